"""Sums over components that variances between them and dispersions are learned from, ``nbmix.core.prior``."""

from __future__ import annotations

from nbmix.core.kernels.elementary import reordered

N_DISPERSION_SUMS = 5  # w, w^2, z, z^2 and z w


@reordered
def _add_expected_squares(variance, own, square_off, vote, into):
    """Add the vote of one component times its E[x^2]: (genes,) each."""
    for j in range(into.size):
        weight = variance[j] / (variance[j] + own[j])
        into[j] += vote * (weight * (weight * square_off[j] + own[j]))


@reordered
def _add_dispersion_sums(pull, information, off, variance, w, w2, z, z2, zw):
    """Add what one component adds to the sums of ``dispersion_rows``: (genes,) each."""
    for j in range(off.size):
        shrinkage = 1.0 / (1.0 + variance * information[j])
        weight = information[j] * shrinkage
        slope = pull[j] * shrinkage - weight * off[j]
        w[j] += weight
        w2[j] += weight * weight
        z[j] += slope
        z2[j] += slope * slope
        zw[j] += slope * weight


@reordered
def expected_square_rows(begin, end, variance, own, square_off, votes, out):
    """sum_k votes_k E[x^2] of the genes begin..end into ``out`` (genes,).

    variance: (genes,) tau^2. own: (K, genes) 1 / H. square_off: (K, genes) d^2. votes: (K,).
    """
    out[begin:end] = 0.0
    for k in range(own.shape[0]):
        _add_expected_squares(
            variance[begin:end], own[k, begin:end], square_off[k, begin:end], votes[k], out[begin:end]
        )


@reordered
def dispersion_rows(begin, end, pull, information, off, variance, out):
    """Sums over components of w, w^2, z, z^2 and z w of the genes begin..end into ``out`` (5, genes).

    w = H / (1 + variance H),    z = pull / (1 + variance H) - w off

    pull, information: (K, genes) (d - b) H around the b of the last call, and H. off: (genes,) by how much b
    has moved since. variance: sigma^2.
    """
    out[:, begin:end] = 0.0
    for k in range(information.shape[0]):
        _add_dispersion_sums(
            pull[k, begin:end],
            information[k, begin:end],
            off[begin:end],
            variance,
            out[0, begin:end],
            out[1, begin:end],
            out[2, begin:end],
            out[3, begin:end],
            out[4, begin:end],
        )
