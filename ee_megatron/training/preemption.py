"""Being told to stop. Slurm sends USR1, USR2 or TERM before a time limit or at a preemption; a stage then ends at its
next step with a checkpoint, and its process with an exit code that says so.

A signal may reach one rank and not another, so ranks act on it only once they have agreed (context.py). No torch here:
signals are listened to before the imports that take longest.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
STOPPED = 85
"""Exit code of a stage that was told to stop and can go on from where it is; slurm/common.sh knows it too."""
WITH_PARENT = "EE_PARENT"
"""Set to its own process id by whoever starts a stage or a run that is to be told to stop when the parent dies, however
it dies. A stage of one rank then heeds signals as in a Slurm step."""
PR_SET_PDEATHSIG = 1
# How long the leader waits for the other ranks to leave.
PARTING_S = 30.0


class Stopped(BaseException):
    """The stage ends here because it was told to. Not an `Exception`: no handler of errors may take it for one.

    `leave` ends the process once everything is closed.
    """

    def __init__(self, text: str, leave: Callable[[], NoReturn] | None = None):
        super().__init__(text)
        self.leave = leave or Parting(0, 1).leave


class Listener:
    """What this process has been told: `asked` is the last signal, 0 before the first."""

    def __init__(self) -> None:
        self.asked = 0
        self._at_once = False

    def listen(self) -> None:
        """From now on signals are noted instead of ending the process."""
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if self._at_once:
            self._at_once = False
            raise Stopped(f"told to stop by {signal.Signals(number).name}")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped` wherever the main thread is: for work that may be given up half-way."""
        if self.asked:
            raise Stopped(f"told to stop by {signal.Signals(self.asked).name}")
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


listener = Listener()


@contextmanager
def keeping_signals() -> Iterator[None]:
    """Whatever a library does inside, afterwards signals mean what they meant before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dying_with_me() -> dict[str, str]:
    """The environment for a child that is to be told to stop when this process dies."""
    return {**os.environ, WITH_PARENT: str(os.getpid())}


def follow_parent(parent: int) -> None:
    """From now on TERM arrives when the parent is dead, also if it is so already. Linux only; elsewhere nothing."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Parting:
    """How a rank leaves after all have agreed to stop: the others with 0, then the leader with STOPPED.

    In this order, because a launcher that sees another code than 0 kills whoever is still there, and the step's code
    would be the killed rank's. `store`: torch's, kept from before the process group was left.
    """

    rank: int
    world: int
    store: Any = None

    def leave(self) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: atexit handlers of libraries may wait for peers that are gone.
        if self.rank:
            self.store.set(f"left/{self.rank}", "")
            os._exit(0)
        if self.world > 1:
            try:
                self.store.wait([f"left/{rank}" for rank in range(1, self.world)], timedelta(seconds=PARTING_S))
            except RuntimeError as error:
                print(f"not all ranks left within {PARTING_S:.0f} s: {error}", file=sys.stderr, flush=True)
            # Between its word and its end a rank takes microseconds; a loaded machine may take longer.
            time.sleep(0.5)
        os._exit(STOPPED)
