"""What a sweep leaves on disk, each file whole or not there:

sweep-<hash>/manifest.json        its runs and tasks (sweep.py)
             tasks/<task>.json    what became of a task so far (one writer: who holds tasks/<task>.lock)
             results/<run>.json   a finished run's figures (measured.py)
             submitted.json       its Slurm jobs
             logs/<task>.log      what the task's stages said
             table.csv, .parquet  made by `collect`

and in a stage's directory spent.json, how long it took.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..observe.lock import process_start
from ..observe.rundir import DONE, write_atomic
from .sweep import StageTask, Sweep, SweepRun

MANIFEST = "manifest.json"
SPENT = "spent.json"
BEAT_S = 5.0
SILENT_S = 120.0
"""A task on another machine that has not written for so long is taken for lost."""
GONE = "GONE"
"""In a queue of tasks: Slurm no longer has the job that says it is at this one."""
WAITING, QUEUED, RUNNING, STOPPED, KILLED, FAILED, FINISHED = (
    "waiting", "queued", "running", "stopped", "killed", "failed", "finished",
)  # fmt: skip


@dataclass
class Record:
    """tasks/<task>.json. state: running, stopped (told to, with a checkpoint), killed (from outside), failed (by
    itself) or finished; stage: the last one started; code: its exit code; seconds: of this task's starts together."""

    state: str
    stage: str = ""
    code: int = 0
    error: str = ""
    starts: int = 0
    seconds: float = 0.0
    host: str = ""
    pid: int = 0
    process: str = ""
    job: str = ""
    events: list[str] = field(default_factory=list)


def save(sweep: Sweep) -> None:
    """The manifest, and the directories that the rest goes into."""
    for name in ("tasks", "results", "logs"):
        (sweep.directory / name).mkdir(parents=True, exist_ok=True)
    _write(sweep.directory / MANIFEST, sweep.to_json())


def open_sweep(directory: Path) -> Sweep:
    """Raises FileNotFoundError or ValueError."""
    file = directory / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: no {MANIFEST} there; expected a sweep's directory")
    data = json.loads(file.read_text())
    if data.get("format") != 1:
        raise ValueError(f"{file}: written by another version of ee-megatron (format {data.get('format')})")
    return Sweep.from_json(directory, data)


def find_sweep(name: str, runs: Path, last: str = "") -> Sweep:
    """By the runs' name, by name/sweep-<hash> or by directory; `last`: of several, the one that ends with that stage.

    Raises FileNotFoundError if there is none, ValueError if several are left."""
    for directory in (Path(name), runs / name):
        if (directory / MANIFEST).is_file():
            return open_sweep(directory)
    sweeps = [sweep for sweep in sweeps_in(runs / name) if last in ("", sweep.last)]
    if len(sweeps) > 1:
        listed = ", ".join(f"{name}/{sweep.directory.name}" for sweep in sweeps)
        raise ValueError(f"{name}: there are {len(sweeps)} sweeps of this name; give --last STAGE or one of {listed}")
    if not sweeps:
        others = sorted({str(file.parent.parent.relative_to(runs)) for file in runs.glob(f"*/sweep-*/{MANIFEST}")})
        where = f"{runs / name}: no sweep {f'up to {last} ' if last else ''}there"
        raise FileNotFoundError(f"{where}; {'there are ' + ', '.join(others) if others else f'none is in {runs}'}")
    return sweeps[0]


def sweeps_in(folder: Path) -> list[Sweep]:
    """Those of one name, but for any whose runs all belong to another of them too: a sweep that has grown since."""
    found = [open_sweep(file.parent) for file in sorted(folder.glob(f"sweep-*/{MANIFEST}"))]
    runs = [(sweep.last, {run.id for run in sweep.runs}) for sweep in found]
    return [
        sweep for sweep, (last, mine) in zip(found, runs, strict=True)
        if not any(last == other and mine < theirs for other, theirs in runs)
    ]  # fmt: skip


# ---- tasks ----


def stage_path(sweep: Sweep, name: str) -> Path:
    """The directory of a stage, by its name in `StageTask.stages`."""
    return sweep.directory.parent / name


def is_done(sweep: Sweep, task: StageTask) -> bool:
    return all((stage_path(sweep, name) / DONE).is_file() for _, name in task.stages)


def record_path(sweep: Sweep, key: str) -> Path:
    return sweep.directory / "tasks" / f"{key}.json"


def read_record(sweep: Sweep, key: str) -> Record | None:
    """None before the task's first start."""
    record = _read(record_path(sweep, key))
    return None if record is None else Record(**record)


