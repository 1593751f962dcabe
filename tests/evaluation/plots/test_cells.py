"""Pictures of cells: bars count them, dots are them, colours and opacity say what they are assigned to."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from nbmix.evaluation import plots
from tests.helpers.figures import assert_drawn, colors_by_x, dots, heights, legend_texts, texts
from tests.helpers.posteriors import SIZES, responsibilities


def test_component_sizes():
    figure = plots.component_sizes([[0.9, 0.1, 0.0], [0.7, 0.3, 0.0], [0.4, 0.6, 0.0]])
    top, bottom = figure.axes
    assert heights(top) == [2, 1, 0]
    assert heights(bottom) == pytest.approx([0.8, 0.6, 0.0])
    assert texts(top) == ["2", "1", "0"]
    assert texts(bottom) == ["0.80", "0.60", ""]
    assert (top.get_ylabel(), bottom.get_xlabel()) == ("cells", "group")
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
def test_component_sizes_at_the_edges(n_cells, n_components):
    posterior = responsibilities(n_cells, n_components)
    figure = plots.component_sizes(posterior)
    assert heights(figure.axes[0]) == np.bincount(posterior.argmax(1), minlength=n_components).tolist()
    assert [to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches] == [*plots.PALETTE[:n_components]]
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
def test_posterior_histogram_counts_every_cell(n_cells, n_components):
    figure = plots.posterior_histogram(responsibilities(n_cells, n_components).astype(np.float32))
    (axes,) = figure.axes
    assert sum(heights(axes)) == n_cells
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "largest posterior probability of the cell"
    assert_drawn(figure)


def test_posterior_histogram_has_a_cell_where_its_posterior_is():
    (axes,) = plots.posterior_histogram([[0.51, 0.49], [0.3, 0.7], [0.0, 1.0], [0.001, 0.999]]).axes
    filled = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches if bar.get_height()]
    assert len(filled) == 3
    for (low, high), value in zip(filled, (0.51, 0.7, 0.999), strict=True):
        assert low <= value <= high
    assert heights(axes)[-1] == 2


def test_posterior_histogram_of_undecided_cells():
    (axes,) = plots.posterior_histogram(np.full((7, 3), 1 / 3, dtype=np.float32)).axes
    assert heights(axes)[0] == 7


def test_log_likelihood_margins():
    log_likelihood = np.array([[-10.0, -15.0, -30.0], [-9.0, -9.5, -20.0], [-50.0, -5.0, -8.0]])
    figure = plots.log_likelihood_margins(log_likelihood, [0, 1, 1])
    (axes,) = figure.axes
    np.testing.assert_allclose(dots(axes), [[0, 5.0], [1, -0.5], [2, 3.0]])
    assert colors_by_x(axes) == [plots.PALETTE[k] for k in (0, 1, 1)]
    assert {text.get_text(): text.get_position()[0] for text in axes.texts} == {"0": 0.0, "1": 1.5}
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), [*SIZES, (20_000, 3)])
def test_log_likelihood_margins_at_the_edges(n_cells, n_components):
    values = np.random.default_rng(0).normal(-1000, 50, (n_cells, n_components))
    figure = plots.log_likelihood_margins(values, values.argmax(1))
    (axes,) = figure.axes
    if n_components == 1:
        assert texts(axes) == ["one group: nothing to compare with"]
    else:
        assert len(dots(axes)) == min(n_cells, plots.MOST_DOTS)
        best, second = np.sort(values, axis=1)[:, [-1, -2]].T
        assert set(dots(axes)[:, 1]) <= set(best - second)
    assert_drawn(figure)


def test_posterior_is_the_opacity():
    coordinates = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
    figure = plots.posterior_on_embedding("UMAP", coordinates, [[1.0, 0.0], [0.4, 0.6], [0.8, 0.2]])
    (axes,) = figure.axes
    order = np.argsort(dots(axes)[:, 0])
    np.testing.assert_array_equal(dots(axes)[order], coordinates)
    opacity = axes.collections[0].get_facecolor()[order, 3]
    np.testing.assert_allclose(opacity / opacity[0], [1.0, 0.6, 0.8])
    assert colors_by_x(axes) == [plots.PALETTE[k] for k in (0, 1, 0)]
    assert legend_texts(axes) == ["0 (2)", "1 (1)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("UMAP 1", "UMAP 2")
    assert texts(axes) == ["0", "1"]
    assert_drawn(figure)


def test_labels_take_the_color_of_their_component():
    coordinates = np.arange(8.0).reshape(4, 2)
    labels = np.array(["b", "b", "a", "c"])
    figure = plots.posterior_on_embedding("PCA", coordinates, np.eye(2)[[0, 0, 1, 1]], labels)
    left, right = figure.axes
    assert legend_texts(left) == ["a (1)", "b (2)", "c (1)"]
    assert legend_texts(right) == ["0 (2)", "1 (2)"]
    hexes = colors_by_x(left)
    assert hexes[0] == hexes[1] == plots.PALETTE[0]
    assert sorted(hexes[2:]) == sorted(plots.PALETTE[1:3])
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
@pytest.mark.parametrize("labelled", [False, True])
def test_posterior_on_embedding_at_the_edges(n_cells, n_components, labelled):
    labels = np.array([f"a very long cell type name, number {i % 25}" for i in range(n_cells)])
    coordinates = np.random.default_rng(0).normal(size=(n_cells, 2)).astype(np.float32)
    figure = plots.posterior_on_embedding(
        "PCA", coordinates, responsibilities(n_cells, n_components), labels if labelled else None
    )
    assert len(figure.axes) == 1 + labelled
    for axes in figure.axes:
        np.testing.assert_array_equal(np.sort(dots(axes), axis=0), np.sort(coordinates, axis=0))
    assert len(legend_texts(figure.axes[-1])) == n_components
    assert_drawn(figure)


def test_points_shrink_and_pale_with_their_number():
    def drawn(n_cells):
        points = plots.posterior_on_embedding("PCA", np.zeros((n_cells, 2)), np.ones((n_cells, 1))).axes[0]
        return points.collections[0].get_sizes()[0], points.collections[0].get_facecolor()[0, 3]

    few, many = drawn(100), drawn(100_000)
    assert few[0] > many[0] > 0
    assert few[1] > many[1] > 0


def test_other_groupings_have_panels_between_labels_and_components():
    coordinates = np.arange(8.0).reshape(4, 2)
    others = {"Leiden": np.array(["1", "1", "0", "0"])}
    figure = plots.posterior_on_embedding(
        "PCA", coordinates, np.eye(2)[[0, 0, 1, 1]], ["b", "b", "a", "a"], others
    )
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["labels", "Leiden"]
    assert len(figure.axes) == 3
    assert legend_texts(figure.axes[1]) == ["0 (2)", "1 (2)"]
    for axes in figure.axes:  # the same cells, the same colours
        assert colors_by_x(axes) == [plots.PALETTE[k] for k in (0, 0, 1, 1)]


def test_short_names_are_written_where_their_cells_are():
    coordinates = np.array([[0.0, 0.0], [0.0, 0.0], [5.0, 1.0], [5.0, 1.0]])
    names = ["cytotoxic_t", "cytotoxic_t", "b_cells", "b_cells"]
    others = {"Leiden": np.array([12, 12, 3, 3])}
    figure = plots.posterior_on_embedding("PCA", coordinates, np.eye(2)[[0, 0, 1, 1]], names, others)
    marks = [{text.get_text(): text.get_position() for text in axes.texts} for axes in figure.axes]
    places = [(0.0, 0.0), (5.0, 1.0)]
    assert marks == [{}, dict(zip(("12", "3"), places, strict=True)), dict(zip("01", places, strict=True))]
