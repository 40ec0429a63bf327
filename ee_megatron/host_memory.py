"""Returns freed host memory to the system; does nothing without glibc."""

from __future__ import annotations

import contextlib
import ctypes

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def limit_arenas(arenas: int) -> None:
    """Limit glibc's arenas in a running process, as MALLOC_ARENA_MAX does for a new one."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, arenas)


def return_freed() -> None:
    """Return freed memory that glibc holds back for reuse (its `malloc_trim`).

    For processes that take turns on one machine: memory that one holds while it waits, the other lacks. In the demo's
    RL that was 700 MiB for each rank and 200 for each actor.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    trim(0)
