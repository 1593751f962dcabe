"""Pictures of cells: bars count them, dots are them, colours and opacity say what they are assigned to."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nbmix.evaluation import plots
from tests.helpers.figures import assert_drawn, colors_by_x, dots, heights, legend_texts, texts, tick_texts
from tests.helpers.posteriors import SIZES, responsibilities


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def test_component_sizes():
    figure = plots.component_sizes(
        [[0.9, 0.1, 0.0], [0.7, 0.3, 0.0], [0.4, 0.0, 0.6]], ["T", "none", "$x_1$ B"]
    )
    (axes,) = figure.axes
    assert widths(axes) == [2, 1]
    assert texts(axes) == ["2 (0.800)", "1 (0.600)"]
    assert tick_texts(axes.yaxis) == ["T", r"\$x_1\$ B"]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [plots.PALETTE[0], plots.PALETTE[2]]
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
def test_component_sizes_at_the_edges(n_cells, n_components):
    posterior = responsibilities(n_cells, n_components)
    figure = plots.component_sizes(posterior)
    sizes = np.bincount(posterior.argmax(1), minlength=n_components)
    assert widths(figure.axes[0]) == sizes[sizes > 0].tolist()
    assert_drawn(figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda place: plots.component_sizes(np.eye(2), None, place),
        lambda place: plots.groups_on_embedding("UMAP", np.eye(2), np.eye(2), None, place),
        lambda place: plots.certainty_on_embedding("UMAP", np.eye(2), np.eye(2), place),
    ],
)
def test_pictures_fill_the_axes_or_the_figure_that_is_given(draw):
    figure = Figure(figsize=(9.0, 3.0))
    left, right = figure.subplots(1, 2)
    assert draw(right) is figure
    assert not left.has_data() and right.has_data()
    assert figure.get_size_inches().tolist() == [9.0, 3.0]
    empty = Figure()
    assert draw(empty) is empty
    assert empty.axes[0].has_data()
    assert empty.get_size_inches().tolist() == draw(None).get_size_inches().tolist()


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
    x, y = dots(axes).T
    np.testing.assert_allclose(y, [5.0, -0.5, 3.0])
    assert [round(place) for place in x] == [0, 1, 1] and x[1] < x[2]
    assert colors_by_x(axes) == [plots.PALETTE[k] for k in (0, 1, 1)]
    assert tick_texts(axes.xaxis) == ["0", "1"]
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


def test_groups_on_embedding_have_their_names_and_colors():
    coordinates = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
    posterior = [[0.9, 0.0, 0.1], [0.2, 0.0, 0.8], [0.8, 0.0, 0.2]]
    figure = plots.groups_on_embedding("$U$", coordinates, posterior, ["T", "nobody", "$B$"])
    (axes,) = figure.axes
    assert legend_texts(axes) == ["T (2)", r"\$B\$ (1)"]
    assert colors_by_x(axes) == [plots.PALETTE[k] for k in (0, 2, 0)]
    assert axes.get_xlabel() == r"\$U\$ 1"
    assert_drawn(figure)


def test_certainty_on_embedding():
    coordinates = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
    figure = plots.certainty_on_embedding(
        "UMAP", coordinates, [[0.4, 0.3, 0.3], [0.0, 1.0, 0.0], [0, 0.3, 0.7]]
    )
    axes, bar = figure.axes
    np.testing.assert_array_equal(dots(axes), coordinates[[1, 2, 0]])  # the least sure on top
    np.testing.assert_allclose(axes.collections[0].get_array(), [1.0, 0.7, 0.4])
    assert axes.collections[0].get_clim() == (0.4, 1.0)
    assert bar.get_ylabel() == "largest posterior"
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
    posterior = responsibilities(n_cells, n_components)
    figure = plots.posterior_on_embedding("PCA", coordinates, posterior, labels if labelled else None)
    assert len(figure.axes) == 1 + labelled
    for axes in figure.axes:
        np.testing.assert_array_equal(np.sort(dots(axes), axis=0), np.sort(coordinates, axis=0))
    assert len(legend_texts(figure.axes[-1])) == len(np.unique(posterior.argmax(1)))
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
