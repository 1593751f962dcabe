"""Marker genes of the components, with their uncertainty, from sufficient statistics alone.

Around the pooled gene m_j, with the tau_j^2 that ``nbmix.core.prior`` learns from all components, most
differences are normal, and some are far larger, as where one component alone has a gene (the contaminated
normal of Tukey 1960, in Contributions to Probability and Statistics, 448-485):

    ln mu_kj ~ (1 - e) N(m_j, tau_j^2) + e N(m_j, 16 tau_j^2),    e = 1 / 20.

Under either part, v its variance, counts and ln mu have the joint density, in proportion,

    f(ln mu) = (v c)^{-1/2} exp(Q - (ln mu - m_j)^2 / (2 v) - (ln r - b_j)^2 / (2 sigma^2)),

Q of ``nbmix.core.expected_log_likelihood``. With (aa, ab, bb) the entries of -Q'' in (ln mu, ln r), ln r is
integrated out by Laplace's approximation, c = bb + 1 / sigma^2, and follows ln mu from the mode along the
tangent -ab / c. Adaptive Gauss-Hermite quadrature (Liu & Pierce 1994, Biometrika 81:624) integrates f in five
points around the mode, at distances in proportion to V^{1/2},

    1 / V = I + 1 / v,    I = aa - ab^2 / c.

A normal density at the mode would not do: no count, or a few overdispersed ones, leave one side to the prior.
The posterior's mean and variance are those of the two parts together, weighted by share times integral.
K components and the typical gene are all that is known of tau^2, which widens the first part's variance V by
1 + (V / tau^2) 2 / (K - 1): to the variance of Student's t with K + 1 degrees of freedom where the prior
alone speaks, not at all where the counts do.

tau_j^2 is that of ``nbmix.core.prior``, learned from the groups, whose votes differ. With w_k their shares of
the cells, and the groups independent, ln mu_kj - m_j has the variance of one of them times

    1 - 2 w_k + sum_l w_l^2,

near 0 for a group of nearly all cells, which is the pooled gene. The square root is a group's vote.

Differences that few counts speak for are shrunk, and need no correction for the number of genes looked at:
the local false sign rate of a difference ~ N(e, u^2) is the probability that it has not the sign of e
(Stephens 2017, Biostatistics 18:275),

    lfsr = Phi(-|e| / u).

The prior takes no difference to be exactly 0; among those with a small lfsr some can be, more than the
rate says where most genes differ nowhere. And all is given the responsibilities, with cells as independent
draws. So the standard errors know nothing of doubt about a cell's assignment, of differences between donors
or batches, nor that components which were found in these very counts differ in them for that reason alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtr
from torch import Tensor

from nbmix.core.batch import Basis
from nbmix.core.expected_log_likelihood import Curvature, curvature, expected_log_likelihood
from nbmix.core.levels import CountLevels
from nbmix.core.m_step import FittedComponents, NewtonMStep, moment_components, sizes_of_components
from nbmix.core.parameters import LOG_INV_DISP_RANGE, Components, GenePrior
from nbmix.core.prior import first_prior, update_prior
from nbmix.core.statistics import SufficientStatistics
from nbmix.errors import InputError

PRIOR_ROUNDS = 10  # M steps and updates of a prior that the fit did not learn; it moves by 1 % in the last
# where tau^2 begins: at a factor of e, too wide for a difference to be taken for dispersion instead
FIRST_VARIANCE = 1.0
WIDE_SHARE, WIDE_FACTOR = 0.05, 16.0  # e, and of tau^2
# of five points, for a standard normal density; more points change nothing
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
NEWTON = NewtonMStep(tolerance=1e-9)  # nats; a mode is then the same wherever Newton has begun
MARKERS_SHOWN = 60  # of all groups together, in a picture that can be read
LOWER_BOUND = 1.96  # standard errors: what the rank counts of a fold change is below it in 1 case of 40


class Contrast(NamedTuple):
    """Difference in ln mu between each component and something else, (K, genes) or (genes,) float64.

    Attributes:
        log_fold_change: posterior mean, natural logarithm.
        standard_error: posterior standard deviation, of the natural logarithm.
    """

    log_fold_change: Tensor
    standard_error: Tensor

    @property
    def log2_fold_change(self) -> Tensor:
        """(K, genes) posterior mean of the binary logarithm."""
        return self.log_fold_change / math.log(2)

    @property
    def false_sign_rate(self) -> Tensor:
        """(K, genes) local false sign rate: 0 to 0.5."""
        return torch.from_numpy(ndtr(-(self.log_fold_change.abs() / self.standard_error).numpy()))

    @property
    def lower_bound(self) -> Tensor:
        """(K, genes) ln fold change that the true one exceeds with probability 0.975."""
        return self.log_fold_change - LOWER_BOUND * self.standard_error


class Markers(NamedTuple):
    """What tells the components' genes apart.

    Attributes:
        log_mean, standard_error: (K, genes) posterior mean and standard deviation of ln mu, per unit of
            size factor.
        share, share_rest: (K, genes) share of the component's cells, and of all others, with a count.
        nearest: (K,) int64 the component that would explain its cells next best; -1 where K = 1.
        from_rest: against all cells of other components, seen as those of one.
        from_nearest: against the nearest component.
        All of the rest and the nearest is NaN where K = 1.
    """

    log_mean: Tensor
    standard_error: Tensor
    share: Tensor
    share_rest: Tensor
    nearest: Tensor
    from_rest: Contrast
    from_nearest: Contrast

    @property
    def score(self) -> Tensor:
        """(K, genes) what genes are ranked by: sure fold change times the share of cells that show it.

        The lower bound of the ln fold change from the rest, times ``share`` where it is positive.
        """
        return _score(self.from_rest, self.share)


def _score(contrast: Contrast, share: Tensor) -> Tensor:
    bound = contrast.lower_bound
    return torch.where(bound > 0, bound * share, bound)


def find_markers(
    statistics: SufficientStatistics,
    basis: Basis,
    total_size: float,
    components: Components | None = None,
    prior: GenePrior | None = None,
) -> Markers:
    """Compare the components' genes; the cost does not depend on the number of cells.

    Args:
        statistics: of the cells, weighted by their responsibilities.
        basis: that they were collected on.
        total_size: sum of the cells' size factors.
        components: where the search for the posterior's centre begins.
        prior: as a fit has learned it from like statistics; by default it is learned here.

    The means are refitted with the prior, so that centre and curvature belong together whatever the
    components were fitted by. A component without cells has those of the prior.
    """
    fitted, prior = _fit(statistics, basis, total_size, components, prior)
    sizes = statistics.weight
    known = _posterior(statistics, basis, total_size, fitted, prior, sizes.numel())
    log_mean, variance = known.log_mean, known.variance
    share, share_rest = _shares(statistics, basis.levels)
    if sizes.numel() == 1:
        unknown = Contrast(torch.full_like(log_mean, torch.nan), torch.full_like(log_mean, torch.nan))
        nearest = torch.tensor([-1])
        return Markers(log_mean, variance.sqrt(), share, share_rest, nearest, unknown, unknown)
    nearest = _nearest(statistics, basis, fitted.components)
    rest = _rest(statistics, basis, total_size, fitted.components, prior)
    return Markers(
        log_mean,
        variance.sqrt(),
        share,
        share_rest,
        nearest,
        Contrast(log_mean - rest.log_mean, (variance + rest.variance).sqrt()),
        Contrast(log_mean - log_mean[nearest], (variance + variance[nearest]).sqrt()),
    )


class Comparison(NamedTuple):
    """One set of components against another one, (genes,) each.

    Attributes:
        log_mean, standard_error: posterior mean and standard deviation of ln mu of the first set.
        share, share_reference: share of the cells of either with a count.
        contrast: the first against the second.
    """

    log_mean: Tensor
    standard_error: Tensor
    share: Tensor
    share_reference: Tensor
    contrast: Contrast

    @property
    def score(self) -> Tensor:
        """(genes,) as ``Markers.score``."""
        return _score(self.contrast, self.share)


def compare_sets(
    statistics: SufficientStatistics,
    basis: Basis,
    total_size: float,
    sets: tuple[Sequence[int], Sequence[int]],
    components: Components | None = None,
) -> Comparison:
    """Compare two sets of components, each seen as one.

    Args:
        statistics, basis, total_size, components: of all K components, see ``find_markers``.
        sets: positions of the first set and of the second, with cells; none is in both.
    """
    n_components = statistics.weight.numel()
    fitted, prior = _fit(statistics, basis, total_size, components, None)
    members = torch.zeros(2, n_components, dtype=torch.float64)
    for number, positions in enumerate(sets):
        members[number, list(positions)] = 1
    summed = statistics.summed(members)
    begin = _begin(members * statistics.weight, summed.weight, fitted.components, prior)
    known = _of_sets(summed, basis, total_size, begin, prior, n_components)
    log_mean, variance = known.log_mean, known.variance
    share, _ = _shares(summed, basis.levels)
    contrast = Contrast(log_mean[0] - log_mean[1], variance.sum(0).sqrt())
    return Comparison(log_mean[0], variance[0].sqrt(), share[0], share[1], contrast)


def _fit(
    statistics: SufficientStatistics,
    basis: Basis,
    total_size: float,
    components: Components | None,
    prior: GenePrior | None,
) -> tuple[FittedComponents, GenePrior]:
    """Fit with the prior's first part, and the prior, learned here if it is not given."""
    learned = prior is not None
    if prior is None:
        prior = first_prior(statistics, basis, total_size, FIRST_VARIANCE)
    if components is None:
        n_components = statistics.weight.numel()
        components = Components(*(t.repeat(n_components, 1) for t in (prior.log_mean, prior.log_inv_disp)))
    if not learned:
        votes = _votes(statistics.weight)
        for _ in range(PRIOR_ROUNDS):
            fitted = NEWTON(statistics, basis, components, total_size, prior)
            components, prior = fitted.components, update_prior(fitted, prior, votes)
    return _mode(statistics, basis, total_size, components, prior), prior


