import numpy as np
import pytest
from scipy.sparse import csr_array, csr_matrix
from sklearn.decomposition import PCA

from nbmix.data.pca import log_pca
from nbmix.evaluation.embedding import embed


def two_groups(n_cells: int = 60, n_genes: int = 80) -> tuple[csr_array, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    profiles = rng.gamma(0.5, size=(2, n_genes))
    group = np.arange(n_cells) % 2
    size = rng.lognormal(np.log(300), 0.5, n_cells)
    counts = csr_array(rng.poisson(size[:, None] * (profiles / profiles.sum(axis=1, keepdims=True))[group]))
    return counts, np.asarray(counts.sum(axis=1), dtype=np.float64), group


def assert_separated(coordinates: np.ndarray, group: np.ndarray) -> None:
    centres = np.stack([coordinates[group == g].mean(axis=0) for g in (0, 1)])
    nearest = np.linalg.norm(coordinates[:, None] - centres, axis=-1).argmin(axis=1)
    assert (nearest == group).all()


def test_first_component_separates_two_groups():
    counts, size, group = two_groups()
    name, coordinates = embed(counts, size, max_umap_cells=0)
    assert name == "PCA"
    assert coordinates.shape == (60, 2)
    assert coordinates.dtype == np.float32
    assert_separated(coordinates, group)


@pytest.mark.parametrize("n_pcs", [5, 70])  # Lanczos, and the dense way
def test_log_pca_is_the_dense_computation(n_pcs):
    counts, size, _ = two_groups()
    scaled = np.log1p(counts.toarray() * (np.median(size) / size)[:, None])
    expected = PCA(min(n_pcs, 60), svd_solver="full").fit_transform(scaled)[:, :5]
    found = log_pca(counts, size, n_pcs)
    assert found.shape == (60, n_pcs)
    signs = np.sign((found[:, :5] * expected).sum(axis=0))
    np.testing.assert_allclose(found[:, :5] * signs, expected, atol=2e-4)


def test_only_the_most_variable_genes_count(monkeypatch):
    counts, size, _ = two_groups()
    monkeypatch.setattr("nbmix.data.pca.N_VARIABLE_GENES", 10)
    log_values = np.log1p(counts.toarray() * (np.median(size) / size)[:, None])
    kept = log_values[:, np.argsort(-log_values.var(axis=0))[:10]]
    found = log_pca(counts, size, 10)
    assert found.var(axis=0).sum() == pytest.approx(kept.var(axis=0).sum(), rel=1e-4)


def test_same_seed_same_scores_and_input_untouched():
    counts, size, _ = two_groups()
    before = counts.copy()
    np.testing.assert_array_equal(log_pca(counts, size, 5, 3), log_pca(csr_matrix(counts), size, 5, 3))
    assert (counts != before).nnz == 0


def test_only_ratios_of_size_factors_matter():
    counts, size, _ = two_groups()
    np.testing.assert_allclose(log_pca(counts, size / 1000, 3), log_pca(counts, size, 3), atol=1e-4)


@pytest.mark.parametrize(
    "counts",
    [
        np.array([[1, 0], [0, 2], [3, 1]]),
        np.array([[1, 2]]),
        np.array([[1], [2]]),
        np.zeros((20, 3)),
        np.ones((20, 3)),
        np.outer(np.arange(1, 21), [1, 2, 3]),
        np.zeros((3, 0)),
    ],
    ids=["3 x 2", "one cell", "one gene", "empty", "constant", "constant up to size", "no genes"],
)
def test_tiny_and_constant_data(counts):
    sparse = csr_array(counts.astype(np.float32))
    name, coordinates = embed(sparse, counts.sum(axis=1))
    assert name == "PCA"
    assert coordinates.shape == (len(counts), 2)
    assert np.isfinite(coordinates).all()


def test_empty_cell_among_others():
    counts, size, _ = two_groups()
    dense = counts.toarray()
    dense[4] = 0
    size[4] = 0
    assert np.isfinite(log_pca(csr_array(dense), size, 5)).all()


def test_no_umap_below_its_neighbors():
    counts, size, _ = two_groups(15)
    assert embed(counts, size).name == "PCA"


def test_number_of_size_factors_is_checked():
    counts, size, _ = two_groups()
    with pytest.raises(ValueError, match=r"\(59,\).*60 cells"):
        log_pca(counts, size[1:])


@pytest.mark.slow
def test_umap_separates_two_groups_and_repeats():
    counts, size, group = two_groups()
    first, second = embed(counts, size, seed=1), embed(counts, size, seed=1)
    assert first.name == "UMAP"
    assert first.coordinates.shape == (60, 2)
    assert first.coordinates.dtype == np.float32
    assert_separated(first.coordinates, group)
    np.testing.assert_array_equal(first.coordinates, second.coordinates)
    assert not np.array_equal(first.coordinates, embed(counts, size, seed=2).coordinates)
