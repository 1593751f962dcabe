"""Groups of components: which to join, in which order, and what is between those that are left.

A mixture spends its components where the likelihood gains most, and cuts a large kind along its programmes
before it gives a rare kind a component of its own. So more components are fitted than there are kinds, and
those are joined between which the cells show no gap (see ``nbmix.core.separation``). A group is the weighted
sum of its components, a small mixture:

    pi_A = sum_{c in A} pi_c,    p(x | A) = sum_{c in A} pi_c p(x | c) / pi_A.

*Order.* While there are two groups, that pair is joined which has the lowest (has a gap, score), with

    score_AB = D_AB - ln max(crossing_AB, 0.001)    [+ ln(n_A n_B / (n_A + n_B)) among pairs with a gap]

So what has no gap goes first, the least separate before others; and of gaps those that are small and between
few cells. Before all others goes a group of less than ``FEW_CELLS`` that has no gap: so few can seldom show
one, and nobody asks for a group of them. The crossing share is that of all neighbours, in the space of log
likelihood ratios, of the cells of one group that are cells of the other, for the group with fewer neighbours.
A cell has 15, or as many as its component has others. Gaps are those of *groups*, tested again after every
join: between two components of one kind, most of the cells that are between them lie in a third.

*Which D?* As long as there are pairs without a gap it is the separation of two *components*, averaged over
pairs of them: the programmes of a group would hide how far it is from others. Once all pairs have gaps, each
group stands for a *kind*, and D is the separation of the kinds that two components are in. A component at the
far end of a programme says how long that is, not how far its kind is from another; but what is joined across
a gap is no programme, and hides nothing.

Joining what has no gap is an idea of Hennig 2010, one fit and all its joins that of Baudry et al. 2010.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from nbmix.core.separation import FEWEST_CELLS, gap_p_value, inflation, neighbours, ratio_space, separation
from nbmix.errors import InputError

Group = tuple[int, ...]

GAP_LEVEL = 0.01  # a usual level

FEW_CELLS = 10  # of a group, which then has to show a gap to be one of those that are asked for

N_NEIGHBOURS = 15  # of a cell; 10 to 30 make no difference

LEAST_CROSSING = 1e-3  # share of neighbours, below which there is nothing left to tell apart

MOST_CELLS = 20_000  # whose neighbours are sought, in 3 s; those of a kind of 1 % are 3,000


class Join(NamedTuple):
    """The join of two groups.

    Attributes:
        n_groups: before it.
        first, second: the components of either group, ascending; ``first`` has the lowest.
        separation: D in standard deviations, see ``separation``, the mean over pairs of one's and the other's
            components.
        crossing: share of the neighbours of the cells of one that are cells of the other, 0 to 1.
        p_value: that there is no gap between the two groups.
        n_cells: of the smaller group.
    """

    n_groups: int
    first: Group
    second: Group
    separation: float
    crossing: float
    p_value: float
    n_cells: int


class PairSeparation(NamedTuple):
    """What is between two groups, by their numbers; the rest as in ``Join``."""

    first: int
    second: int
    separation: float
    p_value: float
    n_cells: int


@dataclass(frozen=True)
class JoinTree:
    """All joins of a fit, from as many groups as components have cells, down to one.

    Attributes:
        joins: in their order.
        cuts: the groups of each cut, cuts[n - 1] has n; each in the order of their cells, the most first.
        gap_level: p value below which there is a gap.
    """

    joins: tuple[Join, ...]
    cuts: tuple[tuple[Group, ...], ...]
    gap_level: float = GAP_LEVEL

    @property
    def most_groups(self) -> int:
        return len(self.cuts)

    def has_gap(self, join: Join) -> bool:
        """Whether there is a gap between the two groups of a join."""
        return join.p_value < self.gap_level

    @property
    def n_with_gaps(self) -> int:
        """How many groups there are once no pair without a gap is left."""
        return self.n_at(self.gap_level)

    def n_at(self, level: float) -> int:
        """How many groups there are before the first of these joins whose p value is below ``level``."""
        return next((join.n_groups for join in self.joins if join.p_value < level), 1)

    def join_from(self, n_groups: int) -> Join | None:
        """The join of ``n_groups`` groups to one fewer; None where there is none."""
        return next((join for join in self.joins if join.n_groups == n_groups), None)

    def groups(self, n_groups: int) -> tuple[Group, ...]:
        """The components, ascending, of each of ``n_groups`` groups; number 0 has most cells.

        Raises:
            InputError: where there are not so many.
        """
        is_number = isinstance(n_groups, int | np.integer) and not isinstance(n_groups, bool)
        if not is_number or not 1 <= n_groups <= self.most_groups:
            raise InputError(
                f"n_groups={n_groups}: this fit can be cut into 1 to {self.most_groups} groups; give one of "
                "these numbers, or auto"
            )
        return self.cuts[n_groups - 1]

    def plain(self) -> dict[str, Any]:
        """Lists and numbers alone, as a checkpoint or JSON keeps them."""
        return {
            "joins": [
                {**join._asdict(), "first": list(join.first), "second": list(join.second)}
                for join in self.joins
            ],
            "cuts": [[list(group) for group in cut] for cut in self.cuts],
            "gap_level": self.gap_level,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> JoinTree:
        """The tree that ``plain`` came from."""
        joins = [
            Join(**{**join, "first": tuple(join["first"]), "second": tuple(join["second"])})
            for join in plain["joins"]
        ]
        cuts = (tuple(tuple(group) for group in cut) for cut in plain["cuts"])
        return cls(tuple(joins), tuple(cuts), plain["gap_level"])


def group_log_joint(log_joint: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
    """(cells, groups), ln of the sum over each group's components of exp(log_joint), (cells, C).

    So ln pi_c + ln p(x_i | c) becomes ln pi_A + ln p(x_i | A), and ln weights (C,) become ln pi_A (groups,).
    """
    return np.stack([np.logaddexp.reduce(log_joint[..., list(group)], axis=-1) for group in groups], axis=-1)


def group_probabilities(probabilities: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
    """(cells, groups), the sum over each group's components of ``probabilities`` (cells, C)."""
    if all(group == (number,) for number, group in enumerate(groups)):
        return probabilities
    sums = np.stack([probabilities[:, list(group)].sum(1) for group in groups], 1)
    return np.minimum(sums, 1.0)  # those of a network are rounded to float32


