"""The DataModule: counts read once, cut into prepared batches of cells."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from nbmix.data.counts import CountData
from nbmix.data.read import read_h5ad
from nbmix.data.sampler import ShuffledBatches
from nbmix.data.simulate import simulated_count_data
from nbmix.data.zheng import MIXTURES, read_zheng
from nbmix.errors import InputError
from nbmix.mixture import fold_blocks, shard
from nbmix.products import Basis, CellBatch

SIZE_FACTOR_RATIO = 1e9  # between the largest and the smallest: beyond it one of them is not a cell

log = logging.getLogger(__name__)


class CellBatches(Dataset[CellBatch]):
    """Slices any set of cells out of the CSR matrix as one ``CellBatch``; never dense."""

    def __init__(self, data: CountData, basis: Basis) -> None:
        self.data, self.basis = data, basis
        if data.labels is None:
            self.codes = None
        else:
            self.codes = np.unique(data.labels, return_inverse=True)[1].astype(np.int64)

    def __getitem__(self, rows: np.ndarray) -> CellBatch:
        return self.batch(rows)

    def batch(self, rows: np.ndarray, fold: int = -1) -> CellBatch:
        """The cells at positions ``rows``, all of one fold."""
        data = self.data
        return CellBatch.build(
            data.counts[rows],
            data.size_factors[rows],
            self.basis.levels,
            rows=rows,
            fold=fold,
            prior=None if data.prior is None else data.prior[rows],
            labels=None if self.codes is None else self.codes[rows],
        )


class PreparedBatches(Dataset[CellBatch]):
    """Batches that are the same every epoch, made at first use and kept."""

    def __init__(self, cells: CellBatches, blocks: Sequence[tuple[int, np.ndarray]]) -> None:
        self.cells, self.blocks = cells, blocks
        self.made: dict[int, CellBatch] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> CellBatch:
        if index not in self.made:
            fold, rows = self.blocks[index]
            self.made[index] = self.cells.batch(rows, fold)
        return self.made[index]

    def __iter__(self) -> Iterator[CellBatch]:
        return (self[index] for index in range(len(self)))


class CountsDataModule(pl.LightningDataModule):
    """Cells for training, held-out cells, and all cells for prediction.

    Args:
        read: returns the checked counts; called once.
        batch_size: cells a batch at most.
        validation_share: of the cells held out, chosen by ``seed`` without regard to labels; 0 for none.
        folds: training cells are split into this many folds, each batch within one (see ``Mixture``).
        shuffle: draw new batches every epoch; else the same prepared ones.
        seed: of the split, the folds and the shuffling.
    """

    def __init__(
        self,
        read: Callable[[], CountData],
        *,
        batch_size: int = 4096,
        validation_share: float = 0.1,
        folds: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"data.batch_size={batch_size}: must be 1 or more")
        if not 0 <= validation_share < 1:
            raise InputError(f"data.validation_share={validation_share}: must be from 0 to below 1")
        self._read = read
        self.batch_size, self.validation_share = batch_size, validation_share
        self.folds, self.shuffle, self.seed = folds, shuffle, seed
        self._data: CountData | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and split the cells; every rank does the same."""
        if self._data is None:
            self.use(self._read())

    def use(self, data: CountData) -> None:
        """Take ``data`` in place of what ``read`` gives."""
        _check_size_factor_range(data.size_factors)
        self._data = data
        generator = np.random.default_rng(self.seed)
        order = generator.permutation(data.n_cells)
        n_held_out = int(self.validation_share * data.n_cells)
        self.validation_rows = np.sort(order[:n_held_out])  # (held-out cells,)
        self.training_rows = np.sort(order[n_held_out:])  # (training cells,)
        if self.folds > self.training_rows.size:
            raise InputError(
                f"model.folds={self.folds}: there are only {self.training_rows.size} cells to fit; use fewer"
            )
        self.basis = Basis.of(data.counts, data.size_factors)
        self._cells = CellBatches(data, self.basis)
        self._fixed: PreparedBatches | None = None

    @property
    def data(self) -> CountData:
        """All cells, checked."""
        self.setup()
        assert self._data is not None
        return self._data

    @property
    def training_data(self) -> CountData:
        """The cells that a fit may see."""
        return self.data if not self.validation_rows.size else self.data.select_cells(self.training_rows)

    @property
    def fingerprint(self) -> str:
        """Of the training cells, their order and their folds: what a fit may only go on with."""
        content = repr((self.seed, self.folds, self.data.cell_names[self.training_rows].tolist()))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _training_blocks(self) -> PreparedBatches:
        if self._fixed is None:
            rank, world_size = self._rank
            blocks = fold_blocks(
                self.training_rows.size,
                self.folds,
                self.batch_size,
                np.random.default_rng([self.seed, 1]),
                rank=rank,
                world_size=world_size,
            )
            self._fixed = PreparedBatches(self._cells, [(f, self.training_rows[rows]) for f, rows in blocks])
        return self._fixed

    def train_dataloader(self) -> DataLoader[CellBatch]:
        if not self.shuffle:
            return DataLoader(self._training_blocks(), batch_size=None)
        sampler = ShuffledBatches(self.training_rows, self.batch_size, self.seed, *self._rank)
        return DataLoader(self._cells, batch_size=None, sampler=sampler)

    def val_dataloader(self) -> DataLoader[CellBatch] | list[Any]:
        if not self.validation_rows.size:
            return []
        blocks = [(-1, rows) for rows in shard(self.validation_rows, self.batch_size, *self._rank)]
        return DataLoader(PreparedBatches(self._cells, blocks), batch_size=None)

    def predict_dataloader(self) -> list[DataLoader[CellBatch]] | DataLoader[CellBatch]:
        """All cells once: training cells with their folds, and held-out ones."""
        rank, world_size = self._rank
        if self.shuffle:
            rows = shard(self.training_rows, max(self.batch_size, 1024), rank, world_size)
            training = PreparedBatches(self._cells, [(-1, r) for r in rows])
        else:
            training = self._training_blocks()
        held_out = [(-1, r) for r in shard(self.validation_rows, 4096, rank, world_size)]
        everything = PreparedBatches(self._cells, [*training.blocks, *held_out])
        everything.made = dict(training.made)  # the first ones are those
        return DataLoader(everything, batch_size=None)