def _mode(
    statistics: SufficientStatistics,
    basis: Basis,
    total_size: float,
    begin: Components,
    prior: GenePrior,
) -> FittedComponents:
    """Where Newton ends, and the curvature there."""
    found = NEWTON(statistics, basis, begin, total_size, prior).components
    return FittedComponents(found, curvature(statistics, basis, found, prior))


def _votes(cells: Tensor) -> Tensor:
    """(K,) how much each component says of the variance between components; the most is 1.

    Its difference from the pooled gene has 1 - 2 w_k + sum_l w_l^2 of the variance of independent ones, w_k
    being its share of the ``cells`` (K,).
    """
    share = cells / cells.sum()
    variance = (1 - 2 * share + (share**2).sum()).clamp(min=torch.finfo(share.dtype).tiny)
    return (variance / variance.max()).sqrt()


class _Posterior(NamedTuple):
    """Mean and variance of ln mu, (K, genes) each."""

    log_mean: Tensor
    variance: Tensor


def _posterior(
    statistics: SufficientStatistics,
    basis: Basis,
    total_size: float,
    usual: FittedComponents,
    prior: GenePrior,
    n_components: int,
) -> _Posterior:
    """From the fit with the prior's first part; tau^2 is known from ``n_components`` and one."""
    wide_prior = prior._replace(log_mean_variance=WIDE_FACTOR * prior.log_mean_variance)
    wide = _mode(statistics, basis, total_size, usual.components, wide_prior)
    log_mean, variance, log_evidence = _integrated(statistics, basis, usual, prior)
    if n_components > 1:
        variance = variance * (1 + variance / prior.log_mean_variance * (2 / (n_components - 1)))
    wide_log_mean, wide_variance, wide_evidence = _integrated(statistics, basis, wide, wide_prior)
    share = torch.sigmoid(wide_evidence - log_evidence + math.log(WIDE_SHARE / (1 - WIDE_SHARE)))
    between = share * (1 - share) * (wide_log_mean - log_mean) ** 2
    return _Posterior(
        torch.lerp(log_mean, wide_log_mean, share), torch.lerp(variance, wide_variance, share) + between
    )


