"""What is wrong with a file is said in one line; matrices and links that would lead their readers astray."""

from __future__ import annotations

import mmap
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from nbmix.data.files import (
    HEAP,
    WINDOW,
    check_heaps,
    check_links,
    check_structure,
    existing,
    open_h5,
    reading,
)
from nbmix.errors import InputError


def test_errors_of_any_kind_become_one_line():
    for error, words in ((KeyError("a\nb"), "cannot be read"), (MemoryError(), "more than fits into memory")):
        with pytest.raises(InputError, match=words) as refused, reading("data.path=x"):
            raise error
        assert "\n" not in str(refused.value)
        assert refused.value.__cause__ is error
    with pytest.raises(InputError, match="as it is"), reading("data.path=x"):
        raise InputError("as it is")


def test_a_path_that_is_there(tmp_path):
    (tmp_path / "a").touch()
    assert existing(str(tmp_path / "a"), "data.path=a") == tmp_path / "a"
    assert existing(tmp_path, "data.path=.") == tmp_path


@pytest.mark.parametrize(
    "name, words",
    [
        ("none", "no such file; check the path (relative to "),
        ("a/b", "cannot be opened (Not a directory); check its permissions"),
        ("a\0b", "cannot be opened (embedded null byte); check its permissions"),
    ],
)
def test_a_path_that_is_not_there(tmp_path, name, words):
    (tmp_path / "a").touch()
    with pytest.raises(InputError) as error:
        existing(f"{tmp_path}/{name}", "data.path=x")
    assert str(error.value).startswith(f"data.path=x: {words}")


def test_an_hdf5_file_is_opened_for_reading(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = 1
    with open_h5(tmp_path / "a.h5", "data.path=a.h5", "an .h5 file") as file:
        assert (file["x"][()], file.mode) == (1, "r")
    (tmp_path / "b.h5").write_bytes(b"no HDF5")
    with pytest.raises(InputError, match=r"^data\.path=b\.h5: is not an HDF5 file; give an \.h5 file$"):
        open_h5(tmp_path / "b.h5", "data.path=b.h5", "an .h5 file")


@pytest.mark.parametrize("target, is_circle", [("/", True), ("..", True), (".", True), ("/a/c", False)])
def test_links_to_what_they_are_in(tmp_path, target, is_circle):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("a/b")
        file["a/c"] = 1
        file["a/b/link"] = h5py.SoftLink(target)
        if is_circle:
            with pytest.raises(ValueError, match=r"^/a/b/link is a link to what it is in$"):
                check_links(file["a"])
        else:
            check_links(file["a"])


def heap(*objects: tuple[int, int]) -> bytes:
    """A global heap of objects (index, size) with their contents."""
    parts = [
        index.to_bytes(8, "little") + size.to_bytes(8, "little") + bytes(-(-size // 8) * 8)
        for index, size in objects
    ]
    content = b"".join(parts)
    return HEAP + (16 + len(content)).to_bytes(8, "little") + content


@pytest.mark.parametrize("place", [0, 40, WINDOW - 3], ids=["first", "later", "across two windows"])
def test_a_heap_that_has_no_end_is_found_wherever_it_is(tmp_path, place):
    path: Path = tmp_path / "heaps"
    with path.open("wb") as file:
        file.seek(place)
        file.write(heap((1, 5), (2, 16)))
    check_heaps(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(heap((1, 5), (0, 0), (2, 16)))
    with pytest.raises(ValueError, match="a heap of texts is damaged"):
        check_heaps(path)


def test_heaps_where_memory_cannot_be_given_back(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    (tmp_path / "heaps").write_bytes(heap((1, 5)))
    check_heaps(tmp_path / "heaps")


def matrix(indices: list[int], indptr: list[int], kind: type = np.int32) -> sp.csr_matrix:
    """(2, 3) with parts that SciPy has not looked at."""
    made = sp.csr_matrix((2, 3), dtype=np.float32)
    made.data, made.indices, made.indptr = (
        np.ones(len(indices)),
        np.array(indices, kind),
        np.array(indptr, kind),
    )
    return made


def test_a_matrix_whose_parts_fit_together():
    for whole in (matrix([0, 2, 1], [0, 2, 3]), matrix([0, 2, 1], [0, 2, 3]).tocsc()):
        assert check_structure(whole) is whole


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_unsigned_indices_become_signed(kind):
    """As BPCells writes them."""
    given = matrix([0, 2, 1], [0, 2, 3], kind)
    checked = check_structure(given)
    assert checked.indices.dtype.kind == checked.indptr.dtype.kind == "i"
    np.testing.assert_array_equal(checked.toarray(), [[1, 0, 1], [0, 1, 0]])
    assert given.indices.dtype == kind  # it is the caller's


@pytest.mark.parametrize(
    "wrong, words",
    [
        (matrix([0, 3, 1], [0, 2, 3]), "indices"),
        (matrix([0, -1, 1], [0, 2, 3]), "indices"),
        (matrix([], [0, 1, 0]), "indptr decreases"),
        (matrix([0, 1], [0, 2, 3]), "index"),
        (matrix([0, 1, 2], [0, 2, 3], np.float64), "no whole numbers"),
        (matrix([0, 9, 2], [0, 2, 3], np.uint32), "indices must be < 3"),
    ],
)
def test_a_matrix_whose_parts_do_not(wrong, words):
    with pytest.raises(ValueError, match=words):
        check_structure(wrong)
