"""The DataModule: counts read once, cut into prepared batches of cells."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from nbmix.core.batch import Basis, CellBatch, Precision
from nbmix.core.declared import LARGEST_SEED, Setting, checked
from nbmix.core.folds import CELLS_A_BLOCK, by_origin, fold_blocks, fold_members, fold_shares
from nbmix.data.backed import StreamedBatches
from nbmix.data.batches import CellBatches, CellsOnDevice, PreparedBatches
from nbmix.data.counts import CountData
from nbmix.data.read import read_h5ad
from nbmix.data.sampler import LARGEST_BATCH, BatchSchedule, ShuffledBatches
from nbmix.data.shuffled import PlannedBatches, ShuffledCells
from nbmix.data.simulate import simulated_count_data
from nbmix.data.tenx import read_tenx
from nbmix.data.zheng import MIXTURES, read_zheng
from nbmix.errors import InputError, did_you_mean

NAMES_AT_ONCE = 65536
SIZE_FACTOR_RATIO = 1e9  # between the largest and the smallest: beyond it one of them is not a cell

log = logging.getLogger(__name__)


@checked("data")
class CountsDataModule(pl.LightningDataModule):
    """Cells for training, held-out cells, and all cells for prediction.

    Args:
        read: returns the checked counts; called once.
        validation_share: these cells are chosen without regard to labels.
        folds: training cells are split into this many folds, each batch within one (see ``Mixture``).
        shuffle: draw new batches every epoch; else the same prepared ones.
        dtype: of the products that batches are for, "float32" or "float64".
    """

    def __init__(
        self,
        read: Callable[[], CountData],
        *,
        batch_size: Annotated[
            int | str,
            Setting(
                "The largest number of cells in a batch. With auto random batches hold 64 cells, and up to "
                "1,024 where there are many; an epoch is then at most 32,768 cells, a share of a pass.",
                least=1,
                words=("auto",),
            ),
        ] = CELLS_A_BLOCK,
        validation_share: Annotated[
            float, Setting("The share of the cells that is held out of the fit.", least=0, below=1)
        ] = 0.1,
        folds: int = 1,
        shuffle: bool = False,
        dtype: str = "float64",
        seed: Annotated[
            int,
            Setting(
                "The seed of the subsample, the held-out cells, the folds and the batches.",
                least=0,
                most=LARGEST_SEED,
            ),
        ] = 0,
    ) -> None:
        super().__init__()
        self._read = read
        self.batch_size, self.validation_share = batch_size, validation_share
        self._block_size = CELLS_A_BLOCK if isinstance(batch_size, str) else batch_size
        self.folds, self.shuffle, self.seed = folds, shuffle, seed
        self._precision = Precision.of(torch.float32 if dtype == "float32" else torch.float64)
        self._data: CountData | None = None
        self._there: dict[int, CellBatch] = {}

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
        if data.is_backed:
            levels = data.counts.levels()
            self.basis = Basis.from_census(data.counts.census, levels, data.size_factors, self._precision)
        else:
            self.basis = Basis.of(data.counts, data.size_factors, self._precision)
        self._cells = CellBatches(data, self.basis)
        self._fixed: PreparedBatches | StreamedBatches | None = None
        self._held_out: list[CellBatch] | None = None
        self._fingerprint: str | None = None

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
    def training_origin_cells(self) -> torch.Tensor | None:
        """(origins,) training cells of each batch of the experiment; None where nothing is known of any."""
        cells = self.training_data.origin_cells
        return None if cells is None else torch.from_numpy(cells)

    @property
    def n_labels(self) -> int:
        """Distinct known labels, numbered from 0 in batches; 0 where there are none."""
        self.setup()
        codes = self._cells.codes
        return 0 if codes is None else int(codes.max()) + 1

    @property
    def fingerprint(self) -> str:
        """Of the training cells, their order and their folds: what a fit may only go on with."""
        if self._fingerprint is None:  # every checkpoint holds it
            digest = hashlib.sha256(repr((self.seed, self.folds)).encode())
            for begin in range(0, self.training_rows.size, NAMES_AT_ONCE):
                some = self.training_rows[begin : begin + NAMES_AT_ONCE]
                digest.update(repr(self.data.cell_names[some].tolist()).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def fold_generator(self) -> np.random.Generator:
        """Draws the folds of the training cells: a new one each time, so that they are the same each time."""
        return np.random.default_rng([self.seed, 1])

    @property
    def cell_folds(self) -> np.ndarray:
        """(cells,) fold of each training cell, as its batches have it; -1 for held-out cells and plain EM."""
        folds = np.full(self.data.n_cells, -1)
        folds[self.training_rows] = fold_members(self.training_rows.size, self.folds, self.fold_generator())
        return folds

    @property
    def schedule(self) -> BatchSchedule:
        """How random batches are dealt out."""
        return BatchSchedule.of(self.batch_size, self.training_rows.size, self._rank[1])

    @property
    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _training_blocks(self) -> PreparedBatches | StreamedBatches:
        if self._fixed is None:
            rank, world_size = self._rank
            if self.data.is_backed:
                self._fixed = self._streamed(training=True, held_out=False, keep=True)
                return self._fixed
            blocks = fold_blocks(
                self.data.size_factors[self.training_rows],
                self.folds,
                self._block_size,
                self.fold_generator(),
                rank=rank,
                world_size=world_size,
                origins=self._training_origins,
            )
            self._fixed = PreparedBatches(self._cells, [(f, self.training_rows[rows]) for f, rows in blocks])
        return self._fixed

    @property
    def _training_origins(self) -> np.ndarray | None:
        """(training cells,) which batch of the experiment each is of; None where nothing is known of any."""
        return None if self.data.origins is None else self.data.origins[self.training_rows]

    def training_pass(self) -> Iterable[CellBatch]:
        """This rank's training cells once, in large batches; those of an origin follow each other.

        Those of a file can be iterated over again, and are then read anew.
        """
        if self.data.is_backed:
            return self._streamed(training=True, held_out=False, keep=False)
        return (self._cells.batch(rows) for _, rows in self._shares(self.training_rows, CELLS_A_BLOCK))

    def _shares(self, rows: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
        """This rank's blocks of cells that belong to no fold."""
        sizes, origins = self.data.size_factors, self.data.origins
        parts = by_origin(rows, None if origins is None else origins[rows])
        return [(-1, share) for part in parts for share in fold_shares(part, sizes[part], size, *self._rank)]

    @property
    def _cells_to_predict(self) -> int:
        """Cells in a block of those that nothing is learned from."""
        if not self.shuffle:
            return self._block_size
        return LARGEST_BATCH if isinstance(self.batch_size, str) else max(self.batch_size, LARGEST_BATCH)

    def _streamed(self, *, training: bool, held_out: bool, keep: bool) -> StreamedBatches:
        """Batches of training cells, each in its fold, and of held-out ones, as the file has them."""
        fold = np.full(self.data.n_cells, StreamedBatches.OUTSIDE)
        if training:
            fold[self.training_rows] = self.cell_folds[self.training_rows]
        if held_out:
            fold[self.validation_rows] = -1
        rank, world_size = self._rank
        return StreamedBatches(
            self.data,
            self.basis,
            fold,
            self._cells_to_predict,
            rank=rank,
            world_size=world_size,
            keep=keep,
        )

    def train_dataloader(self) -> DataLoader[CellBatch]:
        if not self.shuffle:
            return DataLoader(self._training_blocks(), batch_size=None)
        read = ShuffledCells(self.data, self.basis) if self.data.is_backed else None
        sampler = ShuffledBatches(
            self.training_rows,
            self.batch_size,
            self.seed,
            *self._rank,
            origins=self._training_origins,
            blocks=None if read is None else read.blocks,
        )
        if read is not None:
            return DataLoader(read, batch_size=None, sampler=PlannedBatches(sampler))
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        cells = self._cells if device.type == "cpu" else CellsOnDevice(self.data, self.basis, device)
        return DataLoader(cells, batch_size=None, sampler=sampler)

    def transfer_batch_to_device(
        self, batch: CellBatch, device: torch.device, dataloader_idx: int
    ) -> CellBatch:
        """``batch`` on ``device``; where it is the same every epoch it stays there until the fit ends."""
        is_fitted = self.trainer is not None and self.trainer.training
        if device.type == "cpu" or self._fixed is None or self.data.is_backed or not is_fitted:
            return batch.to(device)
        if id(batch) not in self._there:  # which no other batch has, since those of _fixed are kept
            self._there[id(batch)] = batch.to(device)
        return self._there[id(batch)]

    def teardown(self, stage: str) -> None:
        """Give the memory of the device back."""
        self._there.clear()

    def val_dataloader(self) -> DataLoader[CellBatch] | list[Any]:
        if not self.validation_rows.size:
            return []
        if self._held_out is None:
            if self.data.is_backed:  # few enough to be kept, and a pass over the file less
                self._held_out = list(self._streamed(training=False, held_out=True, keep=False))
            else:
                blocks = self._shares(self.validation_rows, self._cells_to_predict)
                self._held_out = PreparedBatches(self._cells, blocks, keep=False).all()
        # a list has all that a DataLoader asks of a Dataset
        return DataLoader(self._held_out, batch_size=None)  # type: ignore[arg-type]

    def predict_dataloader(self) -> list[DataLoader[CellBatch]] | DataLoader[CellBatch]:
        """All cells once: training cells with their folds, and held-out ones."""
        if self.data.is_backed:
            self._held_out = None
            return DataLoader(self._streamed(training=True, held_out=True, keep=False), batch_size=None)
        training: PreparedBatches | StreamedBatches
        # networks are told one origin at a time; without folds any model may have made the fit
        if self.shuffle or (self.folds == 1 and self.data.origins is not None):
            blocks = self._shares(self.training_rows, self._cells_to_predict)
            training = PreparedBatches(self._cells, blocks, keep=False)
        else:
            training = self._training_blocks()
            assert isinstance(training, PreparedBatches)
        held_out = self._shares(self.validation_rows, 4096)
        everything = PreparedBatches(self._cells, [*training.blocks, *held_out], keep=False)
        everything.made = list(training.made)  # the first ones are those
        return DataLoader(everything, batch_size=None)


