"""Objectives by iteration, and the curve over the number of components."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nbmix.evaluation import plots
from tests.helpers.figures import assert_drawn, dots, legend_texts, texts, tick_texts


def test_objective_trace():
    series = {"training objective": [-3.0, -2.0, -1.5], "held-out log likelihood": [np.nan, -2.5, np.nan]}
    figure = plots.objective_trace([1, 2, 3], series)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == legend_texts(axes) == list(series)
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert axes.lines[0].get_ydata().tolist() == [-3.0, -2.0, -1.5]
    assert axes.lines[1].get_xdata().tolist() == [2]
    assert axes.lines[1].get_ydata().tolist() == [-2.5]
    assert [to_hex(line.get_color()) for line in axes.lines] == list(plots.PALETTE[:2])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "nats per cell")
    assert_drawn(figure)


def test_objective_trace_of_one_step_is_a_dot():
    figure = plots.objective_trace([1], {"one": [-1.0]})
    (line,) = figure.axes[0].lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist(), line.get_marker()) == ([1], [-1.0], "o")
    assert_drawn(figure)


def test_objective_trace_of_many_steps_is_a_line():
    (line,) = plots.objective_trace(range(31), {"one": np.arange(31.0)}).axes[0].lines
    assert (line.get_ydata().tolist(), line.get_marker()) == (list(range(31)), "None")


@pytest.mark.parametrize("series", [{}, {"none yet": [np.nan]}])
def test_objective_trace_of_nothing(series):
    (axes,) = plots.objective_trace([1], series).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[] for _ in series]
    with pytest.raises(AssertionError, match="nothing is drawn"):
        assert_drawn(axes.figure)


def test_held_out_curve():
    figure = plots.held_out_curve([3, 2, 4, 3], [-9.0, -10.0, -9.5, -8.0], [0.1, 0.2, 0.3, 0.4])
    (axes,) = figure.axes
    line, points = axes.lines[:2]
    assert line.get_xdata().tolist() == [2, 3, 4]
    assert line.get_ydata().tolist() == [-10.0, -8.0, -9.5]
    assert points.get_xdata().tolist() == [3, 2, 4, 3]
    assert points.get_ydata().tolist() == [-9.0, -10.0, -9.5, -8.0]
    bars, ring = axes.collections
    ends = [[low, high] for (_, low), (_, high) in bars.get_segments()]
    np.testing.assert_allclose(ends, [[-9.1, -8.9], [-10.2, -9.8], [-9.8, -9.2], [-8.4, -7.6]])
    assert ring.get_offsets().tolist() == [[3.0, -8.0]]
    assert axes.get_title(loc="left") == "best: 3 components"
    assert_drawn(figure)


def test_held_out_curve_of_one_fit():
    figure = plots.held_out_curve([5], [-1.0])
    assert dots(figure.axes[0], -1).tolist() == [[5.0, -1.0]]
    assert_drawn(figure)


def test_held_out_curve_rings_what_is_recommended():
    (axes,) = plots.held_out_curve([1, 2, 3], [-9.0, -3.0, -2.9], recommended=2).axes
    assert axes.get_title(loc="left") == "recommended: 2 components"
    assert dots(axes, -1).tolist() == [[2.0, -3.0]]


def test_joins_are_drawn_where_the_separation_is():
    joins = [
        ((0,), (2,), 1.5, False),
        ((3,), (4,), 2.0, False),
        ((0, 2), (3, 4), 1.0, False),
        ((0, 2, 3, 4), (1,), 8.0, True),
    ]
    figure = plots.join_dendrogram(joins, [50, 40, 30, 20, 1000], [[0, 2], [4], [3], [1]])
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "group 0: component 0 (50 cells)",
        "group 0: component 2 (30 cells)",
        "group 2: component 3 (20 cells)",
        "group 1: component 4 (1,000 cells)",
        "group 3: component 1 (40 cells)",
    ]
    first, second, third, last = axes.lines
    assert first.get_xdata().tolist() == [0, 1.5, 1.5, 0]
    assert first.get_ydata().tolist() == [0, 0, 1, 1]
    assert second.get_xdata().tolist() == [0, 2.0, 2.0, 0]
    assert third.get_xdata().tolist() == [1.5, 2.0, 2.0, 2.0]  # not left of its parts
    assert third.get_ydata().tolist() == [0.5, 0.5, 2.5, 2.5]
    assert last.get_xdata().tolist() == [2.0, 8.0, 8.0, 0]
    assert first.get_linewidth() > second.get_linewidth() == third.get_linewidth() == last.get_linewidth()
    assert to_hex(last.get_color()) != to_hex(first.get_color()) == to_hex(third.get_color())
    assert legend_texts(axes) == ["gap", "no gap"]
    assert axes.get_xlabel() == "separation (standard deviations)"
    assert_drawn(figure)


def test_components_without_cells_are_not_joined():
    joins = [((0,), (1,), 1.0, False), ((0, 1), (2,), 2.0, True), ((0, 1, 2), (3,), 3.0, True)]
    (axes,) = plots.join_dendrogram(joins, [5, 0, 4, 3], [[0], [1], [2, 3]], ["$T$", "none", "B"]).axes
    assert tick_texts(axes.yaxis) == [
        r"group \$T\$: component 0 (5 cells)",
        "group B: component 2 (4 cells)",
        "group B: component 3 (3 cells)",
    ]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 2, 2, 0], [2, 3, 3, 0]]
    figure = plots.join_dendrogram(joins, [5, 0, 0, 0], [[0], [1], [2, 3]])
    assert texts(figure.axes[0]) == ["one component with cells: nothing to join"]


def test_separated_groups_have_their_names():
    (axes,) = plots.separation_matrix(2, [0], [1], [5.0], [True], ["CD4 T", "B"]).axes
    assert tick_texts(axes.xaxis) == tick_texts(axes.yaxis) == ["CD4 T", "B"]
    assert axes.get_xticklabels()[0].get_rotation() == 90  # side by side


@pytest.mark.parametrize(
    "draw",
    [
        lambda place: plots.objective_trace([1, 2], {"one": [1.0, 2.0]}, place),
        lambda place: plots.join_dendrogram([((0,), (1,), 1.0, True)], [3, 4], place=place),
        lambda place: plots.separation_matrix(2, [0], [1], [5.0], [True], place=place),
    ],
)
def test_pictures_fill_the_axes_that_are_given(draw):
    figure = Figure(figsize=(9.0, 3.0))
    left, right = figure.subplots(1, 2)
    assert draw(right) is figure
    assert not left.has_data() and right.has_data()
    assert figure.get_size_inches().tolist() == [9.0, 3.0]


def test_separations_are_numbers_on_a_grid():
    figure = plots.separation_matrix(3, [0, 0, 1], [1, 2, 2], [5.0, 2.5, 9.25], [True, False, True])
    (axes,) = figure.axes
    values = axes.images[0].get_array()
    np.testing.assert_array_equal(values[np.triu_indices(3, 1)], [5.0, 2.5, 9.25])
    np.testing.assert_array_equal(values, values.T)
    found = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert found[0, 1] == found[1, 0] == "5.0"
    assert found[2, 0] == "(2.5)"
    assert len(found) == 6
    assert_drawn(figure)
