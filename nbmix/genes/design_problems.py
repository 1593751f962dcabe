"""Log likelihoods of genes in their coefficients and in the numbers of every label, as Newton takes them.

A cell i of label k has ln E[x_ij] = ln s_i + z_i . c_j + a_kj. The coefficients c_j are shared by all labels,
so that a gene is one problem of all its numbers: c first, then the labels' a = ln mu, b = ln r, ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.core.batch import Basis
from nbmix.core.expected_log_likelihood import ExpectedLogLikelihood
from nbmix.core.levels import CountLevels
from nbmix.core.newton import Curve
from nbmix.core.nodes import WIDEST_SOFTPLUS, SizeFactorNodes
from nbmix.core.statistics import SufficientStatistics
from nbmix.genes.design import Design, membership
from nbmix.genes.labelled import (
    LabelledCounts,
    gene_totals,
)

TINY = torch.finfo(torch.float64).tiny


@dataclass
class PoissonProfile:
    """Log likelihood of Poisson genes in their coefficients c, the means eliminated; concave.

    sum_i x_i z_i . c - sum_k X_k ln sum_{i in k} s_i exp(z_i . c), X_k the label's counts.

    Attributes:
        z: (cells, covariates).
        sums: (labels, (1 + covariates)^2, cells) s_i (1, z_i) (1, z_i)', 0 for cells of other labels.
        totals: (labels, problems) X.
        weighted: (labels, problems, covariates) sum_i x_i z_i.
    """

    z: Tensor
    sums: Tensor
    totals: Tensor
    weighted: Tensor

    @classmethod
    def of(cls, design: Design, data: LabelledCounts, genes: np.ndarray) -> PoissonProfile:
        counts, z = data.counts[:, genes], design.z
        ones = torch.cat([torch.ones(len(z), 1, dtype=torch.float64), z], dim=1)
        squares = (ones[:, :, None] * ones[:, None]).flatten(1).T * torch.from_numpy(data.sizes)
        by_label = [counts[data.codes == k] for k in range(data.n_labels)]
        weighted = [x.T @ z[data.codes == k].numpy() for k, x in enumerate(by_label)]
        totals = torch.from_numpy(np.stack([gene_totals(x) for x in by_label]))
        return cls(z, membership(data)[:, None] * squares, totals, torch.from_numpy(np.stack(weighted)))

    def subset(self, keep: Tensor) -> PoissonProfile:
        return replace(self, totals=self.totals[:, keep], weighted=self.weighted[:, keep])

    @property
    def log_inv_disps(self) -> slice:
        return slice(0)  # none

    def sizes(self, at: Tensor) -> Tensor:
        """(labels, problems, 1 + covariates, 1 + covariates) sums of s exp(z . c) (1, z) (1, z)'."""
        grown = torch.exp(self.z @ at.T)  # (cells, problems)
        width = 1 + self.z.shape[1]
        summed = (self.sums.flatten(0, 1) @ grown).view(-1, width * width, len(at))
        return summed.transpose(1, 2).unflatten(2, (width, width))

    def curve(self, at: Tensor) -> Curve:
        sizes = self.sizes(at)
        size = sizes[..., 0, 0].clamp(min=TINY)
        mean = sizes[..., 0, 1:] / size[..., None]  # (labels, problems, covariates)
        second = sizes[..., 1:, 1:] / size[..., None, None]
        covariance = second - mean[..., :, None] * mean[..., None, :]
        value = (self.weighted.sum(0) * at).sum(1) - (self.totals * torch.log(size)).sum(0)
        gradient = (self.weighted - self.totals[..., None] * mean).sum(0)
        return Curve(value, gradient, -(self.totals[..., None, None] * covariance).sum(0))


class _CellTerms(NamedTuple):
    """A term of the log likelihood for every cell and problem, and its derivatives.

    Attributes:
        value: (cells, problems) nats.
        first: (cells, problems) each, in ln of the cell's mean per unit of size factor, in b, ...
        second: likewise, by the two numbers, the smaller first.
    """

    value: Tensor
    first: tuple[Tensor, ...]
    second: dict[tuple[int, int], Tensor]


