"""Tables of names, whatever wrote them."""

from __future__ import annotations

import pytest

from nbmix.data.names import column, parse_names, without_head


@pytest.mark.parametrize(
    "content, rows",
    [
        (b"", []),
        (b"\n", []),
        (b"A\nB", [["A"], ["B"]]),
        (b"A\r\nB\r\n\r\n", [["A"], ["B"]]),
        ("\ufeffé數\tx y\n".encode(), [["é數", "x y"]]),
        ("A\tB\n".encode("utf-16"), [["A", "B"]]),
        (b' "A" \t"say ""hi"\n', [["A", 'say ""hi']]),
        (b"1\tA\n2\tB\n", [["A"], ["B"]]),  # numbers of rows
        (b"1\n2\n", [["1"], ["2"]]),
        (b"1\tA\n", [["1", "A"]]),  # perhaps a name
        (b"5'UTR\n\"\n", [["5'UTR"], ['"']]),
        ("a\x85b\u2028c\n".encode(), [["a\x85b\u2028c"]]),
    ],
)
def test_rows(content, rows):
    assert parse_names(content) == rows


@pytest.mark.parametrize("content", [b"A\n\nB\n", b"\tA\n", b'A\n""\n'])
def test_rows_without_a_name(content):
    with pytest.raises(ValueError, match=r"line [12] of a table of names has none"):
        parse_names(content)


def test_other_encodings_are_no_names():
    with pytest.raises(UnicodeDecodeError):
        parse_names("Müller".encode("latin-1"))


@pytest.mark.parametrize("head", ["gene_id", "Gene Symbol", "barcode", "x", "V1", "CELL.ID"])
def test_a_head_is_told_by_its_words_and_by_the_number_of_names(head):
    rows = [[head], ["A"], ["B"]]
    assert column(without_head(rows, 2), 0) == ["A", "B"]
    assert without_head(rows, 3) == rows
    assert without_head(rows, 1) == rows
    assert without_head([["CD74"], *rows], 3) == [["CD74"], *rows]
