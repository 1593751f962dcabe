"""Groups against the batches that their cells come from: a table, and what in it deserves a look."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import normalized_mutual_info_score

from nbmix.data.from_anndata import DEFAULT_LABEL_KEY
from nbmix.output.results import Results

NEARLY_ALONE = 0.95  # share of a group's cells from one batch

FEWEST_CELLS = 20  # of a group of which anything is said

LARGER_THAN_EXPECTED = 1.2  # times the share of the batch in all cells

MOST_VALUES = 50  # of a column that might be one of batches

EXPLAINED = 0.5  # normalised mutual information of a column and of two groups that a batch may part

ELSEWHERE = 0.1  # of the cells of a batch are in other groups: a value of a kind is in its own alone


class Alone(NamedTuple):
    """A group nearly all of whose cells are of one batch, and the shares of that in it and in all cells."""

    group: int
    batch: str
    share: float
    of_all: float

    @property
    def line(self) -> str:
        return (
            f"Group {self.group}: {self.share:.0%} of its cells are of batch {self.batch}, which has "
            f"{self.of_all:.0%} of all cells. It is a kind that was caught there alone, or a difference that "
            "offsets of genes shared by all groups do not explain."
        )


class Split(NamedTuple):
    """A column of obs that tells two neighbouring groups apart, though it is none of kinds."""

    column: str
    groups: tuple[int, int]

    @property
    def line(self) -> str:
        one, other = self.groups
        return (
            f"obs[{self.column!r}] tells groups {one} and {other} apart, and its values are in other groups "
            "as well. The fit has not used it; if it is a batch, fit with it as the batch key "
            "(data.batch_key, in Python batch_key)."
        )


def batches_table(results: Results) -> pd.DataFrame | None:
    """Cells of each group (row) from each batch (column); None where nothing is known of batches."""
    data = results.data.data
    if data.origins is None:
        return None
    table = np.zeros((len(results.groups), len(data.origin_names)), dtype=np.int64)
    np.add.at(table, (results.assignments, data.origins), 1)
    return pd.DataFrame(table, index=pd.RangeIndex(len(table), name="group"), columns=data.origin_names)


def groups_of_one_batch(table: pd.DataFrame) -> list[Alone]:
    """Groups nearly all of whose cells are of one batch, from a ``batches_table``."""
    cells = table.to_numpy()
    of_all = cells.sum(0) / max(1, cells.sum())
    found = []
    for group, row in enumerate(cells):
        batch = int(row.argmax())
        share = row[batch] / max(1, row.sum())
        is_much = share >= NEARLY_ALONE and share > LARGER_THAN_EXPECTED * of_all[batch]
        if row.sum() >= FEWEST_CELLS and is_much:
            found.append(Alone(group, str(table.columns[batch]), float(share), float(of_all[batch])))
    return found


def splitting_columns(
    obs: pd.DataFrame, assignments: np.ndarray, neighbours: list[tuple[int, int]]
) -> list[Split]:
    """Columns with few values that tell two groups apart, each value of which is in other groups as well.

    A column of kinds has values of one group each.

    Args:
        obs: of the cells, candidates alone.
        assignments: (cells,) groups.
        neighbours: pairs of groups that one kind may have been cut into.
    """
    found = []
    for name in obs.columns:
        codes, values = pd.factorize(obs[name].astype(str))
        if not 2 <= len(values) <= MOST_VALUES:
            continue
        for one, other in neighbours:
            pair = np.isin(assignments, (one, other))
            sizes = [int((assignments == group).sum()) for group in (one, other)]
            if min(sizes) < FEWEST_CELLS:
                continue
            if normalized_mutual_info_score(codes[pair], assignments[pair]) < EXPLAINED:
                continue
            main = [np.bincount(codes[assignments == group]).argmax() for group in (one, other)]
            elsewhere = [float((~pair[codes == value]).mean()) for value in main]
            if main[0] != main[1] and min(elsewhere) >= ELSEWHERE:
                found.append(Split(str(name), (one, other)))
                break
    return found


def _of_fits(obs: pd.DataFrame) -> set[str]:
    """Columns that fits, or groups made of them, have left in obs: these follow groups as no batch does."""
    ends = ("", "_second", "_ambiguous", "_held_out", "_fits_no_group")
    return {f"{key}{end}" for key in obs.columns if f"{key}_probability" in obs for end in ends}


def batch_lines(results: Results, obs: pd.DataFrame | None = None) -> list[str]:
    """What is to be said of groups and batches: in the report, and by ``nbmix.cluster``.

    Where no batch is known, columns of obs are looked at.

    Args:
        obs: of the cells, where the data of ``results`` does not hold it.
    """
    table = batches_table(results)
    if table is not None:
        return [alone.line for alone in groups_of_one_batch(table)]
    data = results.data.data
    if obs is None and data.annotations is not None:
        obs = data.annotations.obs
    if obs is None or len(results.groups) < 2:
        return []
    names = [name for name in obs.columns if name != DEFAULT_LABEL_KEY and name not in _of_fits(obs)]
    named = [name for name in names if not pd.api.types.is_float_dtype(obs[name])]
    labels = data.labels
    if labels is not None:
        named = [name for name in named if not np.array_equal(obs[name].astype(str).to_numpy(), labels)]
    nearest = results.markers.nearest.tolist()
    pairs = sorted({(min(k, n), max(k, n)) for k, n in enumerate(nearest) if n >= 0})
    return [split.line for split in splitting_columns(obs[named], results.assignments, pairs)]
