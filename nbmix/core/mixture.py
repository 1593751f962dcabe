"""The mixture as EM has it: responsibilities, and cross-fitted M steps.

A cell votes for itself: with thousands of genes a component fits its own members so closely that plain EM
never moves from a random start. Cross-fitting keeps, beside the components of all cells, one copy for every
fold of cells, fitted without that fold; a cell's responsibilities come from the copy that has not seen it.
The statistics add, so leaving a fold out is a subtraction and needs no further pass over the counts.

Cells may come from several batches, in which genes have offsets, see ``nbmix.core.offsets``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.cellwise import CellTables, cell_log_likelihood, cell_tables
from nbmix.core.expected_log_likelihood import expected_log_likelihood
from nbmix.core.fold_statistics import FoldStatistics
from nbmix.core.folds import copy_ranks
from nbmix.core.m_step import MStepProblem, NewtonMStep, moment_components
from nbmix.core.offsets import OriginMargins
from nbmix.core.origins import CopyParameters, OriginOffsets
from nbmix.core.parameters import Components, GenePrior
from nbmix.core.prior import first_prior, of_typical_genes, update_prior
from nbmix.core.settings import MixtureSettings
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.tables import LikelihoodTables, batch_log_likelihood, likelihood_tables
from nbmix.errors import InputError

WHOLE_ROUNDS = 3  # M steps and updates of the prior that the copy of all cells takes to catch up

E_STEPS_OF_GIVEN_COMPONENTS = 2  # that these are noticed in, where folds > 1

PROBLEMS_AT_ONCE = 2_000_000  # (gene, component) pairs in an M step of several copies on a GPU: a few GB

WEIGHT_PSEUDO_CELLS = 1.0  # added to each component's size where pseudo-cells are on: no weight reaches 0


class Posterior(NamedTuple):
    """Responsibilities (cells, K) of an E step, and ln p(x_i) (cells,) in nats."""

    responsibilities: Tensor
    log_likelihood: Tensor


class Mixture(nn.Module):
    """The mixture's parameters in all copies, and the two steps of EM on them.

    Attributes:
        log_mean, log_inv_disp: (copies, K, genes) float64; the last copy is fitted to all cells.
        log_weights: (copies, K) float64, ln pi.
        prior_genes: (copies, 3, genes), prior_disp: (copies, 4): the prior of each copy where it is
            learned, see ``prior``; empty otherwise.
        origins: the offsets of the batches that cells come from; None where nothing is known of such.
    """

    prior_genes: Tensor
    prior_disp: Tensor

    def __init__(self, n_genes: int, settings: MixtureSettings, n_origins: int = 0) -> None:
        super().__init__()
        self.settings = settings
        shape = (settings.n_copies, settings.n_components, n_genes)
        self.log_mean = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.log_inv_disp = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        uniform = torch.full(shape[:2], -math.log(settings.n_components), dtype=torch.float64)
        self.log_weights = nn.Parameter(uniform)
        n_priors = settings.n_copies if settings.learns_prior else 0
        self.register_buffer("prior_genes", torch.zeros(n_priors, 3, n_genes, dtype=torch.float64))
        self.register_buffer("prior_disp", torch.zeros(n_priors, 4, dtype=torch.float64))
        # none, so that the state of a fit without origins does not speak of them
        self.origins = OriginOffsets(settings.folds, n_origins, n_genes) if n_origins else None
        self._basis: Basis | None = None
        self._tables: dict[int, LikelihoodTables] = {}  # by copy
        self._cell_tables: dict[int, CellTables] = {}  # by copy
        self._statistics: FoldStatistics
        self.total_size = 1.0
        self.e_steps_until_comparable = 0  # whose copies still owe something to components from outside
        self.register_load_state_dict_post_hook(lambda module, _: module.forget_tables())

    def attach(self, basis: Basis, total_size: float, origin_cells: Tensor | None = None) -> Mixture:
        """Work on the data set of ``basis``, whose size factors sum to ``total_size``.

        ``origin_cells`` (origins,) are those of the fit, where they come from several.
        """
        self._basis, self.total_size = basis, total_size
        if self.origins is not None:
            self.origins.n_cells = origin_cells
        self.forget_tables()
        return self

    @property
    def basis(self) -> Basis:
        if self._basis is None:
            raise RuntimeError("attach a basis before the mixture meets counts")
        if self._basis.nodes.log_nodes.device != self.log_mean.device:
            self._basis = self._basis.to(self.log_mean.device)
        return self._basis

    def components(self, copy: int = -1) -> Components:
        """The components of one copy, by default those of all cells; (K, genes) each."""
        return Components(self.log_mean.data[copy], self.log_inv_disp.data[copy])

    def components_of(self, copy: int, origin: int) -> Components:
        """The components (K, genes) of one copy as cells of one origin see them; -1 is none."""
        components = self.components(copy)
        offset = None if self.origins is None else self.origins.of(copy, origin)
        return components if offset is None else Components(components.log_mean + offset, components[1])

    @torch.no_grad()
    def meet(self, batches: Iterable[CellBatch], responsibilities: Tensor, *, reduce: bool = False) -> None:
        """Learn the origins' first offsets from responsibilities (all rows, K), where a fit begins at these.

        Nothing is to be learned where there are no origins. ``reduce``: the batches are a rank's.
        """
        if self.origins is None:
            return
        folds, n_origins = self.settings.folds, self.origins.n_origins
        margins = OriginMargins.of(batches, self.basis, responsibilities, folds, n_origins)
        self.origins.begin(margins.summed_over_ranks(self.log_mean.device) if reduce else margins)

    @torch.no_grad()
    def set_components(
        self, components: Components, log_weights: Tensor | None = None, prior: GenePrior | None = None
    ) -> None:
        """Start every copy from the same components (K, genes).

        Log weights are taken where weights are learned, and likewise the prior, whose centre then moves to
        the pooled gene of the cells that are fitted.
        """
        self.log_mean.copy_(components.log_mean.to(self.log_mean).expand_as(self.log_mean))
        self.log_inv_disp.copy_(components.log_inv_disp.to(self.log_mean).expand_as(self.log_mean))
        if log_weights is not None and self.settings.weights == "learned":
            self.log_weights.copy_(log_weights.to(self.log_weights).expand_as(self.log_weights))
        if prior is not None and self.settings.learns_prior:
            for copy in range(self.settings.n_copies):
                self._keep_prior(copy, prior)
        self.e_steps_until_comparable = E_STEPS_OF_GIVEN_COMPONENTS
        self.forget_tables()

    @property
    def scores_are_comparable(self) -> bool:
        """Whether the log likelihood of the next E step can be compared with those of later ones.

        Given components may have seen every cell. In the first E step no copy is blind to its fold, and what
        each is fitted to next are responsibilities by components that were not: only after the second M step
        is a cell's log likelihood one that it did not help to.
        """
        return self.settings.folds == 1 or self.e_steps_until_comparable == 0

    def set_prior(self, prior: GenePrior) -> None:
        """What is known of the prior, if it is learned, before a fit begins at responsibilities.

        Only what holds for the typical gene is taken.
        """
        if self.settings.learns_prior:
            unknown = torch.zeros_like(self.log_mean.data[0, 0])
            for copy in range(self.settings.n_copies):
                self._keep_prior(copy, of_typical_genes(prior, unknown))

    def copy_for(self, fold: int) -> int:
        """The copy that has not seen cells of ``fold``; the one of all cells for fold -1 (new cells)."""
        return fold if 0 <= fold < self.settings.n_copies - 1 else self.settings.n_copies - 1

    def forget_tables(self) -> None:
        """To be called where parameters were changed from outside."""
        self._tables.clear()
        self._cell_tables.clear()

    def tables(self, copy: int) -> LikelihoodTables:
        """Of a copy, as cells of no origin see it."""
        if copy not in self._tables:
            last = self.settings.n_copies - 1
            self._tables = {last: self._tables[last]} if last in self._tables else {}
            dtype = self.settings.torch_dtype
            self._tables[copy] = likelihood_tables(self.basis, *self.components(copy), dtype)
        return self._tables[copy]

    def likelihood_of(
        self, components: Components, copy: int, *, by_origin: bool
    ) -> Callable[[CellBatch], Tensor]:
        """What gives the (cells, C) log likelihood of components (C, genes) in nats.

        ``by_origin``: through the offsets of a copy, for batches whose cells have origins.
        """
        if self.origins is not None and by_origin:
            of_cells = self._tables_of_cells(self.origins, components, copy)
            return lambda batch: cell_log_likelihood(batch, self.basis, of_cells)
        tables = likelihood_tables(self.basis, *components, self.settings.torch_dtype)
        return lambda batch: batch_log_likelihood(batch, self.basis, tables)

    def _tables_of_cells(self, origins: OriginOffsets, components: Components, copy: int) -> CellTables:
        offsets, base = origins.offsets[copy], origins.base[copy]
        return cell_tables(self.basis, components, offsets=offsets, base=base)

    @torch.no_grad()
    def posterior(self, batch: CellBatch, *, fold: int | None = None) -> Posterior:
        """E step: softmax_k(ln pi_k + l_ik), from the copy that has not seen the batch's fold.

        ``fold`` overrides the batch's own (-1: the components of all cells). An empty cell gets the prior.
        """
        return self.posterior_of(batch, self.component_log_likelihood(batch, fold=fold), fold=fold)

    @torch.no_grad()
    def posterior_of(self, batch: CellBatch, log_likelihood: Tensor, *, fold: int | None = None) -> Posterior:
        """``posterior`` where the components' log likelihood (cells, K) is known already."""
        copy = self.copy_for(batch.fold if fold is None else fold)
        joint = log_likelihood + self.log_prior(batch, copy)
        return Posterior(torch.softmax(joint, 1), torch.logsumexp(joint, 1))

    @torch.no_grad()
    def component_log_likelihood(self, batch: CellBatch, *, fold: int | None = None) -> Tensor:
        """(cells, K) l_ik in nats, from the copy that has not seen the batch's fold; as in ``posterior``."""
        if batch.n_cells == 0:  # one that is there for other ranks is worth no tables
            return self.log_weights.new_zeros(0, self.settings.n_components)
        copy = self.copy_for(batch.fold if fold is None else fold)
        if self.origins is None or batch.origins is None:
            return batch_log_likelihood(batch, self.basis, self.tables(copy))
        if copy not in self._cell_tables:
            self._cell_tables[copy] = self._tables_of_cells(self.origins, self.components(copy), copy)
        return cell_log_likelihood(batch, self.basis, self._cell_tables[copy])

    def log_prior(self, batch: CellBatch, copy: int = -1) -> Tensor:
        """(cells, K) or (K,) ln pi."""
        if self.settings.weights == "given":
            return batch.given_log_prior(self.settings.n_components)
        return self.log_weights.data[copy]

    def reset_statistics(self) -> None:
        """Forget the statistics of the last iteration."""
        settings = self.settings
        n_components, dtype = settings.n_components, settings.torch_dtype
        self._statistics = FoldStatistics(self.basis, n_components, settings.folds, dtype)
        if self.origins is not None:
            self.origins.reset(self.basis, n_components, self._statistics)

    @torch.no_grad()
    def collect(self, batch: CellBatch, responsibilities: Tensor) -> None:
        """Add a batch's statistics to those of its fold."""
        if not batch.n_cells:
            return
        if self.origins is not None:
            self.origins.add(batch, responsibilities, self._of_copy)
        else:
            self._statistics.add(batch, responsibilities)

    @torch.no_grad()
    def m_step(self, *, warm: bool, reduce: bool = False, whole: bool = False) -> float:
        """Fit every copy to the collected statistics.

        Args:
            warm: begin at the present components; else at the weighted means.
            reduce: first add the statistics of all ranks; each then fits its share of the copies for all.
            whole: also the copy of all cells where there are folds, which no E step on training cells needs;
                ``fit_whole`` can do it later.

        Returns:
            The log prior of the components as they stood before, in nats: what the pseudo-cells add to
            EM's objective. 0 where nothing is added, or components were not set, or folds > 1.
        """
        settings, statistics = self.settings, self._statistics
        rank, n_ranks = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size()) if reduce else (0, 1)
        )
        fitters = copy_ranks(settings.folds, n_ranks)
        if self.origins is not None:
            return self._m_step_of_origins(self.origins, fitters, rank, warm)
        total = statistics.total()
        if n_ranks > 1:
            statistics.sum_over_ranks_(total, fitters)
        if float(total.weight.sum()) == 0:
            raise InputError("there is no cell to fit components to")
        last = settings.n_copies - 1
        log_prior_density = self._log_prior_density(total) if last == 0 and warm else 0.0
        copies = [
            copy for copy in range(settings.n_copies if whole or last == 0 else last) if fitters[copy] == rank
        ]
        at_once = self._copies_at_once()
        for first in range(0, len(copies), at_once):
            seen = {
                copy: total if copy == last else statistics.without(copy, total)
                for copy in copies[first : first + at_once]
            }
            self._fit(seen, warm)
            seen.clear()  # before those of the next are made
        if n_ranks > 1:
            self._share_copies(fitters)
        self.e_steps_until_comparable = max(0, self.e_steps_until_comparable - 1)
        self.forget_tables()
        return log_prior_density

    def _m_step_of_origins(
        self, origins: OriginOffsets, fitters: Sequence[int], rank: int, warm: bool
    ) -> float:
        """``m_step`` of all copies, each on what it has seen of all origins, moved by its own offsets."""
        copies = [copy for copy, fitter in enumerate(fitters) if fitter == rank]
        many = max(fitters) > 0
        origins.finish(self._of_copy, copies, fitters if many else None)
        log_prior_density = 0.0
        for copy in copies:
            seen = origins.seen(copy)
            if float(seen.weight.sum()) == 0:
                raise InputError("there is no cell to fit components to")
            if self.settings.folds == 1 and warm:
                log_prior_density = self._log_prior_density(seen)
            self._fit({copy: seen}, warm)
            mean = origins.centre(copy)
            self.log_mean.data[copy] += mean
            if self.gene_prior(copy) is not None:
                self.prior_genes[copy, 0] += mean
        if many:
            self._share_copies(fitters)
        self.e_steps_until_comparable = max(0, self.e_steps_until_comparable - 1)
        self.forget_tables()
        return log_prior_density

    def _of_copy(self, copy: int) -> CopyParameters:
        return CopyParameters(self.components(copy))

    @property
    def _fit_basis(self) -> Basis:
        """Of the statistics that components are fitted to."""
        return self.basis if self.origins is None else self.origins.fit_basis

    def _share_copies(self, fitters: Sequence[int]) -> None:
        """Every rank takes each copy from the one that fitted it: the same bits on all."""
        for of_copies in (*self.parameters(), *self.buffers()):
            for copy in range(of_copies.shape[0]):
                sent = of_copies.data[copy].contiguous()
                torch.distributed.broadcast(sent, src=fitters[copy])
                of_copies.data[copy] = sent

    @torch.no_grad()
    def fit_whole(self) -> None:
        """Fit the copy of all cells to the collected statistics, from where the first fold's copy stands.

        The prior takes over what that copy has learned of variances, around the pooled gene of all cells.
        With origins every M step has fitted it.
        """
        if self.origins is not None:
            return
        total = self._statistics.total()
        for of_copies in (self.log_mean.data, self.log_inv_disp.data, *self.buffers()):
            if of_copies.numel():
                of_copies[-1] = of_copies[0]
        if self.settings.learns_prior:
            self.prior_genes[-1, 0] = first_prior(total, self.basis, self.total_size).log_mean
        for _ in range(WHOLE_ROUNDS):
            self.fit_to(total)

    @torch.no_grad()
    def fit_to(self, statistics: SufficientStatistics) -> None:
        """An M step of the copy of all cells, from where it stands, on statistics of the basis."""
        self._fit({self.settings.n_copies - 1: statistics}, True)
        self.forget_tables()

    def _copies_at_once(self) -> int:
        """M steps that are taken together; on the CPU one, so that one copy's statistics are in memory."""
        if self.log_mean.device.type == "cpu":
            return 1
        return max(1, PROBLEMS_AT_ONCE // self.log_mean[0].numel())

    def _fit(self, seen: dict[int, SufficientStatistics], warm: bool) -> None:
        """M steps of copies on what each has seen; learned priors then follow the components."""
        settings = self.settings
        problems = {copy: self._problem(of_copy, copy, warm) for copy, of_copy in seen.items()}
        if isinstance(settings.m_step, NewtonMStep) and len(problems) > 1:
            fits = settings.m_step.together(list(problems.values()), self._fit_basis, self.total_size)
        else:
            fits = [
                settings.m_step(one.statistics, self._fit_basis, one.components, self.total_size, one.prior)
                for one in problems.values()
            ]
        for (copy, problem), fitted in zip(problems.items(), fits, strict=True):
            if problem.prior is not None:
                self._keep_prior(copy, update_prior(fitted, problem.prior))
            self.log_mean.data[copy], self.log_inv_disp.data[copy] = fitted.components

    def _problem(self, seen: SufficientStatistics, copy: int, warm: bool) -> MStepProblem:
        """What the M step of a copy works on; its weights are fitted here."""
        settings, basis, prior = self.settings, self._fit_basis, self.gene_prior(copy)
        are_given = self.e_steps_until_comparable == E_STEPS_OF_GIVEN_COMPONENTS
        if settings.learns_prior and (prior is None or are_given or not warm):
            first = first_prior(seen, basis, self.total_size)
            if prior is None:
                prior = first
            elif warm:
                prior = prior._replace(log_mean=first.log_mean)
            else:
                prior = of_typical_genes(prior, first.log_mean)
        if settings.weights == "learned":
            extra = WEIGHT_PSEUDO_CELLS if settings.pseudo_cells != 0 else 0.0
            self.log_weights.data[copy] = log_weights_of(seen, extra)
        if settings.n_pseudo_cells > 0:
            seen = seen + _pseudo_statistics(seen, settings.n_pseudo_cells)
        begin = self.components(copy)
        if not warm:
            begin = moment_components(seen, basis, self.total_size)
            if prior is not None:  # a silent gene's mean is nowhere near where the prior holds it
                begin = Components(
                    *(t.expand_as(begin.log_mean) for t in (prior.log_mean, prior.log_inv_disp))
                )
        return MStepProblem(seen, begin, prior)

    def gene_prior(self, copy: int = -1) -> GenePrior | None:
        """What a copy's components are drawn from, or None where that is not learned, or not yet."""
        if not self.settings.learns_prior:
            return None
        return GenePrior.of_tables(self.prior_genes[copy], self.prior_disp[copy])

    def _keep_prior(self, copy: int, prior: GenePrior) -> None:
        self.prior_genes[copy], self.prior_disp[copy] = prior.tables()

    def _log_prior_density(self, seen: SufficientStatistics) -> float:
        """What pseudo-cells, and the extra cells in learned weights, add to the log likelihood."""
        if self.settings.n_pseudo_cells == 0:
            return 0.0
        pseudo = _pseudo_statistics(seen, self.settings.n_pseudo_cells)
        density = expected_log_likelihood(pseudo, self._fit_basis, self.components()).sum()
        if self.settings.weights == "learned":
            density = density + WEIGHT_PSEUDO_CELLS * self.log_weights.data[-1].sum()
        return float(density)


def log_weights_of(seen: SufficientStatistics, extra: float = WEIGHT_PSEUDO_CELLS) -> Tensor:
    """(K,) ln pi, the share of each component's cells, ``extra`` ones included."""
    sizes = seen.weight + extra
    return torch.log(sizes / sizes.sum())


def _pseudo_statistics(seen: SufficientStatistics, n_cells: float) -> SufficientStatistics:
    """So many cells' worth of the pooled statistics, for every component."""
    pooled = seen.pooled()
    one, n_components = pooled * (n_cells / float(pooled.weight)), seen.weight.numel()
    return SufficientStatistics(
        one.rate.expand(-1, n_components, -1),
        one.pair.expand(-1, n_components),
        one.node.expand(*one.node.shape[:-2], n_components, -1),
        one.weight.expand(n_components),
    )