def group_components(
    log_mean: np.ndarray, log_inv_disp: np.ndarray, log_weights: np.ndarray, groups: Sequence[Group]
) -> tuple[np.ndarray, np.ndarray]:
    """ln mu and ln r (groups, genes) of the Gamma with the mean and the variance of a group's expression.

    With w_c = pi_c / pi_A the expression of a gene in group A is a mixture of its components' Gammas:

        mu_A = sum_c w_c mu_c,    r_A = mu_A^2 / (sum_c w_c mu_c^2 (1 + 1 / r_c) - mu_A^2)

    Args:
        log_mean, log_inv_disp: (C, genes).
        log_weights: (C,) ln pi.
    """
    means, inv_disps = [], []
    for group in groups:
        some = list(group)
        if len(some) == 1:
            means.append(log_mean[some[0]])
            inv_disps.append(log_inv_disp[some[0]])
            continue
        log_w = log_weights[some] - np.logaddexp.reduce(log_weights[some])
        own = log_mean[some] + log_w[:, None]
        mean = np.logaddexp.reduce(own, axis=0)
        relative = np.exp(log_mean[some] - mean)  # mu_c / mu_A
        # a sum of what is not negative: of the components' own variances, and of that between them
        within = relative**2 * np.exp(-log_inv_disp[some])
        variance = np.exp(log_w) @ (within + (relative - 1) ** 2)
        means.append(mean)
        inv_disps.append(-np.log(variance))
    return np.stack(means), np.stack(inv_disps)


class JoinEvidence(NamedTuple):
    """What cells say of the joins of components that have not seen them.

    Attributes:
        log_joint: (cells, C) ln pi_c + ln p(x_i | c), nats.
        log_weights: (C,) ln pi_c, or (cells, C) where cells have those of different copies.
        size_factors: (cells,).
    """

    log_joint: np.ndarray
    log_weights: np.ndarray
    size_factors: np.ndarray

    def tree(self) -> JoinTree:
        """All joins."""
        return join_tree(*self)