@dataclass
class NegativeBinomialWithDesign:
    """Log likelihood of negative binomial genes in their coefficients and each label's a = ln mu, b = ln r.

    Attributes:
        z: (cells, covariates).
        log_size: (cells,) ln s.
        codes: (cells,) int64 labels.
        member: (labels, cells) 0 and 1.
        x: (cells, problems).
        rising: of all labels and problems, what depends on r alone: sum_i D(x_i, r).
    """

    z: Tensor
    log_size: Tensor
    codes: Tensor
    member: Tensor
    x: Tensor
    rising: ExpectedLogLikelihood

    @classmethod
    def of(cls, design: Design, data: LabelledCounts, genes: np.ndarray) -> NegativeBinomialWithDesign:
        counts = data.counts[:, genes]
        with np.errstate(divide="ignore"):
            log_size = torch.from_numpy(np.log(data.sizes))  # empty cells: their share of every sum is 0
        return cls(
            design.z,
            log_size,
            torch.from_numpy(data.codes),
            membership(data),
            torch.from_numpy(counts.toarray().astype(np.float64)),
            _rising_part(counts, data),
        )

    def subset(self, keep: Tensor) -> NegativeBinomialWithDesign:
        n_labels = len(self.member)
        return replace(self, x=self.x[:, keep], rising=self.rising.subset(keep.repeat(n_labels)))

    @property
    def log_inv_disps(self) -> slice:
        first = self.z.shape[1] + len(self.member)
        return slice(first, first + len(self.member))

    @property
    def silent(self) -> Tensor:
        """(labels, problems) whether no cell of the label has a count."""
        return self.member @ self.x == 0

    def cells(self, at: Tensor) -> _CellTerms:
        """At (problems, covariates + labels + labels) c, a, b; without what depends on r alone."""
        c, a, b = self.numbers(at)
        eta = self.z @ c + a[self.codes]
        r = torch.exp(b)[self.codes]
        t = self.log_size[:, None] + eta - b[self.codes]
        grown, share = softplus(t, threshold=WIDEST_SOFTPLUS), torch.sigmoid(t)
        both = (self.x + r) * share
        bent = both * (1 - share)
        return _CellTerms(
            self.x * eta - (self.x + r) * grown,
            (self.x - both, both - r * grown),
            {(0, 0): -bent, (0, 1): bent - r * share, (1, 1): 2 * r * share - r * grown - bent},
        )

    def numbers(self, at: Tensor) -> tuple[Tensor, ...]:
        """c (covariates, problems), then a, b and whatever follows (labels, problems)."""
        n_labels = len(self.member)
        further = (at.shape[1] - self.z.shape[1]) // n_labels
        return at.T.split([self.z.shape[1]] + further * [n_labels])

    def by_label(self, at: Tensor) -> Tensor:
        """(labels, problems) values at (problems, covariates + 2 labels)."""
        _, a, b = self.numbers(at)
        return self.member @ self.cells(at).value + self.rising.value(a.flatten(), b.flatten()).view_as(b)

    def curve(self, at: Tensor) -> Curve:
        return self.summed(self.cells(at), at)

    def summed(self, cells: _CellTerms, at: Tensor) -> Curve:
        """Sums of the cells' terms in the coefficients and in every label's numbers, and of the rest."""
        n_labels, n_covariates = len(self.member), self.z.shape[1]
        _, a, b, *_ = self.numbers(at)
        rising = self.rising.curvature(a.flatten(), b.flatten())
        value = cells.value.sum(0) + rising.value.view_as(b).sum(0)
        by_label = torch.stack([self.member @ part for part in cells.first])  # (numbers, labels, problems)
        by_label[1] += rising.grad_b.view_as(b)
        gradient = torch.cat([self.z.T @ cells.first[0], by_label.flatten(0, 1)])  # (d, problems)
        squares = (self.z[:, :, None] * self.z[:, None]).flatten(1)
        hessian = torch.zeros(len(at), *(2 * [len(gradient)]), dtype=torch.float64)
        hessian[:, :n_covariates, :n_covariates] = (squares.T @ cells.second[0, 0]).T.unflatten(
            1, 2 * [n_covariates]
        )
        for (p, q), bend in cells.second.items():
            own = self.member @ bend
            if p == q == 1:
                own += rising.hess_bb.view_as(b)
            of_p, of_q = (torch.arange(n_labels) + n_covariates + n_labels * which for which in (p, q))
            hessian[:, of_p, of_q] = hessian[:, of_q, of_p] = own.T
            if p == 0:
                for c in range(n_covariates):
                    hessian[:, c, of_q] = hessian[:, of_q, c] = ((self.member * self.z[:, c]) @ bend).T
        return Curve(value, gradient.T, hessian)


