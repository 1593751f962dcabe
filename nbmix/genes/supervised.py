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

    With a design the means are eliminated, mu_kj = sum_i x_ij / sum_i s_i exp(z_i . c_j), and Newton's method
    maximises what remains, which is concave in c_j. Where a gene's likelihood rises without end (for example
    because the gene is silent wherever a covariate is set), the coefficient ends at a bound: a factor e^30
    between a cell and the average one. The mean of a silent gene stays at a floor; with a design the floor
    holds for the mean over the label's cells.

    Args:
        counts: (cells, genes) raw counts, SciPy sparse or dense.
        labels: (cells,) strings, integers or categories; none missing.
        size_factors: (cells,); default the row sums. 0 only for an empty cell.
        design: (cells, covariates) numbers z, without an intercept: the labels are the intercepts.

    Returns:
        ``PointFit``, in torch.float64.

    Raises:
        InputError: arguments that do not fit; see ``nbmix.core.raw_counts.check_counts`` for the counts.

    >>> import nbmix, numpy as np
    >>> fit = nbmix.supervised.fit_point(np.array([[1, 3], [3, 1], [0, 8]]), ["a", "a", "b"])
    >>> fit.log_mean.exp()[0]
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    data = LabelledCounts.checked(counts, labels, size_factors)
    if design is None:
        return fit_point_by_label(data)
    return fit_point_with_design(Design.checked(design, data), data)


def fit_gamma(counts: Any, labels: Any, size_factors: Any = None, design: Any = None) -> GammaFit:
    """Negative binomial fit of every label and gene, by Newton on the sufficient statistics.

        x_ij ~ NB(mean s_i mu_kj exp(z_i . c_j), inverse dispersion r_kj)

    Without a design the cost of Newton's method does not depend on the number of cells. With one every step
    visits all cells. Arguments and errors are those of ``fit_point``. The result is a ``GammaFit``.

    >>> import nbmix, numpy as np
    >>> fit = nbmix.supervised.fit_gamma(np.array([[1, 9], [6, 4], [0, 8]]), ["a", "a", "b"])
    >>> fit.log_inv_disp.shape
    torch.Size([2, 2])
    """
    data = LabelledCounts.checked(counts, labels, size_factors)
    if design is None:
        return fit_gamma_by_label(data)
    return fit_gamma_with_design(Design.checked(design, data), data)


def fit_point_gamma(counts: Any, labels: Any, size_factors: Any = None, design: Any = None) -> PointGammaFit:
    """Zero-inflated negative binomial fit of every label and gene, by Newton in (ln mu, ln r, logit pi).

        x_ij = 0 with probability pi_kj, else ~ NB(mean s_i mu_kj exp(z_i . c_j), inverse dispersion r_kj)

    The log likelihood may have several maxima: the best of a few starts is taken, and the fit of
    ``fit_gamma`` where no point mass gains anything. A design changes the mean of the Gamma part; pi is one
    number for each label and gene. Arguments and errors are those of ``fit_point``. The result is a
    ``PointGammaFit``.

    >>> import nbmix, numpy as np
    >>> counts = np.array([[9, 1], [0, 9], [8, 2], [0, 8], [7, 3], [0, 9]])
    >>> fit = nbmix.supervised.fit_point_gamma(counts, ["a"] * 6, size_factors=[10] * 6)
    >>> gamma = nbmix.supervised.fit_gamma(counts, ["a"] * 6, [10] * 6)
    >>> bool((fit.log_likelihood >= gamma.log_likelihood).all())
    True
    """
    data = LabelledCounts.checked(counts, labels, size_factors)
    if design is None:
        return fit_point_gamma_by_label(data)
    return fit_point_gamma_with_design(Design.checked(design, data), data)


def compare_genes(counts: Any, labels: Any, size_factors: Any = None) -> GeneComparison:
    """Log likelihood of every gene and label under its Poisson and its negative binomial fit.

    Arguments and errors are those of ``fit_point``. The result is a ``GeneComparison``.

    >>> import nbmix, numpy as np
    >>> compared = nbmix.supervised.compare_genes(np.array([[1, 9], [6, 4], [0, 8]]), ["a", "a", "b"])
    >>> compared.gain.shape
    torch.Size([2, 2])
    """
    data = LabelledCounts.checked(counts, labels, size_factors)
    point, gamma = fit_point_by_label(data), fit_gamma_by_label(data)
    return GeneComparison(data.values, point.log_likelihood, gamma.log_likelihood)
