"""Runs one task's stages in order, each in processes of its own, and records the outcome; runs many tasks on this
machine. A task that was killed resumes from its stages' checkpoints when it is started again."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from ..config.cluster import job_shape
from ..config.device import gpu_files
from ..config.load import load
from ..config.schema import RunConfig
from ..observe.lock import RunLock
from ..observe.progress import Progress
from ..observe.rundir import DONE
from ..training.ranks import STOPPED as STOPPED_CODE
from ..training.ranks import WITH_PARENT
from .sweep import FAILED, FINISHED, KILLED, RUNNING, STOPPED, RunStage, StageTask, Sweep, TaskRecord

LOCK_DEADLINE_S = 12 * 3600.0
"""How long to wait for a stage that another task or sweep is making."""
GRACE_S = 60.0
"""Seconds between the request to stop and killing the stage: a step's learning may take as long."""
POLL_S = 1.0
"""Seconds between looks at a stage that another process is making."""
LAST_LINES = 200
CLUSTER_STAGE = '. slurm/common.sh || exit 2; run_stage "$@"'
_loading = threading.Lock()
"""Hydra has one configuration at a time."""


class StageEnded(Exception):
    """Raised when a stage, or this task, ended with `code`; the text says why."""

    def __init__(self, code: int, text: str = ""):
        super().__init__(text)
        self.code = code


def run_task(
    sweep: Sweep, task: StageTask, stop: Callable[[], bool], *, grace_s: float = GRACE_S, devices: str | None = None
) -> TaskRecord:
    """Run the task's missing stages and write the results of the runs that end with it. Returns the record, which is
    also on disk.

    stop: called several times a second. Once it returns true the running stage is stopped at its next step, or killed
    after `grace_s`. devices: CUDA_VISIBLE_DEVICES of the stages. Errors of stages are recorded, not raised.
    """
    before = sweep.record(task.key)
    job = os.environ.get("SLURM_ARRAY_JOB_ID", "")
    job = f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}" if job else os.environ.get("SLURM_JOB_ID", "")
    record = TaskRecord(RUNNING, starts=before.starts + 1 if before else 1, host=socket.gethostname(), job=job)
    sweep.write_record(task.key, record)
    try:
        _check_needed(sweep, task)
        with _loading:
            cfg = load(task.overrides)
        # Stages of the tasks before this one are made here if they are missing: Slurm may release a dependency early,
        # or a directory may have been removed.
        for step in (step for each in sweep.chain(task) for step in each.steps):
            if not (sweep.path(step) / DONE).is_file():
                record.stage = step.stage
                sweep.write_record(task.key, record)
                _make(sweep, task, step, cfg, stop, grace_s, devices)
        # Late: the arithmetic of plans takes seconds to import.
        from .run_metrics import measure

        for run in sweep.runs:
            if run.task == task.key:
                measure(sweep, run, cfg)
        record.state = FINISHED
    except StageEnded as error:
        # Killed by signal n: 128 + n in a shell, -n in Python.
        killed = error.code < 0 or error.code in (130, 137, 143)
        stopped = error.code == STOPPED_CODE or stop()
        record.state, record.code = STOPPED if stopped else KILLED if killed else FAILED, error.code
        record.error = str(error)
    except Exception as error:
        if os.environ.get("EE_DEBUG") == "1":
            raise
        record.state, record.code, record.error = FAILED, 2, " ".join(str(error).split()) or type(error).__name__
    sweep.write_record(task.key, record)
    return record


def _check_needed(sweep: Sweep, task: StageTask) -> None:
    """Raises StageEnded if a needed task failed or was killed (out of memory, say): it would fail again."""
    if reason := sweep.failure(task):
        raise StageEnded(1, reason)
    for each in sweep.chain(task)[:-1]:
        record = sweep.record(each.key)
        if record is not None and record.state == KILLED and not sweep.is_done(each):
            raise StageEnded(-signal.SIGKILL, f"needs {each.key}, which was killed: start the sweep again to resume it")


