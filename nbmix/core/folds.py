"""Cells parted into folds, into batches of like size factors, and over ranks."""

from __future__ import annotations

import math

import numpy as np

from nbmix.core.nodes import fewest_nodes
from nbmix.core.tables import FEWEST_CELLS_FOR_STEPS

CELLS_A_BLOCK = 16384  # at most, where the counts are in memory

FEWEST_CELLS = FEWEST_CELLS_FOR_STEPS  # in a batch that is cut off for its size factors

CUT_TOLERANCE = 1e-6  # of the nodes that are counted on when cells are cut into batches

CELLS_A_PACK = 1000  # of origins that share blocks: as many as make up for what a block costs

BATCH_CELLS = 400  # what a batch costs besides its cells, in cells: tables for its pairs


def fold_blocks(
    size_factors: np.ndarray,
    folds: int,
    block_size: int,
    generator: np.random.Generator,
    *,
    rank: int = 0,
    world_size: int = 1,
    origins: np.ndarray | None = None,
) -> list[tuple[int, np.ndarray]]:
    """Split cells at random into folds of equal size, and these into blocks of cells of like size factors.

    A block holds at most ``block_size`` cells of a rank. With several ranks every rank gets its own cells,
    none twice, of few folds (see ``fold_shares``), and the same number of blocks of each fold, of which
    those of other ranks' folds are empty.

    Args:
        size_factors: (cells,).
        origins: (cells,) what each comes from; a block is of one pack of origins (``packs_of``), and those of
            a pack follow each other. None: all are of one.

    Returns:
        (fold, sorted positions) of each block; the fold is -1 where folds = 1.
    """
    member = fold_members(size_factors.size, folds, generator)
    blocks = []
    packs = None if origins is None else packs_of(np.bincount(origins))[origins]
    for of_pack in by_origin(np.arange(size_factors.size), packs):
        for fold in range(folds) if folds > 1 else [-1]:
            rows = of_pack[member[of_pack] == fold]
            sizes = size_factors[rows]
            shares = fold_shares(rows, sizes, block_size, rank, world_size, fold=fold, folds=folds)
            blocks += [(fold, share) for share in shares]
    return blocks


def packs_of(n_cells: np.ndarray) -> np.ndarray:
    """(origins,) numbers of packs: origins that follow each other, until there are CELLS_A_PACK cells.

    What is known of an origin is in memory until all of its cells have been met.

    Args:
        n_cells: (origins,) cells of each.
    """
    packs, pack, n_packed = np.zeros(len(n_cells), dtype=np.int64), 0, 0
    for origin, n_here in enumerate(n_cells.tolist()):
        packs[origin] = pack
        n_packed += n_here
        if n_packed >= CELLS_A_PACK:
            pack, n_packed = pack + 1, 0
    return packs


def by_origin(rows: np.ndarray, origins: np.ndarray | None) -> list[np.ndarray]:
    """``rows`` of each origin (of the cells at ``rows``), ascending; all together where there are none."""
    if origins is None:
        return [rows]
    return [rows[origins == origin] for origin in np.unique(origins)]


def fold_shares(
    rows: np.ndarray,
    size_factors: np.ndarray,
    block_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    fold: int = -1,
    folds: int = 1,
) -> list[np.ndarray]:
    """One rank's share of a fold in blocks of cells of like size factors: as many blocks on every rank.

    All folds laid end to end, each from its shallowest cell to its deepest, are cut into ``world_size`` parts
    of equal sums of size factors, with which nonzeros and so the work grow. So a rank makes the tables of
    few copies and of few blocks, and little has to be summed.
    """
    work = size_factors / (size_factors.sum() or 1.0)
    blocks = []
    done = 0.0
    for group in alike(np.arange(rows.size), size_factors):
        share = done + np.cumsum(work[group]) - work[group] / 2
        done += work[group].sum()
        of_rank = np.minimum((max(fold, 0) + share) * world_size / folds, world_size - 1).astype(np.int64)
        largest_share = int(np.bincount(of_rank).max(initial=0))
        of_this = np.array_split(group[of_rank == rank], max(1, -(-largest_share // block_size)))
        blocks += [np.sort(rows[some]) for some in of_this]
    return blocks


def fold_members(n_cells: int, folds: int, generator: np.random.Generator) -> np.ndarray:
    """(cells,) random folds of equal size; -1 where folds = 1."""
    return np.full(n_cells, -1) if folds == 1 else generator.permutation(np.arange(n_cells) % folds)


def alike(rows: np.ndarray, size_factors: np.ndarray) -> list[np.ndarray]:
    """Part ``rows`` into groups of like size factors (of these rows), each sorted by them."""
    positive = size_factors[size_factors > 0]
    log_s = np.log(np.maximum(size_factors, positive.min() if positive.size else 1.0))
    order = np.argsort(log_s, kind="stable")
    return np.split(rows[order], _cuts(log_s[order]))


def _cuts(log_s: np.ndarray) -> list[int]:
    """Where to cut cells sorted by size factor, so that products of fewer nodes outweigh more tables.

    A batch costs its nodes times (cells + BATCH_CELLS). The best of a few cuts is taken while it saves a
    tenth.
    """

    def cost(part: np.ndarray) -> float:
        if part.size == 0 or part[0] == part[-1]:
            return float(part.size + BATCH_CELLS)
        half = math.ceil((part[-1] - part[0]) * 16) / 32
        return fewest_nodes(half, CUT_TOLERANCE) * float(part.size + BATCH_CELLS)

    if log_s.size < 2 * FEWEST_CELLS:
        return []
    # by rank, and where the tails begin
    places = {round(log_s.size * share) for share in (1 / 4, 1 / 2, 3 / 4)}
    places |= {int(at) for at in np.searchsorted(log_s, np.linspace(log_s[0], log_s[-1], 5)[1:-1])}
    places |= {FEWEST_CELLS, log_s.size - FEWEST_CELLS}
    tried = [
        (cost(log_s[:at]) + cost(log_s[at:]), at)
        for at in places
        if FEWEST_CELLS <= at <= log_s.size - FEWEST_CELLS
    ]
    if min(tried)[0] > 0.9 * cost(log_s):
        return []
    at = min(tried)[1]
    return [*_cuts(log_s[:at]), at, *(at + cut for cut in _cuts(log_s[at:]))]


def copy_ranks(folds: int, n_ranks: int) -> list[int]:
    """Which rank fits each copy of the components: a fold's, one that has much of it (``fold_shares``)."""
    if folds == 1:
        return [0]
    ranks = [(fold * n_ranks + n_ranks // 2) // folds for fold in range(folds)]
    return [*ranks, int(np.bincount(ranks, minlength=n_ranks).argmin())]
