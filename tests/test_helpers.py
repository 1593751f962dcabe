"""The helpers that other tests rely on can fail."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tests.helpers.figures import assert_drawn


def axes_with_ticks():
    axes = Figure(layout="constrained").add_subplot()
    axes.set(xlabel="x", ylabel="y", title="Nothing", xlim=(0, 10), ylim=(0, 10))
    axes.grid()
    return axes


def test_empty_axes_are_not_drawn():
    with pytest.raises(AssertionError, match="nothing is drawn in Axes"):
        assert_drawn(axes_with_ticks().figure)
    with pytest.raises(AssertionError, match="there are no axes"):
        assert_drawn(Figure())


def test_data_out_of_sight_are_not_drawn():
    axes = axes_with_ticks()
    axes.plot([11, 12], [11, 12])
    with pytest.raises(AssertionError, match="nothing is drawn"):
        assert_drawn(axes.figure)


def test_one_of_two_axes_is_not_enough():
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar([0], [1])
    with pytest.raises(AssertionError, match="nothing is drawn"):
        assert_drawn(figure)
    right.text(0.5, 0.5, "words")
    assert_drawn(figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda axes: axes.plot([1, 2], [3, 4]),
        lambda axes: axes.scatter([1], [2]),
        lambda axes: axes.bar([1], [2]),
        lambda axes: axes.imshow([[1.0, 2.0]], extent=(1, 3, 1, 3)),
        lambda axes: axes.text(5, 5, "word"),
    ],
    ids=["line", "dot", "bar", "image", "text"],
)
def test_data_are_drawn(draw):
    axes = axes_with_ticks()
    draw(axes)
    assert_drawn(axes.figure)
