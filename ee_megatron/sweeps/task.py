"""One task of a sweep: its stages in order, each in processes of its own, and a record of what became of them.

A task may be started by a local executor, by submitit on a Slurm node, or by hand; it may be told to stop, and killed
at any moment. Its record (records.py) has one writer, the holder of the task's lock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.cluster import job_shape
from ..config.load import load
from ..config.schema import RunConfig
from ..observe.lock import RunLock
from ..observe.rundir import DONE
from ..training.preemption import STOPPED as TOLD_TO_STOP
from ..training.preemption import WITH_PARENT
from . import records
from .records import FAILED, FINISHED, KILLED, RUNNING, STOPPED, Record
from .sweep import StageTask, Sweep

LOCK_DEADLINE_S = 12 * 3600.0
"""For a stage that another sweep is making, or a task that is running elsewhere."""
GRACE_S = 60.0
"""From the word to stop to the end of a stage that does not heed it. A step's learning may take as long."""
LAST_LINES = 200
CLUSTER_STAGE = '. slurm/common.sh || exit 2; run_stage "$@"'


class Told(BaseException):
    """Told to stop while no stage was running."""


class Failed(Exception):
    """A stage ended by itself with `code`, saying `text`."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class TaskRunner:
    """`run` does the task, once. `stop` (from a signal handler) makes it end; it can go on later.

    in_process: stages of one rank run in this process, where a debugger is.
    """

    def __init__(self, directory: Path, key: str, *, in_process: bool = False, grace_s: float = GRACE_S):
        self.sweep: Sweep = records.open_sweep(directory)
        self.task: StageTask = self.sweep.task(key)
        self.record = Record(RUNNING)
        self.told = False
        self._in_process, self._grace = in_process, grace_s
        self._child: subprocess.Popen | None = None
        self._hurry = 0.0
        self._held = False

    # ---- from outside ----

    def stop(self) -> None:
        """Ask the running stage to end at its next step; after the grace period it is killed."""
        if self.told:
            return
        self.told, self._hurry = True, time.monotonic() + self._grace
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM)

    def stop_and_wait(self) -> None:
        """`stop`, and the record says so: for a handler that does not return to `run`."""
        self.stop()
        while self._child is not None and not _ended(self._child.pid):
            self._kill_if_late()
            time.sleep(0.1)
        if self._held:
            self._note(STOPPED, code=TOLD_TO_STOP)

    # ---- the task ----

    def run(self) -> int:
        """0, or the exit code of the stage that failed, was stopped or killed. What happened is in the record."""
        with self._lock(self.sweep.directory / "tasks" / f"{self.task.key}.lock"):
            self._held = True
            return self._run()

    def _run(self) -> int:
        before = records.read_record(self.sweep, self.task.key) or Record(RUNNING)
        self.record = Record(RUNNING, starts=before.starts + 1, seconds=before.seconds, events=before.events)
        records.own(self.record)
        try:
            self._check_parents()
            cfg = load(self.task.overrides)
            # What the tasks before this one should have made is made here if it is missing: a dependency may be
            # released early, or a directory may have been removed.
            for task in self.sweep.chain(self.task):
                for stage, name in task.stages:
                    self._stage(cfg, stage, records.stage_path(self.sweep, name))
            for run in self.sweep.runs:
                if run.tasks[-1] == self.task.key:
                    finish_run(self.sweep, run.id, cfg)
        except Told:
            return self._note(STOPPED, code=TOLD_TO_STOP)
        except Failed as error:
            return self._note(self._verdict(error.code), code=error.code, error=str(error))
        except (ValueError, OSError, RuntimeError) as error:
            if self.told:
                # submitit's handler raises one where a job may not go back into the queue any more.
                return self._note(STOPPED, code=TOLD_TO_STOP, error=" ".join(str(error).split()))
            return self._note(FAILED, code=2, error=" ".join(str(error).split()))
        return self._note(FINISHED, code=0)

    def _verdict(self, code: int) -> str:
        if code == TOLD_TO_STOP or self.told:
            return STOPPED
        # The shell's way to say "by a signal", and Python's.
        return KILLED if code < 0 or code in (130, 137, 143) else FAILED

    def _check_parents(self) -> None:
        for task in self.sweep.chain(self.task)[:-1]:
            record = records.read_record(self.sweep, task.key)
            if record is None or records.is_done(self.sweep, task):
                continue
            if record.state == KILLED:
                # What killed it (memory, say) may do it again, once for every task that needs it.
                raise Failed(137, f"needs {task.key}, which was killed: start the sweep again to go on")
            if record.state == FAILED:
                raise Failed(record.code or 1, f"needs {task.key}, which failed: {record.error}")

    def _stage(self, cfg: RunConfig, stage: str, path: Path) -> None:
        if (path / DONE).is_file():
            return
        locks = path.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        # Beside the stage's own lock, which refuses at once: here a second sweep waits for what it needs too.
        with self._lock(locks / path.name):
            if (path / DONE).is_file():
                return
            self._note(RUNNING, f"start {path.name}", stage=stage)
            code, text = self._in_this_process(cfg, stage) if self._in_process else self._in_a_child(cfg, stage, path)
            self._note(RUNNING, f"end {path.name} {code}")
            if self.told and code:
                raise Told
            if code:
                raise Failed(code, text)
            if not (path / DONE).is_file():
                raise Failed(1, f"{stage} ended with exit code 0 but left no {DONE} in {path}")

    def _in_this_process(self, cfg: RunConfig, stage: str) -> tuple[int, str]:
        from ..training import launch

        try:
            launch.run_stage(stage, cfg, self.task.overrides)
        except KeyboardInterrupt:
            raise Told from None
        except Exception as error:
            if os.environ.get("EE_DEBUG") == "1":
                raise
            return 2 if isinstance(error, ValueError | FileNotFoundError) else 1, " ".join(str(error).split())
        return 0, ""

    def _in_a_child(self, cfg: RunConfig, stage: str, path: Path) -> tuple[int, str]:
        log = self.sweep.directory / "logs" / f"{self.task.key}.log"
        log.parent.mkdir(exist_ok=True)
        begun, devices = time.monotonic(), devices_of(cfg, stage)
        before = {"seconds": 0.0, "device_seconds": 0.0, "starts": 0} | records.read_spent(path)
        with log.open("ab") as file:
            offset = file.tell()
            self._child = subprocess.Popen(
                command_of(self.task, stage), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env=environment_of(self.task), start_new_session=True,
            )  # fmt: skip
        if self.told:
            # Told between the lock and here.
            os.kill(self._child.pid, signal.SIGTERM)
        beat, base = 0.0, self.record.seconds
        try:
            while True:
                ended = _ended(self._child.pid)
                now = time.monotonic() - begun
                if ended or now >= beat:
                    beat, self.record.seconds = now + records.BEAT_S, base + now
                    records.write_record(self.sweep, self.task.key, self.record)
                    if path.is_dir():
                        seconds, device = before["seconds"] + now, before["device_seconds"] + now * devices
                        spent = {"seconds": round(seconds, 3), "device_seconds": round(device, 3)}
                        records.write_spent(path, {**spent, "starts": before["starts"] + 1})
                if ended:
                    break
                self._kill_if_late()
                time.sleep(0.1)
        finally:
            code = self._end_child()
        return code, last_words(log, offset, code)

    def _end_child(self) -> int:
        child, self._child = self._child, None
        assert child is not None
        if not _ended(child.pid):
            # Only on an error of this process' own: the child must not outlive the locks.
            _kill_group(child)
        return child.wait()

    def _kill_if_late(self) -> None:
        if self.told and time.monotonic() > self._hurry and self._child is not None:
            _kill_group(self._child)

    # ---- records and locks ----

    def _note(self, state: str, event: str = "", **fields: Any) -> int:
        """Write the record with what is new; returns its exit code."""
        if event:
            restart = os.environ.get("SLURM_RESTART_COUNT", "")
            self.record.events = [*self.record.events, f"{event} restart {restart}" if restart else event]
        self.record = replace(self.record, state=state, **fields)
        records.write_record(self.sweep, self.task.key, self.record)
        return self.record.code

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        """Raises Told, or RuntimeError naming the holder after LOCK_DEADLINE_S."""
        lock, deadline = RunLock(path), time.monotonic() + LOCK_DEADLINE_S
        while True:
            if self.told:
                raise Told
            try:
                lock.acquire()
                break
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
        try:
            yield
        finally:
            lock.release()


def finish_run(sweep: Sweep, ident: str, cfg: RunConfig) -> None:
    """Measure a finished run and write its result, whole."""
    # Late: the arithmetic of plans takes seconds to import.
    from .measured import measure

    run = sweep.run(ident)
    steps = [step for key in run.tasks for step in sweep.task(key).stages]
    records.write_result(sweep, ident, measure(cfg, {stage: records.stage_path(sweep, name) for stage, name in steps}))


def command_of(task: StageTask, stage: str) -> list[str]:
    """One process, or torchrun, is the command line's to start. On a cluster several ranks or nodes are steps of the
    allocation, started by the job scripts' own functions."""
    if not on_steps(task):
        return [sys.executable, "-m", "ee_megatron.cli", stage, *task.overrides]
    return ["bash", "-c", CLUSTER_STAGE, "sweep", stage, *task.overrides]


