"""Cells in the plane: groups lie apart, UMAP where it can, and small or constant data."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from nbmix.evaluation.embedding import embed
from tests.helpers.groups import two_groups


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


def test_no_umap_below_its_neighbors():
    counts, size, _ = two_groups(15)
    assert embed(counts, size).name == "PCA"


def test_umap_separates_two_groups_and_repeats():
    counts, size, group = two_groups()
    first, second = embed(counts, size, seed=1), embed(counts, size, seed=1)
    assert first.name == "UMAP"
    assert first.coordinates.shape == (60, 2)
    assert first.coordinates.dtype == np.float32
    assert_separated(first.coordinates, group)
    np.testing.assert_array_equal(first.coordinates, second.coordinates)
    assert not np.array_equal(first.coordinates, embed(counts, size, seed=2).coordinates)


def test_without_a_compiled_umap_there_are_principal_components(monkeypatch):
    counts, size, _ = two_groups()
    monkeypatch.setattr("nbmix.evaluation.embedding.find_spec", lambda name: None)
    assert embed(counts, size).name == "PCA"
