"""The groups that an AnnData holds: read from its fields, and written.

A grouping of the name ``key`` is obs[key], obsm["X_" + key] and uns[key]: that of a fit, or one that
``nbmix.regroup`` has made of the components of a fit. Means, weights and tables of its groups are there where
it is that of a fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from nbmix.errors import InputError, did_you_mean
from nbmix.evaluation.doubt import AMBIGUOUS_BELOW, second_best
from nbmix.evaluation.plots.style import component_colors

REST = "rest"  # all groups that are not named


@dataclass(frozen=True)
class Grouping:
    """Groups of cells.

    Attributes:
        key: what the names of its fields begin with.
        fit: key of the fit that it is of, maybe the same.
        labels: of the groups, in the order of the columns.
        probabilities: (cells, groups).
        components: of each group, by its label, as in 0+3; None where groups are none of components.
    """

    key: str
    fit: str
    labels: tuple[str, ...]
    probabilities: np.ndarray
    components: dict[str, str] | None

    @classmethod
    def of(cls, adata: ad.AnnData, key: str) -> Grouping:
        """Read it.

        Raises:
            InputError: there is no such grouping, or its fields do not fit together.
        """
        if not isinstance(adata, ad.AnnData):
            raise InputError(f"adata is a {type(adata).__name__}; give the AnnData of a fit")
        own, name = adata.uns.get(key), f"X_{key}"
        if not isinstance(own, Mapping) or key not in adata.obs or name not in adata.obsm:
            raise InputError(
                f"adata: lacks obs[{key!r}], obsm[{name!r}] or uns[{key!r}], which a fit writes; run "
                "nbmix.cluster, or give the key of a fit"
            )
        fit = _fit_of(adata, key)
        # of regroup it is the components themselves, as long as its groups are made of these
        components = own.get("groups") if fit == key or _holds_labels(own) else own
        components = None if components is None else {str(k): str(v) for k, v in components.items()}
        probabilities = np.asarray(adata.obsm[name], dtype=np.float64)
        labels = _labels(adata, key, components, probabilities.shape[1])
        if components is not None:  # files have them in alphabetical order
            components = {label: components[label] for label in labels}
        return cls(key, fit, labels, probabilities, components)

    @property
    def is_of_fit(self) -> bool:
        """Whether it is the grouping of the fit itself."""
        return self.key == self.fit

    @property
    def codes(self) -> np.ndarray:
        """(cells,) the position of each cell's group."""
        return self.probabilities.argmax(1)

    def position(self, label: Any) -> int:
        """Of a group.

        Raises:
            InputError: there is no group of that label.
        """
        if str(label) not in self.labels:
            near = did_you_mean(str(label), self.labels)
            raise InputError(
                f"{self.key} has no group {str(label)!r}; its groups are {', '.join(self.labels[:40])}{near}"
            )
        return self.labels.index(str(label))

    def positions(self, groups: Any) -> list[int]:
        """Of one group or several.

        Raises:
            InputError: none, one twice, or one that there is not.
        """
        if isinstance(groups, str | int | np.integer):
            return [self.position(groups)]
        found = [self.position(label) for label in groups]
        if not found or len(set(found)) < len(found):
            raise InputError(f"groups={list(groups)}: name one group or several, each once")
        return found


def _holds_labels(own: Mapping[str, Any]) -> bool:
    return not isinstance(own.get("labels", ""), str)  # which a group of that name has


def _fit_of(adata: ad.AnnData, key: str) -> str:
    fits = [k for k, v in adata.uns.items() if isinstance(v, Mapping) and "provenance" in v]
    if key in fits:
        return key
    near = sorted((fit for fit in fits if key.startswith(fit)), key=len)
    found = near[-1:] or fits
    if len(found) != 1:
        raise InputError(
            f"uns[{key!r}] does not say which fit its groups are of; there are {', '.join(fits) or 'none'}"
        )
    return found[0]


def _labels(
    adata: ad.AnnData, key: str, components: Mapping[str, str] | None, n_groups: int
) -> tuple[str, ...]:
    """In the order of the columns. A selection of cells drops categories that it has none of."""
    own = adata.uns[key]
    candidates: list[Sequence[str]] = [list(map(str, own["labels"]))] if _holds_labels(own) else []
    if components is not None and all(label.isdecimal() for label in components):
        candidates.append(sorted(components, key=int))
    if isinstance(adata.obs[key].dtype, pd.CategoricalDtype):
        candidates.append(adata.obs[key].cat.categories.astype(str).tolist())
    known = None if components is None else set(components)
    for labels in candidates:
        if len(labels) == n_groups and known in (None, set(labels)):
            return tuple(labels)
    raise InputError(
        f"adata: obs[{key!r}], obsm['X_{key}'] and uns[{key!r}] are not of the same groups; run the "
        "function that wrote them again"
    )


def writable(adata: ad.AnnData, copy: bool) -> ad.AnnData:
    """What results are written to: ``adata`` itself, or a copy of it in memory.

    Raises:
        InputError: ``adata`` is a view of a file.
    """
    if copy:
        return adata.to_memory() if adata.isbacked else adata.copy()
    if adata.isbacked and adata.is_view:
        raise InputError(
            "adata is a view of a file, which nothing can be written to; give adata.to_memory(), or set "
            "copy=True"
        )
    return adata


def write_probabilities(adata: ad.AnnData, key: str, q: np.ndarray, labels: Sequence[str]) -> None:
    """Write probabilities (cells, groups) in the order of ``labels``, and what follows from them alone.

    Colours of the groups, as scanpy knows them, are written where there are none of as many.
    """
    second, margin = second_best(q)
    adata.obs[key] = pd.Categorical.from_codes(q.argmax(1), list(labels))
    adata.obs[f"{key}_probability"] = q.max(1)
    adata.obs[f"{key}_second"] = pd.Categorical.from_codes(second, list(labels))
    adata.obs[f"{key}_margin"] = margin
    adata.obs[f"{key}_ambiguous"] = margin < AMBIGUOUS_BELOW
    adata.obsm[f"X_{key}"] = q
    if len(colors_of(adata, key)) != len(labels):
        adata.uns[f"{key}_colors"] = np.array(component_colors(len(labels)))


def colors_of(adata: ad.AnnData, key: str) -> list[str]:
    """One for each category of obs[key], as scanpy keeps them; none where there are none."""
    known = adata.uns.get(f"{key}_colors")
    return list(map(str, known)) if isinstance(known, list | tuple | np.ndarray) else []


def write_grouping(
    adata: ad.AnnData,
    before: Grouping,
    q: np.ndarray,
    labels: Sequence[str],
    components: dict[str, str] | None,
    **of_fit: Any,
) -> None:
    """Put other groups in the place of ``before``; ``of_fit`` are entries of uns where it is that of a fit.

    An entry that is None is taken away.
    """
    write_probabilities(adata, before.key, q, labels)
    if not before.is_of_fit:
        adata.uns[before.key] = {"labels": np.array(labels)} if components is None else dict(components)
        return
    entries = {**adata.uns[before.key], "labels": np.array(labels), "groups": components, **of_fit}
    adata.uns[before.key] = {name: value for name, value in entries.items() if value is not None}


def with_labels(table: pd.DataFrame, labels: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Groups in some columns, by their positions, by their labels; -1 is missing."""
    named = {c: pd.Categorical.from_codes(table[c].to_numpy(), list(labels)) for c in columns if c in table}
    return table.assign(**named)
