"""A sweep: its points as runs, the stages that runs share as tasks, and their files.

A run's stages form a chain, and runs with equal settings upstream have equal stage directories. A task is a stretch of
stages that the same runs need: shared ones come first, each run's own stretch last. Files, each whole or not there:

<runs>/<name>/sweep-<last>/   manifest.json, tasks/<task>.json (`TaskRecord`), results/<run>.json, submitted.json (Slurm
                              jobs), logs/<task>.log, .lock (held by a local sweep at work), table.csv
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ..arguments import OLDER
from ..config.cluster import job_shape
from ..config.errors import lines_of, refuse
from ..config.identity import PREFIX, stage_dir, stage_order
from ..config.load import load, pin_ids
from ..config.schema import RunConfig
from ..families.hf_directory import read_json
from ..observe.lock import RunLock
from ..observe.rundir import DONE, write_atomic
from .grid import SEED, SEEDS, Grid

MANIFEST = "manifest.json"
WAITING, QUEUED, RUNNING, STOPPED, KILLED, FAILED, FINISHED = STATES = (
    "waiting", "queued", "running", "stopped", "killed", "failed", "finished",
)  # fmt: skip


class RunStage(NamedTuple):
    """A stage of a run: its directory's name and the resources of its Slurm job (slots and gpus are per node)."""

    stage: str
    directory: str
    nodes: int = 1
    slots: int = 1
    gpus: int = 0


@dataclass
class SweepRun:
    """One grid point. `id`: the hash in its last stage directory's name; `settings`: its values of the axes, as in the
    table; `overrides`: settings that start it; `steps`: its stages in order."""

    id: str
    settings: dict[str, Any]
    overrides: list[str]
    steps: list[RunStage]

    @property
    def task(self) -> str:
        """Key of the task that this run alone needs."""
        return self.steps[-1].directory


@dataclass
class StageTask:
    """Stages that run one after another. `key`: the last one's directory; needs: the task before it, "" for none;
    level: number of tasks before it; overrides: of the first run that needs it; runs: ids of all that do."""

    key: str
    steps: list[RunStage]
    needs: str
    level: int
    overrides: list[str]
    runs: list[str]


@dataclass
class TaskRecord:
    """Outcome of a task, tasks/<task>.json. state: running, stopped (on request, with a checkpoint), killed (by a
    signal), failed (by itself) or finished; stage: the last one started; code: its exit code; host, job (Slurm's, as 12
    or 12_3): where it was started."""

    state: str
    stage: str = ""
    code: int = 0
    error: str = ""
    starts: int = 0
    host: str = ""
    job: str = ""


