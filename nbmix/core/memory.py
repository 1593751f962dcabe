"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None


C_LIBRARY = _c_library()


def give_back(c_library: ctypes.CDLL | None = C_LIBRARY) -> None:
    """Return freed memory to the system, where the C library can (glibc); it is slow to do so by itself.

    Batches of many sizes, made on several threads, leave holes that no later batch fits into. Between the
    parts of a run this costs next to nothing; keeping nothing at any time (mallopt) costs a third of a fit.
    """
    trim = getattr(c_library, "malloc_trim", None)
    if trim is not None:
        trim(0)