def join_tree(
    log_joint: np.ndarray,
    log_weights: np.ndarray,
    size_factors: np.ndarray,
    *,
    gap_level: float = GAP_LEVEL,
    seed: int = 0,
) -> JoinTree:
    """Join components, two groups at a time, until there is one.

    A component that is most likely in no cell shows nothing: it belongs to the group of that component whose
    cells give it most of its probability (the largest, where none does), from the beginning and without a
    join. Cells without counts (size factor 0) show nothing either.

    Args:
        log_joint, log_weights, size_factors: see ``JoinEvidence``.
        gap_level: p value below which two groups have a gap between them.
        seed: of the choice of cells whose neighbours are sought, where there are more than ``MOST_CELLS``.
    """
    components = JudgedCells.of(log_joint, log_weights, size_factors)
    edges = neighbour_pairs(components, np.random.default_rng(seed))
    measured = JoinOrder(component_distances(components), edges, components.n_cells)
    groups = first_groups(components)
    cells = components.summed(groups)
    found: dict[tuple[Group, Group], Gap] = {}
    joins, cuts = [], [by_size(groups, cells.n_cells)]
    order = measured
    while len(groups) > 1:
        pairs = list(combinations(range(len(groups)), 2))
        names = [(groups[a], groups[b]) for a, b in pairs]
        found |= {
            name: cells.gap(*pair) for name, pair in zip(names, pairs, strict=True) if name not in found
        }
        have_gaps = [found[name].p_value < gap_level for name in names]
        if all(have_gaps) and order is measured:
            order = measured._replace(distances=kind_distances(cells, groups, components.n_cells))
        keys = [
            (has_gap or found[name].n_cells >= FEW_CELLS, has_gap, order.score(*name, has_gap))
            for name, has_gap in zip(names, have_gaps, strict=True)
        ]
        best = keys.index(min(keys))
        first, second = names[best]
        of_pair = measured.separation(first, second), measured.crossing(first, second)
        joins.append(Join(len(groups), first, second, *of_pair, *found[first, second]))
        a, b = pairs[best]
        columns = [(a, b) if k == a else (k,) for k in range(len(groups)) if k != b]
        groups = tuple(tuple(sorted(c for k in column for c in groups[k])) for column in columns)
        cells = cells.summed(columns)
        cuts.append(by_size(groups, cells.n_cells))
    return JoinTree(tuple(joins), tuple(reversed(cuts)), gap_level)


def mean_inflation(log_joint: np.ndarray, log_weights: np.ndarray, size_factors: np.ndarray) -> float:
    """Median of tau over all pairs of components with cells, see ``nbmix.core.separation.inflation``.

    NaN where there are fewer than two. Arguments as for ``join_tree``.
    """
    components = JudgedCells.of(log_joint, log_weights, size_factors)
    filled = np.flatnonzero(components.n_cells >= FEWEST_CELLS).tolist()
    found = [inflation(*components.pair(a, b)) for a, b in combinations(filled, 2)]
    known = [tau for tau in found if np.isfinite(tau)]
    return float(np.median(known)) if known else np.nan


def pairwise(
    log_joint: np.ndarray, log_weights: np.ndarray, size_factors: np.ndarray, groups: Sequence[Group]
) -> tuple[PairSeparation, ...]:
    """What is between every pair of groups, in the order (0, 1), (0, 2), .., (1, 2), ..

    Args:
        log_joint, log_weights, size_factors: as for ``join_tree``.
        groups: the components of each.
    """
    components = JudgedCells.of(log_joint, log_weights, size_factors)
    distances, n_cells = component_distances(components), components.n_cells
    cells = components.summed(groups)
    return tuple(
        PairSeparation(a, b, mean_distance(distances, n_cells, groups[a], groups[b]), *cells.gap(a, b))
        for a, b in combinations(range(len(groups)), 2)
    )


class Gap(NamedTuple):
    """Whether there is a gap between two groups; see ``Join``."""

    p_value: float
    n_cells: int