def _make(
    sweep: Sweep, task: StageTask, step: RunStage, cfg: RunConfig, stop: Callable[[], bool], grace_s: float,
    devices: str | None,
) -> None:  # fmt: skip
    """Make a stage once no other process is making it, unless that one finished it. Raises StageEnded if it did not
    finish, or RuntimeError if the other process is still running after LOCK_DEADLINE_S."""
    path, deadline = sweep.path(step), time.monotonic() + LOCK_DEADLINE_S
    lock = RunLock(path / ".lock")
    while not (path / DONE).is_file():
        if stop():
            raise StageEnded(STOPPED_CODE)
        if lock.is_held():
            # Another task, sweep or command makes it, or a killed sweep's stage is still writing its checkpoint.
            if time.monotonic() > deadline:
                raise RuntimeError(f"{path} is being written by another process; wait for it or end it")
            time.sleep(POLL_S)
            continue
        log = sweep.directory / "logs" / f"{task.key}.log"
        offset = log.stat().st_size if log.is_file() else 0
        command, environment = command_of(cfg, step.stage, task.overrides)
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        code = _run(command, environment, log, stop, grace_s)
        # Refused if another process took the lock first; a killed stage's remaining processes may hold it, too.
        refused = code in (1, 2) and lock.is_held()
        if not refused and (code or not (path / DONE).is_file()):
            text = f"{step.stage} ended with exit code 0 but left no {DONE}"
            raise StageEnded(code or 1, last_words(log, offset, code) if code else text)


def _run(command: list[str], environment: dict[str, str], log: Path, stop: Callable[[], bool], grace_s: float) -> int:
    """Run a process -> its exit code. Once `stop` is true it gets TERM, and `grace_s` later KILL."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    deadline = math.inf
    try:
        while child.poll() is None:
            if stop() and deadline == math.inf:
                child.terminate()
                deadline = time.monotonic() + grace_s
            if time.monotonic() > deadline:
                _kill_group(child)
            time.sleep(0.1)
    finally:
        if child.poll() is None:
            # Only on an error of this process' own: the child must not outlive the task.
            _kill_group(child)
            child.wait()
    return child.returncode


def _kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def command_of(cfg: RunConfig, stage: str, overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a stage. In a Slurm job several ranks or nodes are steps of the allocation, started by
    the job scripts' functions; the command line starts everything else."""
    # Requeueing is submitit's part.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "EE_REQUEUE": "no"}
    environment.pop(WITH_PARENT, None)
    shape = job_shape(cfg, stage)
    if "SLURM_JOB_ID" in os.environ and (shape.nodes > 1 or shape.ranks > 1):
        return ["bash", "-c", CLUSTER_STAGE, "sweep", stage, *overrides], environment
    environment[WITH_PARENT] = str(os.getpid())
    return [sys.executable, "-m", "ee_megatron.cli", stage, *overrides], environment


def last_words(log: Path, offset: int, code: int) -> str:
    """Error line of a stage that ended with `code`, or else the log's last line. `offset`: where its part of the log
    begins, in bytes."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    with log.open("rb") as file:
        file.seek(offset)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()[-LAST_LINES:]]
    said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line]
    return said[-1].removeprefix("error: ")[:500] if said else f"exit code {code}"


# ---- many tasks on this machine ----


def run_here(sweep: Sweep, tasks: Sequence[StageTask], parallel: int) -> bool:
    """Run tasks, at most `parallel` at a time, parents first. INT or TERM stops all of them, with a checkpoint where
    the stage writes one; if this process dies their stages stop the same way. Returns whether a stop was requested."""
    stop, futures = threading.Event(), dict[str, Future]()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    # Each running task holds one of these.
    seats: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for share in device_shares(os.environ, parallel):
        seats.put(share)

    def work(task: StageTask) -> None:
        if task.needs in futures:
            futures[task.needs].result()
        if stop.is_set():
            return
        devices = seats.get()
        try:
            print(f"started {sweep.describe(task)}", flush=True)
            record = run_task(sweep, task, stop.is_set, devices=devices)
        finally:
            seats.put(devices)
        reason = f" (exit code {record.code}): {record.error}" if record.state == FAILED else ""
        print(f"{record.state} {sweep.describe(task)}{reason}", flush=True)

    try:
        with ThreadPoolExecutor(parallel) as pool, Progress("tasks", len(tasks)) as bar:
            for task in tasks:
                futures[task.key] = pool.submit(work, task)
            for future in as_completed(futures.values()):
                bar.advance(1)
                future.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stop.is_set()


def device_shares(environment: Mapping[str, str], parallel: int) -> list[str | None]:
    """Values of CUDA_VISIBLE_DEVICES for `parallel` tasks: an even share of this machine's GPUs each, or one that tasks
    share where GPUs are fewer. None: the environment's own, where there is nothing to share."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    devices = gpu_files() if given is None else [part for part in given.split(",") if part]
    if not devices or parallel == 1:
        return [None] * parallel
    share = max(1, len(devices) // parallel)
    return [",".join(devices[slot * share % len(devices) :][:share]) for slot in range(parallel)]
