"""Which cells a batch holds: shuffled, sharded over ranks without a cell twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from nbmix.core.folds import by_origin

LEAST_BATCH, LARGEST_BATCH = 64, 1024  # cells of all ranks: beyond, a cell costs no less

STEPS_A_PASS = 64  # at least, where batches grow with the data

EPOCH_CELLS = 32_768  # at most: how often held-out cells are asked whether it is enough

BLOCKS_AT_ONCE = 16  # among whose cells those of a batch are drawn, where blocks are read


class BatchSchedule(NamedTuple):
    """How random batches are dealt out, the one place that says so: cells of a batch, and of an epoch.

    Attributes:
        cells_a_batch: at most, on all ranks together.
        epochs_a_pass: so many epochs see every cell once.
    """

    cells_a_batch: int
    epochs_a_pass: int = 1

    @classmethod
    def of(cls, batch_size: int | str, n_cells: int, world_size: int = 1) -> BatchSchedule:
        """What the setting ``batch_size`` means for so many training cells.

        A number is that of a batch on each rank, and an epoch is a pass. With "auto" batches hold a
        64th of the cells, between 64 and 1,024, and an epoch is a pass or an equal share of one, of at most
        32,768 cells.

        >>> BatchSchedule.of("auto", 85_190)
        BatchSchedule(cells_a_batch=1024, epochs_a_pass=3)
        """
        if not isinstance(batch_size, str):
            return cls(batch_size * world_size)
        cells = min(max(n_cells // STEPS_A_PASS, LEAST_BATCH), LARGEST_BATCH)
        return cls(cells, max(1, -(-n_cells // EPOCH_CELLS)))


class ShuffledBatches(Sampler[np.ndarray]):
    """This rank's shares of new random batches every epoch, some of which may be empty.

    There are as many on every rank. All ranks' shares together are the batches that one process would have,
    of as many cells as these have in all. The order depends on the seed and the epoch alone, so that a
    resumed run sees what the whole one saw. Lightning calls ``set_epoch``.

    Where cells have origins, all cells of a batch have the same one, and batches of all origins follow each
    other at random: the components are then shifted once a batch, not once for each origin in it.

    Args:
        rows: (cells,) positions of all ranks' cells.
        batch_size: cells at most, on each rank, or "auto"; see ``BatchSchedule``.
        seed: of the shuffling.
        rank, world_size: this process and how many there are.
        origins: (cells,) of the cells at ``rows``; None: all are of one.
        blocks: (all cells,) the block of each that is read at once; None: all cells are at hand. Then blocks
            come in random order, and cells that follow each other are of a few of them.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int | str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        origins: np.ndarray | None = None,
        blocks: np.ndarray | None = None,
    ) -> None:
        self.blocks = blocks
        self.schedule, self.seed = BatchSchedule.of(batch_size, rows.size, world_size), seed
        self.rank, self.world_size = rank, world_size
        self.parts = by_origin(rows, origins)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def with_rounds(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The batches of this epoch, and in which round (all cells,) each cell is read; 0 without blocks."""
        which_pass, share = divmod(self.epoch, self.schedule.epochs_a_pass)
        generator = np.random.default_rng([self.seed, which_pass])
        batches: list[np.ndarray] = []
        rounds = None if self.blocks is None else self._rounds(self.blocks, generator)
        for part in self.parts:
            order = generator.permutation(part)
            if rounds is not None:
                order = order[np.argsort(rounds[order], kind="stable")]
            shares = np.array_split(order, self.schedule.epochs_a_pass)
            # as many in every epoch: Lightning asks once; the first share is the largest
            n_batches = max(1, -(-shares[0].size // self.schedule.cells_a_batch))
            batches += np.array_split(shares[share], n_batches)
        if len(self.parts) > 1:
            batches = [batches[number] for number in generator.permutation(len(batches))]
        if rounds is not None:  # a batch comes once the last of its cells has been read
            batches.sort(key=lambda cells: rounds[cells].max(initial=0))
        shares = [cells[self.rank :: self.world_size] for cells in batches]
        return shares, np.zeros(0, np.int64) if rounds is None else rounds

    @staticmethod
    def _rounds(blocks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """(all cells,) in which round of a pass each is read, BLOCKS_AT_ONCE random blocks in one."""
        return (generator.permutation(int(blocks.max()) + 1) // BLOCKS_AT_ONCE)[blocks]

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self.with_rounds()[0]  # at the first batch: Lightning sets a resumed epoch after iter()

    def __len__(self) -> int:
        return len(self.with_rounds()[0])
