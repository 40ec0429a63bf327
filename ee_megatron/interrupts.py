"""Keeps library code from swallowing an interrupt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which any exception after SIGINT becomes KeyboardInterrupt.

    Python raises KeyboardInterrupt wherever the program is. An extension may replace it by an error of its own:
    torch.tensor, interrupted while it reads a sequence, "could not determine the shape". Blocks may be nested.
    If Python doesn't handle SIGINT, or in another thread than the main one, nothing is changed.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
