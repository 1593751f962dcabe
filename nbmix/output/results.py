"""The run folder: scores, result.h5ad, markers, figures and the report, from a model and its predictions."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from scipy.special import entr

from nbmix.core.batch import CellBatch
from nbmix.core.folds import CELLS_A_BLOCK, fold_blocks
from nbmix.core.likelihood import component_log_likelihood
from nbmix.core.memory import give_back
from nbmix.core.parameters import GenePrior
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.backed import StreamedBatches
from nbmix.data.batches import CellBatches
from nbmix.data.counts import CountData
from nbmix.data.module import CountsDataModule
from nbmix.data.whole_file import whole_file, why_unwritable
from nbmix.evaluation import plots
from nbmix.evaluation.calibration import (
    expected_calibration_error,
    fitted_temperature,
    log_prior_of,
    reliability,
    tempered,
)
from nbmix.evaluation.embedding import embed
from nbmix.evaluation.markers import Markers, compare_with_poisson, find_markers, marker_table
from nbmix.evaluation.metrics import clustering_metrics, log_loss, match_cells, overlap_table
from nbmix.models.base import MixtureModule, Prediction
from nbmix.models.mixture_em import MixtureEM
from nbmix.output.report import NAMED_MARKERS, TOP_MARKERS, ComponentLine, Picture, Report
from nbmix.starts.choice import Choice

log = logging.getLogger(__name__)

MOST_CELLS_SHOWN = 30_000  # in a picture of cells: more cover each other

CAPTIONS = {  # of the report, in its order: file name -> title and caption
    "n_components": (
        "Number of components",
        "Held-out log likelihood of the search with different numbers of components. Ringed: the recommended "
        "one, after which a component brings much less. Bars: standard error of the gain over one less.",
    ),
    "objective_trace": ("Objective", "Nats per cell at every iteration, or epoch."),
    "component_sizes": ("Component sizes", "Cells assigned to each component, and how surely."),
    "posterior_embedding": (
        "Cells",
        "Cells placed by their counts alone; a component has the colour of the label that it matches.",
    ),
    "component_label_table": (
        "Labels and components",
        "Cells of each label in each component; the colour is the share of the label.",
    ),
    "component_label_correlation": (
        "Correlation of labels and components",
        "Over the cells, between having a label and the posterior of a component.",
    ),
    "posterior_histogram": (
        "Largest posterior",
        "How sure each cell's assignment is. Thousands of genes that count as independent make "
        "probabilities near 0 and 1; do not read them as calibrated.",
    ),
    "reliability": (
        "Reliability",
        "Share of cells assigned to the component that matches their label, against the probability of their "
        "assignment; on the diagonal probabilities are what they say. A temperature takes off what genes add "
        "that rise and fall together; it cannot mend components that are none of the labels.",
    ),
    "log_likelihood_margins": (
        "Margins",
        "How much better than any other component its own explains a cell; of held-out cells where there are "
        "any, else of cells that the components have seen.",
    ),
    "log_mean_differences": (
        "Differences in expression",
        "ln mu of every gene in a component minus its mean over the others, sorted.",
    ),
    "marker_gene": (
        "A marker gene",
        "Fitted distribution of its expression in every component (lines), and of the counts over size "
        "factors (dots), which counting widens.",
    ),
    "poisson_comparison": (
        "Poisson and negative binomial",
        "Log likelihood of every gene in the cells of a component under both; genes above the line vary "
        "between the cells by more than counting does.",
    ),
}


@dataclass
class Results:
    """A model, the data it met, and what it says of every cell (in the order of the data)."""

    data: CountsDataModule
    model: MixtureModule
    cells: Prediction
    provenance: dict[str, Any]

    @property
    def responsibilities(self) -> np.ndarray:
        """(cells, K) float64."""
        return self.cells.responsibilities.numpy()

    @property
    def assignments(self) -> np.ndarray:
        """(cells,) the component with the largest responsibility."""
        return self.responsibilities.argmax(1)

    @cached_property
    def temperature(self) -> float | None:
        """Beta of the posteriors, from cells that a copy of the components has not seen.

        None where there are none (plain EM without held-out cells), or an encoder gives the posteriors.
        """
        model, module = self.model, self.data
        if not isinstance(model, MixtureEM):
            return None
        n_cells = module.data.n_cells
        if model.n_genes_missing is not None:  # new cells
            rows, folds = np.arange(n_cells), np.full(n_cells, -1)
        else:
            folds = module.cell_folds
            seen = (folds < 0) & ~np.isin(np.arange(n_cells), module.validation_rows)
            rows = np.flatnonzero(~seen)
        return fitted_temperature(model.mixture, module.data, rows, folds[rows])

    @property
    def calibrated(self) -> NDArray[np.float64] | None:
        """(cells, K) tempered responsibilities, made anew; None where there is no temperature."""
        if self.temperature is None:
            return None
        log_prior = log_prior_of(self.model.mixture, self.data.data)
        return tempered(self.responsibilities, log_prior, self.temperature)

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """(cells,) of each cell's assignment, tempered where there is a temperature."""
        calibrated = self.calibrated
        q = self.responsibilities if calibrated is None else calibrated
        return q[np.arange(len(q)), self.assignments]

    @cached_property
    def statistics(self) -> SufficientStatistics:
        """Of all cells, weighted by their responsibilities; one pass over the counts."""
        q, basis = self.cells.responsibilities, self.data.basis
        statistics = SufficientStatistics.zeros(basis, q.shape[1], "cpu")
        for batch in _all_batches(self.data):
            statistics.add_batch_(batch, basis, q[batch.rows])
        return statistics

    @cached_property
    def markers(self) -> Markers:
        """What tells the components' genes apart."""
        components = self.model.mixture.components()
        return find_markers(
            self.statistics,
            self.data.basis,
            self.total_size,
            type(components)(*(t.cpu() for t in components)),
            _learned_prior(self.model),
        )

    @property
    def total_size(self) -> float:
        """Sum of all size factors."""
        return float(self.data.data.size_factors.sum())


