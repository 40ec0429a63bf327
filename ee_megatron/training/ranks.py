"""Ranks as processes: launchers' environment variables, requests to stop, and several ranks on one machine.

Slurm sends USR1, USR2 or TERM before a time limit or at a preemption; a stage then ends at its next step with a
checkpoint, and its process with the exit code STOPPED. A signal may reach one rank and not another, so ranks act on it
only once they have agreed. torch is imported only when a stage runs: signal handlers are installed before the slow
imports.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing.context
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

from ..host_memory import limit_arenas

if TYPE_CHECKING:
    from ..parallel.heartbeat import Heartbeat

T = TypeVar("T")

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
STOPPED = 85
"""Exit code of a stage that stopped on request and can be resumed; slurm/common.sh has it too."""
WITH_PARENT = "EE_PARENT"
"""Set by a parent to its own process id: the stage or run that it starts is stopped when the parent dies, however it
dies. A stage of one rank then handles signals as in a Slurm step."""
PR_SET_PDEATHSIG = 1
PARTING_S = 30.0
"""How long the leader waits for the other ranks to leave."""
GRACE_S = 10.0
"""Seconds from TERM to KILL for ranks that ignore TERM."""
NUMBERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NUM_NODES", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK",
)  # fmt: skip
"""Launchers' variables that hold whole numbers."""


# -- launchers' variables ---------------------------------------------------------------------------------------------


def check_variables(environment: Mapping[str, str]) -> None:
    """Raises ValueError if a launcher's environment variables are malformed or contradict each other."""
    for name in NUMBERS:
        text = environment.get(name, "0")
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError(f"{name}={text!r}: expected a whole number, as a launcher of ranks sets it; unset it")
    rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if "RANK" in environment and "WORLD_SIZE" in environment and rank >= world:
        raise ValueError(f"RANK={rank} with WORLD_SIZE={world}: expected ranks from 0 on, below the number of them")


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several ranks. Only srun sets SLURM_STEP_NUM_TASKS, so a batch
    script is not a rank."""
    return "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def adopt_rank(environment: MutableMapping[str, str]) -> None:
    """In an srun step of several tasks each process is already a rank: set the variables that torch reads.

    MASTER_ADDR and MASTER_PORT come from the batch script, which knows the first learner node. Raises ValueError
    without them.
    """
    if "RANK" in environment or not is_rank(environment):
        return
    if "MASTER_ADDR" not in environment:
        raise ValueError("SLURM_PROCID is set but MASTER_ADDR is not; start ranks through slurm/*.sh, or export it")
    world, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(world)
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    # At most: the last node may have fewer.
    environment["LOCAL_WORLD_SIZE"] = str(-(-world // nodes))
    environment.setdefault("MASTER_PORT", "29500")


# -- requests to stop -------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """The stage stops on request. Not an `Exception`, so that error handlers don't catch it.

    `store`: torch's, saved before the process group was left.
    """

    def __init__(self, text: str, rank: int = 0, world: int = 1, store: Any = None):
        super().__init__(text)
        self.rank, self.world, self.store = rank, world, store

    def leave(self) -> NoReturn:
        """End the process once everything is closed: the other ranks with 0, then the leader with STOPPED.

        In this order, because a launcher that sees another code than 0 kills whoever is still there, and the step's
        code would be the killed rank's.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: atexit handlers of libraries may wait for peers that are gone.
        if self.world > 1:
            part(self.store, self.rank, self.world)
        if self.rank:
            os._exit(0)
        if self.world > 1:
            # A rank exits microseconds after its last message; on a loaded machine it may take longer.
            time.sleep(0.5)
        os._exit(STOPPED)


def part(store: Any, rank: int, world: int) -> None:
    """Before the processes end: the others say so, and the leader, whose process may hold the store that they still
    look into, waits for that, PARTING_S at most."""
    if rank:
        store.set(f"left/{rank}", "")
        return
    try:
        store.wait([f"left/{other}" for other in range(1, world)], timedelta(seconds=PARTING_S))
    except RuntimeError as error:
        print(f"not all ranks left within {PARTING_S:.0f} s: {error}", file=sys.stderr, flush=True)


class Listener:
    """Records requests to stop. `last_signal`: the last signal received, 0 before the first."""

    def __init__(self) -> None:
        self.last_signal = 0
        self._at_once = False

    def listen(self) -> None:
        """Record signals from now on instead of ending the process."""
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.last_signal = number
        if self._at_once:
            self._at_once = False
            raise self._stopped()

    def _stopped(self) -> Stopped:
        return Stopped(f"stopped by {signal.Signals(self.last_signal).name}")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal raises `Stopped` at once: for work that may be abandoned half-way."""
        if self.last_signal:
            raise self._stopped()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


listener = Listener()


@contextmanager
def keeping_signals() -> Iterator[None]:
    """Restore the signal handlers when the block ends, whatever a library does inside."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_parent() -> None:
    """If WITH_PARENT is set: make TERM arrive when that parent dies, or at once if it is dead already. Linux only;
    elsewhere this does nothing."""
    parent = os.environ.pop(WITH_PARENT, "")
    if not parent or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)


# -- several ranks on one machine -------------------------------------------------------------------------------------


