"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc); it is slow to do so by itself.

    Batches of many sizes, made on several threads, leave holes that no later batch fits into. Between the
    parts of a run this costs next to nothing; keeping nothing at any time (mallopt) costs a third of a fit.
    """
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


try:
    _C_LIBRARY: ctypes.CDLL | None = ctypes.CDLL(None)
except (OSError, TypeError):  # Windows
    _C_LIBRARY = None