def _integrated(
    statistics: SufficientStatistics, basis: Basis, fitted: FittedComponents, prior: GenePrior
) -> tuple[Tensor, Tensor, Tensor]:
    """(K, genes) posterior mean and variance of ln mu under one part, and its log evidence less a constant.

    ``fitted`` stands at the mode under ``prior``.
    """
    (log_mean, log_inv_disp), curve = fitted
    of_mean, about_disp = 1 / prior.log_mean_variance, _about_disp(curve, prior)
    information = (-curve.hess_aa - of_mean - curve.hess_ab**2 / about_disp).clamp(min=0)
    spread, tangent = (information + of_mean).rsqrt(), curve.hess_ab / about_disp
    places, densities = [], []
    for node, weight in zip(NODES.tolist(), WEIGHTS.tolist(), strict=True):
        off = node * spread
        at = Components(log_mean + off, (log_inv_disp + tangent * off).clamp(*LOG_INV_DISP_RANGE))
        here = curve if node == 0 else curvature(statistics, basis, at, prior)
        density = here.value - torch.log(_about_disp(here, prior)) / 2
        places.append(at.log_mean)
        densities.append(density + node**2 / 2 + math.log(weight))
    place, log_density = torch.stack(places), torch.stack(densities)
    share = torch.softmax(log_density, 0)
    mean = (share * place).sum(0)
    log_evidence = torch.logsumexp(log_density, 0) + torch.log(spread * of_mean.sqrt())
    return mean, (share * (place - mean) ** 2).sum(0), log_evidence


