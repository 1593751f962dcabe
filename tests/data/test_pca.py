"""Principal components of log counts beside the dense computation."""

import numpy as np
import pytest
from scipy.sparse import csr_array, csr_matrix
from sklearn.decomposition import PCA

from nbmix.data.pca import log_pca
from tests.helpers.groups import two_groups


@pytest.mark.parametrize("n_pcs", [5, 70])  # Lanczos, and the dense way
def test_log_pca_is_the_dense_computation(n_pcs):
    counts, size, _ = two_groups()
    scaled = np.log1p(counts.toarray() * (np.median(size) / size)[:, None])
    expected = PCA(min(n_pcs, 60), svd_solver="full").fit_transform(scaled)[:, :5]
    found = log_pca(counts, size, n_pcs)
    assert found.shape == (60, n_pcs)
    signs = np.sign((found[:, :5] * expected).sum(axis=0))
    np.testing.assert_allclose(found[:, :5] * signs, expected, atol=2e-4)


def test_only_the_most_variable_genes_count():
    counts, size, _ = two_groups()
    log_values = np.log1p(counts.toarray() * (np.median(size) / size)[:, None])
    kept = log_values[:, np.argsort(-log_values.var(axis=0))[:10]]
    found = log_pca(counts, size, 10, n_genes=10)
    assert found.var(axis=0).sum() == pytest.approx(kept.var(axis=0).sum(), rel=1e-4)


def test_same_seed_same_scores_and_input_untouched():
    counts, size, _ = two_groups()
    before = counts.copy()
    np.testing.assert_array_equal(log_pca(counts, size, 5, 3), log_pca(csr_matrix(counts), size, 5, 3))
    assert (counts != before).nnz == 0


def test_only_ratios_of_size_factors_matter():
    counts, size, _ = two_groups()
    np.testing.assert_allclose(log_pca(counts, size / 1000, 3), log_pca(counts, size, 3), atol=1e-4)


def test_empty_cell_among_others():
    counts, size, _ = two_groups()
    dense = counts.toarray()
    dense[4] = 0
    size[4] = 0
    assert np.isfinite(log_pca(csr_array(dense), size, 5)).all()


def test_number_of_size_factors_is_checked():
    counts, size, _ = two_groups()
    with pytest.raises(ValueError, match=r"\(59,\).*60 cells"):
        log_pca(counts, size[1:])
