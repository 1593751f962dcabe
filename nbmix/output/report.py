"""report.html: one file that holds all of a run that is looked at, and needs nothing from elsewhere.

Names of genes, cells and labels, paths and settings come from outside: the template escapes all of them, and
the page forbids itself, by its content security policy, to load anything.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from nbmix.evaluation.plots.interactive import InteractiveCells, bokeh_script
from nbmix.evaluation.plots.style import DPI
from nbmix.output.results import Results

TOP_MARKERS = 25  # of each group in the report; markers.csv has all

NAMED_MARKERS = 8  # in the line of each group

PIXELS_AN_INCH = 80  # of a figure

SMALLEST_SHOWN = 1e-4  # below it a rate is "< 0.0001"


LEAST_SCALE = 0.75  # to which a picture shrinks on a small screen; a wider one is scrolled

Section = Literal["cells", "markers", "groups", "diagnostics"]


class Picture(NamedTuple):
    """A figure as PNG bytes, or cells that the browser draws, with what is said above and below it.

    Attributes:
        title, caption, content: see above.
        section: under which head it stands.
    """

    title: str
    caption: str
    content: bytes | InteractiveCells
    section: Section = "groups"

    @property
    def is_interactive(self) -> bool:
        return isinstance(self.content, InteractiveCells)

    @property
    def source(self) -> str:
        """Of a figure, as a data URI."""
        assert isinstance(self.content, bytes)
        return f"data:image/png;base64,{base64.b64encode(self.content).decode('ascii')}"

    @property
    def width(self) -> int:
        """On the page, in CSS pixels: letters are of one size in all pictures, and two fit in a row."""
        assert isinstance(self.content, bytes)
        pixels, _ = struct.unpack(">II", self.content[16:24])
        return pixels * PIXELS_AN_INCH // DPI

    @property
    def least_width(self) -> int:
        """Below which it is scrolled, as letters would be too small."""
        return int(LEAST_SCALE * self.width)


class GroupLine(NamedTuple):
    """One group at a glance.

    Attributes:
        number: its index.
        n_cells: assigned to it, at least one.
        share: of all cells.
        certainty: mean of its cells' largest posterior.
        label: most frequent known label and its share of the group's cells; None without labels.
        nearest: the group that would explain its cells next best; None where there is no other.
        markers: names of its best marker genes.
    """

    number: int
    n_cells: int
    share: float
    certainty: float
    label: tuple[str, float] | None
    nearest: int | None
    markers: Sequence[str]


def group_lines(results: Results, table: pd.DataFrame) -> list[GroupLine]:
    """Size, certainty, label, neighbour and best markers of every group with cells."""
    q, own, labels = results.responsibilities, results.assignments, results.data.data.labels
    n_cells = len(q)
    best = (
        table[table["rank"] <= NAMED_MARKERS]
        .groupby("component")["symbol" if "symbol" in table else "gene"]
        .apply(list)
    )
    lines = []
    for k in np.unique(own).tolist():
        members = own == k
        size = int(members.sum())
        label = None
        if labels is not None:
            names, counted = np.unique(labels[members], return_counts=True)
            label = (str(names[counted.argmax()]), float(counted.max() / size))
        nearest = int(results.markers.nearest[k])
        lines.append(
            GroupLine(
                k,
                size,
                size / n_cells,
                float(q[members].max(1).mean()),
                label,
                nearest if nearest >= 0 else None,
                best[k],
            )
        )
    return lines


@dataclass(frozen=True)
class Report:
    """All that report.html shows.

    Attributes:
        metrics: content of metrics.json.
        groups: one line each.
        pictures: in their order under each head.
        markers: rows of ``nbmix.evaluation.markers.marker_table``.
        n_genes: of the data, to say how many the table leaves out.
        provenance: nested settings and versions.
        number: what speaks for the number of groups.
        n_shown: cells in pictures of cells, fewer than there are where they were chosen at random.
        batches: what is to be said of groups and the batches that cells come from.
    """

    metrics: Mapping[str, Any]
    groups: Sequence[GroupLine]
    pictures: Sequence[Picture]
    markers: pd.DataFrame
    n_genes: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    number: str = ""
    batches: Sequence[str] = ()
    n_shown: int | None = None

    def render(self) -> str:
        """The whole page."""
        columns = [column for column in MARKER_COLUMNS if column.name in self.markers]
        values = zip(*(self.markers[column.name].tolist() for column in columns), strict=True)
        rows = [
            [Cell(c.show(value), sort_key(value), c.kind) for c, value in zip(columns, row, strict=True)]
            for row in values
        ]
        return TEMPLATE.render(
            report=self,
            heads={picture.section for picture in self.pictures},
            library=bokeh_script() if any(picture.is_interactive for picture in self.pictures) else "",
            highlights=[(name, shown(self.metrics[key])) for key, name in HIGHLIGHTS if key in self.metrics],
            metrics=[(key, shown(value)) for key, value in self.metrics.items()],
            columns=columns,
            rows=rows,
            numbers=sorted(self.markers["component"].unique()),
            settings=list(flattened(self.provenance)),
        )


class Cell(NamedTuple):
    """A table cell: what is read, what it is sorted by, and its classes, of "number", "name" and "short"."""

    text: str
    key: str
    kind: str


class Column(NamedTuple):
    """A column of the marker table: its name there, its head, an explanation, a format, its classes."""

    name: str
    head: str
    explanation: str
    form: str = "{}"
    kind: str = "number"

    def show(self, value: Any) -> str:
        """What the reader sees."""
        if isinstance(value, float):
            if not math.isfinite(value):
                return ""
            if self.name.startswith("lfsr") and value < SMALLEST_SHOWN:
                return f"< {SMALLEST_SHOWN:g}"
        return self.form.format(value)


MARKER_COLUMNS = (
    Column("component", "group", "number of the group"),
    Column("rank", "rank", "by sure fold change times share of cells"),
    Column("gene", "gene", "name in the data", kind="name"),
    Column("symbol", "symbol", "of the gene", kind="name short"),
    Column("log2_fc_rest", "log2 FC", "log2 fold change against all other groups", form="{:+.2f}"),
    Column("log2_fc_rest_se", "± SE", "standard error of the log2 fold change", form="{:.2f}"),
    Column("lfsr_rest", "lfsr", "local false sign rate against the rest", form="{:.4f}"),
    Column("share", "% cells", "of the group that have a count", form="{:.0%}"),
    Column("share_rest", "% rest", "of all other cells that have a count", form="{:.0%}"),
    Column("nearest", "nearest", "the group that would explain these cells next best"),
    Column(
        "log2_fc_nearest", "log2 FC nearest", "log2 fold change against the nearest group", form="{:+.2f}"
    ),
    Column("lfsr_nearest", "lfsr nearest", "local false sign rate against the nearest", form="{:.4f}"),
)

HIGHLIGHTS = (
    ("n_cells", "cells"),
    ("n_genes", "genes"),
    ("n_components_used", "groups with cells"),
    ("heldout_log_likelihood", "held-out log likelihood, nats per cell"),
    ("log_likelihood", "log likelihood, nats per cell"),
    ("elbo", "ELBO, nats per cell"),
    ("ari", "adjusted Rand index with the labels"),
    ("accuracy", "accuracy against the labels"),
    ("seconds", "seconds"),
)


def shown(value: Any) -> str:
    """A metric as a reader wants it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"


def sort_key(value: Any) -> str:
    """What a cell is sorted by: all digits of a number."""
    return repr(float(value)) if isinstance(value, int | float) else str(value)


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and values, as the command line writes them."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "null" if value is None else str(value)


_ENVIRONMENT = Environment(
    loader=PackageLoader("nbmix", "output"),
    autoescape=True,  # whatever the file is called
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"sort_keys": False}  # Bokeh's parts refer to those before them
TEMPLATE = _ENVIRONMENT.get_template("report.html.jinja")
