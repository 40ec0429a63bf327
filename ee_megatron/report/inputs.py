"""Reads the report's inputs: stage directories of one run or several, as plain records.

Runs are named by their configuration or by directories. A missing or damaged file becomes a remark. What several runs
share stands once; their other models are named after the settings in which the runs differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from ..config.identity import PREFIX, STAGES, identity, stage_dir, stage_order
from ..config.load import read_saved
from ..config.schema import RunConfig
from ..observe.metrics import read_metrics
from .results import MADE_BY, NOT_BY_MODEL, Results

T = TypeVar("T")
# Stages without steps: an evaluation logs its figures once, for trackers.
WITHOUT_METRICS = ("import-checkpoint", "traces", "evaluate")
Curves = dict[str, list[tuple[int, float]]]
"""Metric -> (step, value) each; a value may be nan, not all of them are."""
LABEL_LENGTH = 40
"""Characters of a run's settings that still fit beside a model's name."""
# What pandas has for a setting that a run lacks.
MISSING = "nan"


@dataclass(frozen=True)
class ReportRun:
    """One run to report: its stages' directories by name and, among several runs, its label and its settings that
    differ from the others'. `coming`: stages that have not finished but will, of a run under way."""

    stages: Mapping[str, Path]
    label: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    config: RunConfig | None = None
    coming: Sequence[str] = ()


@dataclass
class StageData:
    """A stage's configuration text, metrics, clocks, and the rollouts that RL stored (training/samples.py). `run`:
    label of its run if there are several."""

    name: str
    directory: Path
    run: str = ""
    config: str = ""
    curves: Curves = field(default_factory=dict)
    timings: Curves = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Inputs:
    """All inputs of a report. `results`: of all runs together; `by_run`: each run's results, with its label;
    `problems`: answers.jsonl (evaluation/results.py writes it)."""

    stages: list[StageData] = field(default_factory=list)
    results: Results = field(default_factory=Results)
    by_run: list[tuple[str, Results]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outcomes(self) -> list[int]:
        """Exit depths and L; before the evaluation those of the stored rollouts."""
        if self.results.meta:
            return self.results.outcomes
        depths = (t["depth"] for s in self.stages for k in s.samples for r in k["rollouts"] for t in r["tokens"])
        return sorted({*depths}) or self.results.outcomes


# -- which stages belong to a run -------------------------------------------------------------------------------------


def runs_in(named: Sequence[Path]) -> tuple[list[ReportRun], list[Path]]:
    """Find all runs in the directories, and their last stages' directories.

    A directory is a stage's, which stands for the run that made it, or holds such directories: then every run in it
    that was evaluated, or, if none was, every one at its last stage. Raises ValueError or FileNotFoundError.
    """
    ends = list(dict.fromkeys(end for path in named for end in _ends(path)))
    configs = [read_saved(end / "config.yaml") for end in ends]
    stages = [stages_of(cfg, end.parent) | {_stage_of(end): end} for cfg, end in zip(configs, ends, strict=True)]
    if len(stages) == 1:
        return [ReportRun(stages[0], config=configs[0])], ends
    settings = _differing(configs)
    labels = [settings_label(each) for each in settings]
    if len(set(labels)) < len(labels):
        labels = [f"{end.parent.name}/{end.name}" for end in ends]
    elif max(map(len, labels)) > LABEL_LENGTH:
        # The table of settings defines the labels.
        labels = [f"run {i + 1}" for i in range(len(labels))]
    return [ReportRun(*each) for each in zip(stages, labels, settings, configs, strict=True)], ends


def _ends(path: Path) -> list[Path]:
    """The last stage's directories of the runs that `path` names."""
    if path.is_symlink():  # runs/NAME/latest/STAGE
        path = path.resolve()
    if _stage_of(path) and (path / "config.yaml").is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; name a run's directory or one of its stages'")
    for stage in reversed(STAGES):
        if directories := sorted(p.parent for p in path.glob(f"{PREFIX[stage]}-*/config.yaml")):
            return directories
    raise ValueError(
        f"{path}: no stage's directory in it (expected evaluate-… or another stage with its config.yaml); "
        "name a run's directory, runs/<name>, or one of its stages'"
    )


def _stage_of(path: Path) -> str:
    name = path.name.rsplit("-", 1)[0]
    return next((stage for stage, prefix in PREFIX.items() if name == prefix), "")


def stages_of(cfg: RunConfig, directory: Path) -> dict[str, Path]:
    """Existing stage directories of a run, looked up in `directory`: a run's directory may have been moved since."""
    named = {stage: directory / stage_dir(cfg, stage).name for stage in stage_order(cfg)}
    return {stage: path for stage, path in named.items() if path.is_dir()}


def _differing(configs: Sequence[RunConfig]) -> list[dict[str, str]]:
    """Per run the settings that count and in which not all are alike, by their last part where that is unambiguous."""
    frame = pd.json_normalize([identity(cfg, "evaluate") for cfg in configs]).map(_word)
    frame = frame.loc[:, frame.nunique() > 1]
    # A sweep's `seed` sets them all; shown once.
    seeds = [key for key in frame if key.endswith(".seed")]
    if (frame[seeds].nunique(axis=1) <= 1).all():
        frame = frame.drop(columns=seeds[1:])
    lasts = [key.rsplit(".", 1)[-1] for key in frame]
    frame.columns = [key if lasts.count(last) > 1 else last for key, last in zip(frame, lasts, strict=True)]
    return [{key: word for key, word in row.items() if word != MISSING} for row in frame.to_dict("records")]


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(_word, value)) if isinstance(value, list) else str(value)


