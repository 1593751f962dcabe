"""The run folder: scores, result.h5ad and figures from a fitted model and its predictions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from nbmix.data.module import CountsDataModule
from nbmix.evaluation import plots
from nbmix.evaluation.embedding import embed
from nbmix.evaluation.metrics import clustering_metrics, overlap_table
from nbmix.models.base import MixtureModule, Prediction

MOST_CELLS_SHOWN = 30_000  # in a picture of cells: more cover each other


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


def gather_predictions(predictions: Any, n_cells: int) -> Prediction:
    """Put batches of all ranks back in the order of the data; the same on every rank."""
    batches = [Prediction(*(t.cpu() for t in p)) for p in predictions or []]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shards: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shards, batches)
        batches = [batch for shard in shards for batch in shard]
    joined = Prediction(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    if not torch.equal(joined.rows.sort().values, torch.arange(n_cells)):
        raise RuntimeError("predictions do not hold every cell once")
    order = joined.rows.argsort()
    return Prediction(*(part[order] for part in joined))


def score(results: Results) -> dict[str, Any]:
    """The flat content of metrics.json; log likelihoods and the ELBO are nats per cell."""
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
    if data.data.labels is not None:
        metrics |= clustering_metrics(data.data.labels, results.responsibilities)
    return metrics


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def write_result(results: Results, path: Path) -> None:
    """result.h5ad: counts, obs["nbmix"], obsm["X_nbmix"], the components in varm, provenance in uns.

    Counts that stayed in their file are not written again.
    """
    data, model = results.data.data, results.model
    q = results.responsibilities
    n_components = q.shape[1]
    held_out = np.zeros(data.n_cells, dtype=bool)
    held_out[results.data.validation_rows] = True
    obs = {
        "nbmix": pd.Categorical(results.assignments.astype(str), [str(k) for k in range(n_components)]),
        "nbmix_probability": q.max(1),
        "nbmix_log_likelihood": results.cells.log_likelihood.numpy(),
        "nbmix_held_out": held_out,
        "size_factor": data.size_factors,
    }
    if data.labels is not None:
        obs["cell_type"] = pd.Categorical(data.labels)
    components = model.mixture.components()
    adata = ad.AnnData(
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
    part = path.with_suffix(".part")
    # level 1: the counts of 100,000 cells take seconds, not a minute
    adata.write_h5ad(part, compression="gzip", compression_opts=1)
    os.replace(part, path)


def write_figures(results: Results, folder: Path, loggers: Sequence[Logger], *, max_umap_cells: int) -> None:
    """Draw the figures of a run as PNG files and hand them to the loggers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(results, max_umap_cells).items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure)
            elif isinstance(logger, WandbLogger):
                import wandb

                logger.experiment.log({name: wandb.Image(str(folder / f"{name}.png"))})


def draw(results: Results, max_umap_cells: int) -> dict[str, Figure]:
    """File name -> figure."""
    data, q = results.data.data, results.responsibilities
    figures = {
        "posterior_histogram": plots.posterior_histogram(q),
        "log_mean_differences": plots.log_mean_differences(
            results.model.mixture.components().log_mean.cpu().numpy()
        ),
    }
    if results.model.objective:
        # EM's first iteration may begin at responsibilities, and then has no objective
        first = results.model.n_iterations - len(results.model.objective) + 1
        iterations = range(first, first + len(results.model.objective))
        series = {results.model.objective_name: results.model.objective}
        figures["objective_trace"] = plots.objective_trace(iterations, series)
    if data.labels is None:
        figures["component_sizes"] = plots.component_sizes(q)
    else:
        table = overlap_table(data.labels, results.assignments, q.shape[1])
        figures["component_label_table"] = plots.component_label_table(*table)
    shown = np.arange(data.n_cells)
    if data.n_cells > MOST_CELLS_SHOWN:
        shown = np.sort(np.random.default_rng(0).choice(data.n_cells, MOST_CELLS_SHOWN, replace=False))
    if data.n_cells > max_umap_cells:
        max_umap_cells = 0
    some = data.load() if shown.size == data.n_cells else data.select_cells(shown).load()
    embedding = embed(some.counts, some.size_factors, max_umap_cells=max_umap_cells)
    figures["posterior_embedding"] = plots.posterior_on_embedding(
        embedding.name, embedding.coordinates, q[shown], some.labels
    )
    return figures
