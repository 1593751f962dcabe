"""The Python face with scikit-learn's habits: ``NBMixture``.

It fits by what ``train.py`` fits by: with ``data.validation_share=0`` it leaves the same numbers for the
same seed, and a checkpoint of either is one of the other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_consistent_length
from sklearn.utils.validation import check_is_fitted, validate_data

from nbmix.core.declared import check_value, declared
from nbmix.core.em_loop import StoppingRule
from nbmix.core.joins import Group, JoinTree, group_components, group_log_joint, group_probabilities
from nbmix.core.mixture import Posterior
from nbmix.core.settings import MixtureSettings
from nbmix.core.stepwise import RunningStatistics
from nbmix.data.arguments import settings_as_arguments
from nbmix.data.checkpoint import Checkpoint
from nbmix.data.counts import CountData
from nbmix.data.from_anndata import known_labels, make_count_data
from nbmix.data.from_arrays import each_cell, make_array_data
from nbmix.data.module import CountsDataModule
from nbmix.data.origins import has_columns
from nbmix.data.simulate import draw_counts
from nbmix.errors import InputError, naming_the_nearest
from nbmix.models.base import MixtureModule, Prediction
from nbmix.output.groups import joins_table
from nbmix.progress import say
from nbmix.starts.base import Start
from nbmix.starts.choice import Choice
from nbmix.starts.clusters import LabelsStart
from nbmix.training.arguments import given, model_of, models_in_python, plain, seed_of, start_of
from nbmix.training.callbacks import FitProgress
from nbmix.training.display import lines_on_stderr, progress_shown
from nbmix.training.fit import Fitted, ModelSpec, fit
from nbmix.training.predict import doubt_here, predict_here, restore_for
from nbmix.training.saved_fit import Progress, SavedFit, checkpoint_of, fit_in, load_fit, save_fit
from nbmix.training.stepwise import begin, running_of, step, with_genes
from nbmix.training.trainer import build_trainer, embedded

RENAMED = {"tolerance": "tol"}  # settings of the models that have another name here


class NBMixture(ClusterMixin, BaseEstimator):
    """Mixture of negative binomials for raw counts, fitted by EM or by amortized inference.

    The mixture has more components than the K groups that are asked for; components between which cells show
    no gap are joined, and a group is the weighted sum of its components:

        x_ij | z_i = c ~ NB(mean s_i mu_cj, inverse dispersion r_cj),    z_i ~ Categorical(pi)

    All cells are fitted: nothing is held out, other than what cross-fitting keeps from each fold's copy.
    The same ``random_state`` gives the same bits on the same machine and number of threads.

    Cells come as AnnData, or as a (cells, genes) SciPy sparse matrix or array of any format, NumPy array or
    DataFrame, and hold raw counts: whole numbers, not negative. Genes without a count in the cells of the
    fit take no part. New cells in an AnnData are brought to the genes of the fit by name; in anything else
    genes are in the order of the fit.

    Args:
        n_components: The number of groups K. With "auto" (up to 12), or a range such as "2-10", as many
            groups are taken as have gaps between them; see ``n_components_``.
        components_per_group: So many components are fitted for each group on average, and then joined where
            cells show no gap. "auto" fits max(2 K, K + 6) of them, 1 makes each group one component.
            Components are not joined where folds = 1, where weights are given, and where ``start`` is
            "labels" or "first_batch".
        model: The model is "em" or "amortized".
        start: The fit begins at "random", "kmeans", "topics", "labels", "subsample", "dirichlet" or
            "first_batch", or as an object of ``nbmix.starts`` says, which has settings of its own. The
            default is "random" for EM, else "subsample".
        folds: The number of folds for cross-fitting; 1 is plain EM. It is for EM alone.
        pseudo_cells: The prior that pulls the components' genes to the average cell: "auto" learns it, a
            number adds so many cells of pooled counts, 0 is none.
        weights: The weights pi are "learned", "uniform", or "given" for each cell by ``prior_key``.
        tol: EM has converged once its objective rises by less, relative to it. It is for EM alone.
        max_iter: The largest number of iterations of EM (default 100) or of epochs (default 20).
        batch_size: The largest number of cells in a batch. The default is 16384 for EM, else "auto": 64,
            and up to 1024 where there are many cells.
        model_settings: Other settings of the model, by the names in conf/model: ``patience``, ``m_step`` and
            ``dtype`` for EM, ``n_hidden`` and ``lr`` for amortized inference, and more.
        layer: The layer of an AnnData that holds the raw counts. The default is X.
        size_factor_key: The column of obs of an AnnData that holds size factors. By default they are the
            counts of each cell.
        prior_key: The entry of obsm of an AnnData, (cells, K), for ``weights="given"``.
        batch_key: The column of obs of an AnnData with the batch, donor or protocol of each cell, or several
            columns, whose combinations are batches. Genes have an offset in each batch. For arrays give
            ``batch`` with the cells.
        random_state: The seed of folds, start, encoder and minibatches.
        verbose: With True the fit shows what it does, in a notebook or on the terminal; elsewhere as lines
            on stderr.

    Attributes:
        n_components_: The number of groups K.
        choice_: A table with a row for each candidate, where the number was left open and components are not
            joined, else None: the log likelihood of the search on cells that it has not seen, its gain over
            one component less with standard error, and whether it was taken. There may be several elbows.
        weights_: (K,) The weight pi of each group, in the copy of the components that is fitted to all cells,
            as the next two. It is 1 / K where each group is one component and weights are uniform or given.
        log_mean_: (K, genes) ln mu per unit of size factor; NaN for genes that take no part.
        log_inv_disp_: (K, genes) ln r. Where a group has several components, mu and r are those of the Gamma
            with the mean and variance of the group.
        component_weights_, component_log_mean_, component_log_inv_disp_: (C,) and (C, genes) The same for
            the components. ln p(x_i) is that of the mixture of these.
        component_groups_: (C,) The group that each component belongs to.
        responsibilities_: (cells, K) The probabilities of the cells of the fit. Where folds > 1 they come
            from components that have not seen the cell; ``predict_proba`` of the same cell may differ.
        labels_: (cells,) The group of the largest responsibility.
        log_likelihoods_: (cells,) ln p(x_i) in nats, as ``score_samples`` of the cells of the fit.
        lower_bounds_: (iterations,) The objective in nats per cell: the log likelihood with the log prior
            where folds = 1, the cross-fitted held-out log likelihood where folds > 1, or the ELBO. The first
            iterations have none where the start has seen the cells.
        lower_bound_: The last of them.
        n_iter_: The number of iterations or epochs.
        converged_: Whether EM has converged; None for amortized inference.
        joins_: The table of the joins of components to groups, in their order: the components, their
            separation, and the p value of there being no gap between them. ``cut`` makes the groups.
            Amortized inference has the joins of its start. None where components have seen all cells.
        n_samples_seen_: The number of cells in all parts, after ``partial_fit``.
        batch_names_: The batches of the fit; empty where there are none.
        batch_offsets_: (batches, genes) The natural logarithm of how much more of a gene there is in each
            batch than in the average cell; NaN for genes that take no part.
        n_features_in_, feature_names_in_: The number of genes, and their names if the input had any.

    >>> import nbmix
    >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
    >>> mixture = nbmix.NBMixture(n_components=2, start="kmeans").fit(cells.counts)
    >>> mixture.predict_proba(cells.counts).shape
    (200, 2)
    """

    _fitted: Checkpoint
    _joins: JoinTree | None
    _groups: tuple[Group, ...]
    _of_components: np.ndarray | None  # (cells, C) responsibilities of the fit
    _running: RunningStatistics | None = None  # of a fit by parts

    @naming_the_nearest
    def __init__(
        self,
        n_components: int | str = MixtureSettings.n_components,
        *,
        components_per_group: float | str = "auto",
        model: str = "em",
        start: str | Start | None = None,
        folds: int = MixtureSettings.folds,
        pseudo_cells: float | str = MixtureSettings.pseudo_cells,
        weights: str = MixtureSettings.weights,
        tol: float = StoppingRule.tolerance,
        max_iter: int | None = None,
        batch_size: int | str | None = None,
        model_settings: Mapping[str, Any] | None = None,
        layer: str | None = None,
        size_factor_key: str | None = None,
        prior_key: str | None = None,
        batch_key: str | Sequence[str] | None = None,
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.components_per_group = components_per_group
        self.model = model
        self.start = start
        self.folds = folds
        self.pseudo_cells = pseudo_cells
        self.weights = weights
        self.tol = tol
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.model_settings = model_settings
        self.layer = layer
        self.size_factor_key = size_factor_key
        self.prior_key = prior_key
        self.batch_key = batch_key
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = tags.input_tags.positive_only = True
        return tags

    @naming_the_nearest
    def fit(
        self, X: Any, y: Any = None, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> NBMixture:
        """Fit the mixture to all cells of ``X``.

        Args:
            X: (cells, genes) raw counts, see above.
            y: (cells,) known labels for ``start="labels"``; no other start sees them.
            size_factors: (cells,) or one number, where ``X`` is no AnnData; default the counts of each cell.
            batch: (cells,) names of the batches that cells come from, where ``X`` is no AnnData. To predict,
                a name of the fit stands for its offsets, another one for a batch whose offsets are estimated
                from its cells, and None for no offsets.

        Raises:
            InputError: counts that are not raw counts, or a setting that cannot be used.

        Warns:
            ConvergenceWarning: EM reached ``max_iter`` before it converged.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> mixture.log_mean_.shape, mixture.labels_.shape, mixture.converged_
        ((2, 50), (200,), True)
        """
        with settings_as_arguments(RENAMED), self._shown():
            self._fit(X, y, size_factors, batch)
        self._running = None
        return self

    @naming_the_nearest
    def partial_fit(self, X: Any, y: Any = None, *, size_factors: ArrayLike | None = None) -> NBMixture:
        """Go on with cells that have come later, by one step of stepwise EM; the first call begins the fit.

        The first part is fitted as ``fit`` does: it finds the components, their groups and joins, which stay
        what they are, so let it be a random choice of some thousand cells, not one donor. Of each later part
        every cell is met once: an E step by the components as they stand, statistics added to those of all
        cells before, an M step (Cappe & Moulines 2009, J. R. Stat. Soc. B 71). Nothing but these sums is kept
        of any cell. With n cells so far and m in the part, the mean S of their statistics becomes

            S <- (n S + sum_i s(x_i, q_i)) / (n + m)

        so every cell counts alike, however cells are cut into parts. Genes have to be those of the first
        part; silent ones take part from their first count on.

        ``responsibilities_``, ``labels_`` and ``log_likelihoods_`` are of the cells of the latest part, under
        components that have not seen them; ``lower_bounds_`` goes on with the mean of the last in every part,
        and ``converged_`` is None. ``save`` keeps the sums, and what ``load`` reads goes on.

        Args:
            X: (cells, genes) raw counts, as for ``fit``; later parts may have any number of cells.
            y: (cells,) known labels of the first part for ``start="labels"``; not looked at later.
            size_factors: (cells,) or one number, where ``X`` is no AnnData; default the counts of each cell.
                All parts need the same scale, that of the first.

        Raises:
            InputError: counts that are none, other genes, a setting that cannot be used; ``model`` is not
                "em", ``batch_key`` is given, or the mixture comes from ``fit``, which keeps no sums.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=300, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans")
        >>> for part in cells.counts[:150], cells.counts[150:230], cells.counts[230:]:
        ...     mixture = mixture.partial_fit(part)
        >>> mixture.n_samples_seen_, mixture.labels_.shape
        (300, (70,))
        """
        with settings_as_arguments(RENAMED), self._shown():
            if self.model != "em":
                raise InputError(f"partial_fit: model={self.model} has no sums to add to; choose model=em")
            if self.batch_key is not None:
                raise InputError(
                    "partial_fit: offsets of batches need all cells; leave batch_key out, or use fit"
                )
            if self._running is not None:
                self._take_part(X, size_factors, self._running)
            elif hasattr(self, "weights_"):
                raise InputError(
                    "partial_fit: this mixture was fitted to its cells at once and keeps no sums of them; "
                    "begin a new NBMixture with partial_fit"
                )
            else:
                cells = self._fit(X, y, size_factors, None)
                q = cells.cells.responsibilities
                self._running = begin(
                    self._fitted, cells.data.data, q, self._taking_part, self.n_features_in_
                )
        return self

    def _take_part(self, X: Any, size_factors: ArrayLike | None, running: RunningStatistics) -> None:
        """Go on with a part."""
        names = getattr(self, "feature_names_in_", np.arange(self.n_features_in_).astype(str))
        part = with_genes(
            self._read(X, size_factors, None, reset=False), names, hasattr(self, "feature_names_in_")
        )
        say("assigning cells")
        fitted, self._running, cells = step(self._fitted, running, part)
        objective = [*self.lower_bounds_.tolist(), float(cells.log_likelihood.mean())]
        self._take(fitted, Progress(objective, self.n_iter_ + 1, None), self._running.genes)
        self._take_cells(cells)

    @naming_the_nearest
    def fit_predict(
        self, X: Any, y: Any = None, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> np.ndarray:
        """Fit, and return ``labels_``.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> nbmix.NBMixture(2, start="kmeans").fit_predict(cells.counts).shape
        (200,)
        """
        return self.fit(X, y, size_factors=size_factors, batch=batch).labels_

    @naming_the_nearest
    def predict(
        self, X: Any, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> np.ndarray:
        """The group (cells,) of the largest responsibility, from the components of all cells.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> mixture.predict(cells.counts[:5]).shape
        (5,)
        """
        return self.predict_proba(X, size_factors=size_factors, batch=batch).argmax(1)

    @naming_the_nearest
    def predict_proba(
        self, X: Any, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> np.ndarray:
        """Responsibilities (cells, K): of each group the sum over its components.

        That of a component is softmax_c(ln pi_c + l_ic) for EM, else what the encoder says.

        A cell without counts gets pi.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> float(mixture.predict_proba(cells.counts).sum().round(6))
        200.0
        """
        q = self.predict_components(X, size_factors=size_factors, batch=batch).responsibilities.numpy()
        return group_probabilities(q, self._groups)

    @naming_the_nearest
    def doubt(
        self, X: Any, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> pd.DataFrame:
        """What speaks against the groups of cells, from the components of all cells.

        Returns:
            (cells, 5): "second", the group of the second largest responsibility, "margin", ln q_1 - ln q_2 in
            nats, "ambiguous", where it is below ln 9, "misfit" in nats and "fits_no_group", where it reaches
            ln 1000; see ``nbmix.evaluation.doubt``.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=200, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> foreign = nbmix.simulate(n=50, p=200, k=2, seed=2)
        >>> [float(mixture.doubt(x.counts)["fits_no_group"].mean()) for x in (cells, foreign)]
        [0.0, 1.0]
        """
        return self.predict_with_doubt(X, size_factors=size_factors, batch=batch)[1]

    @naming_the_nearest
    def predict_with_doubt(
        self, X: Any, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> tuple[Prediction, pd.DataFrame]:
        """What ``predict_components`` and ``doubt`` give, from one pass over the cells.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> said, doubt = mixture.predict_with_doubt(cells.counts[:5])
        >>> said.log_likelihood.shape[0], len(doubt)
        (5, 5)
        """
        with settings_as_arguments(RENAMED):
            model, cells = self._restored(X, size_factors, batch)
            said = predict_here(model, cells)
            found = doubt_here(model, cells, said)
        return said, pd.DataFrame(
            {
                "second": found.second,
                "margin": found.margin,
                "ambiguous": found.is_ambiguous,
                "misfit": found.misfit,
                "fits_no_group": found.fits_no_group,
            },
            index=_names_of_cells(X),
        )

    @property
    def n_samples_seen_(self) -> int:
        if self._running is None:
            raise AttributeError("n_samples_seen_ is of a mixture that partial_fit has fitted")
        return self._running.n_cells

    @property
    def joins_(self) -> pd.DataFrame | None:
        check_is_fitted(self, "weights_")
        return None if self._joins is None else joins_table(self._joins)

    @naming_the_nearest
    def cut(
        self,
        n_groups: int | str,
        X: Any = None,
        *,
        size_factors: ArrayLike | None = None,
        batch: ArrayLike | None = None,
    ) -> np.ndarray:
        """Probabilities (cells, n_groups) of another number of groups; 0 is the largest.

        Args:
            n_groups: from 1 to the number of components with cells; "auto": as many as have gaps.
            X: new cells, as for ``predict_proba``; default those of the fit.
            size_factors: of new cells.

        Raises:
            InputError: the fit has no joins, see ``joins_``, or not so many groups.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=300, p=80, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(4, start="kmeans").fit(cells.counts)
        >>> mixture.cut(2).shape, mixture.cut(2, cells.counts[:5]).shape
        ((300, 2), (5, 2))
        """
        check_is_fitted(self, "weights_")
        if self._joins is None:
            raise InputError("cut: this fit has no joins of components; fit with folds of 2 or more")
        number: Any = self._joins.n_with_gaps if n_groups == "auto" else n_groups
        groups = self._groups if number == len(self._groups) else self._joins.groups(number)
        if X is not None:
            q = self.predict_components(X, size_factors=size_factors, batch=batch).responsibilities.numpy()
        elif self._of_components is not None:
            q = self._of_components
        else:
            raise InputError("cut: a mixture that was loaded does not know the cells of its fit; give X")
        return group_probabilities(q, groups)

    @naming_the_nearest
    def score_samples(
        self, X: Any, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> np.ndarray:
        """ln p(x_i) = ln sum_k pi_k exp(l_ik) of each cell (cells,), in nats, with the -ln G(x + 1) term.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> bool((mixture.score_samples(cells.counts) < 0).all())
        True
        """
        return self.predict_components(X, size_factors=size_factors, batch=batch).log_likelihood.numpy()

    @naming_the_nearest
    def score(
        self, X: Any, y: Any = None, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> float:
        """Log likelihood per cell, in nats: of cells that were not fitted it compares K, models and starts.

        ``GridSearchCV`` and ``cross_val_score`` use it.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=300, p=50, k=2, seed=1)
        >>> fitted, held_out = cells.counts[:200], cells.counts[200:]
        >>> one, two = (nbmix.NBMixture(k, start="kmeans").fit(fitted).score(held_out) for k in (1, 2))
        >>> two > one
        True
        """
        return float(self.score_samples(X, size_factors=size_factors, batch=batch).mean())

    @naming_the_nearest
    def bic(self, X: Any, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None) -> float:
        """-2 ln p(X) + (2 C genes + C - 1) ln n for C components (Schwarz 1978).

        C - 1 is left out unless pi is learned.

        It counts every mean and dispersion as a free number, which they are not under the prior that
        ``pseudo_cells="auto"`` learns, so that it favours few components: ``score`` on held-out cells is
        the better guide to K.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> one, two = (nbmix.NBMixture(k, start="kmeans").fit(cells.counts) for k in (1, 2))
        >>> two.bic(cells.counts) < one.bic(cells.counts)
        True
        """
        log_likelihood = self.score_samples(X, size_factors=size_factors, batch=batch)
        components = self._fitted.components
        n_free = 2 * components.log_mean.numel()
        if self.weights == "learned":
            n_free += len(components.log_mean) - 1
        return float(-2 * log_likelihood.sum() + n_free * np.log(len(log_likelihood)))

    @naming_the_nearest
    def sample(
        self, n_samples: int = 1, *, size_factors: ArrayLike | None = None
    ) -> tuple[sp.csr_matrix, np.ndarray]:
        """Draw cells: z ~ Categorical(pi), lambda ~ Gamma(shape r, scale mu / r), x ~ Poisson(s lambda).

        Genes that take no part are 0. Repeated calls draw the same cells where ``random_state`` is a number.

        Args:
            n_samples: cells.
            size_factors: (n_samples,) or one number; default the median of the cells of the fit.

        Returns:
            Counts (n_samples, genes) CSR float32, and groups (n_samples,).

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> counts, groups = mixture.sample(3)
        >>> counts.shape, groups.shape
        ((3, 50), (3,))
        """
        check_is_fitted(self, "weights_")
        if n_samples < 1:
            raise InputError(f"n_samples={n_samples}: must be 1 or more")
        generator = np.random.default_rng(seed_of(self.random_state))
        pi = self.component_weights_ / self.component_weights_.sum()
        drawn = generator.permutation(np.sort(generator.choice(len(pi), n_samples, p=pi)))
        sizes = self._fitted.median_size_factor if size_factors is None else size_factors
        components = self.component_log_mean_, self.component_log_inv_disp_
        counts = draw_counts(drawn, each_cell(sizes, n_samples), *components, generator)
        return counts, self.component_groups_[drawn]

    @naming_the_nearest
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, which ``load``, ``train.py task=predict`` and ``start=checkpoint`` read.

        It holds what new cells need: what is known of the cells of the fit stays behind, and of the arguments
        objects, such as a start or an M step.

        >>> import nbmix, tempfile
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mixture.save(f"{folder}/two.ckpt")
        ...     again = nbmix.NBMixture.load(f"{folder}/two.ckpt")
        >>> again.score(cells.counts) == mixture.score(cells.counts)
        True
        """
        check_is_fitted(self, "weights_")
        names = getattr(self, "feature_names_in_", None)
        own = {
            "arguments": self._plain_arguments(),
            "genes": self._taking_part.tolist(),
            "n_genes": self.n_features_in_,
            "gene_names": None if names is None else names.tolist(),
        }
        if self._running is not None:
            own["parts"] = self._running.plain()
        progress = Progress(self.lower_bounds_.tolist(), self.n_iter_, self.converged_)
        save_fit(Path(path), SavedFit(self._fitted, progress, own))

    def _plain_arguments(self) -> dict[str, Any]:
        """Those that files can hold."""
        arguments = {name: plain(value) for name, value in self.get_params(deep=False).items()}
        if isinstance(self.batch_key, Sequence) and not isinstance(self.batch_key, str):
            arguments["batch_key"] = [str(name) for name in self.batch_key]
        return {
            k: v for k, v in arguments.items() if k == "batch_key" or isinstance(v, str | float | int | None)
        }

    @classmethod
    @naming_the_nearest
    def load(cls, path: str | os.PathLike[str] | ad.AnnData, key: str = "nbmix") -> NBMixture:
        """Read a checkpoint of ``save`` or of ``train.py``, of either mode; nothing in it is executed.

        Of a checkpoint of ``train.py`` genes are those that were fitted, and arguments that are none of the
        model are the defaults.

        Args:
            path: of the file; or an AnnData that ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written
                its fit to, in uns[key]["fit"]. Of that, too, genes are those that were fitted.
            key: of the fit in an AnnData.

        Raises:
            InputError: the file is missing, damaged, or not a checkpoint of nbmix.

        >>> from nbmix import NBMixture
        >>> NBMixture.load("none.ckpt")
        Traceback (most recent call last):
        nbmix.errors.InputError: path=none.ckpt: there is no such file
        """
        where = "adata" if isinstance(path, ad.AnnData) else f"path={path}"
        fitted, progress, own = (
            fit_in(path.uns, key, where) if isinstance(path, ad.AnnData) else load_fit(Path(path))
        )
        if fitted.model not in models_in_python():
            names = ", ".join(models_in_python())
            raise InputError(f"{where}: is of model={fitted.model}; NBMixture has {names}")
        settings = {RENAMED.get(name, name): value for name, value in fitted.settings.items()}
        known = cls._get_param_names()
        given = own.get("arguments", {})
        arguments = given | {k: v for k, v in settings.items() if k in known}
        # what was asked for, where the settings are what came of it
        arguments |= {k: given[k] for k in ("n_components", "components_per_group") if k in given}
        others = {k: v for k, v in settings.items() if k not in known}
        mixture = cls(**arguments | {"model": fitted.model, "model_settings": others or None})
        n_genes = own.get("n_genes", len(fitted.gene_names))
        mixture.n_features_in_ = n_genes
        if (names := own.get("gene_names", fitted.gene_names)) is not None:
            mixture.feature_names_in_ = np.asarray(names, dtype=object)
        mixture._take(fitted, progress, np.asarray(own.get("genes", np.arange(n_genes))))
        mixture._running = running_of(own["parts"], where) if "parts" in own else None
        return mixture

    def _shown(self) -> AbstractContextManager[None]:
        return progress_shown(otherwise=lines_on_stderr()) if self.verbose else nullcontext()

    def _fit(self, X: Any, y: Any, size_factors: ArrayLike | None, batch: ArrayLike | None) -> Fitted:
        arguments = {
            "n_components": self.n_components,
            "components_per_group": self.components_per_group,
            "folds": self.folds,
            "pseudo_cells": self.pseudo_cells,
            "weights": self.weights,
            "tolerance": self.tol,
        }
        kind, settings = model_of(self.model, arguments, self.model_settings)
        max_iter = given(self.max_iter, kind.defaults.max_epochs)
        check_value("max_iter", max_iter, declared(build_trainer)["max_epochs"])
        start, seed = start_of(given(self.start, kind.defaults.start)), seed_of(self.random_state)
        if y is None and isinstance(start, LabelsStart):
            raise InputError("start=labels: give the labels as y of NBMixture.fit")
        everything = self._read(X, size_factors, batch, reset=True)
        if y is not None:
            everything = replace(everything, labels=_labels_in(y, everything, start))
        taking_part = np.flatnonzero(everything.counts.sum(axis=0))
        if not taking_part.size:
            raise InputError("every cell is empty; nbmix needs raw counts")
        data = everything.select_genes(taking_part)
        cells = CountsDataModule(
            lambda: data,
            batch_size=given(self.batch_size, kind.defaults.batch_size),
            validation_share=0.0,
            seed=seed,
            **kind.batch_settings(settings),
        )
        spec = ModelSpec(kind, settings, lambda names, size: kind(names, **settings | size))
        with torch.random.fork_rng(devices=[]), embedded():  # encoder and loaders draw from torch's generator
            torch.manual_seed(seed)
            callbacks = [FitProgress()] if self.verbose else []
            trainer = build_trainer(
                max_epochs=max_iter, enable_checkpointing=False, alone=True, callbacks=callbacks
            )
            fitted = fit(spec, start, cells, trainer, seed=seed)
        _, module, found = fitted
        self._take(checkpoint_of(module, cells), Progress.of(module), taking_part)
        self._take_cells(found)
        if module.converged is False:
            warnings.warn(
                f"EM has not converged in max_iter={max_iter} iterations: raise max_iter, or tol",
                ConvergenceWarning,
                stacklevel=4,  # over naming_the_nearest
            )
        return fitted

    def _take(self, fitted: Checkpoint, progress: Progress, taking_part: np.ndarray) -> None:
        """Keep a fit of the genes at positions ``taking_part``."""
        self._fitted, self._taking_part = fitted, taking_part
        components, log_weights = fitted.components, fitted.log_weights.numpy()
        joined = fitted.groups
        self._joins = None if joined is None else JoinTree.of(joined["tree"])
        self._groups = (
            tuple((c,) for c in range(len(log_weights)))
            if joined is None
            else tuple(tuple(group) for group in joined["groups"])
        )
        profiles = group_components(
            components.log_mean.numpy(), components.log_inv_disp.numpy(), log_weights, self._groups
        )
        shape = (len(self._groups), self.n_features_in_)
        self.log_mean_, self.log_inv_disp_ = np.full(shape, np.nan), np.full(shape, np.nan)
        self.log_mean_[:, taking_part], self.log_inv_disp_[:, taking_part] = profiles
        self.weights_ = np.exp(group_log_joint(log_weights, self._groups))
        self.batch_names_ = fitted.origin_names
        self.batch_offsets_ = np.full((len(self.batch_names_), self.n_features_in_), np.nan)
        if self.batch_names_:
            self.batch_offsets_[:, taking_part] = fitted.state["mixture.origins.offsets"][-1].numpy()
        of_components = np.full((2, len(log_weights), self.n_features_in_), np.nan)
        of_components[:, :, taking_part] = np.stack([t.numpy() for t in components])
        self.component_log_mean_, self.component_log_inv_disp_ = of_components
        self.component_weights_ = np.exp(log_weights)
        self.component_groups_ = np.empty(len(log_weights), dtype=np.int64)
        for number, group in enumerate(self._groups):
            self.component_groups_[list(group)] = number
        self.n_components_ = len(self.weights_)
        self.choice_ = None if fitted.choice is None else Choice.of(fitted.choice).table()
        self._of_components = None
        self.lower_bounds_ = np.array(progress.objective, dtype=np.float64)
        self.lower_bound_ = float(self.lower_bounds_[-1]) if self.lower_bounds_.size else np.nan
        self.n_iter_, self.converged_ = progress.n_iterations, progress.converged

    def _take_cells(self, cells: Prediction | Posterior) -> None:
        """Keep what components say of the cells of the fit."""
        self._of_components = cells.responsibilities.numpy()
        self.responsibilities_ = group_probabilities(self._of_components, self._groups)
        self.labels_ = self.responsibilities_.argmax(1)
        self.log_likelihoods_ = cells.log_likelihood.numpy()

    @naming_the_nearest
    def predict_components(
        self, X: Any, *, size_factors: ArrayLike | None = None, batch: ArrayLike | None = None
    ) -> Prediction:
        """What the C components of all cells say of the cells of ``X``, see ``nbmix.models.base.Prediction``.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> mixture.predict_components(cells.counts[:5]).responsibilities.shape[0]
        5
        """
        with settings_as_arguments(RENAMED):
            return predict_here(*self._restored(X, size_factors, batch))

    def _restored(
        self, X: Any, size_factors: ArrayLike | None, batch: ArrayLike | None
    ) -> tuple[MixtureModule, CountData]:
        """The model, and the cells of ``X``, both with the genes that they share."""
        check_is_fitted(self, "weights_")
        data = self._read(X, size_factors, batch, reset=False)
        if not (isinstance(X, ad.AnnData) and hasattr(self, "feature_names_in_")):  # genes in their order
            data = data.select_genes(self._taking_part)
            data = replace(data, gene_names=self._fitted.gene_names)
        with torch.random.fork_rng(devices=[]):  # an encoder is drawn before it is filled
            return restore_for(self._fitted, data, "NBMixture")

    def _read(
        self, X: Any, size_factors: ArrayLike | None, batch: ArrayLike | None, *, reset: bool
    ) -> CountData:
        """Checked cells with all genes; ``reset`` where they are those of a fit."""
        if isinstance(X, ad.AnnData):
            if size_factors is not None:
                raise InputError(
                    "size_factors: an AnnData has them in obs; name the column by size_factor_key"
                )
            if batch is not None:
                raise InputError("batch: an AnnData has them in obs; name the column by batch_key")
            known = self.batch_key if reset or has_columns(X.obs, self.batch_key) else None
            data = make_count_data(
                X,
                where="adata",
                label_key=None,
                layer=self.layer,
                size_factor_key=self.size_factor_key,
                prior_key=self.prior_key,
                batch_key=known,
                min_counts=0,
            )
            if reset:
                self.n_features_in_ = data.n_genes
                self.feature_names_in_ = data.gene_names.astype(object)
            elif not hasattr(self, "feature_names_in_") and data.n_genes != self.n_features_in_:
                raise InputError(
                    f"adata: has {data.n_genes} genes; the fit had {self.n_features_in_}, without names"
                )
            return data
        for name in ("layer", "size_factor_key", "prior_key", "batch_key"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name}={getattr(self, name)!r}: a {type(X).__name__} has none; give an AnnData"
                )
        least = 2 if reset else 1
        x = validate_data(
            self, X, reset=reset, accept_sparse=True, ensure_all_finite=False, ensure_min_samples=least
        )
        return make_array_data(
            x,
            cell_names=X.index if isinstance(X, pd.DataFrame) else None,
            gene_names=getattr(self, "feature_names_in_", None),
            size_factors=size_factors,
            batch=batch,
        )


def _names_of_cells(X: Any) -> pd.Index | None:
    if isinstance(X, ad.AnnData):
        return X.obs_names
    return X.index if isinstance(X, pd.DataFrame) else None


def _labels_in(y: Any, cells: CountData, start: Start) -> np.ndarray | None:
    """(cells,) labels that ``start`` may see; None where they are not all known and it needs none."""
    check_consistent_length(cells.counts, y)
    names = y.index.astype(str).tolist() if isinstance(y, pd.Series) else []
    if names != cells.cell_names.tolist() and set(names) == set(cells.cell_names.tolist()):
        raise InputError("y: has the cells in another order; give y.loc[adata.obs_names]")
    if np.ndim(y) > 1 and np.shape(y)[1:] != (1,):
        raise InputError(f"y has shape {np.shape(y)}; give one label a cell")
    labels = pd.Series(y if isinstance(y, pd.Series | pd.Categorical) else np.ravel(y))
    if labels.isna().any() and not isinstance(start, LabelsStart):
        return None
    return known_labels(labels, "y", "or drop them")
