"""Pictures of labels against components: tables on the diagonal, correlations, calibration."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from statsmodels.stats.proportion import proportion_confint

from nbmix.evaluation import plots
from nbmix.evaluation.calibration import expected_calibration_error, reliability
from nbmix.evaluation.metrics import overlap_table
from tests.helpers.figures import assert_drawn, dots, heights, legend_texts, texts, tick_texts
from tests.helpers.posteriors import responsibilities


def test_component_label_table_lies_on_the_diagonal():
    table = np.array([[0, 2, 9], [8, 0, 0]])
    figure = plots.component_label_table(["B", "T"], table)
    axes = figure.axes[0]
    assert tick_texts(axes.xaxis) == ["2", "0", "1"]
    assert tick_texts(axes.yaxis) == ["B", "T"]
    assert texts(axes) == ["9", "0", "2", "0", "8", "0"]
    assert [text.get_position() for text in axes.texts] == [(x, y) for y in range(2) for x in range(3)]
    np.testing.assert_allclose(axes.images[0].get_array(), [[9 / 11, 0, 2 / 11], [0, 1, 0]])
    assert_drawn(figure)


@pytest.mark.parametrize(("n_labels", "n_components"), [(1, 1), (1, 30), (30, 1), (12, 30)])
def test_component_label_table_at_the_edges(n_labels, n_components):
    names = [f"a very long cell type name, number {i}, activated" for i in range(n_labels)]
    table = np.random.default_rng(0).integers(0, 20, (n_labels, n_components))
    table[0] = n_labels == 1  # a label without cells among others
    figure = plots.component_label_table(names, table)
    axes = figure.axes[0]
    order = [int(text) for text in tick_texts(axes.xaxis)]
    assert texts(axes) == [str(count) for count in table[:, order].flat]
    assert all(len(name) <= plots.LONGEST_NAME for name in tick_texts(axes.yaxis))
    assert_drawn(figure)


@pytest.mark.parametrize("draw", [plots.component_label_table, plots.component_batch_table])
def test_components_without_cells_have_no_column(draw):
    axes = draw(["B", "T"], np.array([[0, 0, 9], [8, 0, 0]])).axes[0]
    assert sorted(tick_texts(axes.xaxis)) == ["0", "2"]
    assert sorted(texts(axes)) == ["0", "0", "8", "9"]


def test_overlap_table_feeds_the_heat_map():
    found = responsibilities(50, 4).argmax(axis=1)
    labels = np.random.default_rng(1).integers(0, 3, 50)
    figure = plots.component_label_table(*overlap_table(labels, found, 4))
    axes = figure.axes[0]
    for column, k in enumerate(map(int, tick_texts(axes.xaxis))):
        for row in range(3):
            cells = (labels == row) & (found == k)
            assert texts(axes)[4 * row + column] == str(cells.sum())
            share = axes.images[0].get_array()[row, column]
            assert share == pytest.approx(cells.sum() / (labels == row).sum())
    assert_drawn(figure)


def test_component_label_correlation():
    rng = np.random.default_rng(0)
    labels = rng.choice(["B", "NK", "T"], 60)
    posterior = responsibilities(60, 4)
    figure = plots.component_label_correlation(labels, posterior)
    axes = figure.axes[0]
    order = [int(text) for text in tick_texts(axes.xaxis)]
    assert sorted(order) == [0, 1, 2, 3]
    names = tick_texts(axes.yaxis)
    assert names == ["B", "NK", "T"]
    wanted = np.corrcoef(np.vstack([[labels == name for name in names], posterior[:, order].T]))[:3, 3:]
    np.testing.assert_allclose(axes.images[0].get_array(), wanted, atol=1e-12)
    np.testing.assert_allclose([float(text) for text in texts(axes)], wanted.ravel(), atol=0.0051)
    assert_drawn(figure)


def test_no_correlation_is_minus_nothing():
    first = np.array([0.9, 0.1, 0.9, 0.099])
    axes = plots.component_label_correlation(["a", "a", "b", "b"], np.stack([first, 1 - first], 1)).axes[0]
    assert axes.images[0].get_array().min() < 0
    assert set(texts(axes)) == {"0.00"}


def test_a_component_without_cells_has_no_correlation():
    posterior = np.column_stack([np.eye(2)[[0, 0, 1]] * 0.6 + 0.1, np.full(3, 0.2)])
    figure = plots.component_label_correlation(["a", "a", "b"], posterior)
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[1, -1], [-1, 1]])
    assert tick_texts(axes.xaxis) == ["0", "1"]
    assert texts(axes) == ["1.00", "-1.00", "-1.00", "1.00"]
    assert_drawn(figure)


def test_one_label_has_no_correlation():
    axes = plots.component_label_correlation(["a", "a", "a"], np.eye(2)[[0, 0, 1]]).axes[0]
    assert np.isnan(np.ma.filled(axes.images[0].get_array(), np.nan)).all()
    assert texts(axes) == []


def test_reliability_diagram():
    sure, right = np.array([0.6, 0.62, 0.99, 0.99]), np.array([True, False, True, True])
    bins = reliability(sure, right, n_bins=5)
    figure = plots.reliability_diagram(
        {"posterior": bins, "tempered": reliability(sure / 2, right, n_bins=5)}
    )
    top, bottom = figure.axes
    np.testing.assert_allclose(dots(top, 1), [[0.6, 1.0], [0.62, 0.0], [0.99, 1.0]], atol=0.01)
    error = expected_calibration_error(sure, right, n_bins=5)
    assert legend_texts(top)[0] == f"posterior: expected calibration error {error:.3f}"
    assert heights(bottom)[:5] == [0, 0, 1, 1, 2]
    assert heights(bottom)[5:] == [0, 2, 2, 0, 0]
    assert_drawn(figure)


def test_few_cells_have_a_wide_interval():
    sure, right = np.repeat([0.5, 0.9], [4, 400]), np.arange(404) % 4 > 0
    (axes, _) = plots.reliability_diagram({"posterior": reliability(sure, right)}).axes
    ends = [(low, high) for (_, low), (_, high) in axes.collections[0].get_segments()]
    wanted = [proportion_confint(round(0.75 * n), n, method="wilson") for n in (4, 400)]
    np.testing.assert_allclose(ends, wanted)


def test_no_legend_lies_on_data():
    axes = plots.reliability_diagram({"posterior": reliability([0.5, 0.9], [True, True])}).axes[0]
    FigureCanvasAgg(axes.figure).draw()
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1


def test_reliability_diagram_of_no_cells():
    top, bottom = plots.reliability_diagram({"posterior": reliability([], [])}).axes
    diagonal = top.lines[0]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0.0, 1.0]
    assert not len(dots(top, 1))
    assert set(heights(bottom)) == {0}
    assert legend_texts(top) == ["posterior: expected calibration error 0.000"]