def _all_batches(module: CountsDataModule) -> Iterable[CellBatch]:
    """All cells once, on this rank."""
    data, n_ranks = module.data, module.trainer.world_size if module.trainer else 1
    if n_ranks == 1 and not module.shuffle:  # most of these are there already
        # one DataLoader, though Lightning would allow a list
        return module.predict_dataloader()  # type: ignore[return-value]
    if data.is_backed:
        return StreamedBatches(data, module.basis, np.full(data.n_cells, -1), CELLS_A_BLOCK, keep=False)
    cells = CellBatches(data, module.basis)
    blocks = fold_blocks(data.size_factors, 1, CELLS_A_BLOCK, np.random.default_rng(0))
    return (cells.batch(rows) for _, rows in blocks)


def _learned_prior(model: MixtureModule) -> GenePrior | None:
    """The prior of the components of all cells, where the fit that has just ended learned one."""
    mixture, is_prediction = model.mixture, model.n_genes_missing is not None
    if is_prediction:
        return None
    prior = mixture.prior()
    return None if prior is None else GenePrior(*(t.cpu() for t in prior))


def score(results: Results) -> dict[str, Any]:
    """The flat content of metrics.json; log likelihoods, the ELBO, entropy and log losses are nats per cell.

    Those named tempered are of posteriors at ``temperature``, with assignments and matching as they were.
    """
    data, model, cells = results.data, results.model, results.cells
    metrics: dict[str, Any] = {
        "model": model.kind,
        "n_cells": data.data.n_cells,
        "n_empty_cells": int(data.data.empty_cells.sum()),
        "n_genes": data.data.n_genes,
        "n_components": model.mixture.settings.n_components,
        "n_components_used": len(np.unique(results.assignments)),
        "log_likelihood": float(cells.log_likelihood.mean()),
    }
    held_out = cells.log_likelihood[torch.from_numpy(data.validation_rows)]
    seen = cells.unseen_log_likelihood
    unseen = seen[~seen.isnan()]
    if len(held_out):
        metrics["heldout_log_likelihood"] = float(held_out.mean())
    if len(unseen):
        metrics["crossfit_log_likelihood"] = float(unseen.mean())
        metrics.setdefault("heldout_log_likelihood", float(unseen.mean()))
    if not cells.elbo.isnan().any():
        metrics["elbo"] = float(cells.elbo.mean())
    if model.n_genes_missing is not None:
        metrics["n_genes_missing"] = model.n_genes_missing
    else:
        metrics["n_iterations"] = model.n_iterations
        if model.converged is not None:
            metrics["converged"] = model.converged
    metrics["entropy"] = float(entr(results.responsibilities).sum(1).mean())
    if results.temperature is not None:
        metrics["temperature"] = results.temperature
    if data.data.labels is not None:
        metrics |= clustering_metrics(data.data.labels, results.responsibilities)
        matched = match_cells(data.data.labels, results.responsibilities)
        exact = results.responsibilities.max(1)
        metrics["ece"] = expected_calibration_error(exact, matched.correct)
        calibrated = results.calibrated
        if calibrated is not None:
            metrics["ece_tempered"] = expected_calibration_error(results.probabilities, matched.correct)
            metrics["log_loss_tempered"] = log_loss(calibrated, matched.own_component)
    return metrics


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def write_result(results: Results, path: Path) -> None:
    """result.h5ad: counts, obs["nbmix"], obsm["X_nbmix"], the components in varm, provenance in uns.

    What else the input says of its cells and genes is passed on: obs, var, obsm, varm, and what uns holds
    outside groups. Names that begin with "nbmix", and "X_nbmix", are nbmix's own; labels become
    obs["cell_type"] where the input has no such column.

    Counts that stayed in their file are not written again.
    """
    data, model = results.data.data, results.model
    q = results.responsibilities
    n_components = q.shape[1]
    held_out = np.zeros(data.n_cells, dtype=bool)
    held_out[results.data.validation_rows] = True
    obs = {
        "nbmix": pd.Categorical.from_codes(results.assignments, [str(k) for k in range(n_components)]),
        "nbmix_probability": q.max(1),
        "nbmix_log_likelihood": results.cells.log_likelihood.numpy(),
        "nbmix_held_out": held_out,
        "nbmix_size_factor": data.size_factors,
    }
    if data.labels is not None:
        names, codes = np.unique(data.labels, return_inverse=True)
        obs["cell_type"] = pd.Categorical.from_codes(codes, names)
    components = model.mixture.components()
    own = ad.AnnData(
        None if data.is_backed else data.counts,
        obs=pd.DataFrame(obs, index=data.cell_names),
        var=pd.DataFrame(index=data.gene_names),
        obsm={"X_nbmix": q},
        varm={
            "nbmix_log_mean": components.log_mean.T.cpu().numpy(),
            "nbmix_log_inv_disp": components.log_inv_disp.T.cpu().numpy(),
        },
        uns={
            "nbmix": {
                "model": model.kind,
                "log_weights": model.mixture.log_weights.data[-1].cpu().numpy(),
                "objective": np.array(model.objective),
                "provenance": json.dumps(results.provenance),
            }
        },
    )
    with whole_file(path) as part:
        try:
            _write_h5ad(own if data.annotations is None else _merged(own, data.annotations), part)
        except Exception as error:  # a fit must not be lost to fields that it has not used
            if data.annotations is None or why_unwritable(error) is not None:
                raise
            reason = " ".join(str(error).split())
            log.warning(
                "%s: goes without what else the input holds, which cannot be written (%s)", path, reason
            )
            _write_h5ad(own, part)


