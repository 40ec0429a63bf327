"""What the report reads: stage directories in, plain records out. A missing or damaged file becomes a remark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..observe.metrics import read_metrics

STAGES = ("pretrain", "teacher", "traces", "calibrate", "rl", "evaluate")
MODELS = ("teacher", "calibrated", "reinforced")
# Stages that log no steps of their own.
WITHOUT_METRICS = ("traces", "evaluate")


@dataclass(frozen=True)
class Run:
    """One run to report: its stages' directories by name, and, among several, what it is called and where its settings
    differ from those of the others."""

    stages: Mapping[str, Path]
    label: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Stage:
    """A stage's configuration text and its curves: metric name -> [(step, value)], gaps where the value is nan.
    `run` says whose it is where there are several."""

    name: str
    directory: Path
    run: str = ""
    config: str = ""
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


@dataclass
class Results:
    """results.json of the evaluation, each part empty if it is missing there."""

    meta: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    depth_by_entropy: dict[str, Any] = field(default_factory=dict)
    exit_histogram: dict[str, dict[int, float]] = field(default_factory=dict)
    paired: dict[str, dict[str, Any]] = field(default_factory=dict)
    depth: dict[str, Any] = field(default_factory=dict)
    by_task: dict[str, Any] = field(default_factory=dict)
    kl_by_exit: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    correlations: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    pareto: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    externalisation: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By run; the one run that there is has the name ""."""
    chosen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Of several runs: each one's last model at the threshold that validation chose, as (run, row)."""

    @property
    def num_layers(self) -> int:
        """From meta; else the greatest depth that occurs."""
        tokens = [t for a in self.answers for t in a.get("tokens", [])]
        depths = [int(t["depth"]) for t in tokens if "depth" in t]
        depths += [depth for counts in self.exit_histogram.values() for depth in counts]
        return int(self.meta.get("num_layers") or max(depths, default=1))

    @property
    def outcomes(self) -> list[int]:
        """Exit depths and L, from meta or from what occurs."""
        depths = [int(d) for d in self.meta.get("exit_depths") or []]
        depths += [depth for counts in self.exit_histogram.values() for depth in counts]
        depths += [int(t["depth"]) for a in self.answers for t in a.get("tokens", []) if "depth" in t]
        return sorted({*depths, self.num_layers})

    @property
    def models(self) -> list[str]:
        """In the order of the method, "calibrated (seed=1)" of several runs with its like; unknown names last."""
        names = [str(r.get("model", "")) for r in (*self.rows, *self.answers)]
        places = {model: place for place, model in enumerate(MODELS)}
        return sorted(dict.fromkeys(names), key=lambda n: places.get(n.split(" (")[0], len(MODELS)))

    def last_chosen(self) -> dict[str, Any] | None:
        """The row of the last model at the threshold that validation chose for it."""
        for model in reversed(self.models):
            rule = f"hazard > {self.meta.get(f'threshold_{model}')}"
            for row in self.rows:
                if row.get("model") == model and row.get("exits") == rule:
                    return row
        return None


@dataclass
class Inputs:
    stages: list[Stage]
    results: Results
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
    inputs = Inputs([], Results(), [])
    for name in dict.fromkeys((*STAGES, *stage_dirs)):
        if name in present:
            inputs.stages.append(_read_stage(name, present[name], inputs.missing))
        elif name != "pretrain":
            # A model from random weights is the exception, which nobody misses.
            inputs.missing.append(f"{name}: not part of this run, or not run yet")
    if "evaluate" in present:
        inputs.results = _read_results(present["evaluate"] / "results.json", inputs.missing)
    return inputs


def _read_stage(name: str, directory: Path, missing: list[str]) -> Stage:
    stage = Stage(name, directory)
    config, metrics = directory / "config.yaml", directory / "metrics.jsonl"
    if config.is_file():
        stage.config = config.read_text(encoding="utf-8", errors="replace")
    else:
        missing.append(f"{name}: config.yaml is missing")
    if metrics.is_file():
        try:
            stage.curves = curves(read_metrics(metrics))
        except ValueError as error:
            missing.append(f"{name}: {str(error).replace(str(directory), '').lstrip('/')}")
    elif name not in WITHOUT_METRICS:
        missing.append(f"{name}: metrics.jsonl is missing")
    return stage


def curves(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Rows of a metrics.jsonl -> metric name -> [(step, value)], what is no number is left out."""
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
    missing += [
        f"evaluate: results.json has no {part}" for part in ("rows", "answers", "exit_histogram") if not data.get(part)
    ]
    histogram = {
        str(label): {int(depth): float(count) for depth, count in counts.items()}
        for label, counts in (data.get("exit_histogram") or {}).items()
    }
    return Results(
        meta=data.get("meta") or {},
        rows=data.get("rows") or [],
        answers=data.get("answers") or [],
        depth_by_entropy=data.get("depth_by_entropy") or {},
        exit_histogram=histogram,
        paired=data.get("paired") or {},
        depth=data.get("depth") or {},
        by_task=data.get("by_task") or {},
        kl_by_exit=data.get("kl_by_exit") or {},
        correlations=data.get("depth_correlations") or {},
        gates=data.get("gates") or {},
        pareto=data.get("pareto") or {},
        externalisation=data.get("externalisation") or {},
        controls={"": data["controls"]} if data.get("controls") else {},
    )


def entropy_points(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Label ("model, exits") -> [(entropy in nats, depth as a fraction of L)] over the kept answers.

    Left out: the first token of an answer, whose depth is no choice, and labels whose depth never varies.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    layers = results.num_layers
    for answer in results.answers:
        label = f"{answer.get('model', '')}, {answer.get('exits', '')}"
        for token in (answer.get("tokens") or [])[1:]:
            entropy, depth = token.get("entropy"), token.get("depth")
            if entropy is not None and depth is not None and math.isfinite(entropy):
                points.setdefault(label, []).append((float(entropy), depth / layers))
    return {label: group for label, group in points.items() if len({y for _, y in group}) > 1}


def stored_bins(results: Results, label: str) -> list[tuple[float, float, float, int]]:
    """The evaluation's own bins (over all its answers) as of `binned`, without a standard error; [] if it has none."""
    entry = results.depth_by_entropy.get(label)
    bins, layers = entry.get("bins") or [] if isinstance(entry, Mapping) else [], results.num_layers
    return [(b["entropy"], b["depth"] / layers, math.nan, int(b["tokens"])) for b in bins]


def binned(points: list[tuple[float, float]], bins: int = 6) -> list[tuple[float, float, float, int]]:
    """Points -> per bin of equal counts (mean x, mean y, standard error of y, n); ties in x stay together."""
    ordered = sorted(points)
    size = max(1, math.ceil(len(ordered) / bins))
    groups: list[list[tuple[float, float]]] = []
    for point in ordered:
        if groups and (len(groups[-1]) < size or groups[-1][-1][0] == point[0]):
            groups[-1].append(point)
        else:
            groups.append([point])
    summary = []
    for group in groups:
        n = len(group)
        mean = sum(y for _, y in group) / n
        spread = math.sqrt(sum((y - mean) ** 2 for _, y in group) / max(1, n - 1))
        summary.append((sum(x for x, _ in group) / n, mean, spread / math.sqrt(n), n))
    return summary
