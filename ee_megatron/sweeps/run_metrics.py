"""Metrics of a finished run, from its stages' files, and the table of a sweep's runs. Equal files give equal bytes.

FLOPs of RL and of answers are those that the stages counted, from the exits taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.derive import read_dims
from ..config.schema import RunConfig
from ..families import ModelDims
from ..observe.metrics import read_metrics
from ..observe.rundir import write_atomic
from ..planning.flops import pretrain_flops
from ..planning.layout import Layout, rank_parameters
from .sweep import FAILED, FINISHED, Sweep, SweepRun

EVALUATED = {
    "exits": "exits", "accuracy": "accuracy", "accuracy_low": "low", "accuracy_high": "high", "answers": "n",
    "mean_depth": "mean_depth", "total_depth": "total_depth", "length": "length", "kl": "kl",
}  # fmt: skip
REINFORCED = {
    "reward": "reward", "task_reward": "task_reward", "rollout_accuracy": "accuracy",
    "rollout_mean_depth": "mean_depth", "rollout_total_depth": "total_depth", "rollout_length": "length",
}  # fmt: skip
"""Columns of the table and their names in results.json and metrics.jsonl."""
FLOPS = {"flops_rollouts": "flops/rollout", "flops_scoring": "flops/score", "flops_update": "flops/update"}
TAIL = 0.25
"""Share of the RL steps, from the end, over which `reward` and the like are averaged."""


def measure(sweep: Sweep, run: SweepRun, cfg: RunConfig) -> None:
    """Write the metrics of a finished run."""
    sweep.write_result(run, figures_of(cfg, {step.stage: sweep.path(step) for step in run.steps}))


def figures_of(cfg: RunConfig, stages: Mapping[str, Path]) -> dict[str, Any]:
    """One row of the table, without settings and status. `stages`: the run's finished stages by name."""
    dims = read_dims(cfg)
    row: dict[str, Any] = {"seed": cfg.rl.seed}
    if "import-checkpoint" in stages:
        row |= imported(json.loads((stages["import-checkpoint"] / "imported.json").read_text()))
    if "pretrain" in stages:
        row |= pretrained(json.loads((stages["pretrain"] / "pretrain.json").read_text()), cfg, dims)
    if "evaluate" in stages:
        row |= evaluated(json.loads((stages["evaluate"] / "results.json").read_text()))
    if "rl" in stages:
        row |= reinforced(read_metrics(stages["rl"] / "metrics.jsonl"))
    # As a single rank would hold them, with the exits of the real layout.
    return row | parameters(dims, Layout.of(cfg, dims).on_one_rank())


def imported(figures: Mapping[str, int]) -> dict[str, Any]:
    """Updates and tokens of an imported checkpoint's training, if it records them."""
    names = {"iteration": "iteration", "tokens": "tokens_pretrain"}
    return {column: figures[name] for name, column in names.items() if name in figures}


def pretrained(figures: Mapping[str, float], cfg: RunConfig, dims: ModelDims) -> dict[str, Any]:
    """Held-out loss in nats per token, predicted tokens and FLOPs of training from random weights."""
    return {
        "loss": figures["loss"],
        "loss_answer": figures["answer_loss"],
        "tokens_pretrain": round(figures["tokens"]),
        "flops_pretrain": pretrain_flops(cfg, dims, figures["length"], round(figures["sequences"])),
    }


def evaluated(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results of the last model at its chosen threshold, at full depth and sampled, and of the teacher."""
    rows = results["rows"]
    model = rows[-1]["model"]
    by_exits = {row["exits"]: row for row in rows if row["model"] == model}
    chosen = next((row for exits, row in by_exits.items() if exits.startswith("hazard")), rows[-1])
    figures = {"policy": model, **{column: chosen[name] for column, name in EVALUATED.items()}}
    for name, exits in (("full", "full depth"), ("sampled", "sampled")):
        if exits in by_exits:
            figures[f"accuracy_{name}"] = by_exits[exits]["accuracy"]
            figures[f"mean_depth_{name}"] = by_exits[exits]["mean_depth"]
    teacher = next((row for row in rows if row["model"] == "teacher"), None)
    if teacher is not None:
        figures["accuracy_teacher"] = teacher["accuracy"]
        figures["accuracy_lost"] = teacher["accuracy"] - chosen["accuracy"]
    flops = results.get("depth", {}).get(f"{model}, {chosen['exits']}", {}).get("flops")
    return figures | ({"flops_answer": flops["value"]} if flops else {})


def reinforced(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Tokens trained on, the reward at the end, FLOPs of all steps by phase."""
    if not rows:
        return {}
    tail = rows[-max(1, round(TAIL * len(rows))) :]
    figures: dict[str, Any] = {"steps": len(rows), "tokens": round(sum(row["tokens"] for row in rows))}
    figures |= {column: sum(row[name] for row in tail) / len(tail) for column, name in REINFORCED.items()}
    if all(name in row for row in rows for name in FLOPS.values()):
        flops = {column: sum(row[name] for row in rows) for column, name in FLOPS.items()}
        figures |= flops | {"flops_rl": sum(flops.values())}
    return figures


def parameters(dims: ModelDims, layout: Layout) -> dict[str, int]:
    """Number of parameters by kind. `parameters_embedding`: embedding and, where it is not tied, head; the rest of the
    base are layers and the last norm."""
    count = rank_parameters(layout, 0)
    embedding = dims.vocab * dims.hidden * (1 if dims.tied else 2)
    return {
        "parameters_embedding": embedding,
        "parameters_layers": count.base - embedding,
        "parameters_adapters": count.adapters,
        "parameters_gates": count.gates,
        "parameters_trained": count.trained(layout.spec.full),
    }


# ---- the table of a sweep ----


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Rows of the table in the grid's order. A run without a result has only its settings, status and error.

    A setting's column has its full name, so that no metric replaces it: `steps` is not `rl.steps`.
    """
    table = []
    for run in sweep.runs:
        finished, error = sweep.is_done(run), sweep.failure(sweep.tasks[run.task])
        result = (sweep.result(run) or {}) if finished else {}
        # While runs are in progress, the table must not depend on the moment when it is made.
        status = FINISHED if finished else FAILED if error else "unfinished"
        settings = {key: _cell(value) for key, value in run.settings.items()}
        figures = {key: value for key, value in result.items() if key not in settings}
        table.append({"run": run.id, "status": status} | settings | figures | {"error": error})
    return table


def _cell(value: Any) -> Any:
    """A number, or text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, list | dict) else value


def collect(sweep: Sweep, out: Path | None = None) -> Path:
    """Write table.csv into `out`, or the sweep's directory, and return its path. Numbers are written by repr, so that
    they are read back exactly; missing values are empty."""
    table, folder = rows(sweep), out or sweep.directory
    names = [*dict.fromkeys(name for row in table for name in row if name != "error"), "error"]
    folder.mkdir(parents=True, exist_ok=True)
    text = pd.DataFrame(table, columns=names, dtype=object).to_csv(index=False, lineterminator="\n")
    write_atomic(folder / "table.csv", text)
    return folder / "table.csv"