def _merged(own: ad.AnnData, given: ad.AnnData) -> ad.AnnData:
    """What nbmix says of cells and genes, and what the input says where it does not collide."""
    theirs = ["cell_type"] if "cell_type" in given.obs and "cell_type" in own.obs else []
    obs = given.obs.set_axis(own.obs_names).filter(regex="^(?!nbmix)")  # of an earlier result
    return ad.AnnData(
        own.X,
        obs=obs.assign(**own.obs.drop(columns=theirs)),
        var=given.var.set_axis(own.var_names),
        obsm={**given.obsm, **own.obsm},
        varm={**given.varm, **own.varm},
        uns={**given.uns, **own.uns},
    )


def _write_h5ad(adata: ad.AnnData, path: Path) -> None:
    logging.getLogger("anndata").setLevel(logging.WARNING)  # it would name every column of strings
    with ad.settings.override(allow_write_nullable_strings=True):
        # level 1: the counts of 100,000 cells take seconds, not a minute
        adata.write_h5ad(path, compression="gzip", compression_opts=1)


def write_outcome(
    results: Results,
    metrics: dict[str, Any],
    folder: Path,
    loggers: Sequence[Logger],
    *,
    max_umap_cells: int,
    choice: Choice | None = None,
) -> None:
    """All files of the run folder that this module makes.

    Args:
        metrics: of ``score``, and what else belongs into metrics.json.
        folder: the run folder.
        loggers: figures are handed to them, too.
        max_umap_cells: see ``embed``.
        choice: of the number of components, where it was left open; also written as n_components.csv.
    """
    if choice is not None:
        write_choice(choice, folder / "n_components.csv")
    write_result(results, folder / "result.h5ad")
    give_back()
    table = named_markers(results)
    give_back()
    write_markers(table, folder / "markers.csv")
    figures = write_figures(
        results, folder / "figures", loggers, max_umap_cells=max_umap_cells, choice=choice
    )
    write_report(results, metrics, table, figures, folder / "report.html")
    write_json(folder / "metrics.json", metrics)  # the last: where it is, all is there


