"""What the report reads: stage directories in, plain records out. A missing or damaged file becomes a remark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .metrics import read_metrics

STAGES = ("pretrain", "teacher", "traces", "calibrate", "rl", "evaluate")
MODELS = ("teacher", "calibrated", "reinforced")
# Stages that log no steps of their own.
WITHOUT_METRICS = ("traces", "evaluate")


@dataclass
class Stage:
    """A stage's configuration text and its curves: metric name -> [(step, value)], gaps where the value is nan."""

    name: str
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
        """In the order of the method; unknown names last."""
        names = [str(r.get("model", "")) for r in (*self.rows, *self.answers)]
        return sorted(dict.fromkeys(names), key=lambda n: MODELS.index(n) if n in MODELS else len(MODELS))


@dataclass
class Inputs:
    stages: list[Stage]
    results: Results
    missing: list[str]


def read_inputs(stage_dirs: Mapping[str, Path]) -> Inputs:
    """Raises ValueError if none of the directories exists."""
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
        else:
            inputs.missing.append(f"{name}: not part of this run, or not run yet")
    if "evaluate" in present:
        inputs.results = _read_results(present["evaluate"] / "results.json", inputs.missing)
    return inputs


def _read_stage(name: str, directory: Path, missing: list[str]) -> Stage:
    stage = Stage(name)
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
        data.get("meta") or {}, data.get("rows") or [], data.get("answers") or [],
        data.get("depth_by_entropy") or {}, histogram, data.get("paired") or {},
    )  # fmt: skip


def entropy_points(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Label ("model, exits") -> [(entropy in nats, depth as a fraction of L)] over the kept answers.

    Left out: the first token of an answer, whose depth is no choice, and labels whose depth never varies.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for answer in results.answers:
        label = f"{answer.get('model', '')}, {answer.get('exits', '')}"
        for token in (answer.get("tokens") or [])[1:]:
            entropy, depth = token.get("entropy"), token.get("depth")
            if entropy is not None and depth is not None and math.isfinite(entropy):
                points.setdefault(label, []).append((float(entropy), depth / results.num_layers))
    return {label: group for label, group in points.items() if len({y for _, y in group}) > 1}


def stored_bins(results: Results, label: str) -> list[tuple[float, float, float, int]]:
    """The evaluation's own bins (over all its answers) as of `binned`, without a standard error; [] if it has none."""
    entry = results.depth_by_entropy.get(label)
    bins = entry.get("bins") or [] if isinstance(entry, Mapping) else []
    return [(b["entropy"], b["depth"] / results.num_layers, math.nan, int(b["tokens"])) for b in bins]


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
