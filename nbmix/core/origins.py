"""The offsets of a mixture in all copies, and the statistics of its cells origin by origin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.folds import packs_of
from nbmix.core.offsets import (
    FIRST_OFFSET_VARIANCE,
    LARGEST_OFFSET,
    LEAST_GAIN,
    SCREENED_GAIN,
    GammaRates,
    Judge,
    Loadings,
    Members,
    OriginCells,
    OriginMargins,
    SharedStatistics,
    add_shifted_,
    gene_totals,
    mean_offset,
    offset_variance,
    screened,
    spanning_offsets,
    step_and_move,
    summed_over_ranks,
)
from nbmix.core.origin_genes import OriginGenes
from nbmix.core.origin_statistics import OriginStatistics
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


class Told(NamedTuple):
    """What cells of an origin tell of an offset in a copy: the information on it.

    Attributes:
        origin, gene: (told,) of which.
        information: (told,).
    """

    origin: Tensor
    gene: Tensor
    information: Tensor


@dataclass
class _Collected:
    """Statistics of one iteration.

    Attributes:
        basis: of the cells.
        fit_basis: the same with nodes that reach as far as offsets.
        whole: statistics of all origins, without offsets.
        shape: (folds, K, L).
        may_matter: (origins, genes) bool, which may be worth an offset in a copy.
        packs: (origins,) pack of each, see ``nbmix.core.folds``.
        of_pack: statistics of those genes, of packs that are not complete yet.
        n_met: (origins,) cells so far.
        size: (folds, origins, K) sum of q_ik s_i.
        shared: what copies see, every gene at nodes of its own: at first what offsets have changed of
            complete packs.
        gammas: of the components of copies, which stay the same until the M step.
        told: by copy, of complete packs.
        seen: what each copy may see of all cells.
    """

    basis: Basis
    fit_basis: Basis
    whole: OfFolds
    shape: tuple[int, int, int]
    may_matter: Tensor
    packs: Tensor
    n_met: Tensor
    size: Tensor
    of_pack: dict[int, OriginStatistics] = field(default_factory=dict)
    shared: SharedStatistics | None = None
    gammas: dict[int, GammaRates] = field(default_factory=dict)
    told: dict[int, list[Told]] = field(default_factory=dict)
    seen: dict[int, SufficientStatistics] = field(default_factory=dict)


class OriginOffsets(nn.Module):
    """Offsets d_gj of every copy of a mixture, see ``nbmix.core.offsets``.

    What the cells of a pack of origins say is collected fold by fold. Once all of them have been met, every
    copy takes a step on its offsets by those that it may see, and has their statistics moved by the offsets:
    so one pack at a time is in memory where its batches follow each other. Over several ranks all wait for
    the M step.

    Args:
        folds: each has a copy that does not see it; 1: there are none.
        has_whole: there is a copy of all cells, the last one; else there are folds alone.
        n_levels: of axes that components share, see ``nbmix.core.factor``.

    Attributes:
        offsets: (copies, origins, genes) float64, natural logarithm.
        variance: (copies, genes) float64, tau^2.
        base: (copies, genes) offset of genes in all origins where they have none of their own.
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
        # new memory costs more than filling the last one's
        self._shared_room: SharedStatistics | None = None
        self._rooms: list[Tensor] = []
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

    def reset(self, basis: Basis, n_components: int, whole: OfFolds) -> None:
        """Forget the statistics of the last iteration.

        Args:
            basis: of the cells.
            n_components: K.
            whole: empty statistics, for cells of all origins.
        """
        all_offsets = torch.cat([self.offsets, self.base[:, None]], 1)
        reaching = basis._replace(nodes=spanning_offsets(basis.nodes, all_offsets))
        self._collected = _Collected(
            basis,
            reaching,
            whole,
            (self.folds, n_components, self.n_levels),
            self.may_matter.cpu().bool().any(0),
            self._packs,
            torch.zeros(self.n_origins, dtype=torch.int64),
            torch.zeros(self.folds, self.n_origins, n_components, dtype=torch.float64),
        )
        if self._counts is None:
            self._counted = torch.zeros(self.folds, self.n_origins, self.n_genes, dtype=torch.float64)

    def add(self, batch: CellBatch, q: Tensor, parameters: Callable[[int], CopyParameters]) -> None:
        """Add cells; ``parameters`` of a copy are what its offsets are judged by."""
        now, fold = self._collected, max(batch.fold, 0)
        origins, share = Members.of(batch, self.n_origins)
        now.whole.add(batch, q)
        of_components = (q if q.ndim == 2 else q.sum(2)).double().cpu()
        now.size[fold, origins] += (share * batch.size_factors.cpu()[:, None]).T @ of_components
        if self._counted is not None:
            self._counted[fold, origins] += gene_totals(batch, now.basis, share).T
        now.n_met[origins] += share.sum(0).long()
        for pack in now.packs[origins].unique().tolist():
            if pack not in now.of_pack:
                now.of_pack[pack] = self._of_pack(pack)
            now.of_pack[pack].add(batch, q)
            here = now.packs == pack
            assert self.n_cells is not None
            if bool((now.n_met == self.n_cells.cpu())[here].all()) and not _are_several_ranks():
                self._finish(pack, range(self.n_copies), parameters)

    def _of_pack(self, pack: int) -> OriginStatistics:
        """Zeros, of genes that may be worth an offset in an origin of the pack."""
        now = self._collected
        genes = OriginGenes.where(now.may_matter & (now.packs == pack)[:, None])
        return OriginStatistics(now.basis, genes, now.shape, self._rooms.pop() if self._rooms else None)

    def finish(
        self,
        parameters: Callable[[int], CopyParameters],
        copies: Sequence[int],
        fitters: Sequence[int] | None = None,
    ) -> None:
        """Bring in all packs that still wait.

        Args:
            parameters: of each copy.
            copies: that this rank fits.
            fitters: the rank that fits each copy, where there are several.
        """
        now = self._collected
        for pack in now.packs.unique().tolist() if fitters is not None else list(now.of_pack):
            if fitters is not None:
                now.of_pack.setdefault(pack, self._of_pack(pack)).sum_over_ranks_()
            self._finish(pack, copies, parameters)
        total = now.whole.total()
        if fitters is not None:
            now.whole.sum_over_ranks_(total, fitters)
        if self._counted is not None:
            self._counts, self._counted = self._counted, None
            if fitters is not None:
                self._counts = summed_over_ranks(self._counts, self.offsets.device)
        if fitters is not None:
            now.size = summed_over_ranks(now.size, self.offsets.device)
        shared = self._shared(len(copies))
        for place, copy in enumerate(copies):
            own = shared._replace(rate=shared.rate[place : place + 1], node=shared.node[place : place + 1])
            self._see_whole(copy, total, own)
            if not self.are_first:
                self._screen(copy, self._gammas_of(copy, parameters))
        self.are_first = False

    def seen(self, copy: int) -> SufficientStatistics:
        """What a copy may see, of all origins, every gene at nodes of its own; until the next iteration."""
        return self._collected.seen.pop(copy)

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

        Args:
            batches: where those of a pack of origins follow each other, few of these are in memory at a time.

        Returns:
            Sums with every gene's nodes of its own, on the CPU, and the basis with these nodes.
        """
        offsets, base, nodes = self.offsets[-1].cpu(), self.base[[-1]].cpu(), basis.nodes.to("cpu")
        moved = spanning_offsets(nodes, torch.cat([offsets, base, torch.zeros_like(base)]))
        sums = torch.zeros(
            2, 1, *offsets.shape[1:], q.shape[1], moved.log_nodes.shape[1], dtype=torch.float64
        )
        shared = SharedStatistics(moved, *sums)
        whole, waiting = SufficientStatistics.zeros(basis, q.shape[1], "cpu"), dict[int, OriginStatistics]()
        are_of_origins = False

        def bring_in() -> None:
            for of_pack in waiting.values():
                cells = of_pack.seen_without([None])
                step_and_move(cells, Judge.none(base), offsets[cells.genes.chosen][None], shared)
            waiting.clear()

        for batch in batches:
            whole.add_batch_(batch, basis, q[batch.rows])
            if batch.origins is None or not batch.n_cells:
                continue
            are_of_origins, packs = True, self._packs[batch.origins].unique().tolist()
            if not waiting.keys() >= set(packs):
                bring_in()
            for pack in packs:
                if pack not in waiting:
                    genes = OriginGenes.where((offsets != base) & (self._packs == pack)[:, None])
                    waiting[pack] = OriginStatistics(basis, genes, (1, q.shape[1], 1))
                waiting[pack].add(batch, q[batch.rows])
        bring_in()
        begin = base[0] if are_of_origins else torch.zeros_like(base[0])
        found = SufficientStatistics(shared.rate[0], whole.pair * 0, shared.node[0], whole.weight * 0)
        add_shifted_(found, whole, begin, nodes, moved)
        return found, basis._replace(nodes=moved)

    @property
    def _packs(self) -> Tensor:
        """(origins,) number of each one's pack; where cells were not counted each is alone."""
        if self.n_cells is None:
            return torch.arange(self.n_origins)
        return torch.from_numpy(packs_of(self.n_cells.cpu().numpy()))

    def _gammas_of(self, copy: int, parameters: Callable[[int], CopyParameters]) -> GammaRates:
        now = self._collected
        if copy not in now.gammas:
            now.gammas[copy] = GammaRates.of(parameters(copy).components)
        return now.gammas[copy]

    def _screen(self, copy: int, gammas: GammaRates) -> None:
        """Choose the genes that may be worth an offset in the next iteration, and learn the variances."""
        assert self._counts is not None and self.n_cells is not None
        now, fold = self._collected, self.without(copy)
        counts, size = (t.sum(0) if fold is None else t.sum(0) - t[fold] for t in (self._counts, now.size))
        offsets, variance, base = (t[copy].cpu() for t in (self.offsets, self.variance, self.base))
        mean_size = float(now.size.sum() / self.n_cells.sum())
        gain, information = screened(counts, size, mean_size, gammas, offsets, variance)
        for told in now.told.get(copy, []):
            information[told.origin, told.gene] = told.information
        may_matter = (gain > SCREENED_GAIN) | (offsets != base)
        self.may_matter[copy] = may_matter.to(self.may_matter)
        self.variance[copy] = offset_variance(offsets, information, variance).to(self.variance)

    def _shared(self, n_copies: int) -> SharedStatistics:
        """Sums of what the copies of this rank see in this iteration, at nodes of every gene's own."""
        now = self._collected
        if now.shared is None:
            nodes, (_, n_components, n_levels) = now.fit_basis.nodes.to("cpu"), now.shape
            shape = (n_copies, self.n_genes, n_components, n_levels * nodes.log_nodes.shape[1])
            room = self._shared_room
            if room is None or room.rate.shape != shape:
                room = SharedStatistics(nodes, *torch.zeros(2, *shape, dtype=torch.float64))
            room.rate.zero_()
            room.node.zero_()
            self._shared_room = now.shared = room._replace(nodes=nodes)
        return now.shared

    def _see_whole(self, copy: int, total: SufficientStatistics, shared: SharedStatistics) -> None:
        """Let a copy see ``total`` less its fold where genes have no offsets, beside what these have changed.

        Args:
            shared: of this copy alone.
        """
        now, fold = self._collected, self.without(copy)
        part = None if fold is None else now.whole.of(fold)
        whole = total if part is None else total - part
        rate, pair, node, weight = whole.tensors()
        whole = SufficientStatistics(rate.cpu(), pair.cpu(), node.cpu(), weight.cpu())
        cells, base = OriginCells.of_one(whole, now.basis.nodes.to("cpu")), self.base[[copy]].cpu()
        step_and_move(cells, Judge.none(base), base.clone(), shared._replace(have_cells=False))
        seen = (shared.rate[0], pair, shared.node[0], weight)
        now.seen[copy] = SufficientStatistics(*(t.to(self.offsets.device) for t in seen))

    def _finish(self, pack: int, copies: Sequence[int], parameters: Callable[[int], CopyParameters]) -> None:
        """Step on the offsets of a pack all of whose cells have been met, and move their statistics."""
        now = self._collected
        of_pack = now.of_pack.pop(pack)
        genes, which = of_pack.genes, list(copies)
        if not genes.n_rows or not which:
            return
        cells = of_pack.seen_without([self.without(copy) for copy in which])
        judge, at = Judge.none(self.base[which].cpu()), tuple(t.to(self.offsets.device) for t in genes.chosen)
        if not self.are_first:
            gammas = [self._gammas_of(copy, parameters) for copy in which]
            none = Loadings.none(self.n_genes, cells.rate.shape[3])
            loadings = [parameters(copy).loadings or none for copy in which]
            may_step = torch.stack([self.may_matter[copy][at] for copy in which]).bool().cpu()
            judge = Judge(gammas, loadings, self.variance[which].cpu(), judge.base, may_step, LEAST_GAIN)
        offset = torch.stack([self.offsets[copy][at] for copy in which]).cpu()
        information = step_and_move(cells, judge, offset, self._shared(len(which)))
        self._rooms.append(of_pack.room)
        if not self.are_first:
            for place, copy in enumerate(which):
                self.offsets[copy][at] = offset[place].to(self.offsets.device)
                stepped = judge.may_step[place]
                told = Told(genes.origin[stepped], genes.gene[stepped], information[place, stepped])
                now.told.setdefault(copy, []).append(told)


def _without_screening(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state of an earlier version does not tell which genes may be worth an offset: all may."""
    offsets = state.get(f"{prefix}offsets")
    if offsets is not None:
        state.setdefault(f"{prefix}may_matter", torch.ones_like(offsets, dtype=torch.uint8))


def _are_several_ranks() -> bool:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1