def named_markers(results: Results) -> pd.DataFrame:
    """``marker_table`` of all components and genes, with symbols beside the names where there are any."""
    data = results.data.data
    table = marker_table(results.markers, data.gene_names)
    if data.gene_symbols is not None:
        symbols = dict(zip(data.gene_names, data.gene_symbols, strict=True))
        table.insert(table.columns.get_loc("gene") + 1, "symbol", table["gene"].map(symbols))
    return table


def write_choice(choice: Choice, path: Path) -> None:
    """n_components.csv, see ``Choice.table``."""
    choice.table().to_csv(path, index=False, float_format="%.8g")


def write_markers(table: pd.DataFrame, path: Path) -> None:
    """markers.csv: every component and gene, see ``marker_table``; five significant digits."""
    with whole_file(path) as part:
        table.to_csv(part, index=False, float_format="%.5g")


def write_report(
    results: Results,
    metrics: Mapping[str, Any],
    table: pd.DataFrame,
    figures: Mapping[str, Path],
    path: Path,
) -> None:
    """report.html, from what the other functions made: ``table`` of markers, ``figures`` as PNG files."""
    top = table[table["rank"] <= TOP_MARKERS].copy()
    top["log2_fc_rest_se"] = top["ln_fc_rest_se"] / np.log(2)
    pictures = [Picture(*CAPTIONS[name], figures[name].read_bytes()) for name in CAPTIONS if name in figures]
    page = Report(
        metrics, component_lines(results, table), pictures, top, results.data.data.n_genes, results.provenance
    ).render()
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8")


def component_lines(results: Results, table: pd.DataFrame) -> list[ComponentLine]:
    """Size, certainty, label, neighbour and best markers of every component."""
    q, own, labels = results.responsibilities, results.assignments, results.data.data.labels
    n_cells, n_components = q.shape
    best = (
        table[table["rank"] <= NAMED_MARKERS]
        .groupby("component")["symbol" if "symbol" in table else "gene"]
        .apply(list)
    )
    lines = []
    for k in range(n_components):
        members = own == k
        size = int(members.sum())
        label = None
        if labels is not None and size:
            names, counted = np.unique(labels[members], return_counts=True)
            label = (str(names[counted.argmax()]), float(counted.max() / size))
        nearest = int(results.markers.nearest[k])
        lines.append(
            ComponentLine(
                k,
                size,
                size / n_cells,
                float(q[members].max(1).mean()) if size else None,
                label,
                nearest if nearest >= 0 else None,
                best[k],
            )
        )
    return lines