def on_steps(task: StageTask) -> bool:
    """Whether the stage's processes are srun's: of several ranks or nodes, in a Slurm job."""
    return not task.plain and "SLURM_JOB_ID" in os.environ


def environment_of(task: StageTask) -> dict[str, str]:
    given = {"OMP_NUM_THREADS": "1", **os.environ}
    # Requeueing is submitit's part here.
    given["EE_REQUEUE"] = "no"
    given.pop(WITH_PARENT, None)
    if not on_steps(task):
        given[WITH_PARENT] = str(os.getpid())
    return given


def devices_of(cfg: RunConfig, stage: str) -> int:
    """GPUs of the stage's nodes; on a cluster without them, and on this machine, ranks and actors."""
    shape = job_shape(cfg, stage)
    if shape.gpus_per_node:
        return shape.nodes * shape.gpus_per_node
    return shape.ranks + (cfg.rollout.actors if shape.rollout_nodes else 0)


def last_words(log: Path, offset: int, code: int) -> str:
    """What a stage that ended with `code` said last: its error line if there is one. `offset`: where its part of the
    log begins."""
    if code <= 0:
        return f"killed by {signal.Signals(-code).name}" if code else ""
    with log.open("rb") as file:
        file.seek(offset)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()[-LAST_LINES:]]
    said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line]
    return said[-1].removeprefix("error: ")[:500] if said else f"exit code {code}"


def _kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _ended(pid: int) -> bool:
    """Without collecting it: a signal handler may ask while `wait` is under way."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, INT and TERM call `stop`."""
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