def _about_disp(curve: Curvature, prior: GenePrior) -> Tensor:
    """(K, genes) precision of ln r where ln mu is known; counts that pull it to a bound say nothing of it."""
    of_disp = 1 / prior.log_inv_disp_variance
    return (-curve.hess_bb - of_disp).clamp(min=0) + of_disp


def _shares(statistics: SufficientStatistics, levels: CountLevels) -> tuple[Tensor, Tensor]:
    """(K, genes) share of cells with a count: in each component, and in all others together."""
    n_genes, n_components = statistics.rate.shape[:2]
    cells = statistics.pair.new_zeros(n_genes, n_components).index_add_(0, levels.gene, statistics.pair).T
    sizes = statistics.weight[:, None]
    others = _all_others(n_components)
    tiny = torch.finfo(sizes.dtype).tiny
    share, rest = cells / sizes.clamp(min=tiny), (others @ cells) / (others @ sizes).clamp(min=tiny)
    # products in float32 round
    return share.clamp(0, 1), rest.clamp(0, 1) if n_components > 1 else torch.full_like(share, torch.nan)


def _all_others(n_components: int) -> Tensor:
    """(K, K) 1 off the diagonal."""
    return 1 - torch.eye(n_components, dtype=torch.float64)


def _rest(
    statistics: SufficientStatistics,
    basis: Basis,
    total_size: float,
    components: Components,
    prior: GenePrior,
) -> _Posterior:
    """Posterior of ln mu, (K, genes), of the cells that are not of a component, as those of one component.

    A sum over the other components would follow what little is known of those with few cells.
    """
    others, members = statistics.others(), _all_others(statistics.weight.numel())
    begin = _begin(members * statistics.weight, others.weight, components, prior)
    return _of_sets(others, basis, total_size, begin, prior, len(members))


def _begin(cells: Tensor, total: Tensor, components: Components, prior: GenePrior) -> Components:
    """Where the search for sets of components begins, (sets, genes).

    ``cells`` (sets, K) are those that each component brings to a set, ``total`` (sets,) their sum.
    """
    weights = cells / total[:, None].clamp(min=torch.finfo(cells.dtype).tiny)
    log_mean = torch.log(weights @ torch.exp(components.log_mean))
    log_mean = log_mean.nan_to_num(neginf=float(prior.log_mean.min()))
    return Components(log_mean, weights @ components.log_inv_disp)


def _of_sets(
    summed: SufficientStatistics,
    basis: Basis,
    total_size: float,
    begin: Components,
    prior: GenePrior,
    n_components: int,
) -> _Posterior:
    """Of the cells of each set, (sets, genes), seen as those of one component; see ``_posterior``."""
    fitted = NEWTON(summed, basis, begin, total_size, prior)
    return _posterior(summed, basis, total_size, fitted, prior, n_components)


def _nearest(statistics: SufficientStatistics, basis: Basis, components: Components) -> Tensor:
    """(K,) argmax over l != k of the expected log likelihood of k's cells under component l."""
    n_components = statistics.weight.numel()
    found = torch.full((n_components, n_components), -torch.inf, dtype=torch.float64)
    here = torch.arange(n_components)
    for step in range(1, n_components):
        there = (here + step) % n_components
        shifted = Components(components.log_mean[there], components.log_inv_disp[there])
        found[here, there] = expected_log_likelihood(statistics, basis, shifted)
    filled = statistics.weight >= 1  # one without cells is the pooled gene, and near to all
    if int(filled.sum()) > 1:
        found[:, ~filled] = -torch.inf
    return found.argmax(1)


def comparison_table(comparison: Comparison, gene_names: np.ndarray) -> pd.DataFrame:
    """All genes, one a row, the best marker of the first set first; columns as in ``marker_table``."""
    order = torch.argsort(-comparison.score, stable=True).numpy()
    contrast = comparison.contrast
    columns = {
        "log_mean": comparison.log_mean,
        "log_mean_se": comparison.standard_error,
        "share": comparison.share,
        "share_reference": comparison.share_reference,
        "ln_fc": contrast.log_fold_change,
        "ln_fc_se": contrast.standard_error,
        "log2_fc": contrast.log2_fold_change,
        "lfsr": contrast.false_sign_rate,
    }
    table = pd.DataFrame({name: values.numpy()[order] for name, values in columns.items()})
    table.insert(0, "gene", np.asarray(gene_names)[order])
    table.insert(0, "rank", np.arange(1, len(order) + 1))
    return table


