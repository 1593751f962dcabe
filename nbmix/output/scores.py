"""The numbers of metrics.json, from a result; log likelihoods, entropy and log losses are nats per cell."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import entr

from nbmix.errors import in_one_line
from nbmix.evaluation.calibration import expected_calibration_error
from nbmix.evaluation.metrics import clustering_metrics, log_loss, match_cells
from nbmix.output.results import Results

Score = Callable[[Results], dict[str, Any]]

log = logging.getLogger(__name__)


def score(results: Results, more: Sequence[Score] = ()) -> dict[str, Any]:
    """The flat content of metrics.json: what every run has, and what ``more`` functions find.

    One of ``more`` that fails, or gives what JSON cannot hold, is left out with a warning.
    """
    metrics: dict[str, Any] = {}
    for part in (sizes, groups, likelihoods, progress, certainty, agreement):
        metrics |= part(results)
    for own in more:
        try:
            found = dict(own(results))
            json.dumps(found)
        except Exception as error:  # a fit must not be lost to it
            log.warning("score %s is left out: %s", own.__name__, in_one_line(error))
        else:
            metrics |= found
    return metrics


def sizes(results: Results) -> dict[str, Any]:
    """Of the data and of the model; n_components is the number of groups."""
    data, model = results.data.data, results.model
    return {
        "model": model.kind,
        "n_cells": data.n_cells,
        "n_empty_cells": int(data.empty_cells.sum()),
        "n_genes": data.n_genes,
        "n_components": len(results.groups),
        "n_components_used": len(np.unique(results.assignments)),
        "n_components_fitted": model.mixture.settings.n_components,
    }


def groups(results: Results) -> dict[str, Any]:
    """How many groups have gaps between them, and how far apart the closest two of this result are."""
    if results.joins is None:
        return {}
    found: dict[str, Any] = {"n_groups_with_gaps": results.joins.n_with_gaps}
    pairs = results.separations
    if pairs is not None and len(pairs):
        found |= {"n_pairs_without_gap": int((~pairs["gap"]).sum())}
        found |= {"least_separation": float(pairs["separation"].min())}
    return found


def likelihoods(results: Results) -> dict[str, Any]:
    """Of all cells, of held-out cells, and of cells under components that have not seen them; the ELBO.

    Without held-out cells the last but one stands for the second.
    """
    cells = results.cells
    metrics = {"log_likelihood": float(cells.log_likelihood.mean())}
    held_out = cells.log_likelihood[torch.from_numpy(results.data.validation_rows)]
    seen = cells.unseen_log_likelihood
    unseen = seen[~seen.isnan()]
    if len(held_out):
        metrics["heldout_log_likelihood"] = float(held_out.mean())
    if len(unseen):
        metrics["crossfit_log_likelihood"] = float(unseen.mean())
        metrics.setdefault("heldout_log_likelihood", float(unseen.mean()))
    if not cells.elbo.isnan().any():
        metrics["elbo"] = float(cells.elbo.mean())
    return metrics


def progress(results: Results) -> dict[str, Any]:
    """How far the fit went; of new cells, how many of its genes they lack."""
    model = results.model
    if model.n_genes_missing is not None:
        return {"n_genes_missing": model.n_genes_missing}
    converged = {} if model.converged is None else {"converged": model.converged}
    return {"n_iterations": model.n_iterations, **converged}


def certainty(results: Results) -> dict[str, Any]:
    """Mean entropy of the posteriors, and the inverse temperature that takes off what they are too sure.

    And shares of cells that are in doubt, see ``nbmix.evaluation.doubt``.
    """
    doubt = results.doubt
    metrics = {
        "entropy": float(entr(results.responsibilities).sum(1).mean()),
        "share_ambiguous": float(doubt.is_ambiguous.mean()),
        "share_fits_no_group": float(doubt.fits_no_group.mean()),
    }
    if results.inverse_temperature is not None:
        metrics["inverse_temperature"] = results.inverse_temperature
    return metrics


def agreement(results: Results) -> dict[str, Any]:
    """With known labels, see ``clustering_metrics``, and calibration against them; nothing without labels.

    Those named tempered are of posteriors at ``inverse_temperature``, with assignments and matching as they
    were.
    """
    labels, q = results.data.data.labels, results.responsibilities
    if labels is None:
        return {}
    metrics = clustering_metrics(labels, q)
    matched = match_cells(labels, q)
    metrics["ece"] = expected_calibration_error(q.max(1), matched.correct)
    calibrated = results.calibrated
    if calibrated is not None:
        metrics["ece_tempered"] = expected_calibration_error(results.probabilities, matched.correct)
        metrics["log_loss_tempered"] = log_loss(calibrated, matched.own_component)
    return metrics
