"""What all figures share: colours, sizes, legends. Sizes are in inches."""

from collections.abc import Sequence

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


def open_frame(axes: Axes) -> None:
    """Axes without the lines above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)


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


def say(axes: Axes, message: str) -> None:
    """Words where there is nothing to draw."""
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])
