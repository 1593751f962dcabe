"""Is there a gap between two groups of cells? The test of ``nbmix.core.joins`` on cells of known truth.

    python benchmarks/gaps.py --data-dir DATA --json gaps.json --plot gaps.png
    python benchmarks/gaps.py --json gaps.json --only null-simulated --levels given --seeds 4 5 6 7
    python benchmarks/gaps.py --json gaps.json --seeds

One kind of cell must show no gap and two kinds one, at every depth and share of the smaller kind. Cases:

    null-simulated  one kind: genes are independent, or a tenth of them follows a programme, a normal or
                    uniform number of each cell; it moves ln mean by a standard deviation of .5, or 1 (strong)
    null-sorted     one sorted population of pbmc_facs, or one cell line of cellbench_5cl_celseq2. cytotoxic_t
                    is left out, for its genes say that it is two kinds
    kind-simulated  two kinds: a twentieth of the genes differs, by ln fold changes of standard deviation 1,
                    or .5 (weak), with and without a programme that both share
    kind-sorted     two populations, or two lines

Simulated genes have ln means of standard deviation 1.5 and ln inverse dispersions of 1 +- .7, the same in
both kinds. The depth is the median; cells vary around it, in a simulation by .4 of its logarithm. Each sorted
population is thinned to the depth, and left out where it is not as deep. A seed draws four fifths of its
cells, so seeds are not independent there. Sorts are not pure and plates of a line differ, so what is found in
one population need not be false.

Two levels ask two questions:

    fit    as used: a default fit of 8 components, and its tree of joins. p is that of the last join, of two
           groups to one. The gap is that of the tree, which may also end with more than two groups
    given  the test alone: two components fitted to the true kinds. Where the truth is one kind, to parts of
           it: the cells at one end of the programme, or else of the first principal component of log counts,
           as many as a smaller kind would have, and the rest

The columns:

    p < .01        runs with a gap at the level that is in use, of all runs
    by the truth   the same where a cell's ratio is that of the densities it was drawn from, at its own place
                   on the programme: no components can show more. Simulated kinds alone
    AUC            chance that p is lower in two kinds than in one, ties half. Simulated kinds against
                   simulated nulls of the same depth, sorted against sorted, at level given of the same share
    at 1 %, 5 %    share of two kinds that have a lower p than all but so many of the nulls; of fewer than
                   100 or 20 nulls than all of them
    a component    runs in which a group of any cut, perhaps a single component, is the smaller kind, with an
                   F1 of at least .8. Where they are fewer than all runs the search has missed it
    two groups     runs in which one of the last two groups is. Fewer than before: joined in the wrong order
    then a gap     of these the runs with a gap. Fewer than before: a miss of the test
    too many       runs with gaps between more than two groups, which in a simulation is false

Every run is added to the JSON file when it ends, and is not repeated, so an interrupted benchmark goes on
with the same command. Tables and picture are of all runs in the file, so that several commands can fill it;
without seeds nothing is run. After a change of the code, or of cells or genes, give another file.
"""

from __future__ import annotations

import os

# before anything starts threads
os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")})

import argparse
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import common
import made
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, f1_score, roc_auc_score, roc_curve

from nbmix import NBMixture
from nbmix.app.command import one_line
from nbmix.core.joins import GAP_LEVEL, join_tree
from nbmix.data.pca import log_pca

N_COMPONENTS = 8  # what a fit of two groups has
GIVEN_ITERATIONS = 3  # let the prior be learned; many more, and EM leaves weak kinds for the programme
FEWEST_SMALL = 3  # cells of a kind; fewer are none
FOUND = 0.8  # F1

SD_LOG_MEAN, MEAN_LOG_INV_DISP, SD_LOG_INV_DISP, SD_LOG_DEPTH = 1.5, 1.0, 0.7, 0.4
SHARE_DIFFERENT, SHARE_PROGRAMME = 0.05, 0.1
SHARE_DRAWN = 0.8  # of a sorted population, so that seeds differ where it is hardly thinned