@dataclass
class ZeroInflatedWithDesign:
    """Log likelihood of zero-inflated genes in their coefficients and each label's m, b = ln r, l = logit pi.

    m = ln((1 - pi) mu), as in ``ZeroInflated``.

    Attributes:
        gamma: the negative binomials.
        empty: (cells, problems) whether the count is 0.
    """

    gamma: NegativeBinomialWithDesign
    empty: Tensor

    @classmethod
    def of(cls, design: Design, data: LabelledCounts, genes: np.ndarray) -> ZeroInflatedWithDesign:
        gamma = NegativeBinomialWithDesign.of(design, data, genes)
        return cls(gamma, gamma.x == 0)

    def subset(self, keep: Tensor) -> ZeroInflatedWithDesign:
        return ZeroInflatedWithDesign(self.gamma.subset(keep), self.empty[:, keep])

    @property
    def log_inv_disps(self) -> slice:
        return self.gamma.log_inv_disps

    def of_gamma(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Where the negative binomials are (problems, covariates + 2 labels), and l (labels, problems)."""
        c, m, b, logit = self.gamma.numbers(at)
        return torch.cat([c, m + softplus(logit), b]).T, logit

    def by_label(self, at: Tensor) -> Tensor:
        """(labels, problems) values at (problems, covariates + 3 labels); l may be -inf."""
        place, by_label = self.of_gamma(at)
        logit = by_label[self.gamma.codes]
        return self.gamma.by_label(place) + self.gamma.member @ self._inflation(
            self.gamma.cells(place).value, logit
        )

    def _inflation(self, gamma: Tensor, logit: Tensor) -> Tensor:
        """(cells, problems) what pi adds to the values ``gamma``, which are -g at zeros."""
        return torch.where(self.empty, softplus(logit - gamma), 0.0) - softplus(logit)

    def curve(self, at: Tensor) -> Curve:
        place, by_label = self.of_gamma(at)
        gamma, logit = self.gamma.cells(place), by_label[self.gamma.codes]
        zero = torch.sigmoid(logit)
        # that a zero is the point mass's
        inflated = torch.where(self.empty, torch.sigmoid(logit - gamma.value), 0.0)
        ours, mixed = 1 - inflated, inflated * (1 - inflated)
        a, b = gamma.first
        aa, ab, bb = (
            ours * bend + mixed * gamma.first[p] * gamma.first[q] for (p, q), bend in gamma.second.items()
        )
        al, bl, ll = -mixed * a, -mixed * b, mixed - zero * (1 - zero)
        a, b = ours * a, ours * b
        # from a to m, of which da / dl = pi
        ll = ll + zero * (2 * al + zero * aa + (1 - zero) * a)
        al, bl = al + zero * aa, bl + zero * ab
        terms = _CellTerms(
            gamma.value + self._inflation(gamma.value, logit),
            (a, b, inflated - zero + zero * a),
            {(0, 0): aa, (0, 1): ab, (1, 1): bb, (0, 2): al, (1, 2): bl, (2, 2): ll},
        )
        return self.gamma.summed(terms, place)


def _rising_part(counts: sp.csr_matrix, data: LabelledCounts) -> ExpectedLogLikelihood:
    """sum_i D(x_ij, r) of all labels and genes, without any part of the mean."""
    levels = CountLevels.of(counts)
    codes, _ = levels.code(counts, np.arange(counts.shape[0]))
    at = codes * data.n_labels + np.repeat(data.codes, np.diff(counts.indptr))
    pair = np.bincount(at, minlength=levels.n_pairs * data.n_labels).reshape(-1, data.n_labels)
    nothing = torch.zeros(1, dtype=torch.float64)
    statistics = SufficientStatistics(
        nothing.expand(counts.shape[1], data.n_labels, 1),
        torch.from_numpy(pair.astype(np.float64)),
        nothing.expand(data.n_labels, 1),
        nothing.expand(data.n_labels),
    )
    return ExpectedLogLikelihood.of(statistics, Basis(SizeFactorNodes.spanning(np.ones(1)), levels))
