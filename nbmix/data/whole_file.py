"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "no file may grow so",
}

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EIO)


def part_of(path: Path) -> Path:
    """The temporary name of a file that is being written."""
    return path.with_name(path.name + ".part")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes ``path`` at the end; a crash leaves ``path`` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        commit(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def commit(part: Path, path: Path) -> None:
    """Rename ``part`` to ``path`` once its content is on the disk, and wait for the new name to be there."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def why_unwritable(error: BaseException) -> str | None:
    """What kept a file from being written, in words; None for an error of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:  # HDF5 only says it
        number = next((n for n in FULL if f"errno = {n}," in str(error)), None)
    if number in FULL:
        return FULL[number]
    if number in _UNWRITABLE and isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return None