class Simulated(NamedTuple):
    """Of ln means: the standard deviation of fold changes between kinds, if there are two, and programme."""

    fold_change: float | None = None
    programme: float = 0.0
    is_uniform: bool = False


class Sorted(NamedTuple):
    """Labels of a file, the kind that has most cells first."""

    file: str
    labels: tuple[str, ...]


BLOOD, LINES = "pbmc_facs", "cellbench_5cl_celseq2"

GROUPS: dict[str, dict[str, Simulated | Sorted]] = {
    "null-simulated": {
        "independent": Simulated(),
        "programme": Simulated(None, 0.5),
        "uniform programme": Simulated(None, 0.5, True),
        "strong programme": Simulated(None, 1.0),
    },
    "null-sorted": {
        **{name: Sorted(BLOOD, (name,)) for name in ("b_cells", "cd56_nk", "cd14_monocytes", "naive_t")},
        **{name: Sorted(LINES, (name,)) for name in ("A549", "H2228")},
    },
    "kind-simulated": {
        "kind": Simulated(1.0),
        "kind, programme": Simulated(1.0, 0.5),
        "weak kind": Simulated(0.5),
        "weak kind, programme": Simulated(0.5, 0.5),
    },
    "kind-sorted": {
        "b_cells, monocytes": Sorted(BLOOD, ("b_cells", "cd14_monocytes")),
        "b_cells, naive_t": Sorted(BLOOD, ("b_cells", "naive_t")),
        "cd56_nk, b_cells": Sorted(BLOOD, ("cd56_nk", "b_cells")),
        "A549, H2228": Sorted(LINES, ("A549", "H2228")),
    },
}
CASES = {name: (group, case) for group, cases in GROUPS.items() for name, case in cases.items()}
STRENGTHS = {
    "simulated": ("kind", "kind, programme"),
    "simulated, weak": ("weak kind", "weak kind, programme"),
    "sorted": tuple(GROUPS["kind-sorted"]),
}
LEVELS = ("given", "fit")
COLORS = ("#cc79a7", "#d55e00", "#009e73", "#0072b2", "#56b4e9", "#000000")  # of shares, ascending


# Cells of known truth


class Cells(NamedTuple):
    """What is fitted, and what only scores may see.

    Attributes:
        counts: (cells, genes).
        in_small: (cells,), whether a cell is of the smaller kind; None where there is one kind.
        place: (cells,), on the programme; None where none is known.
        log_density: (cells, 2), of the larger and the smaller kind, up to a constant of the cell.
    """

    counts: sp.csr_matrix
    in_small: np.ndarray | None
    place: np.ndarray | None = None
    log_density: np.ndarray | None = None


def simulate(
    case: Simulated, n_cells: int, n_genes: int, depth: int, share: float, rng: np.random.Generator
) -> Cells:
    """Draw cells, the smaller kind first.

        x_ij ~ NB(mean s_i m_ij, inverse dispersion r_j),    m_ij ~ exp(b_j + d_j [i is small] + w_j u_i)

    with u_i the place on the programme, of variance 1, and m_i scaled to a sum of 1.
    """
    base = rng.normal(0, SD_LOG_MEAN, n_genes)
    inv_disp = np.exp(rng.normal(MEAN_LOG_INV_DISP, SD_LOG_INV_DISP, n_genes))
    changes = rng.normal(0, case.fold_change or 0.0, n_genes) * (rng.random(n_genes) < SHARE_DIFFERENT)
    loads = rng.normal(0, case.programme, n_genes) * (rng.random(n_genes) < SHARE_PROGRAMME)
    place = rng.uniform(-(3**0.5), 3**0.5, n_cells) if case.is_uniform else rng.normal(size=n_cells)
    sizes = depth * rng.lognormal(0, SD_LOG_DEPTH, n_cells)
    in_small = np.arange(n_cells) < (0 if case.fold_change is None else round(share * n_cells))

    def means(is_small: np.ndarray) -> np.ndarray:
        """(cells, genes)"""
        relative = np.exp(base + changes * is_small[:, None] + loads * place[:, None])
        return sizes[:, None] * relative / relative.sum(1, keepdims=True)

    mean = means(in_small)
    counts = rng.poisson(mean * rng.gamma(inv_disp, size=mean.shape) / inv_disp)
    if case.fold_change is None:
        return Cells(as_counts(counts), None, place if case.programme else None)
    log_density = np.empty((n_cells, 2))
    for kind in (0, 1):
        mean = means(np.full(n_cells, bool(kind)))
        log_density[:, kind] = (counts * np.log(mean) - (counts + inv_disp) * np.log(inv_disp + mean)).sum(1)
    return Cells(as_counts(counts), in_small, place, log_density)