class JudgedCells(NamedTuple):
    """Cells with counts, and the components, or groups of them, that they are parted among: k = 1..K.

    Attributes:
        joint: (cells, K), ln pi_k + ln p(x_i | k).
        log_weights: (cells, K), ln pi_k of the copy that judges the cell.
        size_factors: (cells,), positive.
        label: (cells,), the most likely.
    """

    joint: np.ndarray
    log_weights: np.ndarray
    size_factors: np.ndarray
    label: np.ndarray

    @classmethod
    def of(cls, log_joint: np.ndarray, log_weights: np.ndarray, size_factors: np.ndarray) -> JudgedCells:
        """Arguments as for ``join_tree``."""
        seen = size_factors > 0
        joint, log_weights = log_joint[seen], np.broadcast_to(log_weights, log_joint.shape)[seen]
        return cls(joint, log_weights, size_factors[seen], joint.argmax(1))

    @property
    def n_cells(self) -> np.ndarray:
        """(K,), of each."""
        return np.bincount(self.label, minlength=self.joint.shape[1])

    def summed(self, groups: Sequence[Group]) -> JudgedCells:
        """Parted among groups of what they are parted among here."""
        joint, log_weights = (group_log_joint(values, groups) for values in (self.joint, self.log_weights))
        return JudgedCells(joint, log_weights, self.size_factors, joint.argmax(1))

    def pair(self, a: int, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the cells of a and of b: log likelihood ratios, whether they are of a, and size factors."""
        cells = np.flatnonzero((self.label == a) | (self.label == b))
        joint, log_weights = self.joint[cells], self.log_weights[cells]
        ratios = joint[:, a] - log_weights[:, a] - joint[:, b] + log_weights[:, b]
        return ratios, self.label[cells] == a, self.size_factors[cells]

    def gap(self, a: int, b: int) -> Gap:
        ratios, in_first, size_factors = self.pair(a, b)
        n_cells = int(min(in_first.sum(), (~in_first).sum()))
        return Gap(gap_p_value(ratios, in_first, size_factors), n_cells)


def first_groups(components: JudgedCells) -> tuple[Group, ...]:
    """Every component that has cells, alone but for some without any, see ``join_tree``; ascending."""
    n_cells, joint = components.n_cells, components.joint
    log_evidence = np.logaddexp.reduce(joint, axis=1)
    leader = np.arange(n_cells.size)
    for c in np.flatnonzero(n_cells == 0):
        mass = np.bincount(components.label, np.exp(joint[:, c] - log_evidence), n_cells.size)
        leader[c] = (mass if mass.any() else n_cells).argmax()
    members = [np.flatnonzero(leader == first) for first in np.flatnonzero(n_cells)]
    return tuple(sorted(tuple(int(c) for c in group) for group in members))


def by_size(groups: Sequence[Group], n_cells: np.ndarray) -> tuple[Group, ...]:
    """The groups, those of most cells first, and of as many those with the lower components."""
    return tuple(group for _, group in sorted(zip(-n_cells, groups, strict=True)))


def component_distances(components: JudgedCells) -> np.ndarray:
    """(C, C), separation of components, 0 where one has no cells."""
    n_cells, depth = components.n_cells, float(np.median(components.size_factors))
    distances = np.zeros((n_cells.size, n_cells.size))
    for a, b in combinations(np.flatnonzero(n_cells).tolist(), 2):
        distances[a, b] = distances[b, a] = separation(*components.pair(a, b), depth)
    return distances


def kind_distances(kinds: JudgedCells, groups: Sequence[Group], n_cells: np.ndarray) -> np.ndarray:
    """(C, C), separation of the kinds that two components belong to, 0 where one has no cells.

    Args:
        kinds: cells parted among them.
        groups: the components of each.
        n_cells: (C,), of each component.
    """
    members = np.stack([np.isin(np.arange(n_cells.size), group) & (n_cells > 0) for group in groups])
    return members.T @ component_distances(kinds) @ members


def neighbour_pairs(components: JudgedCells, generator: np.random.Generator) -> np.ndarray:
    """(C, C), how many neighbours of cells in c are in c', and the other way round.

    In the space of log likelihood ratios, of ``MOST_CELLS`` cells at most.
    """
    label, n_components = components.label, components.joint.shape[1]
    edges = np.zeros((n_components, n_components))
    occupied = np.flatnonzero(components.n_cells)
    if occupied.size < 2:
        return edges
    log_likelihood = components.joint[:, occupied] - components.log_weights[:, occupied]
    space = ratio_space(log_likelihood, components.size_factors, label)
    if label.size > MOST_CELLS:
        some = np.sort(generator.choice(label.size, MOST_CELLS, replace=False))
        space, label = space[some], label[some]
    near = label[neighbours(space, N_NEIGHBOURS)]  # (cells, neighbours), the nearest first
    # as many as its component has others: a small one would else seem to cross, however far away it is
    n_others = np.maximum(np.bincount(label, minlength=n_components) - 1, 1)
    counted = np.arange(near.shape[1]) < n_others[label][:, None]
    own = np.broadcast_to(label[:, None], near.shape)
    np.add.at(edges, (own[counted], near[counted]), 1.0)
    return edges + edges.T


def mean_distance(distances: np.ndarray, n_cells: np.ndarray, first: Group, second: Group) -> float:
    """Mean of distances (C, C) over pairs of a component of one group and one of the other, with cells."""
    n_pairs = np.prod([np.count_nonzero(n_cells[list(group)]) for group in (first, second)])
    return float(distances[np.ix_(first, second)].sum() / max(n_pairs, 1))


class JoinOrder(NamedTuple):
    """What orders joins, between components; sums and means over it are those of groups.

    Attributes:
        distances: (C, C), D of components or of their kinds, 0 where a component has no cells.
        edges: (C, C), neighbours of a cell in c that are in c', and the other way round.
        n_cells: (C,), of each.
    """

    distances: np.ndarray
    edges: np.ndarray
    n_cells: np.ndarray

    def separation(self, first: Group, second: Group) -> float:
        return mean_distance(self.distances, self.n_cells, first, second)

    def crossing(self, first: Group, second: Group) -> float:
        """Share of the neighbours, of the group with fewer, that are in the other one."""
        ends = min(self.edges[list(group)].sum() for group in (first, second))
        return float(self.edges[np.ix_(first, second)].sum() / ends) if ends else 0.0

    def score(self, first: Group, second: Group, has_gap: bool) -> float:
        """The lower, the earlier are two groups joined, among pairs with a gap or among those without."""
        crossing = max(self.crossing(first, second), LEAST_CROSSING)
        score = self.separation(first, second) - np.log(crossing)
        if has_gap:
            a, b = (self.n_cells[list(group)].sum() for group in (first, second))
            score += np.log(a * b / (a + b))
        return float(score)