def _check_size_factor_range(size_factors: np.ndarray) -> None:
    positive = size_factors[size_factors > 0]
    if positive.size and positive.max() / positive.min() > SIZE_FACTOR_RATIO:
        raise InputError(
            f"size factors range from {positive.min():g} to {positive.max():g}; no experiment does: mend "
            "the column that data.size_factor_key names"
        )


BATCH_SETTINGS = ("batch_size", "validation_share", "folds", "shuffle", "dtype")


@checked("data", CountsDataModule, read_h5ad)
def from_h5ad(
    path: Annotated[str | os.PathLike[str] | None, Setting("The .h5ad file.")] = None,
    *,
    seed: int = 0,
    **settings: Any,
) -> CountsDataModule:
    """Cells of an .h5ad file; ``settings`` are those of ``read_h5ad`` and ``CountsDataModule``."""
    batches, reading = _split(settings, read_h5ad)
    return CountsDataModule(lambda: read_h5ad(path, seed=seed, **reading), seed=seed, **batches)


@checked("data", CountsDataModule, read_tenx)
def from_tenx(
    path: Annotated[
        str | os.PathLike[str] | None,
        Setting("The folder with the filtered matrix.mtx, or the .h5 file of the filtered matrix."),
    ] = None,
    *,
    seed: int = 0,
    **settings: Any,
) -> CountsDataModule:
    """Cells as Cell Ranger leaves them; ``settings`` are those of ``read_tenx`` and ``CountsDataModule``."""
    batches, reading = _split(settings, read_tenx)
    return CountsDataModule(lambda: read_tenx(path, seed=seed, **reading), seed=seed, **batches)


