"""Freed memory goes back to the system."""

from __future__ import annotations

import platform

import numpy as np
import psutil
import pytest

from nbmix.core.memory import give_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_what_was_freed_below_a_block_that_stays_is_given_back():
    process = psutil.Process()
    blocks = [np.ones(4096) for _ in range(2000)]  # 64 MB, in pieces that the heap holds
    kept = blocks.pop()
    blocks.clear()
    before = process.memory_info().rss
    give_back()
    assert before - process.memory_info().rss > 32e6
    assert kept.sum() == 4096


def test_a_system_without_it_is_left_alone():
    assert give_back(None) is None