def as_counts(counts: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(counts.astype(np.float32))


def draw_sorted(case: Sorted, data_dir: Path, depth: int, share: float, rng: np.random.Generator) -> Cells:
    """Cells of sorted populations, each thinned to the depth.

    Raises:
        LookupError: a population is not as deep, or has too few cells.
    """
    everything = read(data_dir, case.file)
    parts: list[sp.csr_matrix] = []
    for label in case.labels:
        cells = everything[(everything.obs["cell_type"] == label).to_numpy()]
        kept = made.some(cells, rng, n_cells=round(SHARE_DRAWN * cells.n_obs))
        total = made.median_total(kept)
        if total < depth:
            raise LookupError(f"{label} has a median total of {total:.0f}")
        parts.append(made.thinned(kept, depth / total, rng))
    if len(parts) == 1:
        return Cells(parts[0], None)
    large, small = parts
    n_cells = min(int(large.shape[0] / (1 - share)), int(small.shape[0] / share))
    n_small = round(share * n_cells)
    check_small(n_small)
    chosen = [
        part[np.sort(rng.choice(part.shape[0], n, replace=False))]
        for part, n in ((small, n_small), (large, n_cells - n_small))
    ]
    return Cells(sp.vstack(chosen, format="csr"), np.arange(n_cells) < n_small)


@cache
def read(data_dir: Path, file: str) -> ad.AnnData:
    return made.real(data_dir, file)


def parted(cells: Cells, share: float) -> np.ndarray:
    """(cells,), the smaller kind; of one kind the given share of its cells, those at an end of it.

    Raises:
        LookupError: too few cells of one kind.
    """
    counts, place = cells.counts, cells.place
    n_cells = counts.shape[0]
    n_small = round(share * n_cells)
    check_small(n_small)
    if cells.in_small is not None:
        return cells.in_small
    if place is None:
        place = log_pca(counts, totals(counts), 1)[:, 0]
    return np.argsort(np.argsort(place)) >= n_cells - n_small


def check_small(n_small: int) -> None:
    """Raise LookupError where a smaller kind would have too few cells."""
    if n_small < FEWEST_SMALL:
        raise LookupError(f"{n_small} cells of the smaller kind")


def totals(counts: sp.csr_matrix) -> np.ndarray:
    return np.asarray(counts.sum(1), dtype=np.float64).ravel()


# One run


class Joined(NamedTuple):
    """Components of a fit, joined: the table of joins, the last one at its end, and the cells of n groups."""

    joins: pd.DataFrame
    cut: Callable[[int], np.ndarray]

    @property
    def p_value(self) -> float:
        """Of the last join; 1 where one component has all cells."""
        return float(self.joins["p_value"].iloc[-1]) if len(self.joins) else 1.0

    @property
    def n_components(self) -> int:
        """That have cells."""
        return int(self.joins["n_groups"].max()) if len(self.joins) else 1

    @property
    def n_with_gaps(self) -> int:
        """Groups that are left once whatever has no gap between it is joined."""
        with_gap = self.joins.loc[self.joins["gap"].astype(bool), "n_groups"]
        return int(with_gap.iloc[0]) if len(with_gap) else 1


def fit_and_join(counts: sp.csr_matrix, seed: int, labels: np.ndarray | None = None) -> Joined:
    """Fit components, one for each label if there are labels, and join them.

    No other function knows how that is asked for.
    """
    if labels is None:
        # the components themselves, which a group of its own for each leaves in the tree
        mixture = NBMixture(N_COMPONENTS, components_per_group=1, random_state=seed)
    else:
        mixture = NBMixture(2, start="labels", max_iter=GIVEN_ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(counts, labels)
    assert mixture.joins_ is not None  # folds are those of the default
    return Joined(mixture.joins_, lambda n_groups: mixture.cut(n_groups).argmax(1))


def agreement(label: np.ndarray, in_small: np.ndarray) -> float:
    """F1 of the group that is most like the smaller kind."""
    return max(float(f1_score(in_small, label == group)) for group in np.unique(label))


def measure_fit(cells: Cells, seed: int) -> dict[str, Any]:
    """Level "fit"."""
    found = fit_and_join(cells.counts, seed)
    row = {
        "p_value": found.p_value,
        "has_gap": found.n_with_gaps > 1,
        "n_with_gaps": found.n_with_gaps,
        "n_components": found.n_components,
        "p_values": found.joins["p_value"].tolist(),
        "n_cells_of_last": int(found.joins["n_cells"].iloc[-1]) if len(found.joins) else 0,
    }
    if cells.in_small is not None:
        cuts = [found.cut(n) for n in range(1, found.n_components + 1)]
        two = cuts[min(2, len(cuts)) - 1]
        row |= {
            "ari_two": adjusted_rand_score(cells.in_small, two),
            "f1_two": agreement(two, cells.in_small),
            "f1_best": max(agreement(cut, cells.in_small) for cut in cuts),
            "ari_with_gaps": adjusted_rand_score(cells.in_small, cuts[found.n_with_gaps - 1]),
        }
    return row


def measure_given(cells: Cells, seed: int, share: float) -> dict[str, Any]:
    """Level "given", and beside it what the densities themselves say."""
    given = parted(cells, share)
    found = fit_and_join(cells.counts, seed, given)
    kept = agreement(found.cut(found.n_components), given)
    row = {"p_value": found.p_value, "has_gap": found.p_value < GAP_LEVEL, "f1_two": kept}
    if cells.log_density is not None:
        log_weights = np.log([1 - given.mean(), given.mean()])
        log_joint = cells.log_density + log_weights
        joins = join_tree(log_joint, log_weights, totals(cells.counts)).joins
        row |= {
            "p_truth": joins[-1].p_value if joins else 1.0,
            "f1_truth": agreement(log_joint.argmax(1), given),
        }
    return row


class Run(NamedTuple):
    """One measurement; the share is None where a default fit sees one kind."""

    case: str
    level: str
    depth: int
    share: float | None
    seed: int

    @property
    def method(self) -> str:
        """What a ``Record`` tells runs of a case and a seed apart by."""
        return f"{self.level} depth={self.depth} share={self.share}"


def draw(run: Run, arguments: argparse.Namespace) -> Cells:
    """The cells of a run: the same at both levels, where there are two kinds."""
    # a case has random numbers of its own, whichever others are chosen
    key = [run.seed, run.depth, round(1000 * (run.share or 0)), zlib.crc32(run.case.encode())]
    rng, share = np.random.default_rng(key), run.share or 0.0
    case = CASES[run.case][1]
    if isinstance(case, Sorted):
        return draw_sorted(case, arguments.data_dir, run.depth, share, rng)
    return simulate(case, arguments.cells, arguments.genes, run.depth, share, rng)


def measure(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw, fit and judge; or an error, or a reason why there is nothing to measure, in their place."""
    began = time.process_time()
    try:
        cells = draw(run, arguments)
        row = {"n_cells": cells.counts.shape[0], "n_genes": cells.counts.shape[1]}
        if cells.in_small is not None:
            row["n_small"] = int(cells.in_small.sum())
        if run.level == "fit":
            row |= measure_fit(cells, run.seed)
        else:
            assert run.share is not None
            row |= measure_given(cells, run.seed, run.share)
    except LookupError as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # others are still to be measured
        return {"error": one_line(error)}
    return row | {"cpu_seconds": time.process_time() - began}


# All runs


def planned(arguments: argparse.Namespace) -> Iterator[Run]:
    """All runs of a seed before the next seed; the cheap ones first, then from shallow to deep."""
    for seed in arguments.seeds:
        for level in LEVELS:
            for depth in arguments.depths:
                for case, (group, _) in CASES.items():
                    if level not in arguments.levels or group not in arguments.only:
                        continue
                    is_null = group.startswith("null")
                    for share in (None,) if is_null and level == "fit" else arguments.shares:
                        yield Run(case, level, depth, share, seed)


def run_all(record: common.Record, runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Every run that the record does not hold."""
    code = common.code_state()
    for run in runs:
        if record.holds(run.case, run.method, run.seed):
            continue
        row = measure(run, arguments)
        named = {"data": run.case, "group": CASES[run.case][0], "method": run.method, **run._asdict()}
        record.add(named | {"code": code, "load_average": os.getloadavg()[0]} | row)
        print(f"{run.case}, {run.method} seed={run.seed}: {brief(row)}", file=sys.stderr, flush=True)


def brief(row: dict[str, Any]) -> str:
    """A run in one line."""
    if "error" in row or "skipped" in row:
        return row.get("error") or f"skipped, {row['skipped']}"
    return f"p {row['p_value']:.2g}, CPU s {row['cpu_seconds']:.1f}"


def available(arguments: argparse.Namespace) -> list[Run]:
    """Planned runs whose files are there; a line for each file that is not."""
    runs, missing = [], set()
    for run in planned(arguments):
        case = CASES[run.case][1]
        if isinstance(case, Simulated) or is_there(case.file, arguments.data_dir):
            runs.append(run)
        else:
            missing.add(case.file)
    for file in sorted(missing):
        print(f"{file}.h5ad: is not in --data-dir, its cases are skipped", file=sys.stderr)
    return runs


def is_there(file: str, data_dir: Path | None) -> bool:
    return data_dir is not None and (data_dir / f"{file}.h5ad").exists()


def warm_up() -> None:
    """Imports, and what numba compiles."""
    cells = simulate(Simulated(1.0), 60, 80, 500, 0.5, np.random.default_rng(0))
    fit_and_join(cells.counts, 0)
    measure_given(cells, 0, 0.5)


# Tables and the picture


class Roc(NamedTuple):
    """p values of two kinds against those of one.

    Attributes:
        false, true: rates at every threshold, ascending.
        area: below the curve.
    """

    false: np.ndarray
    true: np.ndarray
    area: float

    def at(self, rate: float) -> float:
        """The largest share of true gaps with no more than so many false ones."""
        return float(self.true[self.false <= rate].max())


def roc_of(one_kind: Sequence[dict[str, Any]], two_kinds: Sequence[dict[str, Any]]) -> Roc:
    """Of the rows of either."""
    truth = np.repeat([False, True], [len(one_kind), len(two_kinds)])
    evidence = -np.array([row["p_value"] for row in (*one_kind, *two_kinds)])
    false, true, _ = roc_curve(truth, evidence, drop_intermediate=False)
    return Roc(false, true, float(roc_auc_score(truth, evidence)))


def select(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Rows with these values; a tuple is any of its values."""
    return [
        row
        for row in rows
        if all(row[k] in v if isinstance(v, tuple) else row[k] == v for k, v in wanted.items())
    ]


def nulls_of(
    rows: Sequence[dict[str, Any]], strength: str, level: str, depth: int, share: float
) -> list[dict[str, Any]]:
    """What two kinds are compared with."""
    group = "null-sorted" if strength == "sorted" else "null-simulated"
    # a component of few cells may lose them all, which is no gap, so that shares differ
    return select(rows, group=group, level=level, depth=depth, share=share if level == "given" else None)


def ratio(values: Sequence[bool]) -> str | None:
    """How many of how many."""
    return f"{sum(values)}/{len(values)}" if values else None


def values_of(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """Values in ascending order."""
    return sorted({row[name] for row in rows if row[name] is not None})


def show(rows: Sequence[dict[str, Any]]) -> None:
    depths = values_of(rows, "depth")
    show_nulls(rows, depths)
    show_kinds(rows, depths)
    show_roc(rows, depths)
    show_misses(rows, depths)


def show_nulls(rows: Sequence[dict[str, Any]], depths: Sequence[int]) -> None:
    """Gaps in one kind."""
    lines = []
    for group in ("null-simulated", "null-sorted"):
        names = [*GROUPS[group], tuple(GROUPS[group])]
        for name in names:
            cells = []
            for level in LEVELS:
                for depth in depths:
                    mine = select(rows, case=name, level=level, depth=depth)
                    cells.append(ratio([row["has_gap"] for row in mine]))
            lines.append([name if isinstance(name, str) else f"all {group}", *cells])
    columns = ("one kind", *(f"{level} {depth:,}" for level in LEVELS for depth in depths))
    common.show("False gaps: p < .01 where the truth is one kind; level and depth", columns, lines, width=150)


def show_kinds(rows: Sequence[dict[str, Any]], depths: Sequence[int]) -> None:
    """Gaps in two kinds."""
    lines = []
    for name in (*GROUPS["kind-simulated"], *GROUPS["kind-sorted"]):
        for share in values_of(select(rows, case=name), "share"):
            line = [f"{name}, {share:.1%}"]
            for depth in depths:
                given, fit = (select(rows, case=name, share=share, depth=depth, level=v) for v in LEVELS)
                by_truth = [row["p_truth"] < GAP_LEVEL for row in given if "p_truth" in row]
                gaps = (by_truth, *([row["has_gap"] for row in some] for some in (given, fit)))
                line.append("  ".join(f"{ratio(some) or '-':>5}" for some in gaps))
            lines.append(line)
    title = "True gaps: p < .01 where the truth is two kinds; by the truth, at level given, and at level fit"
    common.show(title, ("two kinds, share", *(f"{depth:,}" for depth in depths)), lines, width=150)


def show_roc(rows: Sequence[dict[str, Any]], depths: Sequence[int]) -> None:
    """AUC and rates."""
    for level in LEVELS:
        lines = []
        for strength, depth in product(STRENGTHS, depths):
            kinds = select(rows, case=STRENGTHS[strength], level=level, depth=depth)
            for share in values_of(kinds, "share"):
                one, two = nulls_of(rows, strength, level, depth, share), select(kinds, share=share)
                line = [f"{strength}, {depth:,}, {share:.1%}", len(one), len(two), None, None, None]
                if one and two:
                    roc = roc_of(one, two)
                    line[3:] = [f"{value:.3f}" for value in (roc.area, roc.at(0.01), roc.at(0.05))]
                gaps = [[row["has_gap"] for row in some] for some in (one, two)]
                lines.append([*line, *(f"{np.mean(some):.3f}" if some else None for some in gaps)])
        columns = ("depth, share", "one kind", "two kinds", "AUC", "at 1 %", "at 5 %")
        common.show(f"ROC of p at level {level}", (*columns, "p < .01, one", "p < .01, two"), lines)


def show_misses(rows: Sequence[dict[str, Any]], depths: Sequence[int]) -> None:
    """Where a default fit lost the smaller kind."""
    lines = []
    for strength, names in STRENGTHS.items():
        for depth in depths:
            kinds = select(rows, case=names, level="fit", depth=depth)
            for share in values_of(kinds, "share"):
                mine = select(kinds, share=share)
                at_two = [row for row in mine if row["f1_two"] >= FOUND]
                lines.append(
                    [
                        f"{strength}, {depth:,}, {share:.1%}",
                        len(mine),
                        sum(row["f1_best"] >= FOUND for row in mine),
                        len(at_two),
                        sum(row["has_gap"] for row in at_two),
                        sum(row["n_with_gaps"] > 2 for row in mine),
                        f"{np.mean([row['ari_two'] for row in mine]):.3f}",
                    ]
                )
    columns = ("depth, share", "runs", "a component", "two groups", "then a gap", "too many", "ARI of two")
    common.show("Where a default fit loses the smaller kind", columns, lines)


def plot(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """ROC curves, if any: a row of panels for each level and strength, a panel a depth, a line a share."""
    depths, shares = values_of(rows, "depth"), values_of(rows, "share")
    curves: dict[tuple[str, str], dict[tuple[int, float], Roc]] = {}
    for level, strength, depth, share in product(LEVELS, STRENGTHS, depths, shares):
        one = nulls_of(rows, strength, level, depth, share)
        two = select(rows, case=STRENGTHS[strength], level=level, depth=depth, share=share)
        if one and two:
            curves.setdefault((level, strength), {})[depth, share] = roc_of(one, two)
    if not curves:
        return None
    colors = dict(zip(shares, COLORS, strict=False))
    figure = Figure(figsize=(1 + 2 * len(depths), 2 * len(curves)), dpi=150, layout="constrained")
    panels = figure.subplots(len(curves), len(depths), sharex=True, sharey=True, squeeze=False)
    for ((level, strength), found), of_depths in zip(curves.items(), panels, strict=True):
        for depth, axes in zip(depths, of_depths, strict=True):
            for share in shares:
                if roc := found.get((depth, share)):
                    axes.plot(roc.false, roc.true, color=colors.get(share), label=f"{share:.1%}", lw=1.2)
            axes.plot([0, 1], [0, 1], ":", color="0.7", lw=1)
            axes.set_title(f"{level}; {strength}; {depth:,}", fontsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=6)
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    lines = {f"{share:.1%}": lines[f"{share:.1%}"] for share in shares if f"{share:.1%}" in lines}
    figure.legend(lines.values(), lines, title="share", loc="outside right upper", frameon=False, fontsize=7)
    figure.supxlabel("share of one kind with as low a p", fontsize=8)
    figure.supylabel("share of two kinds", fontsize=8)
    return figure


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, help="folder with the .h5ad files; without it simulations alone"
    )
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[200, 1000, 5000, 30000], help="median counts"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.005, 0.02, 0.1, 0.5], help="of the smaller kind"
    )
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=[*GROUPS], help="groups of cases")
    parser.add_argument("--levels", choices=LEVELS, nargs="+", default=[*LEVELS])
    parser.add_argument("--seeds", type=int, nargs="*", default=[*range(4)])
    parser.add_argument("--cells", type=int, default=1500, help="of a simulation (default: %(default)s)")
    parser.add_argument("--genes", type=int, default=2000, help="of a simulation (default: %(default)s)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for the figures")
    parser.add_argument("--plot", metavar="PNG", type=Path, help="ROC curves")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    record, runs = common.Record(arguments.json, ("data", "method", "seed")), available(arguments)
    if not all(record.holds(run.case, run.method, run.seed) for run in runs):
        warm_up()
        run_all(record, runs, arguments)
    failed = [row for row in record.rows if "error" in row]
    rows = [row for row in record.rows if "error" not in row and "skipped" not in row]
    show(rows)
    for row in failed:
        print(f"{row['case']}, {row['method']} seed={row['seed']}: {row['error']}", file=sys.stderr)
    if len(codes := {row["code"] for row in rows}) > 1:
        print(f"measured with {len(codes)} states of nbmix/ and conf/: {', '.join(sorted(codes))}")
    if arguments.plot and (figure := plot(rows)) is not None:
        figure.savefig(arguments.plot)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
