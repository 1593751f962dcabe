"""Cells that the browser draws: which there are, what is told of each. The report's tests point at them."""

from __future__ import annotations

import base64
import gzip
import logging

import numpy as np
import pytest

from nbmix.evaluation.plots import PALETTE
from nbmix.evaluation.plots.interactive import InteractiveCells, bokeh_script, interactive_cells


def parts(drawn: InteractiveCells, kind: str) -> list[dict]:
    """Attributes of all parts of a kind in Bokeh's document."""
    found = []

    def walk(value):
        if isinstance(value, dict):
            if value.get("name") == kind and "attributes" in value:
                found.append(value["attributes"])
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(drawn.item)
    return found


def columns_of(drawn: InteractiveCells, name: str) -> dict[str, list]:
    """Columns of a source, as the browser reads them."""
    (source,) = (source for source in parts(drawn, "ColumnDataSource") if source.get("name") == name)
    found = {}
    for column, values in source["data"]["entries"]:
        if isinstance(values, dict):
            raw = gzip.decompress(base64.b64decode(values["array"]["data"]))
            values = np.frombuffer(raw, values["dtype"]).tolist()
        found[column] = values
    return found


def test_what_is_told_of_a_cell(caplog):
    posterior = [[0.75, 0.0, 0.25], [0.125, 0.0, 0.875]]
    with caplog.at_level(logging.WARNING):
        drawn = interactive_cells("UMAP", [[0.0, 1.0], [2.0, 3.0]], posterior, ["a", "b"], ["T", "$B$"])
    assert not caplog.records  # Bokeh logs what it cannot draw
    told = columns_of(drawn, "cells")
    order = np.argsort(told["cell"])
    sorted_told = {name: [values[i] for i in order] for name, values in told.items()}
    assert sorted_told == {
        "x": [0.0, 2.0],
        "y": [1.0, 3.0],
        "cell": ["a", "b"],
        "label": ["T", "$B$"],
        "group": ["0", "2"],
        "probability": [0.75, 0.875],
        "second": ["2", "0"],
        "second_probability": [0.25, 0.125],
    }
    assert drawn.groups == [("0", PALETTE[0], 1), ("2", PALETTE[2], 1)]  # none without cells
    (colors,) = parts(drawn, "CategoricalColorMapper")
    assert dict(zip(colors["factors"], colors["palette"], strict=True)) == {"0": PALETTE[0], "2": PALETTE[2]}
    assert columns_of(drawn, "marks") == {"x": [0.0, 2.0], "y": [1.0, 3.0], "group": ["0", "2"]}


def test_one_group_has_no_second():
    drawn = interactive_cells("PCA", [[0.0, 1.0]], [[1.0]], ["a"])
    assert set(columns_of(drawn, "cells")) == {"x", "y", "cell", "group", "probability"}
    (hover,) = parts(drawn, "HoverTool")
    assert "second" not in hover["tooltips"] and "label" not in hover["tooltips"]


@pytest.mark.parametrize("n_cells", [3, 30_000])
def test_what_is_shown_is_small(n_cells):
    rng = np.random.default_rng(0)
    posterior = rng.dirichlet(np.full(3, 0.2), n_cells)
    drawn = interactive_cells("UMAP", rng.normal(size=(n_cells, 2)), posterior, np.arange(n_cells))
    told = columns_of(drawn, "cells")
    assert sorted(map(int, told["cell"])) == list(range(n_cells))
    assert len(str(drawn.item)) < 10_000 + 100 * n_cells


def test_the_library_evaluates_and_closes_nothing():
    script = bokeh_script()
    assert len(script) < 2_000_000
    assert "</script" not in script.lower() and "<!--" not in script
