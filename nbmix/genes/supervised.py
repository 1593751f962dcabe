"""Fits given the labels: one distribution of the rate lambda for every label and gene.

x_ij ~ Poisson(s_i lambda_ij), and within label k lambda_ij is drawn from

    point         a point mass at mu_kj: x is Poisson
    gamma         Gamma with mean mu_kj and shape r_kj: x is negative binomial
    point gamma   0 with probability pi_kj, else that Gamma: x is zero-inflated negative binomial

(Sarkar & Stephens 2021, "Separating measurement and expression models clarifies confusion in single-cell
RNA sequencing analysis"). With covariates z_i, mu_kj becomes mu_kj exp(z_i . c_j): the coefficients of a gene
are shared by all labels.

All fits maximise the likelihood by the Newton of ``nbmix.core.newton``, within the bounds of
``nbmix.core.parameters``. Where a gene is silent in a label the mean would be 0. It stays at the floor
``lowest_log_mean`` instead, so that a new cell with such a count has a finite likelihood and the fit can
serve as components. The counts then say nothing of the dispersion, and the fit is the Poisson's: ln r at its
upper bound, pi = 0. A label without cells (a category that no cell has) is silent in every gene; its log
likelihoods are 0.
"""

from __future__ import annotations

from typing import Any

from nbmix.genes.covariates import fit_gamma_with_design, fit_point_gamma_with_design, fit_point_with_design
from nbmix.genes.design import Design
from nbmix.genes.gamma import fit_gamma_by_label, fit_point_by_label
from nbmix.genes.labelled import GammaFit, GeneComparison, LabelledCounts, PointFit, PointGammaFit
from nbmix.genes.zero_inflated import fit_point_gamma_by_label


def fit_point(counts: Any, labels: Any, size_factors: Any = None, design: Any = None) -> PointFit:
    """Poisson fit of every label and gene: mu_kj = sum_i x_ij / sum_i s_i over the label's cells.

    With a design the means are eliminated, mu_kj = sum_i x_ij / sum_i s_i exp(z_i . c_j), and Newton climbs
    the concave rest in c_j. Where a gene's likelihood rises without end (it is silent wherever a
    covariate is set, say), the coefficient ends at a bound, a factor e^30 between a cell and the average one.
    The floor of a silent gene then holds for the mean over the label's cells.

    Args:
        counts: (cells, genes) raw counts, SciPy sparse or dense.
        labels: (cells,) strings, integers or categories; none missing.
        size_factors: (cells,); default the row sums. 0 only for an empty cell.
        design: (cells, covariates) numbers z, without an intercept: the labels are the intercepts.

    Raises:
        InputError: arguments that do not fit; see ``nbmix.core.raw_counts.check_counts`` for the counts.

    >>> import numpy as np
    >>> fit = fit_point(np.array([[1, 3], [3, 1], [0, 8]]), ["a", "a", "b"])
    >>> fit.log_mean.exp()[0]
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    data = LabelledCounts.checked(counts, labels, size_factors)
    if design is None:
        return fit_point_by_label(data)
    return fit_point_with_design(Design.checked(design, data), data)


def fit_gamma(counts: Any, labels: Any, size_factors: Any = None, design: Any = None) -> GammaFit:
    """Negative binomial fit of every label and gene, by Newton on the sufficient statistics.

    Without a design the cost of Newton does not depend on the number of cells; with one every step visits all
    cells. Arguments and errors as in ``fit_point``.

    >>> import numpy as np
    >>> fit = fit_gamma(np.array([[1, 9], [6, 4], [0, 8]]), ["a", "a", "b"])
    >>> fit.log_inv_disp.shape
    torch.Size([2, 2])
    """
    data = LabelledCounts.checked(counts, labels, size_factors)
    if design is None:
        return fit_gamma_by_label(data)
    return fit_gamma_with_design(Design.checked(design, data), data)


def fit_point_gamma(counts: Any, labels: Any, size_factors: Any = None, design: Any = None) -> PointGammaFit:
    """Zero-inflated negative binomial fit of every label and gene, by Newton in (ln mu, ln r, logit pi).

    The log likelihood may have several maxima: the best of a few starts is taken, and the gamma fit where no
    point mass gains anything. A design moves the mean of the Gamma part; pi is one number for a label and
    gene. Arguments and errors as in ``fit_point``.

    >>> import numpy as np
    >>> counts = np.array([[9, 1], [0, 9], [8, 2], [0, 8], [7, 3], [0, 9]])
    >>> fit = fit_point_gamma(counts, ["a"] * 6, size_factors=[10] * 6)
    >>> bool((fit.log_likelihood >= fit_gamma(counts, ["a"] * 6, [10] * 6).log_likelihood).all())
    True
    """
    data = LabelledCounts.checked(counts, labels, size_factors)
    if design is None:
        return fit_point_gamma_by_label(data)
    return fit_point_gamma_with_design(Design.checked(design, data), data)


def compare_genes(counts: Any, labels: Any, size_factors: Any = None) -> GeneComparison:
    """Log likelihood of every gene and label under its Poisson and its negative binomial fit.

    Arguments and errors as in ``fit_point``.

    >>> import numpy as np
    >>> compared = compare_genes(np.array([[1, 9], [6, 4], [0, 8]]), ["a", "a", "b"])
    >>> compared.gain.shape
    torch.Size([2, 2])
    """
    data = LabelledCounts.checked(counts, labels, size_factors)
    point, gamma = fit_point_by_label(data), fit_gamma_by_label(data)
    return GeneComparison(data.values, point.log_likelihood, gamma.log_likelihood)
