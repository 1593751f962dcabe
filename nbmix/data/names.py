"""Tables of names beside a matrix: genes and barcodes, as various programs write them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

_HEADS = {  # letters of what programs write above a column of names
    *("", "x", "v1", "id", "ids", "name", "names", "index", "rownames"),
    *("gene", "genes", "geneid", "geneids", "genename", "genenames", "genesymbol", "symbol", "symbols"),
    *("ensembl", "ensemblid", "ensemblgeneid", "feature", "features", "featureid", "featurename"),
    *("barcode", "barcodes", "cell", "cells", "cellid", "cellids", "cellname", "cellbarcode", "cellbarcodes"),
}

Rows = list[list[str]]


def parse_names(content: bytes) -> Rows:
    """The rows of a table, its columns separated by tabs: names first.

    Byte-order marks, line ends of Windows, blank last lines, and quotes and spaces around a field are no
    part of names; nor are numbers of rows, as R writes them into a column of their own.

    Raises:
        ValueError: a row has no name, or the text is not UTF-8.
    """
    encoding = next((name for mark, name in _ENCODINGS.items() if content.startswith(mark)), "utf-8")
    lines = content.decode(encoding).split("\n")  # ``str.splitlines`` would also split within a name
    while lines and not lines[-1].strip():
        del lines[-1]
    rows = [[_field(field) for field in line.split("\t")] for line in lines]
    if len(rows) > 1 and all(len(row) > 1 and row[0] == str(number) for number, row in enumerate(rows, 1)):
        rows = [row[1:] for row in rows]
    for number, row in enumerate(rows, 1):
        if not row[0]:
            raise ValueError(f"line {number} of a table of names has none")
    return rows


def without_head(rows: Rows, n_names: int) -> Rows:
    """Rows without the first one where there is one more than names, and it says what the columns are."""
    if len(rows) == n_names + 1 and re.sub(r"[^a-z0-9]", "", rows[0][0].lower()) in _HEADS:
        return rows[1:]
    return rows


def column(rows: Sequence[Sequence[str]], number: int) -> list[str]:
    """One column of all rows."""
    return [row[number] for row in rows]


def _field(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
