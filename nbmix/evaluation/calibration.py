"""How far posteriors can be trusted, and a tempering that takes off what correlated genes add to them.

A mixture whose genes are independent given the component counts genes that rise and fall together as evidence
of their own, so that its posteriors are too sharp. They are tempered at an inverse temperature beta = 1 / T
(Guo et al. 2017, section 4.2, where T stands):

    softmax_k(ln pi_k + beta l_ik),    0 < beta <= 1

Without labels beta comes from the spread of the contrasts d_i = l_ik - l_il within a component. Were genes
independent, the variance of their sum would be the sum of their variances. Where it is f times that, a
contrast says only d_i / f: a design effect (Kish 1965), or the magnitude adjustment of a composite likelihood
(Ribatet, Cooley & Davison 2012, section 2.2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.mixture import Mixture
from nbmix.core.tables import batch_log_likelihood, likelihood_tables
from nbmix.data.counts import CountData

N_BINS = 15
N_BLOCKS = 8  # of genes
MOST_CELLS = 3000  # that beta is fitted to
FEWEST_CELLS = 10.0  # of a component that takes part, by responsibility
LEAST_BETA = 1e-3
STEPS = 20  # of the fixed point at most, which settles in two to six
SETTLED = 1e-3  # change of ln beta


class Reliability(NamedTuple):
    """Cells by how sure their assignment is; (bins,) each.

    Attributes:
        confidence: mean probability of the assignments; NaN in an empty bin.
        accuracy: share of them that is right; NaN in an empty bin.
        n_cells: in the bin.
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    n_cells: NDArray[np.int64]


