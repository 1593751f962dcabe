"""Components joined to groups, as many as one likes, without a new fit."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nbmix.core.joins import Group, Join, JoinTree, group_probabilities, join_tree
from nbmix.data.counts import some_rows
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.evaluation.calibration import log_prior_of
from nbmix.models.base import MixtureModule, Prediction

MOST_CELLS = 100_000  # of a kind of 0.5 % that leaves 500


class JoinEvidence(NamedTuple):
    """What cells say of the joins of components that have not seen them; see ``nbmix.core.joins.join_tree``.

    Of a random ``MOST_CELLS`` of them, where there are more.

    Attributes:
        log_joint: (cells, K) ln pi_k + ln p(x_i | k), nats.
        log_weights: (K,) ln pi_k, or (cells, K).
        size_factors: (cells,).
    """

    log_joint: NDArray[np.float64]
    log_weights: NDArray[np.float64]
    size_factors: NDArray[np.float64]

    @classmethod
    def of(cls, data: CountsDataModule, model: MixtureModule, cells: Prediction) -> JoinEvidence | None:
        """Of a fit, or of new cells.

        None where components have seen the cells, and so cannot say whether two of them are one kind (plain
        EM, amortized inference), or have no likelihood of their own (deep models).
        """
        is_fit = model.n_genes_missing is None
        if is_fit and cells.unseen_log_likelihood[data.training_rows].isnan().any():
            return None
        rows = some_rows(np.arange(data.data.n_cells), MOST_CELLS)
        log_weights = log_prior_of(model.mixture, data.data)
        if log_weights.ndim == 2:
            log_weights = log_weights[rows]
        log_joint = cells.component_log_likelihood[rows].double().numpy() + log_weights
        if not np.isfinite(log_joint).all():
            return None
        return cls(log_joint, log_weights, data.data.size_factors[rows])

    def tree(self) -> JoinTree:
        """The joins."""
        return join_tree(*self)


def joins_table(tree: JoinTree) -> pd.DataFrame:
    """A row a join, in their order; groups by the components that they are made of, as in 0+3."""
    rows: list[dict[str, Any]] = [
        {
            **join._asdict(),
            "first": _shown(join.first),
            "second": _shown(join.second),
            "gap": tree.has_gap(join),
        }
        for join in tree.joins
    ]
    return pd.DataFrame(rows, columns=[*Join._fields, "gap"])


def _shown(group: Group) -> str:
    return "+".join(map(str, group))


def regroup(
    adata: ad.AnnData,
    n_groups: int | str = "auto",
    *,
    key: str = "nbmix",
    key_added: str | None = None,
    copy: bool = False,
) -> ad.AnnData | None:
    """Join the components of a fit to groups, without a new fit.

    Components between which cells show no gap are joined first, see ``nbmix.core.joins``. The probability of
    a group is the sum of those of its components. A group keeps the label of the component that has most of
    its cells.

        obs["nbmix_groups"]                the group of the largest probability
        obs["nbmix_groups_probability"]    that probability
        obsm["X_nbmix_groups"]             (cells, groups) probabilities, in the order of the categories
        uns["nbmix_groups"]                the components of each group, by its label, as in 0+3

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        n_groups: how many; "auto" joins whatever has no gap between it.
        key: what the names of the fit begin with.
        key_added: what the new names begin with; default ``key`` + "_groups".
        copy: write into a copy, and return it.

    Raises:
        InputError: the fit has no joins, or not so many groups.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=300, p=80, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=4, start="kmeans")
    >>> nbmix.regroup(adata, 2)
    >>> adata.obs["nbmix_groups"].nunique(), adata.obsm["X_nbmix_groups"].shape
    (2, (300, 2))
    """
    fit = adata.uns.get(key)
    if not isinstance(fit, dict) or "cuts" not in fit:
        raise InputError(
            f"adata: uns[{key!r}] holds no joins of components; run nbmix.cluster with model='em' and folds "
            "of 2 or more, whose components are judged by cells that they have not seen"
        )
    cuts = json.loads(fit["cuts"])
    if n_groups == "auto":
        with_gap = fit["joins"].loc[fit["joins"]["gap"].astype(bool), "n_groups"]
        n_groups = int(with_gap.iloc[0]) if len(with_gap) else 1
    if not isinstance(n_groups, int | np.integer) or not 1 <= n_groups <= len(cuts):
        raise InputError(
            f"n_groups={n_groups}: this fit can be cut into 1 to {len(cuts)} groups; give one of these "
            "numbers, or auto"
        )
    if copy:
        adata = adata.copy()
    groups, of_components = cuts[n_groups - 1], np.asarray(adata.obsm[f"X_{key}"])
    n_cells = np.bincount(of_components.argmax(1), minlength=of_components.shape[1])
    labels = [str(max(group, key=lambda k: (n_cells[k], -k))) for group in groups]
    q = group_probabilities(of_components, groups)
    added = key_added or f"{key}_groups"
    adata.obs[added] = pd.Categorical.from_codes(q.argmax(1), labels)
    adata.obs[f"{added}_probability"] = q.max(1)
    adata.obsm[f"X_{added}"] = q
    adata.uns[added] = {label: _shown(group) for label, group in zip(labels, groups, strict=True)}
    return adata if copy else None
