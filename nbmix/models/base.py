"""The contract of a model: what it is made of, and what others ask of it.

A model is a LightningModule around a ``Mixture``. Its file in ``nbmix/models`` and its settings in
``conf/model`` are all there is to it: the class is found by its ``kind``.

Others ask this of it, in this order:

    Model(gene_names, **settings)      the settings of conf/model
    begin(start, data)                 takes what a start of ``nbmix.starts`` has made of the training cells
    setup, configure_optimizers, training_step, ...
                                       Lightning fits it to batches (``CellBatch``) of ``CountsDataModule``
    predict_step(batch, batch_idx)     what it says of cells, in the fit and of new ones
    mixture.components()               what it says of genes: negative binomials, one a component and gene
    on_save_checkpoint                 a checkpoint holds kind, plain and parameters; ``restore`` reads it
    restrict_genes(positions)          brings it to data that lacks some of its genes

A mixture is made of components, its user asks for groups. ``join`` joins the components of a fit to groups;
until then, and where a model does not join, each component is a group.

``nbmix.models.minibatch`` has most of it for a model that follows gradients; ``nbmix.models.mixture_em`` is
one that takes M steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.declared import declared
from nbmix.core.joins import Group, JoinEvidence, JoinTree, PairSeparation, by_size, group_probabilities
from nbmix.core.mixture import Mixture
from nbmix.core.origins import OriginOffsets
from nbmix.core.settings import MixtureSettings
from nbmix.data.checkpoint import SECTION, Checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.starts.base import StartState


class Prediction(NamedTuple):
    """What a model says of a batch of cells, and of its C components.

    Attributes:
        rows: (cells,) positions in the data, so that shards can be put back in order.
        responsibilities: (cells, C).
        log_likelihood: (cells,) ln p(x_i) under the components of all cells, nats.
        unseen_log_likelihood: (cells,) the same under components that have not seen the cell; else NaN.
        elbo: (cells,) nats; NaN where inference is exact.
        component_log_likelihood: (cells, C) float32 ln p(x_i | c) in nats, under components that have not
            seen the cell where there are such; NaN where a model has none.
    """

    rows: Tensor
    responsibilities: Tensor
    log_likelihood: Tensor
    unseen_log_likelihood: Tensor
    elbo: Tensor
    component_log_likelihood: Tensor


class FitDefaults(NamedTuple):
    """What a fit takes where nothing is said, as in conf/model.

    Attributes:
        start: its name.
        max_epochs: at most.
        batch_size: cells, or "auto".
    """

    start: str
    max_epochs: int
    batch_size: int | str


class MixtureModule(pl.LightningModule):
    """What every model shares. A new one gives what is abstract here, and the first three attributes.

    Args:
        gene_names: (genes,) names, kept in the checkpoint to match genes of other data.
        settings: of the mixture.
        plain: the keyword arguments, plain values alone, that make the same model again.

    Attributes:
        kind: name of the model in checkpoints, metrics.json and results.
        shuffle: whether each epoch has new random batches; else every epoch has the same.
        objective_name: of ``objective``, for pictures.
        free_to_change: settings that say how far or how fast a fit goes, not what it is: a fit that goes on
            from a checkpoint may have others.
        defaults: of a fit.
        in_python: whether ``nbmix.NBMixture`` has it.
        posterior_is_exact: whether responsibilities are the posterior under the mixture, which can be
            tempered.
        meets_new_origins: whether batches that a fit has not seen need offsets of the mixture alone, which
            are estimated, see ``nbmix.training.new_batches``.
        mixture: the components and their weights; the last copy is that of all cells.
        objective: what the fit raises, nats per cell for each epoch; an epoch appends to it.
        n_iterations: epochs that are over; an epoch sets it.
        converged: None where a fit has no such notion.
        n_genes_missing: of a restored model, in the data that it is applied to.
        choice: of the number of components, see ``nbmix.starts.choice``.
        groups: the components of each group, ascending; see ``join``.
        joins: of components to groups, from cells that these have not seen: those of the fit once it has
            ended, or of the start, which ``begin`` sets where components of the fit see all cells.
        join_evidence: of the start, likewise.
        separations: of every pair of groups, once a fit has ended; none where there are no joins.
    """

    kind: ClassVar[str]
    shuffle: ClassVar[bool]
    objective_name: ClassVar[str]
    free_to_change: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[FitDefaults]
    in_python: ClassVar[bool] = False
    posterior_is_exact: ClassVar[bool] = False
    meets_new_origins: ClassVar[bool] = True

    objective: list[float]
    n_iterations: int = 0
    converged: bool | None = None
    n_genes_missing: int | None = None
    choice: dict[str, Any] | None = None
    groups: tuple[Group, ...]
    joins: JoinTree | None = None
    join_evidence: JoinEvidence | None = None
    separations: tuple[PairSeparation, ...] = ()
    _first_epoch: int | None = None  # of this process's fit

    def __init__(self, gene_names: np.ndarray, settings: MixtureSettings, plain: dict[str, Any]) -> None:
        super().__init__()
        self.gene_names = np.asarray(gene_names)
        self.plain = plain
        self.mixture = Mixture(len(self.gene_names), settings)
        self.origin_names: tuple[str, ...] = ()
        self.groups = tuple((c,) for c in range(settings.n_components))
        self.objective = []

    # what a model gives

    @abstractmethod
    def begin(self, start: StartState, data: CountsDataModule) -> None:
        """Take a start made from the training cells of ``data``."""

    @abstractmethod
    def training_step(self, batch: CellBatch, batch_idx: int) -> dict[str, Tensor]:
        """Take one batch of training cells.

        Returns:
            "responsibilities": (cells, K), which are scored against labels; "loss": (), whose gradient
            Lightning follows, unless ``automatic_optimization`` is off.
        """

    @abstractmethod
    def predict_step(self, batch: CellBatch, batch_idx: int) -> Prediction:
        """What the model says of a batch of cells; outside a fit, too, where nobody has stopped gradients."""

    def restrict_genes(self, positions: np.ndarray) -> None:
        """Keep the genes at ``positions`` alone, for data that lacks the others.

        A model with other parameters for each gene than those of the mixture does the same to them.
        """
        for name in ("log_mean", "log_inv_disp"):  # a prior is of no use any more
            kept = getattr(self.mixture, name).data[..., torch.from_numpy(positions)]
            setattr(self.mixture, name, torch.nn.Parameter(kept))
        if self.mixture.origins is not None:
            self.mixture.origins.restrict_genes(torch.from_numpy(positions))
        self.gene_names = self.gene_names[positions]

    def held_out_log_likelihood(self, batch: CellBatch) -> Tensor:
        """(cells,) ln p(x_i) of held-out cells in nats: that of the mixture, unless a model knows better."""
        return self.mixture.posterior(batch, fold=-1).log_likelihood

    def held_out(self, batch: CellBatch) -> dict[str, Tensor]:
        """What is logged of held-out cells: means over cells of these (cells,), by their names."""
        return {"heldout_log_likelihood": self.held_out_log_likelihood(batch)}

    # what it may use

    @property
    def data(self) -> CountsDataModule:
        """The cells that the trainer works on."""
        # Lightning sets the attribute without declaring it
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def from_first_rank(self, tensor: Tensor) -> Tensor:
        """The values that rank 0 has, on every rank; on the device of ``tensor``."""
        if self.trainer.world_size == 1:
            return tensor
        sent = tensor.to(self.device, copy=True)
        torch.distributed.broadcast(sent, src=0)
        return sent.to(tensor.device)

    def log_epoch(self, values: dict[str, float]) -> None:
        """Log numbers that are already those of the whole epoch and of all ranks.

        "objective" and "iteration" are what the line of progress and the best checkpoint look at. They have
        to be there before ``on_train_epoch_end``, which callbacks see first.
        """
        # float64 in a tensor, since Lightning would keep a plain number as float32
        tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
        self.log_dict(tensors, on_step=False, on_epoch=True, batch_size=1)

    # what it has already

    @classmethod
    def batch_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``CountsDataModule`` for a model of these ``settings``, or their defaults.

        What the model has no setting for is left to the data.
        """
        settings_of_class = declared(cls)
        known = {name: one.default for name, one in settings_of_class.items()}
        found = {name: settings.get(name, known.get(name)) for name in ("folds", "dtype")}
        return {name: value for name, value in found.items() if value is not None} | {"shuffle": cls.shuffle}

    @classmethod
    def can_join(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a model of these ``settings``, or their defaults, can join its components to groups."""
        return False

    def join(self, n_groups: int, responsibilities: np.ndarray) -> None:
        """Join components to groups, and number these by their cells, the one with most first.

        Where fewer components than that have cells, others are groups without cells.

        Args:
            n_groups: wanted; as many as components where there are no ``joins``.
            responsibilities: (cells, C) of the fit.
        """
        tree = self.joins
        groups = list(self.groups if tree is None else tree.groups(min(n_groups, tree.most_groups)))
        n_cells = np.bincount(responsibilities.argmax(1), minlength=responsibilities.shape[1])
        for c in np.argsort(n_cells, kind="stable").tolist():  # those with fewest cells
            if len(groups) < n_groups and (c,) not in groups:
                groups = [tuple(other for other in group if other != c) for group in groups] + [(c,)]
        q = group_probabilities(responsibilities, groups)
        self.groups = by_size(groups, np.bincount(q.argmax(1), minlength=len(groups)))

    def cut(self, n_groups: int | str) -> None:
        """Join the components to another number of groups; 0 has most cells of the fit.

        Args:
            n_groups: wanted; "auto": as many as have gaps between them.

        Raises:
            InputError: the fit has no joins, or not so many groups.
        """
        if self.joins is None:
            raise InputError("n_groups: the checkpoint has no joins of components; leave n_groups out")
        number = self.joins.n_with_gaps if isinstance(n_groups, str) else n_groups
        if number != len(self.groups):
            self.groups, self.separations = self.joins.groups(number), ()

    @property
    def joined_plain(self) -> dict[str, Any] | None:
        """Joins and groups in lists and numbers alone, as a checkpoint keeps them."""
        if self.joins is None:
            return None
        return {
            "tree": self.joins.plain(),
            "groups": [list(group) for group in self.groups],
            "separations": [list(pair) for pair in self.separations],
        }

    def take_joined(self, plain: Mapping[str, Any] | None) -> None:
        """Take the joins and groups that a checkpoint has kept.

        Raises:
            LookupError, TypeError, ValueError: they are not those of as many components.
        """
        if plain is None:
            return
        groups = tuple(tuple(int(c) for c in group) for group in plain["groups"])
        if sorted(c for group in groups for c in group) != list(range(self.mixture.settings.n_components)):
            raise ValueError("groups that are not those of the components")
        self.joins, self.groups = JoinTree.of(plain["tree"]), groups
        self.separations = tuple(PairSeparation(*pair) for pair in plain["separations"])

    @classmethod
    def knows_origins(cls) -> bool:
        """Whether the model has offsets of the batches that cells come from, see ``know_origins``."""
        return False

    @classmethod
    def check_origins(cls, names: tuple[str, ...]) -> None:
        """Raise ``InputError`` where there are batches, and the model has nothing for them."""
        if names and not cls.knows_origins():
            raise InputError(f"data.batch_key: model={cls.kind} has no offsets of batches; choose model=em")

    def know_origins(self, names: tuple[str, ...]) -> None:
        """Have genes differ between the batches of these names, before the fit or parameters of one.

        Raises:
            InputError: the model has nothing for that.
        """
        self.check_origins(names)
        if not names:
            return
        self.origin_names = tuple(names)
        self.mixture.origins = OriginOffsets(self.mixture.settings.folds, len(names), len(self.gene_names))

    def setup(self, stage: str) -> None:
        data = self.data
        total_size = float(data.data.size_factors[data.training_rows].sum())
        self.mixture.attach(data.basis, total_size, data.training_origin_cells)

    def on_train_start(self) -> None:
        self._first_epoch = self.current_epoch

    @property
    def has_begun(self) -> bool:
        """Whether an epoch is over, in which all that a checkpoint may have brought has been used."""
        return self._first_epoch is not None and self.current_epoch > self._first_epoch

    def on_validation_epoch_start(self) -> None:
        self._held_out: dict[str, float] = {}
        self._n_held_out = 0

    def validation_step(self, batch: CellBatch, batch_idx: int) -> None:
        for name, values in self.held_out(batch).items():
            self._held_out[name] = self._held_out.get(name, 0.0) + float(values.sum())
        self._n_held_out += batch.n_cells

    def on_validation_epoch_end(self) -> None:
        *totals, n_cells = self.sum_over_ranks(*self._held_out.values(), self._n_held_out)
        if n_cells:
            means = {name: total / n_cells for name, total in zip(self._held_out, totals, strict=True)}
            self.log_epoch(means)
            self.take_held_out(means)

    def take_held_out(self, means: Mapping[str, float]) -> None:
        """Called after each epoch with the means of ``held_out``, where cells are held out."""

    def as_checkpoint(self, data: CountsDataModule, state: dict[str, Tensor], cells: str = "") -> Checkpoint:
        """What a file holds of the model with parameters ``state``, fitted to ``data``.

        Args:
            cells: fingerprint of these; "" where nothing is to be known of them.
        """
        median = float(np.median(data.data.size_factors[data.training_rows]))
        return Checkpoint(
            self.kind,
            self.plain,
            self.gene_names,
            median,
            cells,
            state,
            self.choice,
            self.joined_plain,
            origin_names=self.origin_names,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        whole = self.as_checkpoint(self.data, checkpoint["state_dict"], self.data.fingerprint)
        checkpoint[SECTION] = whole.section
        checkpoint[self.kind] = {"objective": self.objective, "n_iterations": self.n_iterations}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """How far the fit was; the parameters come back by their names."""
        progress = checkpoint[self.kind]
        self.objective, self.n_iterations = progress["objective"], progress["n_iterations"]
