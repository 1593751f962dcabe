"""Which cells a batch holds: shuffled, sharded over ranks without a cell twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class ShuffledBatches(Sampler[np.ndarray]):
    """This rank's shares of new random batches every epoch, some of which may be empty.

    There are as many on every rank. All ranks' shares together are the batches that one process would have,
    of ``world_size`` times as many cells. The order depends on the seed and the epoch alone, so that a
    resumed run sees what the whole one saw. Lightning calls ``set_epoch``.

    Args:
        rows: (cells,) positions of all ranks' cells.
        batch_size: cells at most, on each rank.
        seed: of the shuffling.
        rank, world_size: this process and how many there are.
    """

    def __init__(
        self, rows: np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _batches(self) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        n_batches = max(1, -(-order.size // (self.batch_size * self.world_size)))
        return [cells[self.rank :: self.world_size] for cells in np.array_split(order, n_batches)]

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self._batches()  # at the first batch: Lightning sets a resumed epoch after iter()

    def __len__(self) -> int:
        return len(self._batches())
