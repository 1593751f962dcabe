"""Which batch of the experiment a cell comes from, as columns of obs tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pandas as pd

from nbmix.core.declared import Setting
from nbmix.data.counts import CountData
from nbmix.errors import InputError

BatchKey = Annotated[
    str | Sequence[str] | None,
    Setting(
        "The column of obs that holds the batch, donor or protocol of each cell. "
        "Genes have an offset in each batch. With several columns each combination of "
        "values is a batch. With null there are no batches."
    ),
]

CROSSED = " | "  # between the values of several columns

FEWEST_CELLS = 2  # of a batch: of one cell all that is its own could be the batch's

CELLS_A_BATCH = 5  # on average; else it is no batch


def read_origins(obs: pd.DataFrame, where: str, key: BatchKey) -> tuple[np.ndarray, tuple[str, ...]]:
    """(cells,) place of each cell's batch among the names, and these, sorted.

    Raises:
        InputError: a column that is not there, lacks values, or measures something.
    """
    columns = [key] if isinstance(key, str) else list(key or ())
    if not columns:
        raise InputError("data.batch_key is empty; name a column of obs, or set it to null")
    read = [_read_column(obs, where, column) for column in columns]
    values = np.array([CROSSED.join(of_cell) for of_cell in zip(*read, strict=True)])
    names, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int64), tuple(names.tolist())


def has_columns(obs: pd.DataFrame, key: BatchKey) -> bool:
    """Whether all columns that a key names are there."""
    columns = [key] if isinstance(key, str) else list(key or ())
    return all(column in obs for column in columns)


def _read_column(obs: pd.DataFrame, where: str, key: str) -> list[str]:
    if key not in obs:
        names = ", ".join(map(str, obs.columns)) or "none"
        raise InputError(
            f"{where}: obs has no column {key!r}; set data.batch_key to one of its columns ({names})"
        )
    column, field = obs[key], f"{where}: obs[{key!r}]"
    if missing := int(column.isna().sum()):
        raise InputError(
            f"{field} misses the batch of {missing} of {len(column)} cells; name it, drop these cells, or "
            "set data.batch_key=null"
        )
    if pd.api.types.is_float_dtype(column):
        values = column.to_numpy(np.float64)
        measured = values[values != np.round(values)]
        if measured.size:
            raise InputError(
                f"{field} holds measured numbers (such as {measured[0]:g}); a batch is a name: make "
                "classes of them, or choose another column for data.batch_key"
            )
        column = column.astype(np.int64)
    return column.astype(str).tolist()


def check_origins(data: CountData) -> None:
    """Raise ``InputError`` where batches of a fit cannot be told apart, or are none."""
    n_cells = data.origin_cells
    if n_cells is None:
        return
    names = data.origin_names
    if len(names) == 1:
        raise InputError(
            f"data.batch_key: all {data.n_cells} cells are of one batch, {names[0]!r}; set it to null"
        )
    if len(names) * CELLS_A_BATCH > data.n_cells:
        raise InputError(
            f"data.batch_key: makes {len(names)} batches of {data.n_cells} cells; a batch is of many cells, "
            "such as a donor, a run or a protocol: choose another column"
        )
    if few := [name for name, n in zip(names, n_cells, strict=True) if n < FEWEST_CELLS]:
        raise InputError(
            f"data.batch_key: {len(few)} of {len(names)} batches have a single cell (such as {few[0]!r}), "
            "which cannot be told from what is particular to its batch; drop these cells, or join batches"
        )