@dataclass
class Sweep:
    """A sweep on disk. `directory`: <runs>/<name>/sweep-<last>; stage directories are its siblings. `last`: the stage
    that runs end with; `tasks` by key, those that others need first."""

    directory: Path
    last: str
    runs: list[SweepRun]
    tasks: dict[str, StageTask] = field(init=False)

    def __post_init__(self) -> None:
        self.tasks = cut(self.runs)
        self.lock = RunLock(self.directory / ".lock")

    @property
    def ids(self) -> set[str]:
        return {run.id for run in self.runs}

    def chain(self, task: StageTask) -> list[StageTask]:
        """The tasks that `task` depends on, in order, and the task itself."""
        return [*(self.chain(self.tasks[task.needs]) if task.needs else []), task]

    def describe(self, task: StageTask) -> str:
        """The sweep's stages, and the settings that all of its runs have in common."""
        stages = "+".join(step.stage for step in task.steps)
        first, *others = (run.settings for run in self.runs if run.id in task.runs)
        shared = spelt({key: value for key, value in first.items() if all(o.get(key) == value for o in others)})
        return f"{stages} for {len(task.runs)} runs: {shared}".rstrip(": ") if others else f"{stages} {shared}".rstrip()

    # ---- on disk ----

    def save(self) -> None:
        """Write the manifest, and make the sweep's directories."""
        for name in ("tasks", "results", "logs"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        _write(self.directory / MANIFEST, {"format": 2, "last": self.last, "runs": [asdict(run) for run in self.runs]})

    def path(self, step: RunStage) -> Path:
        return self.directory.parent / step.directory

    def is_done(self, what: StageTask | SweepRun) -> bool:
        return all((self.path(step) / DONE).is_file() for step in what.steps)

    def record(self, key: str) -> TaskRecord | None:
        """A task's record; None before its first start."""
        fields = _read(self.directory / "tasks" / f"{key}.json")
        return None if fields is None else TaskRecord(**fields)

    def write_record(self, key: str, record: TaskRecord) -> None:
        _write(self.directory / "tasks" / f"{key}.json", asdict(record))

    def result(self, run: SweepRun) -> dict[str, Any] | None:
        """A run's figures (run_metrics.py); None while it has not finished."""
        return _read(self.directory / "results" / f"{run.id}.json")

    def write_result(self, run: SweepRun, values: Mapping[str, Any]) -> None:
        _write(self.directory / "results" / f"{run.id}.json", values)

    def submitted(self) -> dict[str, str]:
        """Slurm job of each task's last submission, by task key."""
        return _read(self.directory / "submitted.json") or {}

    def note_submitted(self, jobs: Mapping[str, str]) -> None:
        _write(self.directory / "submitted.json", {**self.submitted(), **jobs})

    # ---- states ----

    def task_state(self, task: StageTask, queue: Mapping[str, str] | None = None) -> str:
        """State of a task from the files and, in `queue`, from Slurm (slurm.queued). A record that says "running"
        counts while a local sweep holds the lock."""
        if self.is_done(task):
            return FINISHED
        record, there = self.record(task.key), (queue or {}).get(task.key)
        claims = record is not None and record.state == RUNNING
        if there == "RUNNING" or (claims and self.lock.is_held()):
            return RUNNING
        if there:
            return QUEUED
        if record is None or record.state == FINISHED:
            # Never started; or finished, and a stage was removed since.
            return WAITING
        return KILLED if claims else record.state

    def failure(self, task: StageTask) -> str:
        """Why the task, or the first failed one that it depends on, has failed; "" if none has."""
        for each in self.chain(task):
            record = self.record(each.key)
            if record is not None and record.state == FAILED and not self.is_done(each):
                reason = record.error or f"exit code {record.code}"
                return reason if each is task else f"{each.key}, which it needs: {reason}"
        return ""

    def run_state(self, run: SweepRun, queue: Mapping[str, str] | None = None) -> str:
        """State of a run: finished, failed (also if a task that it needs has), or that of its own task."""
        if self.is_done(run):
            return FINISHED
        own = self.tasks[run.task]
        return FAILED if self.failure(own) else self.task_state(own, queue)

    def counts(self, queue: Mapping[str, str] | None = None) -> str:
        """Number of runs by state, for example "11 finished, 1 failed"."""
        number = Counter(self.run_state(run, queue) for run in self.runs)
        return ", ".join(f"{number[state]} {state}" for state in reversed(STATES) if number[state])


def spelt(settings: Mapping[str, Any]) -> str:
    """Format settings: {"a": 1, "b": [2]} -> "a=1 b=[2]"."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def cut(runs: list[SweepRun]) -> dict[str, StageTask]:
    """Cut the runs' chains of stages into tasks, by level."""
    users: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        for step in run.steps:
            users[step.directory].append(run.id)
    tasks: dict[str, StageTask] = {}
    for run in runs:
        needs = ""
        # Consecutive stages that the same runs need.
        for level, (_, group) in enumerate(itertools.groupby(run.steps, lambda step: users[step.directory])):
            steps = list(group)
            key = steps[-1].directory
            tasks.setdefault(key, StageTask(key, steps, needs, level, run.overrides, users[key]))
            needs = key
    return dict(sorted(tasks.items(), key=lambda item: item[1].level))


# ---- from a grid ----


def resolve(grid: Grid, last: str, check: Callable[[RunConfig], None]) -> Sweep:
    """Load and check every point of a grid; nothing is written. Overrides of runs have the commits of hub ids.

    `check` raises ValueError or FileNotFoundError for a configuration that cannot start. Raises Faults with all
    errors, each with the points that have it.
    """
    errors: dict[str, list[str]] = defaultdict(list)
    runs: dict[str, SweepRun] = {}
    names: dict[str, str] = {}
    home = Path()
    for number, point in enumerate(grid.points(), 1):
        settings, overrides = {key: value.plain for key, value in point.items()}, grid.overrides(point)
        name = f"point {number} ({spelt(settings)})" if settings else f"point {number}"
        try:
            cfg = load(overrides)
            refuse(pin_ids(cfg, overrides, whole=False).values())
            check(cfg)
            if budget := grid.budget(point):
                bought = budget.buy(cfg)
                settings[budget.set] = bought
                overrides.append(f"{budget.set}={bought!r}")
                cfg = load(overrides)
                check(cfg)
            home = Path(cfg.runs) / cfg.name
            steps = [_step(cfg, stage) for stage in stages_of(cfg, last)]
            ident = steps[-1].directory.rsplit("-", 1)[1]
            if ident in runs:
                raise ValueError(f"the same run as {names[ident]}: what differs does not change a result")
            names[ident], runs[ident] = name, SweepRun(ident, settings, overrides, steps)
        except (ValueError, FileNotFoundError) as error:
            for line in lines_of(error):
                errors[line].append(name)
    refuse(
        f"{points[0]}{f' and {len(points) - 1} other(s), up to {points[-1]}' if len(points) > 1 else ''}: {line}"
        for line, points in errors.items()
    )
    return Sweep(home / f"sweep-{PREFIX[last]}", last, list(runs.values()))


def _step(cfg: RunConfig, stage: str) -> RunStage:
    shape, gpus = job_shape(cfg, stage), cfg.job.gpus_per_node
    return RunStage(stage, stage_dir(cfg, stage).name, shape.nodes, gpus or shape.ranks_per_node, gpus)


def stages_of(cfg: RunConfig, last: str) -> list[str]:
    """Stages of a run up to `last`. Raises ValueError if `last` is not one of them."""
    stages = [stage for stage in stage_order(cfg) if not (cfg.init_policy and stage in ("traces", "calibrate"))]
    if last not in stages:
        raise ValueError(f"--last {last}: this run's stages are {', '.join(stages)}")
    return stages[: stages.index(last) + 1]


# ---- reopened and extended ----


def open_sweep(directory: Path) -> Sweep:
    """Read a sweep from its directory. Raises FileNotFoundError or ValueError."""
    file = directory / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: no {MANIFEST} there; expected a sweep's directory")
    try:
        data = read_json(file)
        if data["format"] != 2:
            raise ValueError(f"format {data['format']}, by another version of ee-megatron")
        runs = [
            SweepRun(**run | {"steps": [RunStage(OLDER.get(stage, stage), *rest) for stage, *rest in run["steps"]]})
            for run in data["runs"]
        ]
        good = all(isinstance(run.settings, dict) and isinstance(run.overrides, list) for run in runs)
        stages = {data["last"], *(step.stage for run in runs for step in run.steps)}
        if not (runs and good and stages <= {*PREFIX, *OLDER}):
            raise ValueError("no runs with settings, overrides and stages")
        return Sweep(directory, data["last"], runs)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"{file}: not a sweep's manifest ({error}); start the sweep again to write it") from None