def _check_size_factor_range(size_factors: np.ndarray) -> None:
    positive = size_factors[size_factors > 0]
    if positive.size and positive.max() / positive.min() > SIZE_FACTOR_RATIO:
        raise InputError(
            f"size factors range from {positive.min():g} to {positive.max():g}; no experiment does: mend "
            "the column that data.size_factor_key names"
        )


BATCH_SETTINGS = ("batch_size", "validation_share", "folds", "shuffle")


def from_h5ad(path: str | os.PathLike[str] | None, *, seed: int = 0, **settings: Any) -> CountsDataModule:
    """Cells of an .h5ad file; ``settings`` are those of ``read_h5ad`` and ``CountsDataModule``."""
    batches, reading = _split(settings)
    return CountsDataModule(lambda: read_h5ad(path, seed=seed, **reading), seed=seed, **batches)


def from_zheng(mixture: str, *, seed: int = 0, **settings: Any) -> CountsDataModule:
    """Sorted populations, "mix2" to "mix10"; ``settings`` of ``read_zheng`` and ``CountsDataModule``."""
    batches, reading = _split(settings)
    if mixture not in MIXTURES:
        raise InputError(f"data.mixture={mixture}: choose one of {', '.join(MIXTURES)}")
    populations = MIXTURES[mixture]
    return CountsDataModule(lambda: read_zheng(populations, seed=seed, **reading), seed=seed, **batches)


def from_simulation(
    *, n_cells: int, n_genes: int, n_components: int, simulation_seed: int, seed: int = 0, **settings: Any
) -> CountsDataModule:
    """A simulation; ``settings`` are those of ``simulated_count_data`` and ``CountsDataModule``."""
    batches, drawing = _split(settings)
    return CountsDataModule(
        lambda: simulated_count_data(n_cells, n_genes, n_components, seed=simulation_seed, **drawing),
        seed=seed,
        **batches,
    )


def _split(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    batches = {name: settings.pop(name) for name in BATCH_SETTINGS if name in settings}
    return batches, settings