@checked("data", CountsDataModule, read_zheng)
def from_zheng(
    mixture: Annotated[
        str, Setting("The populations to mix: mix2, mix4 or mix10.", words=tuple(MIXTURES))
    ] = "mix4",
    *,
    path: Annotated[
        str | os.PathLike[str] | None,
        Setting("An .h5ad file that has these populations. With null each of them is downloaded once."),
    ] = None,
    seed: int = 0,
    **settings: Any,
) -> CountsDataModule:
    """Sorted populations, "mix2" to "mix10"; ``settings`` of ``read_zheng`` and ``CountsDataModule``."""
    batches, reading = _split(settings, read_zheng)
    populations = MIXTURES[mixture]
    return CountsDataModule(
        lambda: read_zheng(populations, path=path, seed=seed, **reading), seed=seed, **batches
    )


@checked("data", CountsDataModule, simulated_count_data)
def from_simulation(
    *,
    simulation_seed: Annotated[
        int, Setting("The seed of the counts. data.seed is that of the fit.", least=0, most=LARGEST_SEED)
    ] = 1,
    seed: int = 0,
    **settings: Any,
) -> CountsDataModule:
    """A simulation; ``settings`` are those of ``simulated_count_data`` and ``CountsDataModule``."""
    batches, drawing = _split(settings, simulated_count_data)
    return CountsDataModule(
        lambda: simulated_count_data(seed=simulation_seed, **drawing), seed=seed, **batches
    )


def _split(
    settings: dict[str, Any], reader: Callable[..., CountData]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of ``CountsDataModule``, and those of ``reader``."""
    batches = {name: settings.pop(name) for name in BATCH_SETTINGS if name in settings}
    if unknown := settings.keys() - inspect.signature(reader).parameters.keys():
        near = did_you_mean(min(unknown), inspect.signature(reader).parameters, "data.")
        raise InputError(f"data.{min(unknown)}: there is no such setting of this data{near}")
    return batches, settings