def reliability(confidence: ArrayLike, correct: ArrayLike, n_bins: int = N_BINS) -> Reliability:
    """Accuracy at each confidence, in bins ((m - 1) / M, m / M] (Guo et al. 2017, equations 2 and 3).

    Args:
        confidence: (cells,) probability of each assignment.
        correct: (cells,) whether it is right.
        n_bins: M, of equal width.

    Raises:
        ValueError: the shapes differ, or a probability is out of range.

    >>> reliability([0.9, 0.8, 0.1], [True, False, False], n_bins=2).n_cells
    array([1, 2])
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if sure.shape != right.shape or sure.ndim != 1:
        raise ValueError(f"confidence has shape {sure.shape}, correct {right.shape}; both must be (cells,)")
    if not ((sure >= 0) & (sure <= 1 + 1e-9)).all():
        raise ValueError("confidence must lie in 0..1")
    place = np.clip(np.ceil(sure * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
    n_cells = np.bincount(place, minlength=n_bins)
    share = np.where(n_cells > 0, n_cells, np.nan)
    return Reliability(
        np.bincount(place, weights=sure, minlength=n_bins) / share,
        np.bincount(place, weights=right, minlength=n_bins) / share,
        n_cells,
    )


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, n_bins: int = N_BINS) -> float:
    """Mean over cells of |accuracy - confidence| of their bin (Naeini et al. 2015; Guo et al., equation 5).

    See ``reliability``. 0 is calibrated, on the average of each bin.

    >>> round(expected_calibration_error([0.75, 0.75, 0.75, 0.75], [True, True, False, False]), 12)
    0.25
    """
    bins = reliability(confidence, correct, n_bins)
    gap = np.nan_to_num(np.abs(bins.accuracy - bins.confidence))
    return float(gap @ bins.n_cells / max(1, bins.n_cells.sum()))


def tempered(responsibilities: ArrayLike, log_weights: ArrayLike, beta: float) -> NDArray[np.float64]:
    """(cells, K) softmax_k(ln pi_k + beta l_ik) from the posterior q at beta = 1: (q / pi)^beta pi, scaled.

    A responsibility that has underflown to 0 stays 0: it is below exp(-745 beta).

    Args:
        responsibilities: (cells, K), rows sum to 1.
        log_weights: (K,) or (cells, K) ln pi.
        beta: inverse temperature.
    """
    q = np.asarray(responsibilities, dtype=np.float64)
    if beta == 1:
        return q
    with np.errstate(divide="ignore"):
        joint = np.log(q)
    joint *= beta  # in place, for there may be millions of cells
    joint += (1 - beta) * np.asarray(log_weights, dtype=np.float64)
    joint -= joint.max(axis=1, keepdims=True)
    np.exp(joint, out=joint)
    joint /= joint.sum(axis=1, keepdims=True)
    return joint


def inverse_temperature_by_gene_blocks(
    log_likelihood: ArrayLike, log_prior: ArrayLike, size_factors: ArrayLike
) -> float | None:
    """The beta that takes the correlation of genes off the posteriors; 1 where there is none.

    For a pair of components let V be the variance within them of the contrast l_ik - l_il. Genes were split
    at random into G blocks, whose own contrasts have variances that sum to S. Any two genes are in different
    blocks with probability (G - 1) / G, so that C = (V - S) G / (G - 1) is what their covariances add, and

        beta_kl = (V - C) / V

    Variances are weighted by responsibilities, tempered by beta itself until it settles: weighted by right
    posteriors they are those within components, though components overlap. What the size factor explains,
    a s + b sqrt(s) + c in each component, is taken off before, for it is no correlation of genes; the rest
    is taken to vary in proportion to s. The beta of the pairs are averaged with weights sqrt(n_k n_l) e^-D,
    D the Bhattacharyya distance of normal distributions with the contrast's means and mean variance: pairs
    that are nowhere near each other do not matter.

    Correlation is seen only within the components as they are. A programme along which components were split,
    components that are none of the groups one had in mind, and errors of the components' genes are not seen;
    so beta is an upper bound of what agrees best with any labels.

    Args:
        log_likelihood: (cells, K, blocks) ln p(genes of the block | k), nats, under components that have not
            seen the cell.
        log_prior: (K,) or (cells, K) ln pi.
        size_factors: (cells,), positive.

    Returns:
        beta, or None where fewer than two components have FEWEST_CELLS, or all of them are the same.
    """
    parts = np.asarray(log_likelihood, dtype=np.float64)
    sizes, prior = np.asarray(size_factors, dtype=np.float64), np.asarray(log_prior, dtype=np.float64)
    if parts.ndim != 3 or sizes.shape != parts.shape[:1]:
        raise ValueError(f"(cells, K, blocks) and (cells,) do not fit {parts.shape} and {sizes.shape}")
    if not parts.shape[0]:
        return None
    total = parts.sum(2)  # (cells, K)
    root = np.sqrt(sizes / sizes.mean())
    scaled = parts / root[:, None, None]
    design = np.stack([root, np.ones_like(root), 1 / root], axis=1)  # of the contrast over sqrt(s)
    beta = 1.0
    for _ in range(STEPS):
        found = _mean_ratio(scaled, design, softmax(prior + beta * total, axis=1))
        if found is None:
            return None
        before, beta = beta, float(np.clip(found, LEAST_BETA, 1.0))
        if abs(np.log(beta / before)) < SETTLED:
            break
    return beta


def _mean_ratio(scaled: NDArray, design: NDArray, q: NDArray) -> float | None:
    """Weighted mean over the pairs of (V - C) / V, under responsibilities q (cells, K)."""
    n_cells, n_components, n_blocks = scaled.shape
    size = q.sum(0)  # (K,)
    variance, of_genes, mean = np.full((3, n_components, n_components), np.nan)
    for k in np.flatnonzero(size >= FEWEST_CELLS):
        weight = q[:, k] / size[k]
        contrast = (scaled[:, [k]] - scaled).reshape(n_cells, -1)  # (cells, K blocks)
        weighted = design * weight[:, None]
        # cells of one size factor leave nothing to tell the columns apart: least squares of least norm
        effect = np.linalg.lstsq(design.T @ weighted, weighted.T @ contrast, rcond=1e-10)[0]
        rest = (contrast - design @ effect).reshape(scaled.shape)
        variance[k] = weight @ rest.sum(2) ** 2
        of_blocks = weight @ (rest**2).sum(2)
        covariance = (variance[k] - of_blocks) * n_blocks / (n_blocks - 1)
        of_genes[k] = variance[k] - covariance
        mean[k] = effect.sum(0).reshape(n_components, n_blocks).sum(1)  # at the mean size factor
    one, other = np.triu_indices(n_components, 1)
    both, genes, apart = ((m + m.T)[one, other] for m in (variance, of_genes, mean))
    usable = np.isfinite(both) & (both > 0)
    if not usable.any():
        return None
    one, other, both, genes, apart = (v[usable] for v in (one, other, both, genes, apart))
    distance = apart**2 / (4 * both)  # Delta^2 / 8 v with v = both / 2
    weights = softmax(np.log(size[one] * size[other]) / 2 - distance)
    return float(weights @ (genes / both))


def block_log_likelihood(
    mixture: Mixture, data: CountData, folds: ArrayLike, blocks: ArrayLike
) -> NDArray[np.float64]:
    """(cells, K, blocks) log likelihood of the genes of each block, by the copy that has not seen the cell.

    Args:
        mixture: of the genes of ``data``.
        data: cells in memory.
        folds: (cells,) fold of each; -1 where no copy has seen the cell.
        blocks: (genes,) block of each gene, from 0.
    """
    of_cell, of_gene = np.asarray(folds), np.asarray(blocks)
    shape = (data.n_cells, mixture.settings.n_components, int(of_gene.max()) + 1)
    found = np.empty(shape)
    origins = np.full(data.n_cells, -1) if data.origins is None else data.origins
    for block in range(shape[2]):
        genes = np.flatnonzero(of_gene == block)
        counts = data.counts[:, genes].tocsr()
        counts.sort_indices()
        basis = Basis.of(counts, data.size_factors)
        for fold, origin in np.unique(np.stack([of_cell, origins]), axis=1).T.tolist():
            rows = np.flatnonzero((of_cell == fold) & (origins == origin))
            a, b = (t.cpu()[:, genes] for t in mixture.components_of(mixture.copy_for(fold), origin))
            batch = CellBatch.build(counts, data.size_factors, basis, pick=rows)
            tables = likelihood_tables(basis, a, b, torch.float64)
            found[rows, :, block] = batch_log_likelihood(batch, basis, tables).numpy()
    return found


def log_prior_of(mixture: Mixture, data: CountData) -> NDArray[np.float64]:
    """(K,) ln pi of the components of all cells, or (cells, K) where it is given."""
    if mixture.settings.weights == "given" and data.prior is not None:
        with np.errstate(divide="ignore"):
            return np.log(data.prior)
    return mixture.log_weights.data[-1].cpu().numpy()


def fitted_inverse_temperature(
    mixture: Mixture, data: CountData, rows: ArrayLike, folds: ArrayLike
) -> float | None:
    """``inverse_temperature_by_gene_blocks`` of at most MOST_CELLS cells, chosen at random from some.

    Args:
        mixture: its components, and what their copies have seen.
        data: all cells, in memory or in their file.
        rows: (some,) ascending positions of cells that may be judged: of each there is a copy blind to it.
        folds: (some,) their folds; -1 for cells that no copy has seen.

    Returns:
        beta; None where there is one component, or too few cells or genes.
    """
    allowed, member = np.asarray(rows), np.asarray(folds)
    full = np.asarray(data.size_factors)[allowed] > 0
    allowed, member = allowed[full], member[full]
    if mixture.settings.n_components < 2 or data.n_genes < N_BLOCKS or not allowed.size:
        return None
    generator = np.random.default_rng(0)
    if allowed.size > MOST_CELLS:
        chosen = np.sort(generator.choice(allowed.size, MOST_CELLS, replace=False))
        allowed, member = allowed[chosen], member[chosen]
    some = data.select_cells(allowed).load()
    blocks = generator.permutation(np.arange(data.n_genes) % N_BLOCKS)
    likelihood = block_log_likelihood(mixture, some, member, blocks)
    return inverse_temperature_by_gene_blocks(likelihood, log_prior_of(mixture, some), some.size_factors)
