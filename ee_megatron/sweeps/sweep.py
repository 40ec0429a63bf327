"""A grid resolved: every point a whole configuration with an id, the work shared among them cut out.

A run's stages form a chain, and runs with equal settings upstream have equal stage directories. A task is a stretch of
stages that the same runs need: shared ones come first, each run's own stretch last.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config.cluster import job_shape
from ..config.derive import read_dims
from ..config.errors import lines_of, refuse
from ..config.identity import stage_dir, stage_order
from ..config.load import load
from ..config.schema import RunConfig
from .grid import BUDGET, Grid, Value, describe


@dataclass
class SweepRun:
    """One grid point. `settings`: what varies, as in the table; `overrides`: what starts it; `tasks`: what it needs, in
    order, the last of them its own."""

    id: str
    settings: dict[str, Any]
    overrides: list[str]
    tasks: list[str] = field(default_factory=list)


@dataclass
class StageTask:
    """Stages to be run one after another, as (stage, name of its directory). `key` is the last one's directory.

    needs: the task before it, "" for none; overrides: of the first run that needs it; runs: ids of all that do; nodes,
    slots, gpus: what a Slurm job of it asks for (slots and gpus per node); plain: one process on one node.
    """

    key: str
    stages: list[tuple[str, str]]
    needs: str
    overrides: list[str]
    runs: list[str]
    nodes: int = 1
    slots: int = 1
    gpus: int = 0
    plain: bool = True


@dataclass
class Sweep:
    """`directory`: <runs>/<name>/sweep-<hash of its runs>; stage directories are its siblings."""

    directory: Path
    last: str
    runs: list[SweepRun]
    tasks: list[StageTask]

    def task(self, key: str) -> StageTask:
        return next(task for task in self.tasks if task.key == key)

    def run(self, ident: str) -> SweepRun:
        return next(run for run in self.runs if run.id == ident)

    def chain(self, task: StageTask) -> list[StageTask]:
        """The tasks that `task` needs, first things first, and itself."""
        return [*(self.chain(self.task(task.needs)) if task.needs else []), task]

    def levels(self) -> list[list[StageTask]]:
        """Tasks by how many come before them."""
        depths = [len(self.chain(task)) for task in self.tasks]
        return [[t for t, d in zip(self.tasks, depths, strict=True) if d == depth] for depth in sorted(set(depths))]

    def describe(self, task: StageTask) -> str:
        """Its stages, and the settings that all of its runs have in common."""
        stages = "+".join(stage for stage, _ in task.stages)
        first, *others = (self.run(ident).settings for ident in task.runs)
        shared = spelt({key: value for key, value in first.items() if all(o.get(key) == value for o in others)})
        if others:
            return f"{stages} for {len(task.runs)} runs{': ' if shared else ''}{shared}"
        return f"{stages} {shared}".rstrip()

    def to_json(self) -> dict[str, Any]:
        runs, tasks = [asdict(run) for run in self.runs], [asdict(task) for task in self.tasks]
        return {"format": 1, "last": self.last, "runs": runs, "tasks": tasks}

    @staticmethod
    def from_json(directory: Path, data: dict[str, Any]) -> Sweep:
        tasks = [StageTask(**{**task, "stages": [(s, d) for s, d in task["stages"]]}) for task in data["tasks"]]
        return Sweep(directory, data["last"], [SweepRun(**run) for run in data["runs"]], tasks)


def spelt(settings: Mapping[str, Any]) -> str:
    """{"a": 1, "b": [2]} -> "a=1 b=[2]"."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def resolve(grid: Grid, last: str, check: Callable[[RunConfig], None]) -> Sweep:
    """Load and check every point; nothing is written.

    `check` raises ValueError or FileNotFoundError for a configuration that cannot start. Raises Faults with all
    errors, each with the points that have it.
    """
    errors: dict[str, list[str]] = {}
    runs: dict[str, tuple[SweepRun, RunConfig]] = {}
    names: dict[str, str] = {}
    for number, point in enumerate(grid.points(), 1):
        settings = {key: value.plain for key, value in point.items()}
        name = f"point {number} ({describe(settings)})" if settings else f"point {number}"
        try:
            run, cfg = _resolve_point(grid, point, settings, last, check)
            if run.id in runs:
                raise ValueError(
                    f"the same run as {names[run.id]}: what differs changes how a result is computed, not what it is"
                )
            names[run.id], runs[run.id] = name, (run, cfg)
        except (ValueError, FileNotFoundError) as error:
            for line in lines_of(error):
                errors.setdefault(line, []).append(name)
    refuse(f"{_some(points)}: {line}" for line, points in errors.items())
    cfg = next(iter(runs.values()))[1]
    digest = hashlib.sha256(" ".join([last, *sorted(runs)]).encode()).hexdigest()[:8]
    directory = Path(cfg.runs) / cfg.name / f"sweep-{digest}"
    return Sweep(directory, last, [run for run, _ in runs.values()], cut(list(runs.values()), last))