def write_figures(
    results: Results,
    folder: Path,
    loggers: Sequence[Logger],
    *,
    max_umap_cells: int,
    choice: Choice | None = None,
) -> dict[str, Path]:
    """Draw the figures of a run as PNG files and hand them to the loggers; name -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw(results, max_umap_cells)
    if choice is not None:
        figures["n_components"] = plots.held_out_curve(
            choice.n_components, choice.log_likelihood, choice.gain_error, recommended=choice.recommended
        )
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=plots.DPI)
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure)
            elif isinstance(logger, WandbLogger):
                import wandb

                logger.experiment.log({name: wandb.Image(str(folder / f"{name}.png"))})
    return {name: folder / f"{name}.png" for name in figures}


def draw(results: Results, max_umap_cells: int) -> dict[str, Figure]:
    """File name -> figure."""
    data, q = results.data.data, results.responsibilities
    components = results.model.mixture.components()
    log_mean, log_inv_disp = (t.cpu().numpy() for t in components)
    figures = {
        "posterior_histogram": plots.posterior_histogram(q),
        "component_sizes": plots.component_sizes(q),
        "log_mean_differences": plots.log_mean_differences(log_mean),
    }
    if results.model.objective:
        # EM's first iteration may begin at what has none
        first = results.model.n_iterations - len(results.model.objective) + 1
        iterations = range(first, first + len(results.model.objective))
        series = {results.model.objective_name: results.model.objective}
        figures["objective_trace"] = plots.objective_trace(iterations, series)
    if data.labels is not None:
        table = overlap_table(data.labels, results.assignments, q.shape[1])
        figures["component_label_table"] = plots.component_label_table(*table)
        correct = match_cells(data.labels, q).correct
        curves = {"posterior": reliability(q.max(1), correct)}
        if results.temperature is not None:
            curves["tempered"] = reliability(results.probabilities, correct)
        figures["reliability"] = plots.reliability_diagram(curves)
        figures["component_label_correlation"] = plots.component_label_correlation(data.labels, q)
    shown = _some_rows(np.arange(data.n_cells), MOST_CELLS_SHOWN)
    some = _loaded(data, shown)
    if data.n_cells > max_umap_cells:
        max_umap_cells = 0
    embedding = embed(some.counts, some.size_factors, max_umap_cells=max_umap_cells)
    figures["posterior_embedding"] = plots.posterior_on_embedding(
        embedding.name, embedding.coordinates, q[shown], some.labels
    )
    gene = _telling_gene(results.markers)
    figures["marker_gene"] = plots.latent_distribution(
        data.gene_labels[gene],
        some.counts[:, [gene]].toarray()[:, 0],
        some.size_factors,
        results.assignments[shown],
        log_mean[:, gene],
        log_inv_disp[:, gene],
    )
    both = compare_with_poisson(results.statistics, results.data.basis, results.total_size)
    figures["poisson_comparison"] = plots.poisson_against_negative_binomial(
        both.poisson.numpy(), both.negative_binomial.numpy()
    )
    held_out = results.data.validation_rows
    rows = _some_rows(held_out if held_out.size else np.arange(data.n_cells), plots.MOST_DOTS)
    unseen = _loaded(data, rows)
    margins = component_log_likelihood(
        unseen.counts, unseen.size_factors, log_mean, log_inv_disp, dtype=torch.float32
    )
    figures["log_likelihood_margins"] = plots.log_likelihood_margins(
        margins.numpy(), results.assignments[rows]
    )
    return figures


def _some_rows(rows: np.ndarray, most: int) -> np.ndarray:
    """All of them, or a random choice in their order."""
    if rows.size <= most:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, most, replace=False))


def _loaded(data: CountData, rows: np.ndarray) -> CountData:
    """Some cells in memory."""
    return data.load() if rows.size == data.n_cells else data.select_cells(rows).load()


def _telling_gene(markers: Markers) -> int:
    """Of the components' best markers the one that differs most surely."""
    best = markers.score.nan_to_num(0.0).argmax(1)  # (K,)
    sure = (markers.from_rest.log_fold_change / markers.from_rest.standard_error).nan_to_num(0.0)
    return int(best[sure[torch.arange(len(best)), best].argmax()])
