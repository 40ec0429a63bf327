"""What the report reads: stage directories in, plain records out. A missing or damaged file becomes a remark."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.identity import STAGES, stage_order
from ..config.schema import RunConfig
from ..observe.metrics import read_metrics
from .differences import problems_of
from .lens import read_lens
from .results import Results

# Stages without steps: an evaluation logs its figures once, for trackers.
WITHOUT_METRICS = ("imported", "traces", "evaluate")
Curve = Sequence[tuple[int, float]]
"""(step, value) each; a value may be nan."""


@dataclass(frozen=True)
class ReportRun:
    """One run to report: its stages' directories by name, and, among several, what it is called and where its settings
    differ from those of the others. `coming`: stages that have not finished but will, of a run under way."""

    stages: Mapping[str, Path]
    label: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    config: RunConfig | None = None
    coming: Sequence[str] = ()


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
    samples: list[dict[str, Any]] = field(default_factory=list)
    """RL's rollouts that were kept, by step (training/samples.py makes them)."""


@dataclass
class Inputs:
    """What the report is made of. `results` is that of all runs together, `by_run` what each of them found, with its
    label (of the one run that there is: ""). `problems`, `lens`: answers.jsonl and lens.json (evaluation/records.py
    makes them)."""

    stages: list[StageData]
    results: Results
    by_run: list[tuple[str, Results]]
    missing: list[str]
    problems: list[dict[str, Any]] = field(default_factory=list)
    lens: dict[str, Any] = field(default_factory=dict)

    @property
    def outcomes(self) -> list[int]:
        """Exit depths and L; before the evaluation those of the rollouts that were kept."""
        if self.results.rows or self.results.answers:
            return self.results.outcomes
        kept = (t["depth"] for s in self.stages for k in s.samples for r in k["rollouts"] for t in r["tokens"])
        return sorted({*kept}) or self.results.outcomes

    def directory(self, stage: str) -> Path | None:
        return next((s.directory for s in self.stages if s.name == stage), None)


def read_inputs(run: ReportRun) -> Inputs:
    """What the stages of one run have written. Raises ValueError if none of the directories exists."""
    stage_dirs = run.stages
    present = {name: Path(path) for name, path in stage_dirs.items() if Path(path).is_dir()}
    if not present and not run.coming:
        looked = ", ".join(f"{name}: {path}" for name, path in stage_dirs.items()) or "no directory was named"
        raise ValueError(
            f"nothing to report: expected at least one stage's directory, found none ({looked}); run a stage first"
        )
    stages: list[StageData] = []
    missing: list[str] = []
    for name in dict.fromkeys((*STAGES, *stage_dirs)):
        # What a stage that isn't through lacks isn't missing.
        remarks: list[str] = [] if name in run.coming else missing
        if name in present:
            stages.append(_read_stage(name, present[name], remarks))
        elif name not in ("imported", "pretrain") and (run.config is None or name in stage_order(run.config)):
            # A model that is made first is the exception, which nobody misses, nor a stage that was switched off.
            remarks.append(f"{name}: not part of this run, or not run yet")
    inputs = Inputs(stages, Results(), [], missing)
    if "evaluate" in present and "evaluate" not in run.coming:
        folder = present["evaluate"]
        inputs.results = _read_results(folder / "results.json", missing)
        inputs.problems = _read_problems(folder / "answers.jsonl", missing) or problems_of(inputs.results)
        inputs.lens = _read_lens(folder / "lens.json", missing)
    inputs.by_run = [("", inputs.results)]
    return inputs


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
    stage.samples = _read_samples(directory / "samples", name, missing)
    return stage


def _read_samples(directory: Path, name: str, missing: list[str]) -> list[dict[str, Any]]:
    found = []
    for path in directory.glob("step_*.json"):
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            found.append({"step": int(kept["step"]), "rollouts": list(kept["rollouts"])})
        except (ValueError, KeyError, TypeError) as error:
            missing.append(f"{name}: samples/{path.name} can't be read ({error})")
    return sorted(found, key=lambda kept: int(kept["step"]))


def _read_problems(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Evaluations before there was such a file have none."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["answers"] is not None and line["prompt"] is not None]
    except (ValueError, KeyError, TypeError) as error:
        missing.append(f"evaluate: answers.jsonl can't be read ({error})")
        return []


def _read_lens(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_lens(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        missing.append(f"evaluate: lens.json can't be read ({error})")
        return {}


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