def find_sweep(name: str, runs: Path, last: str = "") -> Sweep:
    """Find a sweep by its runs' name or by its directory; `last`: of several, the one that ends with that stage.

    Raises FileNotFoundError if there is none, ValueError if several match."""
    for directory in (Path(name), runs / name):
        if (directory / MANIFEST).is_file():
            return open_sweep(directory)
    files = sorted((runs / name).glob(f"sweep-{PREFIX.get(last, '*')}/{MANIFEST}"))
    if len(files) > 1:
        listed = ", ".join(f"{name}/{file.parent.name}" for file in files)
        raise ValueError(f"{name}: there are {len(files)} sweeps of this name; give --last STAGE or one of {listed}")
    if not files:
        others = sorted({file.parent.parent.name for file in runs.glob(f"*/sweep-*/{MANIFEST}")})
        raise FileNotFoundError(f"{runs / name}: no such sweep; {runs} has {', '.join(others) or 'none'}")
    return open_sweep(files[0].parent)


def placed(new: Sweep, extend: bool) -> Sweep:
    """Merge a grid's sweep with the one of its name on disk, if any: all runs of both; else `new` itself.

    A name has one sweep for each last stage. A grid that has all of its runs extends it, and one that has some of them
    is a part of it. Others are added with `extend` only. Nothing is written. Raises ValueError for others without it.
    """
    if not (new.directory / MANIFEST).is_file():
        return new
    old = open_sweep(new.directory)
    if not (extend or old.ids <= new.ids or new.ids <= old.ids):
        raise ValueError(
            f"{new.directory} has {len(old.runs)} run(s), and {len(new.ids - old.ids)} of these points are not among "
            "them: --extend adds them; or give all of its points too, or another --name"
        )
    before, ours = ({run.id: run for run in sweep.runs} for sweep in (old, new))
    both = ours if old.ids <= new.ids else before | ours
    keys = dict.fromkeys(key for run in (*before.values(), *ours.values()) for key in run.settings)
    for run in both.values():
        known = (before[run.id].settings if run.id in before else {}) | run.settings
        if missing := keys.keys() - known.keys():
            # One grid may vary a setting that the other does not.
            cfg = OmegaConf.structured(load(run.overrides))
            known |= {key: _setting(cfg, key) for key in missing}
        run.settings = {key: known[key] for key in keys if known[key] is not None}
    return Sweep(new.directory, new.last, list(both.values()))


def _setting(cfg: Any, key: str) -> Any:
    """A setting's value as in a grid; None for anything but a single setting (a group, a budget)."""
    value = OmegaConf.select(cfg, SEEDS[-1] if key == SEED else key, default=None)
    value = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
    return value if isinstance(value, bool | int | float | str | list) else None


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _write(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
