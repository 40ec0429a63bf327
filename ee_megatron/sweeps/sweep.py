"""A grid resolved: every point a whole configuration with an id, the work shared among them cut out.

A run's stages form a chain, and runs with equal settings upstream have equal stage directories. A task is a stretch of
stages that the same runs need: shared ones come first, each run's own stretch last.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config.cluster import job_shape
from ..config.derive import read_dims
from ..config.identity import stage_dir, stage_order
from ..config.load import load
from ..config.schema import RunConfig
from .grid import BUDGET, Grid, Value, describe


class GridError(ValueError):
    """Everything that is wrong with a grid's points, one line each."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = list(lines)


@dataclass
class Run:
    """One grid point. `settings`: what varies, as in the table; `overrides`: what starts it; `tasks`: what it needs, in
    order, the last of them its own."""

    id: str
    settings: dict[str, Any]
    overrides: list[str]
    tasks: list[str] = field(default_factory=list)


@dataclass
class Task:
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
    runs: list[Run]
    tasks: list[Task]

    def task(self, key: str) -> Task:
        return next(task for task in self.tasks if task.key == key)

    def run(self, ident: str) -> Run:
        return next(run for run in self.runs if run.id == ident)

    def chain(self, task: Task) -> list[Task]:
        """The tasks that `task` needs, first things first, and itself."""
        return [*(self.chain(self.task(task.needs)) if task.needs else []), task]

    def levels(self) -> list[list[Task]]:
        """Tasks by how many come before them."""
        found: dict[int, list[Task]] = {}
        for task in self.tasks:
            found.setdefault(len(self.chain(task)) - 1, []).append(task)
        return [found[level] for level in sorted(found)]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "last": self.last,
            "runs": [asdict(run) for run in self.runs],
            "tasks": [asdict(task) for task in self.tasks],
        }

    @staticmethod
    def from_json(directory: Path, data: dict[str, Any]) -> Sweep:
        tasks = [Task(**{**task, "stages": [(s, d) for s, d in task["stages"]]}) for task in data["tasks"]]
        return Sweep(directory, data["last"], [Run(**run) for run in data["runs"]], tasks)


def resolve(grid: Grid, last: str, check: Callable[[RunConfig], None]) -> Sweep:
    """Load and check every point; nothing is written.

    `check` raises ValueError or FileNotFoundError for a configuration that cannot start. Raises GridError with all
    errors, each with the points that have it.
    """
    errors: dict[str, list[str]] = {}
    found: list[tuple[Run, RunConfig]] = []
    names: dict[str, str] = {}
    for number, point in enumerate(grid.points(), 1):
        settings = {key: value.plain for key, value in point.items()}
        name = f"point {number} ({describe(settings)})" if settings else f"point {number}"
        try:
            run, cfg = _resolve_point(grid, point, settings, last, check)
            if run.id in names:
                raise ValueError(
                    f"the same run as {names[run.id]}: what differs changes how a result is computed, not what it is"
                )
            names[run.id] = name
            found.append((run, cfg))
        except (ValueError, FileNotFoundError) as error:
            errors.setdefault(" ".join(str(error).split()), []).append(name)
    if errors:
        raise GridError([f"{_some(points)}: {text}" for text, points in errors.items()])
    cfg = found[0][1]
    text = " ".join([last, *sorted(run.id for run, _ in found)])
    directory = Path(cfg.runs) / cfg.name / f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Sweep(directory, last, [run for run, _ in found], _cut(found, last))


def _some(points: list[str]) -> str:
    return points[0] if len(points) == 1 else f"{points[0]} and {len(points) - 1} other(s), up to {points[-1]}"


def _resolve_point(
    grid: Grid, point: dict[str, Value], settings: dict[str, Any], last: str, check: Callable[[RunConfig], None]
) -> tuple[Run, RunConfig]:
    overrides = grid.overrides(point)
    cfg = load(overrides)
    check(cfg)
    if BUDGET in point:
        from .isoflop import buy

        bought = buy(cfg, read_dims(cfg), float(point[BUDGET].plain), grid.isoflop)
        overrides.append(f"{grid.isoflop.set}={bought.text}")
        settings[grid.isoflop.set] = float(bought.text) if "." in bought.text else int(bought.text)
        settings["budget_tokens"], settings["budget_flops"] = bought.tokens, float(f"{bought.flops:.6g}")
        cfg = load(overrides)
        check(cfg)
    stages = stages_of(cfg, last)
    return Run(stage_dir(cfg, stages[-1]).name.rsplit("-", 1)[1], settings, overrides), cfg


def stages_of(cfg: RunConfig, last: str) -> list[str]:
    """What a run goes through, up to `last`. Raises ValueError if that is not among it."""
    stages = [stage for stage in stage_order(cfg) if not (cfg.start and stage in ("traces", "calibrate"))]
    if last not in stages:
        raise ValueError(f"--last {last}: this run's stages are {', '.join(stages)}")
    return stages[: stages.index(last) + 1]


def _cut(found: list[tuple[Run, RunConfig]], last: str) -> list[Task]:
    """Chains of stage directories -> tasks, parents before children; fills in `Run.tasks`."""
    chains = {run.id: [(stage, stage_dir(cfg, stage).name) for stage in stages_of(cfg, last)] for run, cfg in found}
    users: dict[str, list[str]] = {}
    for ident, chain in chains.items():
        for _, name in chain:
            users.setdefault(name, []).append(ident)
    tasks: dict[str, Task] = {}
    for run, cfg in found:
        stretches: list[list[tuple[str, str]]] = []
        for step in chains[run.id]:
            if stretches and users[stretches[-1][0][1]] == users[step[1]]:
                stretches[-1].append(step)
            else:
                stretches.append([step])
        before = ""
        for stretch in stretches:
            key = stretch[-1][1]
            if key not in tasks:
                tasks[key] = _task(cfg, run, stretch, before, users[key])
            run.tasks.append(key)
            before = key
    return sorted(tasks.values(), key=lambda task: len(task.runs) == 1)


def _task(cfg: RunConfig, run: Run, stretch: list[tuple[str, str]], before: str, users: list[str]) -> Task:
    shapes = [job_shape(cfg, stage) for stage, _ in stretch]
    gpus = cfg.cluster.gpus_per_node
    return Task(
        key=stretch[-1][1],
        stages=list(stretch),
        needs=before,
        overrides=copy.copy(run.overrides),
        runs=list(users),
        nodes=max(shape.nodes for shape in shapes),
        slots=gpus or max(shape.ranks_per_node for shape in shapes),
        gpus=gpus,
        plain=all(shape.nodes == 1 and shape.ranks == 1 for shape in shapes),
    )
