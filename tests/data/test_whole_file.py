"""A file is there whole or as it was, and words for what keeps it from being written."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from nbmix.data.whole_file import part_of, whole_file, why_unwritable
from tests.helpers.apart import apart


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with whole_file(path) as part:
        part.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError), whole_file(path) as part:
        part.write_text("sec")
        raise RuntimeError
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["a.txt"]


def write_and_be_killed(path):
    with whole_file(path) as part:
        part.write_text("sec")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_the_file_as_it_was_and_the_next_one_writes_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first")
    assert apart(write_and_be_killed, path) == -signal.SIGKILL
    assert path.read_text() == "first"
    assert part_of(path).exists()
    with whole_file(path) as part:
        part.write_text("third")
    assert path.read_text() == "third"
    assert not part_of(path).exists()


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "a"), "the disk is full"),
        (OSError("file write failed: errno = 28, error message = 'No space left'"), "the disk is full"),
        (RuntimeError("file write failed: errno = 122, error message = ''"), "the quota is used up"),
        (OSError(errno.EFBIG, "File too large"), "no file may grow so"),
        (OSError(errno.EACCES, "Permission denied", "a/b"), "Permission denied: a/b"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (OSError(errno.ENOENT, "No such file or directory", "a"), None),
        (OSError("file write failed: errno = 2, error message = ''"), None),
        (ValueError("the disk is full"), None),
    ],
)
def test_why_a_file_could_not_be_written(error, words):
    assert why_unwritable(error) == words