def write_record(sweep: Sweep, key: str, record: Record) -> None:
    _write(record_path(sweep, key), asdict(record))


def own(record: Record) -> None:
    """This process is the one that the record is about from now on."""
    record.host, record.pid = socket.gethostname(), os.getpid()
    record.process, record.job = process_start(os.getpid()) or "", own_job(os.environ)


def own_job(environment: Mapping[str, str]) -> str:
    """This process's Slurm job as sbatch's users name it, 12 or 12_3; "" outside one."""
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return environment.get("SLURM_JOB_ID", "")


def task_state(sweep: Sweep, task: StageTask, queue: Mapping[str, str] | None = None) -> str:
    """By what is on disk: a task that says it is running is believed while its process lives or keeps writing. `queue`:
    what Slurm has of the tasks (slurm.py); one that waits there (again) is queued, one whose job has ended is dead."""
    if is_done(sweep, task):
        return FINISHED
    record, there = read_record(sweep, task.key), (queue or {}).get(task.key)
    if (
        record is not None
        and record.state == RUNNING
        and there != GONE
        and _alive(record, record_path(sweep, task.key))
    ):
        return RUNNING
    if there in ("PENDING", "CONFIGURING", "REQUEUED", "COMPLETING"):
        return QUEUED
    if record is None or record.state == FINISHED:
        # Never begun; or finished once, and somebody has removed a stage since.
        return WAITING
    return KILLED if record.state == RUNNING else record.state


def _alive(record: Record, file: Path) -> bool:
    if record.host == socket.gethostname():
        return process_start(record.pid) == record.process
    return silent_for(file) < SILENT_S


def silent_for(file: Path) -> float:
    """Seconds since a task's record was last written."""
    return max(0.0, time.time() - file.stat().st_mtime)


def failure(sweep: Sweep, task: StageTask) -> tuple[StageTask, Record] | None:
    """The first of the tasks that `task` needs, or itself, that has failed."""
    for each in sweep.chain(task):
        record = read_record(sweep, each.key)
        if record is not None and record.state == FAILED and not is_done(sweep, each):
            return each, record
    return None


# ---- runs ----


def read_result(sweep: Sweep, ident: str) -> dict[str, Any] | None:
    """None while the run has not finished."""
    return _read(sweep.directory / "results" / f"{ident}.json")


def write_result(sweep: Sweep, ident: str, values: dict[str, Any]) -> None:
    _write(sweep.directory / "results" / f"{ident}.json", values)


def run_state(sweep: Sweep, run: SweepRun, queue: Mapping[str, str] | None = None) -> str:
    """finished, failed (whoever's fault), or what its own task is doing: before that has begun, a run is waiting."""
    tasks = [sweep.task(key) for key in run.tasks]
    if all(is_done(sweep, task) for task in tasks):
        return FINISHED
    if failure(sweep, tasks[-1]) is not None:
        return FAILED
    return task_state(sweep, tasks[-1], queue)


def error_of(sweep: Sweep, run: SweepRun) -> str:
    """Why it failed, or "": its own error, or that of the first task that kept it from starting."""
    failed = failure(sweep, sweep.task(run.tasks[-1]))
    if failed is None:
        return ""
    task, record = failed
    return record.error if task.key == run.tasks[-1] else f"{task.key}, which it needs: {record.error}"


def counts(sweep: Sweep, queue: Mapping[str, str] | None = None) -> str:
    """ "11 finished, 1 failed" """
    number = Counter(run_state(sweep, run, queue) for run in sweep.runs)
    order = (FINISHED, RUNNING, QUEUED, STOPPED, KILLED, FAILED, WAITING)
    return ", ".join(f"{number[state]} {state}" for state in order if number[state])


# ---- time ----


def read_spent(stage: Path) -> dict[str, float]:
    """{"seconds", "device_seconds", "starts"} of all who worked on a stage in a sweep; {} where nobody did."""
    return _read(stage / SPENT) or {}


def write_spent(stage: Path, spent: dict[str, float]) -> None:
    write_atomic(stage / SPENT, json.dumps(spent))


# ---- Slurm's jobs ----


def submitted(sweep: Sweep) -> dict[str, str]:
    """Task key -> the Slurm job that it was last submitted as."""
    return _read(sweep.directory / "submitted.json") or {}


def note_submitted(sweep: Sweep, jobs: dict[str, str]) -> None:
    _write(sweep.directory / "submitted.json", {**submitted(sweep), **jobs})


_JOB = re.compile(r"\d+(_\d+)?")


def job_numbers(jobs: dict[str, str]) -> list[str]:
    return sorted({job.split("_")[0] for job in jobs.values() if _JOB.fullmatch(job)})


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _write(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
