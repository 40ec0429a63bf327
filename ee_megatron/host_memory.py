"""Memory of the host that a process has freed, back to the system; nothing happens without glibc."""

from __future__ import annotations

import contextlib
import ctypes

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def limit_arenas(arenas: int) -> None:
    """What MALLOC_ARENA_MAX in the environment does to a process that has yet to start."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, arenas)


def return_freed() -> None:
    """Give back what glibc keeps of freed memory for later (its `malloc_trim`).

    For processes that take turns on one machine: what one keeps while it waits, the other lacks. In the demo's RL that
    was 700 MiB for each rank and 200 for each actor.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    trim(0)