class Forked(multiprocessing.context.ForkProcess):
    """`ee-megatron` with these arguments in a process forked off this one, which has the imports already; with the
    methods of subprocess.Popen that are used here. The child calls `before` first.

    `launch.may_fork`: whether forking is safe.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: IO | None = None,
        stderr: IO | None = None, before: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(target=_as_command, args=(arguments, environment, stdout, stderr, before))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("ee-megatron", timeout or 0.0)
        return self.exitcode


def _as_command(
    arguments: Sequence[str], environment: Mapping[str, str], stdout: IO | None, stderr: IO | None,
    before: Callable[[], None] | None,
) -> NoReturn:  # fmt: skip
    """Reset the state of a forked process to that of a new one, then run the command."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for stream, descriptor in ((stdout, 1), (stderr, 2)):
        if stream is not None:
            os.dup2(stream.fileno(), descriptor)
    if before is not None:
        before()
    # Libraries read these variables when they were loaded, in the parent.
    if "torch" in sys.modules:
        threads = environment.get("OMP_NUM_THREADS", "").split(",")[0] or len(os.sched_getaffinity(0))
        sys.modules["torch"].set_num_threads(int(threads))
    if "MALLOC_ARENA_MAX" in environment:
        limit_arenas(int(environment["MALLOC_ARENA_MAX"]))
    # Named, not imported: the command line is above all else.
    sys.exit(importlib.import_module("ee_megatron.cli").main(list(arguments)))


def run_ranks(
    command: Sequence[str], world: int, logs: Path, environment: Mapping[str, str], forked: bool = False
) -> int:
    """Start `world` processes of one command, each with its rank in the variables that torch reads, and wait. Once one
    fails the others are ended, and its error is the last line on stderr; each rank's stderr goes to a log of its own.
    Ctrl-C and TERM end all of them. On a cluster srun does this (slurm/common.sh).

    `forked`: the command is this package's own, and this process has imported what it needs (`Forked`). Returns the
    exit code: 0, that of the rank that failed first, or 128 plus the number of the signal that killed it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"rank-{rank}.log" for rank in range(world)]
    processes: list[subprocess.Popen | Forked] = []
    with _terminating():
        try:
            for rank, file in enumerate(files):
                given = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                given |= {"LOCAL_WORLD_SIZE": str(world), WITH_PARENT: str(os.getpid())}
                processes.append(_start(command, file, rank == 0, {**environment, **given}, forked))
            failed = _first_failed(processes, files)
        finally:
            _end(processes)
    if failed is None:
        return 0
    code = processes[failed].poll()
    assert code is not None
    print(_reason(f"rank {failed} of {world}", files[failed], code), file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


def _start(
    command: Sequence[str], file: Path, leads: bool, environment: Mapping[str, str], forked: bool
) -> subprocess.Popen | Forked:
    with file.open("wb") as log:
        # Only rank 0 prints progress and metrics.
        stdout = None if leads else log
        if forked:
            return Forked(command, environment, stdout, log, _ignore_interrupts)
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, env=environment, preexec_fn=_ignore_interrupts
        )


def _first_failed(processes: Sequence[subprocess.Popen | Forked], files: Sequence[Path]) -> int | None:
    """The rank that failed first, None once all have ended well."""
    while True:
        codes = [process.poll() for process in processes]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed:
            # Ranks that lose a peer fail too: the cause is a killed rank, else the one that wrote to its log first.
            return min(failed, key=lambda rank: (failed[rank] > 0, files[rank].stat().st_mtime_ns))
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen | Forked]) -> None:
    for method in ("terminate", "kill"):
        for process in processes:
            if process.poll() is None:
                getattr(process, method)()
        deadline = time.monotonic() + GRACE_S
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)


def _reason(name: str, log: Path, code: int) -> str:
    if code < 0:
        return f"error: {name}: killed by {signal.Signals(-code).name}; its log is {log}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code == STOPPED:
        return lines[-1] if lines else f"{name}: stopped on request"
    errors = [line for line in lines if line.startswith("error: ")]
    last = errors[-1] if errors else f"error: {name}: ended with exit code {code}"
    return last if code == 2 else f"{last} ({log})"


def free_port() -> int:
    """A free port. Below the system's ephemeral ports (Linux: from 32768), which may be taken before a rank listens
    there. Raises RuntimeError if none is free."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port of a hundred between 20000 and 32000; end what listens on them")


def _ignore_interrupts() -> None:
    # The terminal sends INT to every process; ranks end by TERM from their parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _terminating() -> Iterator[None]:
    """Inside, TERM raises SystemExit, so that the processes started here are ended too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Distributed:
    """This process among the ranks of its stage. `heartbeat` is None for a single rank."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.leads = self.rank == 0
        self.heartbeat: Heartbeat | None = None

    @property
    def meet(self) -> Callable[[], None] | None:
        """Wait for rank 0 as long as it gives signs of life; nothing for a single rank."""
        return self.heartbeat.meet if self.heartbeat else None

    def broadcast_from_rank0(self, make: Callable[..., T] | None, *arguments: Any) -> T:
        """Call `make(*arguments)` on rank 0 and return its result on every rank; other ranks' arguments are ignored.
        Plain records only. The others wait as long as rank 0 lives: any deadline is `make`'s own."""
        box: list[Any] = [make(*arguments) if self.leads and make else None]
        if self.heartbeat is not None:
            from torch import distributed as dist

            self.heartbeat.meet()
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def stop_requested(self) -> bool:
        """Whether any rank has received a signal; all ranks call it."""
        if self.heartbeat is None:
            return bool(listener.last_signal)
        import torch
        from torch import distributed as dist

        stops = torch.tensor([listener.last_signal])
        self.heartbeat.meet()
        dist.all_reduce(stops, op=dist.ReduceOp.MAX)
        return bool(stops.item())
