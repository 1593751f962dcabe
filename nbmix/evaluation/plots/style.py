"""What all figures share: colours, sizes, legends. Sizes are in inches."""

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito (2008), their yellow last, as it is pale on white; then 22 colours added one at a time, each
# the farthest in OKLab from all before as seen with normal, protanopic and deuteranopic vision (Machado et
# al. 2009). No 30 colours are all easy to tell apart, so the figures also write component numbers beside the
# data.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#f0e442"),
    *("#5a0f00", "#000078", "#6900ff", "#a50f5a", "#00f0c3", "#8778ff", "#5a2d96", "#1e5a00"),
    *("#0f2d3c", "#d200b4", "#96b487", "#b4d2ff", "#0000d2", "#1e5a69", "#ffc387", "#876978"),
    *("#ff78d2", "#ff4b5a", "#4b3c2d", "#f00ff0", "#964b96", "#b44b4b"),
)
LONGEST_NAME = 32  # characters
LONGEST_UPRIGHT = 3  # characters of the names of columns that stand side by side
LEGEND_ROWS = 18
DPI = 150


def component_colors(n: int) -> list[str]:
    """The first n colours; they repeat after the 30th."""
    return [PALETTE[i % len(PALETTE)] for i in range(n)]


def short_name(name: object) -> str:
    """The name with its middle left out where it is long: cell types often differ in their last word.

    Matplotlib draws it as it stands: no dollar begins a formula, no first underscore hides it from legends,
    and what cannot be printed is written out.
    """
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
    head, tail = LONGEST_NAME // 2, LONGEST_NAME - LONGEST_NAME // 2 - 1
    text = text if len(text) <= LONGEST_NAME else f"{text[:head]}…{text[-tail:]}"
    return f"{' ' if text.startswith('_') else ''}{text}".replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure whose parts make room for each other."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


Place = Axes | Figure | None
"""Where to draw: into axes, into a figure that is resized and has no axes yet, or into a new figure."""


def axes_in(place: Place, width: float, height: float) -> Axes:
    """The axes to draw into; those of a figure fill it, and it gets this size."""
    if isinstance(place, Axes):
        return place
    figure = new_figure(width, height) if place is None else place
    figure.set_size_inches(width, height)
    return figure.add_subplot()


def figure_of(axes: Axes) -> Figure:
    """The whole figure that axes are in."""
    figure = axes.figure.figure  # of a subfigure the one around it
    assert isinstance(figure, Figure)
    return figure


def open_frame(axes: Axes) -> None:
    """Axes without the lines above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)


def name_columns(axes: Axes, names: Sequence[str]) -> None:
    """Names under the columns 0, 1, ...; upright where they are short."""
    turned = any(len(name) > LONGEST_UPRIGHT for name in names)
    axes.set_xticks(range(len(names)), names, rotation=90.0 if turned else 0.0)


def side_legend_width(handles: Sequence[Line2D]) -> float:
    """Estimated width of `side_legend`, inches."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return -(-len(handles) // LEGEND_ROWS) * (0.5 + 0.072 * longest)


def side_legend(axes: Axes, handles: Sequence[Line2D], title: str | None = None) -> None:
    """Legend to the right of the axes, in as many columns as it needs."""
    axes.legend(
        handles=handles,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
        ncols=-(-len(handles) // LEGEND_ROWS),
    )


def top_legend(axes: Axes, handles: Sequence[Artist], ncols: int = 1) -> None:
    """Legend above the axes, where there are no data."""
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize="small",
        ncols=ncols,
    )


def say(axes: Axes, message: str) -> None:
    """Words where there is nothing to draw."""
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])
