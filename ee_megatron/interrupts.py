"""An interrupt that isn't lost on its way to the command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in which whatever fails after SIGINT fails as KeyboardInterrupt.

    Python raises that wherever the program is. Inside of an extension it may be dropped for an error of the extension's
    own: torch.tensor, interrupted while it reads a sequence, "could not determine the shape". Blocks may be nested.
    Where SIGINT isn't Python's to handle, or in another thread than the main one, nothing is changed.
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
