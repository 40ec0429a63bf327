"""Verdicts from processes that can be killed: no answer, however odd, holds a run up for longer than its deadline.

What such a process sends back is a line of text (worker.py) and never unpickled: an answer may have got hold of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from multiprocessing.connection import wait

from ..types import Prompt
from .base import Task, Verdict

START_TIMEOUT_S = 60.0
# Far more than a verifier needs, far less than a machine has.
DEFAULT_MEMORY_MB = 4096
LONGEST_LINE = 4096
TIMED_OUT = Verdict(correct=False, well_formed=False, answered=False, timed_out=True)
_START = "from ee_megatron.tasks.worker import main; main()"
log = logging.getLogger(__name__)


class _Worker:
    """One verifier process, its connection, and what it is doing: `item` is the index it works on, None while idle."""

    def __init__(self, task: bytes, deadline_s: float, memory_mb: int) -> None:
        self.connection, theirs = socket.socketpair()
        self.heard, self.given = b"", 0
        self.deadline_s = deadline_s
        self.ready = False
        self.item: int | None = None
        self.until = time.monotonic() + START_TIMEOUT_S
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        # Not multiprocessing's own start: that imports the parent's main module again, and with it torch.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), str(deadline_s), str(memory_mb)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        self._send(task, START_TIMEOUT_S)

    @property
    def busy(self) -> bool:
        """Whether an answer, or its readiness, is to be waited for."""
        return self.item is not None or not self.ready

    def give(self, index: int, item: tuple[Prompt, str]) -> None:
        self.item, self.until = index, time.monotonic() + self.deadline_s
        self.given += 1
        self._send(pickle.dumps(item), self.deadline_s)

    def _send(self, data: bytes, patience_s: float) -> None:
        # If it died, the connection reads as ended, which is where deaths are dealt with; if it doesn't read, it misses
        # its deadline.
        with contextlib.suppress(OSError):
            self.connection.settimeout(patience_s)
            self.connection.sendall(data)

    def hear(self) -> tuple[str, str] | None:
        """Kind and content of the line that it owes, None until there is all of it. Raises EOFError if it died,
        ValueError for anything else that it sends."""
        if not (data := self.connection.recv(LONGEST_LINE)):
            raise EOFError
        self.heard += data
        line, end, rest = self.heard.partition(b"\n")
        if rest or len(line) > LONGEST_LINE:
            raise ValueError("more than a line")
        if not end:
            return None
        self.heard = b""
        kind, number, value = line.decode().split(" ", 2)
        if kind not in (("verdict", "error") if self.ready else ("ready", "failed")) or number != str(self.given):
            raise ValueError(f"{kind} {number}")
        return kind, value

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class VerifierPool:
    """Runs `task.verify` in `workers` processes, each answer within `deadline_s` seconds.

    A process that misses the deadline or dies is killed and replaced, and its answer gets a verdict with `timed_out`.
    `timeouts` counts these. A process has `memory_mb` MiB of its own (0: no limit); what asks for more fails or dies,
    and costs its own answer only. `failures` counts answers at which `verify` raised an exception; they are treated
    alike, and the first exception is logged.

    Raises ValueError for bad settings; RuntimeError if a process can't start.
    """

    def __init__(
        self, task: Task, workers: int = 1, deadline_s: float = 5.0, memory_mb: int = DEFAULT_MEMORY_MB
    ) -> None:
        if workers < 1 or deadline_s <= 0:
            raise ValueError(f"workers={workers}, deadline_s={deadline_s}: both must be positive")
        if memory_mb < 0:
            raise ValueError(f"memory_mb={memory_mb}: expected MiB, or 0 for no limit")
        self.timeouts = 0
        self.failures = 0
        self.task_name = task.name
        self._start = partial(_Worker, pickle.dumps(task), deadline_s, memory_mb)
        self._workers = [self._start() for _ in range(workers)]
        self._closed = False

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """Verdicts on (prompt, answer) pairs, in their order."""
        if self._closed:
            raise RuntimeError("the verifier pool is closed; make a new one")
        verdicts: list[Verdict | None] = [None] * len(items)
        waiting = iter(range(len(items)))
        left = len(items)
        # A process that something else ended between two calls costs no answer.
        self._replace(lambda worker: worker.ready and worker.process.poll() is not None)
        try:
            while left:
                for worker in self._workers:
                    if worker.ready and worker.item is None and (index := next(waiting, None)) is not None:
                        worker.give(index, items[index])
                left -= self._collect(verdicts)
        except BaseException:
            # Verdicts still under way would be taken for those of the next call.
            self._replace(lambda worker: worker.busy)
            raise
        return [verdict if verdict is not None else TIMED_OUT for verdict in verdicts]

    def close(self) -> None:
        """End the processes. Safe to call twice."""
        if not self._closed:
            self._closed = True
            for worker in self._workers:
                worker.stop()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _collect(self, verdicts: list[Verdict | None]) -> int:
        """Wait for the next event, at most until the next deadline; the number of answers that are now settled."""
        active = {w.connection: i for i, w in enumerate(self._workers) if w.busy}
        nearest = min(self._workers[i].until for i in active.values())
        spoke = wait(list(active), timeout=max(0.0, nearest - time.monotonic()))
        settled = 0
        for connection in spoke:
            assert isinstance(connection, socket.socket)
            settled += self._receive(active[connection], verdicts)
        for index in active.values():
            worker = self._workers[index]
            if worker.busy and time.monotonic() > worker.until:
                settled += self._lose(index, verdicts, "missed the deadline")
        return settled

    def _receive(self, index: int, verdicts: list[Verdict | None]) -> int:
        worker = self._workers[index]
        try:
            heard = worker.hear()
            if heard is None:
                return 0
            kind, value = heard
            verdict = TIMED_OUT if kind != "verdict" else verdict_of(value)
        except (EOFError, OSError):
            return self._lose(index, verdicts, "died")
        except ValueError:
            return self._lose(index, verdicts, "said what no verifier says")
        if kind == "failed":
            raise RuntimeError(f"a verifier process can't start: {value}")
        if kind == "ready":
            worker.ready = True
            return 0
        assert worker.item is not None
        if kind == "error":
            if self.failures == 0:
                log.warning("a verifier raised %r; such answers count as timed out", value)
            self.failures += 1
        verdicts[worker.item] = verdict
        worker.item = None
        return 1

    def _lose(self, index: int, verdicts: list[Verdict | None], how: str) -> int:
        """Kill and replace a process; its answer, if it had one, is settled as timed out."""
        worker = self._workers[index]
        worker.stop()
        if not worker.ready:
            raise RuntimeError(
                f"a verifier process {how} while starting (exit code {worker.process.returncode}, "
                f"{START_TIMEOUT_S:.0f} s allowed); its messages are on standard error"
            )
        self._workers[index] = self._start()
        if worker.item is None:
            return 0
        self.timeouts += 1
        verdicts[worker.item] = TIMED_OUT
        return 1

    def _replace(self, which: Callable[[_Worker], bool]) -> None:
        for index, worker in enumerate(self._workers):
            if which(worker):
                worker.stop()
                self._workers[index] = self._start()


def verdict_of(text: str) -> Verdict:
    """From its fields, 0 or 1 each. Raises ValueError for anything else."""
    if not re.fullmatch(f"[01]{{{len(fields(Verdict))}}}", text):
        raise ValueError(f"{text!r} is no verdict")
    return Verdict(*(flag == "1" for flag in text))