def _some(points: list[str]) -> str:
    return points[0] if len(points) == 1 else f"{points[0]} and {len(points) - 1} other(s), up to {points[-1]}"


def _resolve_point(
    grid: Grid, point: dict[str, Value], settings: dict[str, Any], last: str, check: Callable[[RunConfig], None]
) -> tuple[SweepRun, RunConfig]:
    overrides = grid.overrides(point)
    cfg = load(overrides)
    check(cfg)
    if BUDGET in point:
        # Late: the arithmetic of plans takes seconds to import.
        from .budget import buy

        bought = buy(cfg, read_dims(cfg), float(point[BUDGET].plain), grid.isoflop)
        overrides.append(f"{grid.isoflop.set}={bought.text}")
        settings[grid.isoflop.set] = float(bought.text) if "." in bought.text else int(bought.text)
        settings["budget_tokens"], settings["budget_flops"] = bought.tokens, float(f"{bought.flops:.6g}")
        cfg = load(overrides)
        check(cfg)
    stages = stages_of(cfg, last)
    return SweepRun(stage_dir(cfg, stages[-1]).name.rsplit("-", 1)[1], settings, overrides), cfg


def stages_of(cfg: RunConfig, last: str) -> list[str]:
    """What a run goes through, up to `last`. Raises ValueError if that is not among it."""
    stages = [stage for stage in stage_order(cfg) if not (cfg.init_policy and stage in ("traces", "calibrate"))]
    if last not in stages:
        raise ValueError(f"--last {last}: this run's stages are {', '.join(stages)}")
    return stages[: stages.index(last) + 1]


def cut(runs: list[tuple[SweepRun, RunConfig]], last: str) -> list[StageTask]:
    """Chains of stage directories -> tasks, parents before children; fills in `SweepRun.tasks`."""
    chains = [[(stage, stage_dir(cfg, stage).name) for stage in stages_of(cfg, last)] for _, cfg in runs]
    users: dict[str, list[str]] = {}
    for (run, _), chain in zip(runs, chains, strict=True):
        for _, name in chain:
            users.setdefault(name, []).append(run.id)
    tasks: dict[str, StageTask] = {}
    for (run, cfg), chain in zip(runs, chains, strict=True):
        # Consecutive stages that the same runs need.
        for _, group in itertools.groupby(chain, lambda step: users[step[1]]):
            stretch = list(group)
            key = stretch[-1][1]
            if key not in tasks:
                tasks[key] = _task(cfg, run, stretch, users[key])
            run.tasks.append(key)
    return sorted(tasks.values(), key=lambda task: len(task.runs) == 1)


def _task(cfg: RunConfig, run: SweepRun, stretch: list[tuple[str, str]], users: list[str]) -> StageTask:
    shapes = [job_shape(cfg, stage) for stage, _ in stretch]
    gpus = cfg.cluster.gpus_per_node
    return StageTask(
        key=stretch[-1][1],
        stages=stretch,
        needs=run.tasks[-1] if run.tasks else "",
        overrides=list(run.overrides),
        runs=list(users),
        nodes=max(shape.nodes for shape in shapes),
        slots=gpus or max(shape.ranks_per_node for shape in shapes),
        gpus=gpus,
        plain=all(shape.nodes == 1 and shape.ranks == 1 for shape in shapes),
    )
