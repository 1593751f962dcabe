"""Files from outside: opened, and whatever is wrong inside them said in one line."""

from __future__ import annotations

import mmap
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import scipy.sparse as sp

from nbmix.data.recognise import cure, what_it_is
from nbmix.errors import InputError

HEAP = b"GCOL\x01\0\0\0"  # how a global heap of HDF5 begins
WINDOW = 2**26  # bytes of a file that are looked at together

Compressed = TypeVar("Compressed", sp.csr_matrix, sp.csc_matrix)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what a damaged file makes h5py, anndata, pandas or SciPy raise into one line.

    They raise all kinds, so this goes around reading alone, never around a computation.

    Raises:
        InputError: in place of any other exception.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(
            f"{where}: holds, or claims to hold, more than fits into memory ({_reason(error)}); get it "
            "again, or, if it is an .h5ad of CSR counts that is this large, set data.backed=true"
        ) from error
    except Exception as error:
        raise InputError(f"{where}: cannot be read ({_reason(error)}); {cure(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def existing(path: str | os.PathLike[str], where: str) -> Path:
    """A file or folder that is there.

    Raises:
        InputError: it is not, or may not be read.
    """
    path = Path(path)
    with suppress(RuntimeError):  # nobody's home
        path = path if path.exists() else path.expanduser()
    try:
        if not path.is_dir():
            path.open("rb").close()
    except FileNotFoundError:
        raise InputError(f"{where}: no such file; check the path (relative to {Path.cwd()})") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{where}: cannot be opened ({reason}); check its permissions") from None
    return path


def open_h5(path: Path, where: str, wanted: str) -> h5py.File:
    """An HDF5 file for reading; ``wanted`` is what the user should give in place of another kind.

    Raises:
        InputError: it is none, or is cut short.
    """
    with suppress(ImportError):  # filters beyond those of HDF5, where they are installed
        import hdf5plugin  # noqa: F401 - its import registers them
    if not h5py.is_hdf5(path):
        raise InputError(f"{where}: {what_it_is(path) or f'is not an HDF5 file; give {wanted}'}")
    with reading(where):
        check_heaps(path)
        return h5py.File(path, "r")


def check_links(group: h5py.Group) -> None:
    """Whether a group holds no link to itself or to what it is in, which anndata would read over and over.

    Raises:
        ValueError: it holds one.
    """

    def in_itself(name: str, link: object) -> str | None:
        path = posixpath.join(group.name, name)
        if isinstance(link, h5py.SoftLink):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link.path))
            if posixpath.commonpath([target, path]) == target:
                return path
        return None

    if (path := group.visititems_links(in_itself)) is not None:
        raise ValueError(f"{path} is a link to what it is in")


def check_heaps(path: Path) -> None:
    """Whether HDF5 can walk its global heaps, where texts are: at free space of size 0 it would stay forever.

    A collection is b"GCOL", a version and three zeros, its size, and objects: index and three numbers in 8
    bytes, size in 8, data in multiples of 8; in free space, index 0, the size is all (HDF5 File Format
    Specification 3.0, III.E). Zeros are what downloads leave that were cut short.

    Raises:
        ValueError: it cannot.
    """
    give_back = getattr(mmap, "MADV_DONTNEED", None)  # which Windows does not have
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for begin in range(0, len(content), WINDOW):
            window_end = begin + WINDOW + len(HEAP) - 1
            start = content.find(HEAP, begin, window_end)
            while start >= 0:
                _check_heap(content, start)
                start = content.find(HEAP, start + 1, window_end)
            if give_back is not None:  # else it counts as ours
                content.madvise(give_back, begin, min(WINDOW, len(content) - begin))


def _check_heap(content: mmap.mmap, start: int) -> None:
    end = min(start + int.from_bytes(content[start + 8 : start + 16], "little"), len(content))
    place = start + 16
    while place + 16 <= end:
        size = int.from_bytes(content[place + 8 : place + 16], "little")
        if content[place : place + 2] != b"\0\0":
            size = 16 + -(-size // 8) * 8
        if size == 0:
            raise ValueError("a heap of texts is damaged")
        place += size


def check_structure(matrix: Compressed) -> Compressed:
    """The matrix, its row pointers and indices signed, once it is known that they stay within it.

    SciPy itself trusts them, and would read on. Others write them unsigned.

    Raises:
        ValueError: they do not, or are no whole numbers.
    """
    parts = matrix.indices, matrix.indptr
    if any(part.dtype.kind not in "iu" for part in parts):
        raise ValueError("indices or indptr are no whole numbers")
    if any(part.dtype.kind == "u" for part in parts):
        indices, indptr = (part.astype(np.int64) for part in parts)
        matrix = type(matrix)((matrix.data, indices, indptr), shape=matrix.shape)
    if (np.diff(matrix.indptr) < 0).any():  # which SciPy does not look at where the last one is 0
        raise ValueError("indptr decreases")
    matrix.check_format(full_check=True)
    return matrix