def settings_label(settings: Mapping[str, str]) -> str:
    """Format settings as "key=value, key=value"."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


# -- what the stages of a run have written ----------------------------------------------------------------------------


def read_inputs(runs: Sequence[ReportRun]) -> Inputs:
    """Read the files of the runs' stages. Raises ValueError if a run has no directory, and for runs of different
    numbers of layers, whose depths can't be compared."""
    read = [(run, _read_run(run)) for run in runs]
    layers = {run.label: inputs.results.num_layers for run, inputs in read if inputs.results.rows}
    if len(set(layers.values())) > 1:
        raise ValueError(
            f"runs of models with different numbers of layers ({layers}): expected one; report them one by one, or "
            "compare sizes with `ee-megatron sweep collect` and `ee-megatron scaling`"
        )
    return _merge(read) if len(runs) > 1 else read[0][1]


def _read_run(run: ReportRun) -> Inputs:
    if not run.coming and not any(path.is_dir() for path in run.stages.values()):
        raise ValueError(
            f"nothing to report: expected at least one stage's directory, found none of "
            f"{', '.join(map(str, run.stages.values())) or '(none was named)'}; run a stage first"
        )
    inputs = Inputs()
    for name in STAGES:
        # What a stage that isn't through lacks isn't missing.
        missing = [] if name in run.coming else inputs.missing
        if name in run.stages and run.stages[name].is_dir():
            inputs.stages.append(_read_stage(name, run.stages[name], missing))
            if name == "evaluate" and name not in run.coming:
                _read_evaluation(inputs, run.stages[name])
        elif name not in ("import-checkpoint", "pretrain") and (run.config is None or name in stage_order(run.config)):
            # A model that is made first is not missed, nor is a stage that was switched off.
            missing.append(f"{name}: not part of this run, or not run yet")
    inputs.by_run = [("", inputs.results)]
    return inputs


def _read_evaluation(inputs: Inputs, folder: Path) -> None:
    missing = inputs.missing
    results = _read("evaluate", folder / "results.json", lambda path: Results.from_json(_json(path)), missing)
    inputs.results = results or Results()
    inputs.problems = _read("evaluate", folder / "answers.jsonl", _problems, missing) or []
    parts = ("rows", "answers", "exit_histogram")
    missing += [f"evaluate: results.json has no {part}" for part in parts if not getattr(inputs.results, part)]


def _read_stage(name: str, directory: Path, missing: list[str]) -> StageData:
    config = _read(name, directory / "config.yaml", lambda path: path.read_text("utf-8", "replace"), missing)
    stage = StageData(name, directory, config=config or "")
    if name not in WITHOUT_METRICS:
        stage.curves = _read(name, directory / "metrics.jsonl", _curves, missing) or {}
        stage.timings = _read(name, directory / "timings.jsonl", _curves, []) or {}
    samples = [_read(name, path, _json, missing) for path in (directory / "samples").glob("step_*.json")]
    stage.samples = sorted((sample for sample in samples if sample), key=lambda sample: sample["step"])
    return stage


