"""Cells in the plane that answer the mouse, drawn in the browser by Bokeh, which takes a second to import."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nbmix.evaluation.plots.cells import fullest_place, own_components

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
    from bokeh.core.properties import value
    from bokeh.embed import json_item
    from bokeh.models import BooleanFilter, CDSView, ColumnDataSource, HoverTool
    from bokeh.plotting import figure
    from bokeh.transform import factor_cmap

    points, posterior = np.asarray(coordinates, np.float32), np.asarray(responsibilities)
    n_cells = len(posterior)
    own = own_components(posterior)
    order = np.random.default_rng(0).permutation(n_cells)  # no group hides another
    number = posterior.argmax(axis=1)
    columns: dict[str, Any] = {
        "cell": np.asarray(cell_names).astype(str),
        "group": number.astype(str),
        "probability": posterior.max(axis=1).astype(np.float32),
    }
    told = ["@cell", "group <b>@group</b>, probability @probability{0.0000}"]  # values are escaped
    if len(own.names) > 1:
        rest = np.full(posterior.shape, -1.0)
        filled = np.unique(number)
        rest[:, filled] = posterior[:, filled]
        rest[np.arange(n_cells), number] = -1.0
        columns["second"] = rest.argmax(axis=1).astype(str)
        columns["second_probability"] = rest.max(axis=1).astype(np.float32)
        told.append("second <b>@second</b>, probability @second_probability{0.0000}")
    if labels is not None:
        columns["label"] = np.asarray(labels).astype(str)
        told.insert(1, "label <b>@label</b>")
    cells = ColumnDataSource(
        {"x": points[order, 0], "y": points[order, 1]}
        | {name: _plain(values[order]) for name, values in columns.items()},
        name="cells",
    )
    plot = figure(
        sizing_mode="stretch_width",
        aspect_ratio=1.25,
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag=None,  # a finger on the picture scrolls the page
        x_axis_label=f"{embedding_name} 1",
        y_axis_label=f"{embedding_name} 2",
    )
    dots = plot.scatter(
        "x",
        "y",
        source=cells,
        view=CDSView(filter=BooleanFilter(name="cells shown")),
        size=float(np.clip(250 / max(n_cells, 1) ** 0.5, 3.0, 9.0)),
        fill_color=factor_cmap("group", list(own.colors), list(own.names)),
        fill_alpha=0.7,
        line_color=None,
    )
    lines = "".join(f"<div>{line}</div>" for line in told)
    plot.add_tools(HoverTool(renderers=[dots], tooltips=f'<div style="{TOLD}">{lines}</div>', limit=1))
    places = [fullest_place(points, points[own.codes == k]) for k in range(len(own.names))]
    marks = ColumnDataSource(
        {"x": [float(x) for x, _ in places], "y": [float(y) for _, y in places], "group": list(own.names)},
        name="marks",
    )
    plot.text(
        "x",
        "y",
        "group",
        source=marks,
        view=CDSView(filter=BooleanFilter(name="marks shown")),
        text_align="center",
        text_baseline="middle",
        text_font=value("sans-serif"),
        text_font_size="12px",
        text_font_style="bold",
        text_outline_color="white",
    )
    plot.toolbar.logo = None
    for axis in plot.axis:
        axis.ticker = []
    plot.grid.visible = False
    plot.outline_line_color = None
    sizes = [int(size) for size in own.sizes]
    return InteractiveCells(json_item(plot), list(zip(own.names, own.colors, sizes, strict=True)))


def _plain(values: np.ndarray) -> Sequence[str] | np.ndarray:
    """Texts as a list, which Bokeh writes as they are."""
    return values.tolist() if values.dtype.kind == "U" else values
