"""What is to be seen in a figure, by matplotlib's public names."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread


def pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) from 0 to 1."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    buffer.seek(0)
    return imread(buffer)[..., :3]


def data_of(axes: Axes) -> list[Artist]:
    """What stands for data: all but frame, ticks, labels, title and legend."""
    return [*axes.lines, *axes.collections, *axes.patches, *axes.images, *axes.texts]


def assert_drawn(figure: Figure) -> None:
    """Data are seen in each of the axes: without them the picture would be another one there."""
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert shown, "there are no axes"
    whole = pixels(figure)
    figure.set_layout_engine("none")  # nothing moves when something is hidden
    hidden = [artist for axes in shown for artist in data_of(axes) if artist.get_visible()]
    for artist in hidden:
        artist.set_visible(False)
    changed = (pixels(figure) != whole).any(axis=2)
    for artist in hidden:
        artist.set_visible(True)
    height, width = changed.shape
    for axes in shown:
        (left, low), (right, high) = axes.get_position().get_points()
        inside = changed[
            int((1 - high) * height) : int(np.ceil((1 - low) * height)),
            int(left * width) : int(np.ceil(right * width)),
        ]
        assert inside.any(), f"nothing is drawn in {axes}"


def legend_texts(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def texts(axes: Axes) -> list[str]:
    """Words inside the axes."""
    return [text.get_text() for text in axes.texts]


def heights(axes: Axes) -> list[float]:
    """Of the bars."""
    return [bar.get_height() for bar in axes.patches]


def dots(axes: Axes, which: int = 0) -> np.ndarray:
    """(dots, 2) of a scatter."""
    return np.asarray(axes.collections[which].get_offsets())


def colors_by_x(axes: Axes) -> list[str]:
    """Colours of the dots of the first scatter, from left to right."""
    order = np.argsort(dots(axes)[:, 0], kind="stable")
    return [to_hex(color) for color in axes.collections[0].get_facecolor()[order]]


def tick_texts(axis) -> list[str]:
    """Of an axis of the axes, such as ``axes.xaxis``."""
    return [label.get_text() for label in axis.get_ticklabels()]