def _read(stage: str, path: Path, parse: Callable[[Path], T], missing: list[str]) -> T | None:
    """What a file holds; None, with a remark, if it is missing or damaged."""
    try:
        return parse(path)
    except FileNotFoundError:
        missing.append(f"{stage}: {path.name} is missing")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        missing.append(f"{stage}: {path.name} can't be read ({str(error).replace(f'{path.parent}/', '')})")
    return None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _problems(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["answers"]]


def _curves(path: Path) -> Curves:
    """A metrics.jsonl by metric; values that are not numbers are left out."""
    curves: Curves = {}
    for row in read_metrics(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((row["step"], float(value)))
    return {name: points for name, points in curves.items() if any(math.isfinite(y) for _, y in points)}


# -- several runs as one ----------------------------------------------------------------------------------------------


def _merge(read: Sequence[tuple[ReportRun, Inputs]]) -> Inputs:
    """The first run that has a model, a stage or an answer to a problem is where it comes from."""
    merged, results = Inputs(), Results(meta={"exit_depths": []})
    stages, owners = dict[Path, StageData](), dict[Path, list[ReportRun]]()
    for run, inputs in read:
        for stage in inputs.stages:
            stages.setdefault(stage.directory, stage)
            owners.setdefault(stage.directory, []).append(run)
    for path, stage in stages.items():
        stage.run = "" if len(owners[path]) == len(read) else _common(owners[path])
    merged.stages = sorted(stages.values(), key=lambda stage: list(STAGES).index(stage.name))
    problems: dict[str, dict[str, Any]] = {}
    for run, inputs in read:
        # A model is named after the runs that have the stage that made it.
        made = {stage.name: stages[stage.directory].run for stage in inputs.stages}
        run_results, names = inputs.results, dict[str, str]()
        for model in run_results.models:
            of = next((made[stage] for stage in MADE_BY.get(model, ()) if stage in made), run.label)
            names[model] = f"{model} ({of})" if of else model

        def renamed(label: str, names: Mapping[str, str] = names) -> str:
            model, comma, exits = label.partition(", ")
            return names.get(model, model) + comma + exits

        if run_results.rows:
            exits = {*results.meta["exit_depths"], *run_results.outcomes[:-1]}
            results.meta = {"num_layers": run_results.num_layers, "exit_depths": sorted(exits)}
        for part, values in vars(run_results).items():
            have = getattr(results, part)
            if part in ("rows", "answers"):
                _add_new(have, values, renamed)
            elif part not in NOT_BY_MODEL:
                have |= {renamed(label): value for label, value in values.items() if renamed(label) not in have}
        for line in inputs.problems:
            into = problems.setdefault(line["id"], {**line, "answers": {}})
            into["answers"] = {renamed(label): answer for label, answer in line["answers"].items()} | into["answers"]
        merged.by_run.append((run.label, run_results))
        merged.missing += [f"{run.label}: {line}" for line in inputs.missing]
    merged.results, merged.problems = results.in_order(), list(problems.values())
    return merged


def _add_new(into: list[dict[str, Any]], rows: Sequence[Mapping[str, Any]], renamed: Callable[[str], str]) -> None:
    """Rows and answers of models that `into` doesn't have under the same problem and exits."""

    def which(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row.get("id", row.get("prompt")), row["model"], row.get("exits")

    known = {which(row) for row in into}
    named = [{**row, "model": renamed(row["model"])} for row in rows]
    into += [row for row in named if which(row) not in known]


def _common(runs: Sequence[ReportRun]) -> str:
    """The settings in which these runs are alike, among those that tell all runs apart; their labels, where that is
    too long, or where these aren't settings."""
    alike = {key: value for key, value in runs[0].settings.items() if all(r.settings.get(key) == value for r in runs)}
    words = settings_label(alike)
    return words if len(runs) > 1 and 0 < len(words) <= LABEL_LENGTH else ", ".join(run.label for run in runs)
