"""The offsets of a mixture in all copies, and the statistics of its cells origin by origin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nbmix.core.batch import Basis, CellBatch, SomeGenes
from nbmix.core.offsets import (
    FIRST_OFFSET_VARIANCE,
    LARGEST_OFFSET,
    SCREENED_GAIN,
    GammaRates,
    Loadings,
    OriginMargins,
    add_shifted_,
    gene_totals,
    mean_offset,
    offset_step,
    offset_variance,
    quieted,
    screened,
    spanning_offsets,
    zeros_of_genes,
)
from nbmix.core.parameters import Components
from nbmix.core.statistics import SufficientStatistics


class OfFolds(Protocol):
    """Statistics of the cells of each fold, as ``nbmix.core.fold_statistics`` has them."""

    def add(self, batch: CellBatch, responsibilities: Tensor) -> None: ...

    def total(self) -> SufficientStatistics: ...

    def of(self, fold: int) -> SufficientStatistics | None: ...

    def sum_over_ranks_(self, total: SufficientStatistics, fitters: Sequence[int]) -> None: ...


class CopyParameters(NamedTuple):
    """What the offsets of a copy are judged by: components (K, genes), and loadings where there are any."""

    components: Components
    loadings: Loadings | None = None


@dataclass
class _Collected:
    """Statistics of one iteration.

    Attributes:
        basis: of the cells.
        fit_basis: the same with nodes that reach as far as offsets.
        whole: statistics of all origins, without offsets.
        make: empty statistics by fold, of some genes.
        genes: of each origin, that may be worth an offset in a copy; statistics by origin are of these.
        by_origin: of origins that are not complete yet.
        n_met: cells of each origin so far.
        size: (folds, origins, K) sum of q_ik s_i.
        of_copy: what each copy may see, every gene at nodes of its own: at first what offsets have changed of
            complete origins.
        information: by copy and origin, on the offsets of its genes.
        gammas: of the components of each copy, which stay the same until the M step.
    """

    basis: Basis
    fit_basis: Basis
    whole: OfFolds
    make: Callable[[SomeGenes], OfFolds]
    genes: list[SomeGenes]
    n_met: Tensor
    size: Tensor
    by_origin: dict[int, OfFolds] = field(default_factory=dict)
    of_copy: dict[int, SufficientStatistics] = field(default_factory=dict)
    information: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gammas: dict[int, GammaRates] = field(default_factory=dict)


class OriginOffsets(nn.Module):
    """Offsets d_gj of every copy of a mixture, see ``nbmix.core.offsets``.

    What an origin's cells say is collected fold by fold. Once all of them have been met, every copy takes a
    step on its offsets by those that it may see, and adds their statistics to its own, moved by the offsets:
    so one origin at a time is in memory where its batches follow each other. Over several ranks all wait for
    the M step.

    Args:
        folds: each has a copy that does not see it; 1: there are none.
        has_whole: there is a copy of all cells, the last one; else there are folds alone.
        n_levels: of axes that components share, see ``nbmix.core.factor``.

    Attributes:
        offsets: (copies, origins, genes) float64, natural logarithm.
        variance: (copies, genes) float64, tau^2.
        base: (copies, genes) offset of genes in all origins where they have none of their own (``quieted``).
        may_matter: (copies, origins, genes) uint8, 1 where a gene may be worth an offset (``screened``).
        n_cells: (origins,) cells of the fit; None where nothing is fitted.
        are_first: there are no components yet by which offsets could be judged.
    """

    offsets: Tensor
    variance: Tensor
    base: Tensor
    may_matter: Tensor

    def __init__(
        self, folds: int, n_origins: int, n_genes: int, *, has_whole: bool = True, n_levels: int = 1
    ) -> None:
        super().__init__()
        n_copies = 1 if folds == 1 else folds + has_whole
        self.folds, self.n_levels = folds, n_levels
        self.register_buffer("offsets", torch.zeros(n_copies, n_origins, n_genes, dtype=torch.float64))
        first = torch.full((n_copies, n_genes), FIRST_OFFSET_VARIANCE, dtype=torch.float64)
        self.register_buffer("variance", first)
        self.register_buffer("base", torch.zeros(n_copies, n_genes, dtype=torch.float64))
        self.register_buffer("may_matter", torch.ones_like(self.offsets, dtype=torch.uint8))
        self.n_cells: Tensor | None = None
        self.are_first = True
        self._collected: _Collected
        self._counts: Tensor | None = None  # (folds, origins, genes) sum of x_ij, once all cells were met
        self._counted: Tensor | None = None  # the same, so far
        self._room: dict[int, SufficientStatistics] = {}  # new memory costs more than filling the last one's
        self.register_load_state_dict_pre_hook(_without_screening)

    @property
    def n_copies(self) -> int:
        return self.offsets.shape[0]

    @property
    def n_origins(self) -> int:
        return self.offsets.shape[1]

    def without(self, copy: int) -> int | None:
        """The fold that a copy does not see."""
        return copy if self.folds > 1 and copy < self.folds else None

    @property
    def fit_basis(self) -> Basis:
        """Of the statistics of the iteration."""
        return self._collected.fit_basis

    def of(self, copy: int, origin: int) -> Tensor | None:
        """(genes,) offsets; None for cells of no origin."""
        return None if origin < 0 else self.offsets[copy, origin]

    def set(self, offsets: Tensor, variance: Tensor) -> None:
        """The same offsets (origins, genes), and variances, for all copies."""
        self.offsets.copy_(offsets.to(self.offsets).expand_as(self.offsets))
        self.variance.copy_(variance.to(self.variance).expand_as(self.variance))
        self.base.zero_()
        self.may_matter.fill_(1)
        self.are_first = False

    def take_over(self, other: OriginOffsets) -> None:
        """The offsets of another one, of the same cells."""
        self.load_state_dict(other.state_dict())
        self._counts = other._counts
        self.are_first = False

    def loud(self, copy: int, origin: int) -> SomeGenes:
        """Genes that have an offset of their own in an origin."""
        return SomeGenes.where((self.offsets[copy, origin] != self.base[copy]).cpu())

    @staticmethod
    def within_bounds(offsets: Tensor) -> Tensor:
        """Offsets as large as they may be."""
        return offsets.clamp(-LARGEST_OFFSET, LARGEST_OFFSET)

    def restrict_genes(self, positions: Tensor) -> None:
        """Keep the genes at ``positions`` alone."""
        self.offsets, self.variance = self.offsets[..., positions], self.variance[:, positions]
        self.base, self.may_matter = self.base[:, positions], self.may_matter[..., positions]
        self._counts = None

    def extend(self, n_new: int) -> None:
        """Add origins without offsets."""
        self.offsets = torch.cat(
            [self.offsets, self.offsets.new_zeros(self.n_copies, n_new, self.n_genes)], 1
        )
        new = self.may_matter.new_ones(self.n_copies, n_new, self.n_genes)
        self.may_matter = torch.cat([self.may_matter, new], 1)
        self._counts = None

    @property
    def n_genes(self) -> int:
        return self.offsets.shape[2]

    def begin(self, margins: OriginMargins) -> None:
        """First offsets of every copy, from responsibilities alone."""
        for copy in range(self.n_copies):
            first = margins.first_offsets(self.without(copy))
            for mine, found in zip((self.offsets, self.variance, self.may_matter), first, strict=True):
                mine[copy] = found.to(mine)
        self._counts = margins.of_origin
        self.base.zero_()
        self.are_first = True

    def reset(
        self, basis: Basis, n_components: int, whole: OfFolds, make: Callable[[SomeGenes], OfFolds]
    ) -> None:
        """Forget the statistics of the last iteration.

        Args:
            basis: of the cells.
            n_components: K.
            whole: empty statistics, for cells of all origins.
            make: empty ones of some genes, for the cells of one origin.
        """
        all_offsets = torch.cat([self.offsets, self.base[:, None]], 1)
        reaching = basis._replace(nodes=spanning_offsets(basis.nodes, all_offsets))
        genes = [SomeGenes.where(chosen) for chosen in self.may_matter.cpu().bool().any(0)]
        n_met = torch.zeros(self.n_origins, dtype=torch.int64)
        size = torch.zeros(self.folds, self.n_origins, n_components, dtype=torch.float64)
        self._collected = _Collected(basis, reaching, whole, make, genes, n_met, size)
        if self._counts is None:
            self._counted = torch.zeros(self.folds, self.n_origins, self.n_genes, dtype=torch.float64)

    def add(self, batch: CellBatch, q: Tensor, parameters: Callable[[int], CopyParameters]) -> None:
        """Add cells of one origin; ``parameters`` of a copy are what its offsets are judged by."""
        if not 0 <= batch.origin < self.n_origins:
            raise ValueError(f"a batch of origin {batch.origin} in a fit of {self.n_origins} origins")
        now, origin = self._collected, batch.origin
        now.whole.add(batch, q)
        fold = max(batch.fold, 0)
        of_components = q if q.ndim == 2 else q.sum(2)
        now.size[fold, origin] += (batch.size_factors @ of_components.double()).cpu()
        if self._counted is not None:
            self._counted[fold, origin] += gene_totals(batch, now.basis)
        now.n_met[origin] += batch.n_cells
        if not len(now.genes[origin].positions):
            return
        if origin not in now.by_origin:
            now.by_origin[origin] = now.make(now.genes[origin])
        now.by_origin[origin].add(batch, q)
        is_complete = self.n_cells is not None and now.n_met[origin] == self.n_cells[origin]
        if is_complete and not _are_several_ranks():
            raw = now.by_origin.pop(origin)
            self._finish(origin, raw, raw.total(), range(self.n_copies), parameters)

    def finish(
        self,
        parameters: Callable[[int], CopyParameters],
        copies: Sequence[int],
        fitters: Sequence[int] | None = None,
    ) -> None:
        """Bring in all origins that still wait.

        Args:
            parameters: of each copy.
            copies: that this rank fits.
            fitters: the rank that fits each copy, where there are several.
        """
        now = self._collected
        for origin in range(self.n_origins):
            raw = now.by_origin.pop(origin, None)
            if not len(now.genes[origin].positions) or (raw is None and fitters is None):
                continue
            raw = now.make(now.genes[origin]) if raw is None else raw
            total = raw.total()
            if fitters is not None:
                raw.sum_over_ranks_(total, fitters)
            if float(total.weight.sum()) == 0:
                continue
            self._finish(origin, raw, total, copies, parameters)
        total = now.whole.total()
        if fitters is not None:
            now.whole.sum_over_ranks_(total, fitters)
        if self._counted is not None:
            self._counts, self._counted = self._counted, None
            if fitters is not None:
                torch.distributed.all_reduce(self._counts)
        if fitters is not None:
            torch.distributed.all_reduce(now.size)
        nodes, to_nodes = now.basis.nodes.to("cpu"), now.fit_basis.nodes.to("cpu")
        for copy in copies:
            seen = self._seen_by(copy, now.whole, total)
            base = self.base[copy].cpu()
            add_shifted_(self._room_for(copy), seen, base, nodes, to_nodes, n_levels=self.n_levels)
            if not self.are_first:
                self._screen(copy, self._gammas_of(copy, parameters))
        self.are_first = False

    def seen(self, copy: int) -> SufficientStatistics:
        """What a copy may see, of all origins, every gene at nodes of its own; until the next iteration."""
        found, device = self._collected.of_copy.pop(copy), self.offsets.device
        self._room[copy] = found
        return SufficientStatistics(*(t.to(device) for t in found.tensors()))

    def centre(self, copy: int) -> Tensor:
        """Take the mean over cells off the offsets of a copy, and return it, (genes,)."""
        assert self.n_cells is not None
        mean = mean_offset(self.offsets[copy], self.n_cells.to(self.offsets.device))
        self.offsets[copy] -= mean
        self.base[copy] -= mean
        return mean

    def statistics(
        self, batches: Iterable[CellBatch], basis: Basis, q: Tensor
    ) -> tuple[SufficientStatistics, Basis]:
        """Of cells with responsibilities (all rows, K), moved by the offsets of the copy of all cells.

        Returns:
            Sums with every gene's nodes of its own, on the CPU, and the basis with these nodes.
        """
        offsets, nodes = self.offsets[-1].cpu(), basis.nodes.to("cpu")
        none = torch.zeros_like(offsets[0])
        moved = basis._replace(nodes=spanning_offsets(nodes, torch.cat([offsets, none[None]])))
        total: SufficientStatistics | None = None

        def bring_in(seen: SufficientStatistics, origin: int) -> None:
            nonlocal total
            if total is None:
                total = zeros_of_genes(basis.levels, q.shape[1], moved.nodes.log_nodes.shape[1])
            add_shifted_(total, seen, none if origin < 0 else offsets[origin], nodes, moved.nodes)

        seen, origin = SufficientStatistics.zeros(basis, q.shape[1], "cpu"), -1
        for batch in batches:
            if batch.origin != origin and float(seen.weight.sum()) > 0:
                bring_in(seen, origin)
                seen = SufficientStatistics.zeros(basis, q.shape[1], "cpu")
            origin = batch.origin
            seen.add_batch_(batch, basis, q[batch.rows])
        bring_in(seen, origin)
        assert total is not None
        return total, moved

    def _gammas_of(self, copy: int, parameters: Callable[[int], CopyParameters]) -> GammaRates:
        now = self._collected
        if copy not in now.gammas:
            now.gammas[copy] = GammaRates.of(parameters(copy).components)
        return now.gammas[copy]

    def _screen(self, copy: int, gammas: GammaRates) -> None:
        """Choose the genes that may be worth an offset in the next iteration, and learn the variances."""
        assert self._counts is not None
        now, fold = self._collected, self.without(copy)
        counts, size = (t.sum(0) if fold is None else t.sum(0) - t[fold] for t in (self._counts, now.size))
        offsets, variance, base = (t[copy].cpu() for t in (self.offsets, self.variance, self.base))
        gain, information = screened(counts, size, now.n_met, gammas, offsets, variance)
        for origin, genes in enumerate(now.genes):
            if (copy, origin) in now.information:
                information[origin, genes.positions] = now.information[copy, origin]
        may_matter = (gain > SCREENED_GAIN) | (offsets != base)
        self.may_matter[copy] = may_matter.to(self.may_matter)
        self.variance[copy] = offset_variance(offsets, information, variance).to(self.variance)

    def _seen_by(self, copy: int, of_folds: OfFolds, total: SufficientStatistics) -> SufficientStatistics:
        """``total`` less the fold that a copy does not see, on the CPU."""
        fold = self.without(copy)
        part = None if fold is None else of_folds.of(fold)
        if part is not None:
            total = total - part
        return SufficientStatistics(*(t.cpu() for t in total.tensors()))

    def _room_for(self, copy: int) -> SufficientStatistics:
        """Sums of what a copy sees in this iteration, at nodes of every gene's own."""
        now = self._collected
        if copy not in now.of_copy:
            n_components, n_nodes = now.size.shape[2], now.fit_basis.nodes.log_nodes.shape[1]
            room, width = self._room.pop(copy, None), self.n_levels * n_nodes
            if room is not None and room.rate.shape == (self.n_genes, n_components, width):
                for tensor in room.tensors():
                    tensor.zero_()
            else:
                room = zeros_of_genes(now.basis.levels, n_components, width)
            now.of_copy[copy] = room
        return now.of_copy[copy]

    def _finish(
        self,
        origin: int,
        raw: OfFolds,
        total: SufficientStatistics,
        copies: Sequence[int],
        parameters: Callable[[int], CopyParameters],
    ) -> None:
        """Step on the offsets of an origin all of whose cells have been met, and move their statistics."""
        now = self._collected
        nodes, to_nodes = now.basis.nodes.to("cpu"), now.fit_basis.nodes.to("cpu")
        genes = now.genes[origin].positions
        for copy in copies:
            seen = self._seen_by(copy, raw, total)
            offset, base = self.offsets[copy, origin].cpu()[genes], self.base[copy].cpu()[genes]
            if not self.are_first:
                gammas = GammaRates(*(t[genes] for t in self._gammas_of(copy, parameters)))
                loadings = parameters(copy).loadings
                if loadings is None:
                    loadings = Loadings.none(len(genes), nodes.log_nodes.numel())
                else:
                    loadings = loadings._replace(of_genes=loadings.of_genes[genes])
                variance = self.variance[copy].cpu()[genes]
                offset, information = offset_step(seen, nodes, gammas, offset, variance, loadings)
                offset = quieted(offset, base, information)
                self.offsets[copy, origin, genes.to(self.offsets.device)] = offset.to(self.offsets)
                now.information[copy, origin] = information
            add = partial(add_shifted_, base=base, genes=genes, n_levels=self.n_levels)
            add(self._room_for(copy), seen, offset, nodes, to_nodes)


def _without_screening(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state of an earlier version does not tell which genes may be worth an offset: all may."""
    offsets = state.get(f"{prefix}offsets")
    if offsets is not None:
        state.setdefault(f"{prefix}may_matter", torch.ones_like(offsets, dtype=torch.uint8))


def _are_several_ranks() -> bool:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1
