"""Several runs as one: what they share stands once, every model under a name that says which run it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .data import Inputs, ReportRun, StageData, read_inputs
from .results import MADE_BY, Results


def merge(runs: Sequence[ReportRun]) -> Inputs:
    """Raises ValueError for runs of different numbers of layers, whose depths are not the same thing."""
    read = [(run, read_inputs(run)) for run in runs]
    layers = {run.label: inputs.results.num_layers for run, inputs in read if inputs.results.rows}
    if len(set(layers.values())) > 1:
        found = ", ".join(f"{label}: {count}" for label, count in layers.items())
        raise ValueError(
            f"runs of models with different numbers of layers ({found}): expected one; "
            "report them one by one, or compare sizes with `ee-megatron sweep collect` and `ee-megatron scaling`"
        )
    results, problems, lens = Results(), dict[str, dict[str, Any]](), dict[str, Any]()
    for run, inputs in read:
        names = {model: _name(model, run, inputs, read) for model in inputs.results.models}
        _add(results, inputs.results, names)
        _add_records(problems, lens, inputs, names)
    by_run = [(run.label, inputs.results) for run, inputs in read]
    missing = [f"{run.label}: {line}" for run, inputs in read for line in inputs.missing]
    return Inputs(_stages(read), results, by_run, missing, list(problems.values()), lens)


def _name(model: str, run: ReportRun, inputs: Inputs, read: Sequence[tuple[ReportRun, Inputs]]) -> str:
    """The model's own name if all runs share it; else with the settings that its sharers have in common."""

    def maker(of: Inputs) -> Path | None:
        return next((d for stage in MADE_BY.get(model, ()) if (d := of.directory(stage))), None)

    mine = maker(inputs)
    having = [(other, found) for other, found in read if model in found.results.models]
    sharers = [other for other, found in having if mine is not None and maker(found) == mine] or [run]
    return model if len(sharers) == len(having) else f"{model} ({_common(sharers)})"


def _common(runs: Sequence[ReportRun]) -> str:
    """The settings in which these runs are alike, among those that tell all runs apart; or their labels, where these
    are no settings."""
    if len(runs) == 1:
        return runs[0].label
    alike = {key: value for key, value in runs[0].settings.items() if all(r.settings.get(key) == value for r in runs)}
    if alike and runs[0].label == _words(runs[0].settings):
        return _words(alike)
    return ", ".join(run.label for run in runs)


def _words(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _add(into: Results, found: Results, names: Mapping[str, str]) -> None:
    """What `into` already has of a shared model stays as it is."""

    def renamed(label: str) -> str:
        return _renamed(label, names)

    into.meta = into.meta or {"num_layers": found.num_layers, "exit_depths": found.meta.get("exit_depths") or []}
    into.meta["exit_depths"] = sorted({*into.meta["exit_depths"], *(found.meta.get("exit_depths") or [])})
    seen = {(row["model"], row.get("exits")) for row in into.rows}
    into.rows += [row for row in _with_model(found.rows, renamed) if (row["model"], row.get("exits")) not in seen]
    known = {_which(answer) for answer in into.answers}
    into.answers += [answer for answer in _with_model(found.answers, renamed) if _which(answer) not in known]
    for part in Results.parts_by_model():
        have = getattr(into, part)
        for label, value in getattr(found, part).items():
            have.setdefault(renamed(str(label)), value)


def _renamed(label: str, names: Mapping[str, str]) -> str:
    model = next((m for m in names if label == m or label.startswith(f"{m}, ")), label)
    return names.get(model, model) + label[len(model) :]


def _add_records(
    problems: dict[str, dict[str, Any]], lens: dict[str, Any], inputs: Inputs, names: Mapping[str, str]
) -> None:
    """Answers by problem, and readouts; a shared model's are those of the first run that has them."""
    for line in inputs.problems:
        into = problems.setdefault(str(line.get("id", line["prompt"])), {**line, "answers": {}})
        for label, answer in line["answers"].items():
            into["answers"].setdefault(_renamed(label, names), answer)
    found = inputs.lens
    if not found or lens.setdefault("exit_depths", found["exit_depths"]) != found["exit_depths"]:
        # Columns of other exits would not line up.
        return
    kept = lens.setdefault("answers", [])
    known = {_which(answer) for answer in kept}
    named = _with_model(found["answers"], lambda model: _renamed(model, names))
    kept += [answer for answer in named if _which(answer) not in known]


def _with_model(rows: Sequence[Mapping[str, Any]], renamed: Callable[[str], str]) -> list[dict[str, Any]]:
    return [{**row, "model": renamed(str(row.get("model", "")))} for row in rows]


def _which(answer: Mapping[str, Any]) -> tuple[Any, ...]:
    return answer.get("id", answer.get("prompt")), answer["model"], answer.get("exits")


def _stages(read: Sequence[tuple[ReportRun, Inputs]]) -> list[StageData]:
    """Each directory once, under the settings that its runs have in common; a stage's directories together."""
    owners: dict[Path, list[ReportRun]] = {}
    stages: dict[Path, StageData] = {}
    for run, inputs in read:
        for stage in inputs.stages:
            owners.setdefault(stage.directory, []).append(run)
            stages.setdefault(stage.directory, stage)
    order = list(dict.fromkeys(stage.name for stage in stages.values()))
    for path, stage in stages.items():
        stage.run = "" if len(owners[path]) == len(read) else _common(owners[path])
    return sorted(stages.values(), key=lambda stage: order.index(stage.name))
