"""The ranks of one machine, started, watched and ended together. What goes wrong is said once, in one last line; all
else that ranks say on stderr is in a log of each.

On a cluster srun does this (slurm/common.sh). On a CPU ranks are forked off a process that has imported what they need.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from ..host_memory import limit_arenas
from .preemption import STOPPED, WITH_PARENT

LOG = "EE_RANK_LOG"
"""Set for a rank that is started here: the file that its stderr goes to."""
GRACE_S = 10.0
"""From the word to end to the end of ranks that do not heed it."""
NUMBERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK",
)  # fmt: skip
"""What launchers say in numbers."""


def check_variables(environment: Mapping[str, str]) -> None:
    """Raises ValueError if what a launcher says of this process is not to be understood."""
    for name in NUMBERS:
        text = environment.get(name, "0")
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError(f"{name}={text!r}: expected a whole number, as a launcher of ranks sets it; unset it")
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if "RANK" in environment and "WORLD_SIZE" in environment and rank >= world:
        raise ValueError(f"RANK={rank} with WORLD_SIZE={world}: expected ranks from 0 on, below the number of them")


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether somebody has started this process as one of several."""
    return "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


class Forked:
    """`ee-megatron` with these arguments in a process forked off this one, whose imports it needn't repeat: as much of
    subprocess.Popen as is used here.

    `launch.may_fork` says where that goes well.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: IO | None = None,
        stderr: IO | None = None, before: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        def main() -> None:
            for told in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(told, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(environment)
            for stream, number in ((stdout, 1), (stderr, 2)):
                if stream is not None:
                    os.dup2(stream.fileno(), number)
            if before is not None:
                before()
            # What libraries read of the environment when they were loaded, in another process.
            if "torch" in sys.modules:
                threads = environment.get("OMP_NUM_THREADS", "").split(",")[0] or len(os.sched_getaffinity(0))
                sys.modules["torch"].set_num_threads(int(threads))
            if "MALLOC_ARENA_MAX" in environment:
                limit_arenas(int(environment["MALLOC_ARENA_MAX"]))
            # Named, not imported: the command line is above all else.
            sys.exit(importlib.import_module("ee_megatron.cli").main(list(arguments)))

        self._process = multiprocessing.get_context("fork").Process(target=main)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("ee-megatron", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self.pid:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Ranks:
    """`world` processes of one command, each with its rank in the variables that torch reads. `run` once.

    `forked`: the command is this package's own, and this process has imported what it needs (`Forked`).
    """

    def __init__(
        self, command: Sequence[str], world: int, logs: Path, environment: Mapping[str, str], forked: bool = False
    ):
        self.world, self._logs, self._forked = world, logs, forked
        self._command, self._environment = list(command), dict(environment)
        self._processes: list[subprocess.Popen | Forked] = []

    def run(self) -> int:
        """Start all, wait, and end the others once one has failed; its error is the last line on stderr. Returns the
        exit code: 0, that of the rank that failed first, or 128 and the number of the signal that killed it.

        Ctrl-C and TERM end all of them.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        with _terminating():
            try:
                for rank in range(self.world):
                    self._processes.append(self._start(rank))
                failed = self._wait()
            finally:
                self._end()
        if failed is None:
            return 0
        code = self._processes[failed].poll()
        assert code is not None
        print(self._said(failed, code), file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code

    def _start(self, rank: int) -> subprocess.Popen | Forked:
        given = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
        given |= {"LOCAL_WORLD_SIZE": str(self.world), LOG: str(self._log(rank)), WITH_PARENT: str(os.getpid())}
        with self._log(rank).open("wb") as log:
            # Progress and figures are the leader's, on stdout.
            stdout = None if rank == 0 else log
            if self._forked:
                return Forked(self._command, self._environment | given, stdout, log, _ignore_interrupts)
            return subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, env=self._environment | given,
                preexec_fn=_ignore_interrupts,
            )  # fmt: skip

    def _wait(self) -> int | None:
        """The rank that failed first, None if none did."""
        while True:
            codes = [process.poll() for process in self._processes]
            failed = {rank: code for rank, code in enumerate(codes) if code}
            if failed:
                # Ranks that lose another one fail too: killed ones, and whoever spoke first, are the reason.
                return min(failed, key=lambda rank: (failed[rank] > 0, self._log(rank).stat().st_mtime_ns))
            if all(code == 0 for code in codes):
                return None
            time.sleep(0.05)

    def _end(self) -> None:
        for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            for process in self._processes:
                if process.poll() is None:
                    process.send_signal(number)
            deadline = time.monotonic() + patience
            while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank}.log"

    def _said(self, rank: int, code: int) -> str:
        log, name = self._log(rank), f"rank {rank} of {self.world}"
        if code < 0:
            return f"error: {name}: killed by {signal.Signals(-code).name}; its log is {log}"
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if code == STOPPED:
            return lines[-1] if lines else f"{name}: stopped, as told"
        errors = [line for line in lines if line.startswith("error: ")]
        last = errors[-1] if errors else f"error: {name}: ended with exit code {code}"
        return last if code == 2 else f"{last} ({log})"


def free_port() -> int:
    """A port that nobody has now. Below those that the system deals out (Linux: from 32768), which may be taken by
    the time that a rank listens at it. Raises RuntimeError if there is none."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port of a hundred between 20000 and 32000; end what listens on them")


def _ignore_interrupts() -> None:
    # The terminal's INT reaches every process; ranks end when they are told to.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Inside, TERM ends this process as an error would, so that what it has started is ended too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
