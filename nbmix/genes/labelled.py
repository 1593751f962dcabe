"""Counts with labels, and what fits of them return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.special import gammaln
from torch import Tensor

from nbmix.core.likelihood import check_size_factors
from nbmix.core.raw_counts import check_counts
from nbmix.errors import InputError


class PointFit(NamedTuple):
    """Poisson given the label, as ``fit_point`` returns it.

    Attributes:
        labels: (labels,) what the rows stand for, sorted, or in the order of their categories.
        log_mean: (labels, genes) float64 ln mu, per unit of size factor.
        log_likelihood: (labels, genes) float64 nats, summed over the label's cells, with -ln G(x + 1).
        coefficients: (covariates, genes) float64, per unit of the covariate.
    """

    labels: np.ndarray
    log_mean: Tensor
    log_likelihood: Tensor
    coefficients: Tensor


class GammaFit(NamedTuple):
    """Negative binomial given the label, as ``fit_gamma`` returns it.

    Attributes:
        log_inv_disp: (labels, genes) float64 ln r.
        labels, log_mean, log_likelihood, coefficients: as in ``PointFit``.
    """

    labels: np.ndarray
    log_mean: Tensor
    log_inv_disp: Tensor
    log_likelihood: Tensor
    coefficients: Tensor


class PointGammaFit(NamedTuple):
    """Zero-inflated negative binomial given the label, as ``fit_point_gamma`` returns it.

    Attributes:
        log_mean, log_inv_disp: (labels, genes) ln mu and ln r of the Gamma part alone.
        logit_zero: (labels, genes) ln(pi / (1 - pi)), with pi the probability of the point mass at 0; -inf
            where pi = 0, and the fit is that of ``fit_gamma``.
        labels, log_likelihood, coefficients: as in ``PointFit``.
    """

    labels: np.ndarray
    log_mean: Tensor
    log_inv_disp: Tensor
    logit_zero: Tensor
    log_likelihood: Tensor
    coefficients: Tensor


class GeneComparison(NamedTuple):
    """Log likelihoods of each gene in the cells of each label, as ``compare_genes`` returns them.

    Attributes:
        labels: (labels,) what the rows stand for.
        point, gamma: (labels, genes) nats, under the Poisson and under the negative binomial.
        gain: (labels, genes) nats by which the negative binomial is better; 0 where a gene is Poisson.
    """

    labels: np.ndarray
    point: Tensor
    gamma: Tensor

    @property
    def gain(self) -> Tensor:
        """(labels, genes) nats by which the negative binomial is better; 0 where a gene is Poisson."""
        return self.gamma - self.point


@dataclass(frozen=True)
class LabelledCounts:
    """Checked counts (cells, genes) with size factors (cells,), label values and codes (cells,)."""

    counts: sp.csr_matrix
    sizes: np.ndarray
    values: np.ndarray
    codes: np.ndarray

    @classmethod
    def checked(cls, counts: Any, labels: Any, size_factors: Any) -> LabelledCounts:
        matrix = check_counts(counts, "counts")
        if size_factors is None:
            sizes = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
        else:
            sizes = np.asarray(size_factors, dtype=np.float64).ravel()
        check_size_factors(sizes, matrix)
        if np.shape(labels) != (matrix.shape[0],):
            raise InputError(
                f"labels has shape {np.shape(labels)}; give one for each of {matrix.shape[0]} cells"
            )
        categories = pd.Categorical(labels)
        codes = np.asarray(categories.codes, np.int64)
        if (codes < 0).any():
            cell = int(np.argmax(codes < 0))
            raise InputError(f"labels is missing for cell {cell}; leave out cells without a label")
        return cls(matrix, sizes, np.asarray(categories.categories), codes)

    @property
    def n_cells(self) -> int:
        return self.counts.shape[0]

    @property
    def n_genes(self) -> int:
        return self.counts.shape[1]

    @property
    def n_labels(self) -> int:
        return self.values.size

    @property
    def total_size(self) -> float:
        """Sum of the size factors, of which the floor of the means depends; 1 where all cells are empty."""
        return float(self.sizes.sum()) or 1.0

    def of(self, label: int) -> tuple[sp.csr_matrix, np.ndarray]:
        """The cells of one label and their size factors."""
        rows = np.flatnonzero(self.codes == label)
        return self.counts[rows], self.sizes[rows]


def gene_totals(counts: sp.csr_matrix) -> np.ndarray:
    """(genes,) float64 summed counts."""
    return np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()


def gene_constants(counts: sp.csr_matrix, sizes: np.ndarray) -> np.ndarray:
    """(genes,) sum_i x_ij ln s_i - ln G(x_ij + 1), nats."""
    size = np.repeat(sizes, np.diff(counts.indptr))
    x = counts.data.astype(np.float64)
    return np.bincount(counts.indices, x * np.log(size) - gammaln(x + 1), minlength=counts.shape[1])


def no_coefficients(n_genes: int) -> Tensor:
    return torch.zeros(0, n_genes, dtype=torch.float64)
