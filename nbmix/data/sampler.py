"""Which cells a batch holds: shuffled, sharded over ranks without a cell twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from nbmix.core.folds import by_origin


class ShuffledBatches(Sampler[np.ndarray]):
    """This rank's shares of new random batches every epoch, some of which may be empty.

    There are as many on every rank. All ranks' shares together are the batches that one process would have,
    of ``world_size`` times as many cells. The order depends on the seed and the epoch alone, so that a
    resumed run sees what the whole one saw. Lightning calls ``set_epoch``.

    Where cells have origins, all cells of a batch have the same one, and batches of all origins follow each
    other at random: the components are then shifted once a batch, not once for each origin in it.

    Args:
        rows: (cells,) positions of all ranks' cells.
        batch_size: cells at most, on each rank.
        seed: of the shuffling.
        rank, world_size: this process and how many there are.
        origins: (cells,) of the cells at ``rows``; None: all are of one.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        origins: np.ndarray | None = None,
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.parts = by_origin(rows, origins)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _batches(self) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, self.epoch])
        batches: list[np.ndarray] = []
        for part in self.parts:
            n_batches = max(1, -(-part.size // (self.batch_size * self.world_size)))
            batches += np.array_split(generator.permutation(part), n_batches)
        if len(self.parts) > 1:
            batches = [batches[number] for number in generator.permutation(len(batches))]
        return [cells[self.rank :: self.world_size] for cells in batches]

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self._batches()  # at the first batch: Lightning sets a resumed epoch after iter()

    def __len__(self) -> int:
        return len(self._batches())
