"""Cells in the plane that answer the mouse, drawn in the browser by Bokeh, which takes a second to import."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nbmix.evaluation.plots.cells import Grouping, fullest_place, own_components

# of what is told of a cell: half the width of a telephone
TOLD = "max-width: 150px; overflow-wrap: anywhere; font: 12px/1.4 sans-serif"


class InteractiveCells(NamedTuple):
    """What a page needs to draw the cells and to hide groups of them.

    Attributes:
        item: JSON of Bokeh's document, for ``Bokeh.embed.embed_item``. Its sources "cells" and "marks" have a
            column "group"; its filters "cells shown" and "marks shown" say which of their rows are seen.
        groups: name, colour and number of cells of each group that has some.
    """

    item: Mapping[str, Any]
    groups: list[tuple[str, str, int]]


@cache
def bokeh_script() -> str:
    """The library, 1.3 MB of JavaScript that loads nothing."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], minified=True).js_raw[:1])


def interactive_cells(
    embedding_name: str,
    coordinates: ArrayLike,
    responsibilities: ArrayLike,
    cell_names: ArrayLike,
    labels: ArrayLike | None = None,
) -> InteractiveCells:
    """Cells coloured by component; under the mouse stand name, label, and the two likeliest components.

    Canvas, not WebGL, which compiles code in a way that the report's content security policy forbids: of
    30,000 cells it is still swift.

    Args:
        embedding_name: for the axes, such as "UMAP".
        coordinates: (cells, 2).
        responsibilities: (cells, components), rows sum to 1; components without cells are left out.
        cell_names: (cells,)
        labels: (cells,) none missing, or None.
    """
    points, posterior = np.asarray(coordinates, np.float32), np.asarray(responsibilities)
    own = own_components(posterior)
    columns, lines = _told(posterior, own, cell_names, labels)
    order = np.random.default_rng(0).permutation(len(points))  # no group hides another
    cells = {"x": points[:, 0], "y": points[:, 1]} | columns
    places = np.array([fullest_place(points, points[own.codes == k]) for k in range(len(own.names))])
    marks = {"x": places[:, 0].tolist(), "y": places[:, 1].tolist(), "group": list(own.names)}
    drawn = _draw(embedding_name, {name: _plain(cells[name][order]) for name in cells}, marks, own, lines)
    sizes = own.sizes.tolist()
    return InteractiveCells(drawn, list(zip(own.names, own.colors, sizes, strict=True)))


def _told(
    posterior: NDArray, own: Grouping, cell_names: ArrayLike, labels: ArrayLike | None
) -> tuple[dict[str, NDArray], list[str]]:
    """What is known of each cell, and lines of Bokeh's template for it, which escapes the values."""
    filled, number = np.unique(posterior.argmax(axis=1)), posterior.argmax(axis=1)
    columns = {
        "cell": np.asarray(cell_names).astype(str),
        "group": number.astype(str),
        "probability": posterior.max(axis=1).astype(np.float32),
    }
    lines = ["@cell", "group <b>@group</b>, probability @probability{0.0000}"]
    if labels is not None:
        columns["label"] = np.asarray(labels).astype(str)
        lines.insert(1, "label <b>@label</b>")
    if len(own.names) > 1:
        others = np.full(posterior.shape, -1.0)
        others[:, filled] = posterior[:, filled]
        others[np.arange(len(number)), number] = -1.0
        columns["second"] = others.argmax(axis=1).astype(str)
        columns["second_probability"] = others.max(axis=1).astype(np.float32)
        lines.append("second <b>@second</b>, probability @second_probability{0.0000}")
    return columns, lines


def _draw(
    name: str, cells: Mapping[str, Any], marks: Mapping[str, Any], own: Grouping, lines: Sequence[str]
) -> Mapping[str, Any]:
    """Bokeh's JSON of dots, the names of their groups, and ``lines`` about the one under the mouse."""
    from bokeh.core.properties import value
    from bokeh.embed import json_item
    from bokeh.models import BooleanFilter, CDSView, ColumnDataSource, HoverTool
    from bokeh.plotting import figure
    from bokeh.transform import factor_cmap

    plot = figure(
        sizing_mode="stretch_width",
        aspect_ratio=1.25,
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag=None,  # a finger on the picture scrolls the page
        x_axis_label=f"{name} 1",
        y_axis_label=f"{name} 2",
    )
    dots = plot.scatter(
        "x",
        "y",
        source=ColumnDataSource(dict(cells), name="cells"),
        view=CDSView(filter=BooleanFilter(name="cells shown")),
        size=float(np.clip(250 / max(len(cells["x"]), 1) ** 0.5, 3.0, 9.0)),
        fill_color=factor_cmap("group", list(own.colors), list(own.names)),
        fill_alpha=0.7,
        line_color=None,
    )
    told = "".join(f"<div>{line}</div>" for line in lines)
    plot.add_tools(HoverTool(renderers=[dots], tooltips=f'<div style="{TOLD}">{told}</div>', limit=1))
    plot.text(
        "x",
        "y",
        "group",
        source=ColumnDataSource(dict(marks), name="marks"),
        view=CDSView(filter=BooleanFilter(name="marks shown")),
        text_align="center",
        text_baseline="middle",
        text_font=value("sans-serif"),
        text_font_size="12px",
        text_font_style="bold",
        text_outline_color="white",
    )
    plot.toolbar.logo = None
    plot.axis.ticker = []
    plot.grid.visible = False
    plot.outline_line_color = None
    return json_item(plot)


def _plain(values: NDArray) -> list[str] | NDArray:
    """Texts as a list, which Bokeh writes as they are."""
    return values.tolist() if values.dtype.kind == "U" else values
