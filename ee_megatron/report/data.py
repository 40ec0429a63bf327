"""What the report reads: stage directories in, plain records out. A missing or damaged file becomes a remark."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config.identity import STAGES
from ..observe.metrics import read_metrics
from .results import Results

# Stages without steps: an evaluation logs its figures once, for trackers.
WITHOUT_METRICS = ("traces", "evaluate")
Curve = Sequence[tuple[int, float]]
"""(step, value) each; a value may be nan."""


@dataclass(frozen=True)
class ReportRun:
    """One run to report: its stages' directories by name, and, among several, what it is called and where its settings
    differ from those of the others."""

    stages: Mapping[str, Path]
    label: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass
class StageData:
    """A stage's configuration text, its curves by metric, its clocks' by name. `run` says whose it is where there are
    several."""

    name: str
    directory: Path
    run: str = ""
    config: str = ""
    curves: dict[str, Curve] = field(default_factory=dict)
    timings: dict[str, Curve] = field(default_factory=dict)


@dataclass
class Inputs:
    """What the report is made of. `results` is that of all runs together, `by_run` what each of them found, with its
    label (of the one run that there is: "")."""

    stages: list[StageData]
    results: Results
    by_run: list[tuple[str, Results]]
    missing: list[str]

    def directory(self, stage: str) -> Path | None:
        return next((s.directory for s in self.stages if s.name == stage), None)


def read_inputs(stage_dirs: Mapping[str, Path]) -> Inputs:
    """What the stages of one run have written. Raises ValueError if none of the directories exists."""
    present = {name: Path(path) for name, path in stage_dirs.items() if Path(path).is_dir()}
    if not present:
        looked = ", ".join(f"{name}: {path}" for name, path in stage_dirs.items()) or "no directory was named"
        raise ValueError(
            f"nothing to report: expected at least one stage's directory, found none ({looked}); run a stage first"
        )
    stages: list[StageData] = []
    missing: list[str] = []
    for name in dict.fromkeys((*STAGES, *stage_dirs)):
        if name in present:
            stages.append(_read_stage(name, present[name], missing))
        elif name != "pretrain":
            # A model from random weights is the exception, which nobody misses.
            missing.append(f"{name}: not part of this run, or not run yet")
    results = Results()
    if "evaluate" in present:
        results = _read_results(present["evaluate"] / "results.json", missing)
    return Inputs(stages, results, [("", results)], missing)


def _read_stage(name: str, directory: Path, missing: list[str]) -> StageData:
    stage = StageData(name, directory)
    config, metrics, timings = (directory / name for name in ("config.yaml", "metrics.jsonl", "timings.jsonl"))
    if config.is_file():
        stage.config = config.read_text(encoding="utf-8", errors="replace")
    else:
        missing.append(f"{name}: config.yaml is missing")
    if metrics.is_file() and name not in WITHOUT_METRICS:
        try:
            stage.curves = _curves(read_metrics(metrics))
        except ValueError as error:
            missing.append(f"{name}: {str(error).replace(str(directory), '').lstrip('/')}")
    elif name not in WITHOUT_METRICS:
        missing.append(f"{name}: metrics.jsonl is missing")
    if timings.is_file():
        # A clock's file that is damaged is nobody's loss.
        with contextlib.suppress(ValueError):
            stage.timings = _curves(read_metrics(timings))
    return stage


def _curves(rows: list[dict]) -> dict[str, Curve]:
    """Rows of a metrics.jsonl by metric; what is no number is left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                found.setdefault(name, []).append((row["step"], float(value)))
    return {name: points for name, points in found.items() if any(math.isfinite(y) for _, y in points)}


def _read_results(path: Path, missing: list[str]) -> Results:
    if not path.is_file():
        missing.append("evaluate: results.json is missing")
        return Results()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        missing.append(f"evaluate: results.json is not JSON ({error})")
        return Results()
    if not isinstance(data, dict):
        missing.append(f"evaluate: results.json holds a {type(data).__name__}, expected an object")
        return Results()
    results = Results.from_json(data)
    for part in ("rows", "answers", "exit_histogram"):
        if not getattr(results, part):
            missing.append(f"evaluate: results.json has no {part}")
    return results
