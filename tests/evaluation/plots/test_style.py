"""Colours, names and legends that all figures share."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D

from nbmix.evaluation.plots.style import (
    LEGEND_ROWS,
    LONGEST_NAME,
    PALETTE,
    axes_in,
    component_colors,
    figure_of,
    name_columns,
    new_figure,
    say,
    short_name,
    side_legend,
    side_legend_width,
)
from tests.helpers.figures import assert_drawn, legend_texts, texts


def test_palette_has_thirty_distinct_colors_and_then_repeats():
    assert len(set(PALETTE)) == len(PALETTE) == 30
    assert component_colors(31) == [*PALETTE, PALETTE[0]]


def test_long_names_lose_their_middle():
    assert short_name("B") == "B"
    assert short_name(7) == "7"
    short = short_name("CD4-positive, alpha-beta memory T cell, activated")
    assert len(short) == LONGEST_NAME
    assert short.startswith("CD4-positive, al") and short.endswith(", activated") and "…" in short


@pytest.mark.parametrize("n", [1, LEGEND_ROWS, LEGEND_ROWS + 1])
def test_a_legend_has_as_many_columns_as_it_needs(n):
    axes = new_figure(4, 4).add_subplot()
    handles = [Line2D([], [], label=f"name {i}") for i in range(n)]
    side_legend(axes, handles, "names")
    assert legend_texts(axes) == [f"name {i}" for i in range(n)]
    assert axes.get_legend().get_title().get_text() == "names"
    wider = side_legend_width(handles) / side_legend_width(handles[:1])
    assert (wider > 1.9) == (n > LEGEND_ROWS)


def test_the_whole_figure_is_that_around_a_subfigure():
    figure = new_figure(4, 4)
    axes = figure.subfigures(1, 2)[1].subplots()
    assert figure_of(axes) is figure
    assert axes_in(axes, 9, 9) is axes
    assert figure.get_size_inches().tolist() == [4, 4]


@pytest.mark.parametrize(("names", "turned"), [(["0", "29"], 0), (["0", "CD4 T"], 90)])
def test_names_of_columns_do_not_overlap(names, turned):
    axes = new_figure(4, 4).add_subplot()
    name_columns(axes, names)
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert axes.get_xticklabels()[0].get_rotation() == turned


def test_words_where_there_is_nothing_to_draw():
    figure = new_figure(4, 4)
    axes = figure.add_subplot()
    say(axes, "nothing")
    assert texts(axes) == ["nothing"]
    assert not len(axes.get_xticks()) and not len(axes.get_yticks())
    assert_drawn(figure)


@pytest.mark.parametrize(
    "name, shown",
    [
        ("low ($) high ($$)", "low ($) high ($$)"),
        ("$x_1$ cells", "$x_1$ cells"),
        (r"\frac$\alpha{", r"\frac$\alpha{"),
        ("_hidden", " _hidden"),
        ("a\nb\x1b", r"a\nb\x1b"),
        ("Té", "Té"),
    ],
)
def test_names_are_drawn_as_they_stand(name, shown):
    def pixels(text: str, parse_math: bool) -> np.ndarray:
        figure = new_figure(3.0, 1.0)
        figure.text(0.1, 0.5, text, parse_math=parse_math)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())

    np.testing.assert_array_equal(pixels(short_name(name), True), pixels(shown, False))
