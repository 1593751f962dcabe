"""Which cells a batch holds: shuffled, sharded over ranks without a cell twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class ShuffledBatches(Sampler[np.ndarray]):
    """New random batches of this rank's cells every epoch; as many batches on every rank.

    The order depends on the seed and the epoch alone, so that a resumed run sees what the whole one saw.
    Lightning calls ``set_epoch``.

    Args:
        rows: (cells,) positions of all ranks' cells.
        batch_size: cells at most.
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
        largest_share = -(-order.size // self.world_size)
        n_batches = max(1, -(-largest_share // self.batch_size))
        return np.array_split(order[self.rank :: self.world_size], n_batches)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self._batches()  # at the first batch: Lightning sets a resumed epoch after iter()

    def __len__(self) -> int:
        return len(self._batches())
