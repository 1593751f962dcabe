"""The components of a fit that has ended, joined to groups."""

from __future__ import annotations

import numpy as np

from nbmix.core.joins import JoinEvidence, pairwise
from nbmix.data.counts import some_rows
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.evaluation.calibration import log_prior_of
from nbmix.models.base import MixtureModule, Prediction
from nbmix.starts.choice import Range

MOST_CELLS = 100_000  # of a kind of 0.5 % that leaves 500


def join_components(
    data: CountsDataModule,
    model: MixtureModule,
    cells: Prediction,
    allowed: Range | None = None,
    *,
    to_groups: bool = True,
) -> None:
    """Find the joins of a model's components, and join them to the groups that it was asked for.

    Args:
        data: the cells of the fit.
        model: fitted to them.
        cells: what it says of all of them.
        allowed: numbers of groups, of which as many are taken as have gaps between them; None where the model
            was asked for a number.
        to_groups: false: each component stays a group, and the joins are only known.

    Raises:
        InputError: the cells cannot tell which components belong together.
    """
    n_components, n_groups = model.mixture.settings.n_components, model.mixture.settings.n_groups
    evidence = model.join_evidence or evidence_of(data, model, cells)
    if model.joins is None and evidence is not None:
        model.joins = evidence.tree()
    if to_groups:
        tree = model.joins
        if tree is None and n_components != n_groups:
            raise InputError(
                "model.components_per_group: the likelihoods of the cells are not finite, and do not say "
                "which components belong together; set it to 1"
            )
        if allowed is not None and tree is not None:
            n_groups = min(max(tree.n_with_gaps, allowed.least), allowed.most, n_components)
            model.plain |= {"n_components": n_groups, "components_per_group": n_components / n_groups}
        model.join(n_groups or n_components, cells.responsibilities.numpy())
    if evidence is not None:
        model.separations = pairwise(*evidence, model.groups)


def evidence_of(data: CountsDataModule, model: MixtureModule, cells: Prediction) -> JoinEvidence | None:
    """What cells of a fit say of the joins of components that have not seen them.

    Of a random ``MOST_CELLS`` of them where there are more. None where components have seen all cells, which
    then cannot say whether two of them are one kind (plain EM, amortized inference), or have no likelihood of
    their own (deep models).
    """
    if cells.unseen_log_likelihood[data.training_rows].isnan().any():
        return None
    rows = some_rows(np.arange(data.data.n_cells), MOST_CELLS)
    log_weights = log_prior_of(model.mixture, data.data)
    if log_weights.ndim == 2:
        log_weights = log_weights[rows]
    log_joint = cells.component_log_likelihood[rows].double().numpy() + log_weights
    if not np.isfinite(log_joint).all():
        return None
    return JoinEvidence(log_joint, log_weights, data.data.size_factors[rows])