def marker_table(markers: Markers, gene_names: np.ndarray, most: int | None = None) -> pd.DataFrame:
    """All components, and all genes or the ``most`` best, one a row, the best marker of each component first.

    ``ln_`` and ``log2_`` name the logarithm, ``_se`` is a standard error, ``share`` is of cells with a count,
    ``rest`` all other components and ``nearest`` the one that the column of this name holds; ``log_mean`` is
    the natural logarithm of the mean per unit of size factor.
    """
    order = torch.argsort(-markers.score, dim=1, stable=True)[:, :most]  # (K, genes)
    n_components, n_genes = order.shape

    def sorted_rows(values: Tensor) -> np.ndarray:
        return values.gather(1, order).flatten().numpy()

    def of_component(values: Tensor) -> np.ndarray:
        return values.repeat_interleave(n_genes).numpy()

    columns: dict[str, np.ndarray] = {
        "component": of_component(torch.arange(n_components)),
        "rank": np.tile(np.arange(1, n_genes + 1), n_components),
        "gene": np.asarray(gene_names)[order.flatten().numpy()],
        "log_mean": sorted_rows(markers.log_mean),
        "log_mean_se": sorted_rows(markers.standard_error),
        "share": sorted_rows(markers.share),
        "share_rest": sorted_rows(markers.share_rest),
    }
    for name, contrast in (("rest", markers.from_rest), ("nearest", markers.from_nearest)):
        if name == "nearest":
            columns["nearest"] = of_component(markers.nearest)
            columns["share_nearest"] = sorted_rows(
                markers.share[markers.nearest] if n_components > 1 else markers.share_rest
            )
        columns |= {
            f"ln_fc_{name}": sorted_rows(contrast.log_fold_change),
            f"ln_fc_{name}_se": sorted_rows(contrast.standard_error),
            f"log2_fc_{name}": sorted_rows(contrast.log2_fold_change),
            f"lfsr_{name}": sorted_rows(contrast.false_sign_rate),
        }
    return pd.DataFrame(columns)


def top_markers(table: pd.DataFrame, n_genes: int | None, groups: Sequence[str]) -> pd.DataFrame:
    """The first markers of each group in their order, without genes that an earlier group has.

    Args:
        table: with "component", "rank" and "gene", see ``marker_table``.
        n_genes: of each group; None for as many as can be read, 2 to 5.
        groups: names, as they are in "component" as text.

    Raises:
        InputError: not one gene is asked for.
    """
    if n_genes is None:
        n_genes = int(np.clip(MARKERS_SHOWN // max(len(groups), 1), 2, 5))
    if isinstance(n_genes, bool) or not isinstance(n_genes, int | np.integer) or n_genes < 1:
        raise InputError(f"n_genes={n_genes!r}: must be a whole number, 1 or more")
    component = table["component"].astype(str)
    order = component.map({name: place for place, name in enumerate(groups)})
    best = table[order.notna() & (table["rank"] <= n_genes)]
    best = best.assign(_place=order[best.index]).sort_values(["_place", "rank"], kind="stable")
    return best.drop_duplicates("gene").drop(columns="_place").reset_index(drop=True)


class PoissonComparison(NamedTuple):
    """Log likelihood (K, genes) of each gene in the cells of each component, nats, with -ln x!.

    Attributes:
        poisson: under its Poisson fit, a point mass of expression.
        negative_binomial: under its negative binomial fit, a Gamma; both without a prior.
    """

    poisson: Tensor
    negative_binomial: Tensor


def compare_with_poisson(
    statistics: SufficientStatistics, basis: Basis, total_size: float
) -> PoissonComparison:
    """Fit both by maximum likelihood, from the statistics alone; arguments as in ``find_markers``."""
    begin = moment_components(statistics, basis, total_size)
    fitted = NewtonMStep()(statistics, basis, begin, total_size)
    nodes = basis.nodes.log_nodes
    counts = statistics.rate.sum(2).T  # (K, genes)
    # ln s and s at the nodes, summed over the cells of a component
    of_counts = statistics.rate @ nodes if nodes.dim() == 1 else (statistics.rate * nodes[:, None]).sum(2)
    constant = of_counts.T - _log_factorials(statistics, basis.levels)
    size = sizes_of_components(statistics, basis)
    poisson = counts * begin.log_mean - size * torch.exp(begin.log_mean)
    return PoissonComparison(poisson + constant, fitted.curvature.value + constant)


def _log_factorials(statistics: SufficientStatistics, levels: CountLevels) -> Tensor:
    """(K, genes) sum_i q_ik ln x_ij!."""
    weighted = statistics.pair * torch.special.gammaln(levels.count + 1)[:, None]
    total = weighted.new_zeros(levels.n_genes, weighted.shape[1])
    return total.index_add_(0, levels.gene, weighted).T
