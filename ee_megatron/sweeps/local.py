"""A sweep's tasks as processes of this machine."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event

from ..config.device import gpu_files
from ..observe.progress import Progress
from . import records
from .records import FAILED, KILLED, STOPPED
from .sweep import StageTask, Sweep
from .task import stopped_by_signals

GRACE_S = 90.0
"""From the word to stop to the end of tasks that do not heed it; more than they give their stages."""


class LocalExecutor:
    """Tasks as processes of this machine, at most `parallel` at a time, each after the one that it needs.

    command: task key -> what to start. INT or TERM ends all of them, with a checkpoint where the stage keeps one; if
    this process dies, they are told so (training/preemption.py) and end the same way.
    """

    def __init__(
        self,
        sweep: Sweep,
        command: Callable[[str], list[str]],
        environment: Mapping[str, str],
        parallel: int,
        say: Callable[[str], None],
    ):
        self.sweep, self._command, self._environment, self._say = sweep, command, dict(environment), say
        self.codes: dict[str, int] = {}
        """Exit codes of the tasks that were started, by key."""
        self._running: dict[str, tuple[subprocess.Popen, int]] = {}
        self._slots = list(range(parallel))
        self._devices = split_devices(visible_devices(self._environment), parallel)
        self._told = Event()

    def run(self, tasks: Sequence[StageTask]) -> int:
        """Start `tasks`, parents first, and wait. 0; 1 if one failed; 130 if told to stop."""
        waiting = list(tasks)
        with stopped_by_signals(self._told.set), Progress("tasks", len(tasks)) as bar:
            try:
                while (waiting or self._running) and not self._told.is_set():
                    bar.advance(self._collect())
                    self._start_ready(waiting)
                    time.sleep(0.1)
                if self._told.is_set():
                    self._say("told to stop: running tasks end at their next step")
                    return 130
            finally:
                self._end_all()
        return 1 if any(self.codes.values()) else 0

    def _start_ready(self, waiting: list[StageTask]) -> None:
        pending = {task.key for task in waiting} | set(self._running)
        for task in list(waiting):
            if not self._slots:
                return
            if task.needs in pending:
                continue
            waiting.remove(task)
            if task.needs and records.task_state(self.sweep, self.sweep.task(task.needs)) in (STOPPED, KILLED):
                # It goes on with the next start, and so does what needs it.
                continue
            slot = self._slots.pop(0)
            devices = {"CUDA_VISIBLE_DEVICES": self._devices[slot]} if self._devices else {}
            # A group of its own: the terminal's INT is for this process, which passes it on as the word to stop.
            child = subprocess.Popen(
                self._command(task.key), stdin=subprocess.DEVNULL, env=self._environment | devices,
                start_new_session=True,
            )  # fmt: skip
            self._running[task.key] = (child, slot)
            self._say(f"started {self.sweep.describe(task)}")

    def _collect(self) -> int:
        """How many tasks have ended."""
        before = len(self.codes)
        for key, (child, slot) in list(self._running.items()):
            code = child.poll()
            if code is None:
                continue
            del self._running[key]
            self._slots.append(slot)
            self.codes[key] = code
            task, record = self.sweep.task(key), records.read_record(self.sweep, key)
            state = records.task_state(self.sweep, task)
            reason = f" (exit code {code}): {record.error}" if record and state == FAILED else ""
            self._say(f"{state} {self.sweep.describe(task)}{reason}; {records.counts(self.sweep)}")
        return len(self.codes) - before

    def _end_all(self) -> None:
        number, deadline = signal.SIGTERM, 0.0
        while self._running:
            if time.monotonic() > deadline:
                for child, _ in self._running.values():
                    child.send_signal(number)
                number, deadline = signal.SIGKILL, time.monotonic() + GRACE_S
            self._collect()
            time.sleep(0.1)


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """The machine's GPUs, as CUDA_VISIBLE_DEVICES names them; none where there are none."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [part for part in environment["CUDA_VISIBLE_DEVICES"].split(",") if part]
    return gpu_files()


def split_devices(devices: Sequence[str], parallel: int) -> list[str]:
    """Each slot's devices: an even share, or one that slots take turns at where there are fewer devices than slots. []
    if there is nothing to share out."""
    if not devices or parallel == 1:
        return []
    share = max(1, len(devices) // parallel)
    return [",".join(devices[slot * share % len(devices) :][:share]) for slot in range(parallel)]
