"""Joins as tables, and other groups of a fit that is there already."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from nbmix.core.joins import Group, Join, JoinTree, PairSeparation, group_probabilities
from nbmix.errors import InputError, naming_the_nearest
from nbmix.output.grouping import Grouping, writable, write_probabilities


def joins_table(tree: JoinTree) -> pd.DataFrame:
    """A row a join, in their order; groups by the components that they are made of, as in 0+3."""
    rows: list[dict[str, Any]] = [
        {
            **join._asdict(),
            "first": group_name(join.first),
            "second": group_name(join.second),
            "gap": tree.has_gap(join),
        }
        for join in tree.joins
    ]
    return pd.DataFrame(rows, columns=[*Join._fields, "gap"])


def separations_table(pairs: Sequence[PairSeparation], gap_level: float) -> pd.DataFrame:
    """A row a pair of groups, by their numbers; p values below ``gap_level`` are gaps."""
    table = pd.DataFrame(pairs, columns=list(PairSeparation._fields))
    return table.assign(gap=table["p_value"] < gap_level)


def group_name(group: Sequence[int]) -> str:
    """A group by its components, as in 0+3."""
    return "+".join(map(str, group))


def how_many(tree: JoinTree, n_groups: int) -> str:
    """What speaks for ``n_groups`` groups: the next join, the next split, and numbers nearly as good.

    The last are those that there would be where a gap needed ten times, or a tenth of, the evidence.
    """
    said = []
    steps = (("next join", n_groups, n_groups - 1), ("next split", n_groups + 1, n_groups + 1))
    for name, before, number in steps:
        join = tree.join_from(before)
        if join is not None:
            gap = "a gap" if tree.has_gap(join) else "no gap"
            said.append(f"the {name}, to {number}, is of {gap} (p = {join.p_value:.2g})")
    fewest, most = tree.n_at(tree.gap_level / 10), tree.n_at(tree.gap_level * 10)
    nearly = sorted({fewest, tree.n_with_gaps, most} - {n_groups})
    said.append(f"gaps alone make {tree.n_with_gaps}")
    if nearly:
        said.append(f"nearly as good: {', '.join(map(str, nearly))}")
    return f"{n_groups} groups: " + "; ".join(said)


@naming_the_nearest
def regroup(
    adata: ad.AnnData,
    n_groups: int | str = "auto",
    *,
    key: str = "nbmix",
    key_added: str | None = None,
    copy: bool = False,
) -> ad.AnnData | None:
    """Join the components of a fit to another number of groups, without a new fit.

    Components between which cells show no gap are joined first, see ``nbmix.core.joins``. The probability of
    a group is the sum of those of its components. A group gets the label of the group of the fit from which
    most of its cells come. If two would get the same label, the one with more of these cells has it, and the
    other gets the next free number.

        obs["nbmix_groups"]                the group of the largest probability
        obs["nbmix_groups_probability"]    that probability; and second, margin and ambiguous of these groups
        obsm["X_nbmix_groups"]             (cells, groups) probabilities, in the order of the categories
        uns["nbmix_groups"]                the components of each group, by its label, as in 0+3

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        n_groups: the number of groups; "auto" joins all groups that have no gap between them.
        key: what the names of the fit begin with.
        key_added: what the new names begin with; default ``key`` + "_groups".
        copy: whether to write into a copy, and return it.

    Raises:
        InputError: the fit has no joins, or cannot be cut into so many groups.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=300, p=80, k=3, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=3)
    >>> nbmix.regroup(adata, 2)
    >>> adata.obs["nbmix_groups"].nunique(), adata.obsm["X_nbmix_groups"].shape
    (2, (300, 2))
    """
    if not isinstance(adata, ad.AnnData):
        raise InputError(f"adata is a {type(adata).__name__}; give the AnnData of a fit")
    fit = adata.uns.get(key)
    if not isinstance(fit, dict) or "cuts" not in fit:
        raise InputError(
            f"adata: uns[{key!r}] holds no joins of components; run nbmix.cluster with folds of 2 or more, "
            "whose components are judged by cells that they have not seen (nbmix.recluster takes them away)"
        )
    if (name := f"X_{key}_components") not in adata.obsm:
        raise InputError(f"adata: lacks obsm[{name!r}], which the fit has written; run nbmix.cluster again")
    added = key_added or f"{key}_groups"
    if added in (key, f"{key}_components"):
        raise InputError(f"key_added={added}: is what the fit itself has written; choose another name")
    other = adata.uns.get(added)
    if isinstance(other, Mapping) and "provenance" in other:
        raise InputError(f"key_added={added}: is another fit, which it would replace; choose another name")
    before = Grouping.of(adata, key)
    assert before.components is not None  # where there are joins
    own = [members(group) for group in before.components.values()]
    cuts = [[tuple(group) for group in cut] for cut in json.loads(fit["cuts"])]
    number: Any = n_groups
    if n_groups == "auto":
        with_gap = fit["joins"].loc[fit["joins"]["gap"].astype(bool), "n_groups"]
        number = int(with_gap.iloc[0]) if len(with_gap) else 1
    is_number = isinstance(number, int | np.integer) and not isinstance(number, bool)
    if not is_number or not (1 <= number <= len(cuts) or number == len(own)):
        raise InputError(
            f"n_groups={n_groups}: this fit can be cut into 1 to {len(cuts)} groups; give one of these "
            "numbers, or auto"
        )
    groups = own if number == len(own) else cuts[number - 1]
    adata = writable(adata, copy)
    q = group_probabilities(np.asarray(adata.obsm[f"X_{key}_components"]), groups)
    numbers = kept_labels(q.argmax(1), before.codes, len(groups), len(before.labels))
    if groups is own:
        numbers = list(range(len(own)))
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    names = _named([numbers[g] for g in order], before.labels)
    write_probabilities(adata, added, q[:, order], names)
    adata.uns[added] = {name: group_name(groups[g]) for name, g in zip(names, order, strict=True)}
    return adata if copy else None


def _named(numbers: Sequence[int], labels: Sequence[str]) -> list[str]:
    """Labels of groups, ascending: those of earlier ones by their position, else the next free number."""
    taken, names = set(labels), []
    for number in numbers:
        name = (
            labels[number]
            if number < len(labels)
            else next(str(n) for n in range(number, number + len(taken) + 1) if str(n) not in taken)
        )
        taken.add(name)
        names.append(name)
    return names


def members(name: str) -> tuple[int, ...]:
    """The components of a group by its name, as in 0+3."""
    return tuple(int(component) for component in name.split("+"))


class Partition(NamedTuple):
    """Groups that components are joined to.

    Attributes:
        name: of the column of obs.
        labels: of the groups.
        groups: the components of each.
    """

    name: str
    labels: list[str]
    groups: tuple[Group, ...]

    @property
    def named(self) -> dict[str, str]:
        """The components of each group, as in 0+3, by its label."""
        return {label: group_name(group) for label, group in zip(self.labels, self.groups, strict=True)}


def partitions_in(adata: ad.AnnData, key: str) -> list[Partition]:
    """The groups of a fit, and those that ``regroup`` has made of them.

    The latter are what says the same of the cells as the components of this fit.

    Raises:
        InputError: the groups of the fit are not those of its components.
    """
    fit = adata.uns[key]
    own = _partition(adata, key, fit.get("groups"), fit.get("labels"))
    if own is None:
        raise InputError(
            f"adata: uns[{key!r}] does not say of what components its groups are made, as after "
            "nbmix.recluster; predict by the fit before it (copy=True keeps that)"
        )
    found, components = [own], sorted(c for group in own.groups for c in group)
    q = adata.obsm.get(f"X_{key}_components")
    for name in adata.uns if q is not None else ():
        other = None if name == key or name not in adata.obs else _partition(adata, name, adata.uns[name])
        if other is None or sorted(c for group in other.groups for c in group) != components:
            continue
        said = np.array(other.labels)[group_probabilities(np.asarray(q), other.groups).argmax(1)]
        if np.array_equal(said, adata.obs[name].astype(str)):
            found.append(other)
    return found


def _partition(adata: ad.AnnData, name: str, named: Any, labels: Any = None) -> Partition | None:
    """By the components of each label; in the order of ``labels``, of the categories, or of their numbers."""
    is_one = isinstance(named, Mapping) and all(
        isinstance(group, str) and re.fullmatch(r"\d+(\+\d+)*", group) for group in named.values()
    )
    if not is_one:
        return None
    column = adata.obs.get(name)
    order = [] if labels is None else [str(label) for label in labels]
    if not order and isinstance(column.dtype, pd.CategoricalDtype):
        order = [str(c) for c in column.cat.categories]
    if set(order) != set(named):  # a label that no cell has is lost where cells are picked
        order = sorted(
            named, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label)
        )
    return Partition(name, order, tuple(members(named[label]) for label in order))


def kept_labels(groups: np.ndarray, earlier: np.ndarray, n_groups: int, n_earlier: int) -> list[int]:
    """A label for each of ``n_groups``: that of the earlier group which most of its cells come from.

    The group with most such cells chooses first; one whose label is taken gets the lowest free number, above
    all earlier ones.

    Args:
        groups, earlier: (cells,) number of the group of each cell, now and before.
        n_groups, n_earlier: how many there are of either, with those without cells.
    """
    table = np.zeros((n_groups, n_earlier), dtype=np.int64)
    np.add.at(table, (groups, earlier), 1)
    labels: dict[int, int] = {}
    for group in np.argsort(-table.max(1), kind="stable").tolist():
        wanted = int(table[group].argmax())
        taken = set(labels.values())
        free = max([table.shape[1] - 1, *taken]) + 1
        labels[group] = free if wanted in taken or not table[group].any() else wanted
    return [labels[group] for group in range(n_groups)]
