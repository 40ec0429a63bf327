"""A finished run in figures, from what its stages left: accuracy, depth, reward, parameters, FLOPs, time.

FLOPs are not planned but measured: each RL step's histogram of exits, and the evaluation's, go into the arithmetic of
planning/flops.py, which knows what a layer that is run, one that is skipped, a gate and the readout cost.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.derive import read_dims, resolve_exits
from ..config.schema import RunConfig
from ..families import ModelDims
from ..observe.metrics import read_metrics
from ..planning.flops import decode_cost, phase_flops, prefill_cost, pretrain_flops, rollouts_per_step
from ..planning.layout import Layout, rank_parameters
from ..planning.workload import Workload
from .records import read_spent
from .styles import chosen_styles

EVALUATED = {
    "exits": "exits", "accuracy": "accuracy", "accuracy_low": "low", "accuracy_high": "high", "answers": "n",
    "mean_depth": "mean_depth", "total_depth": "total_depth", "length": "length", "kl": "kl",
}  # fmt: skip
REINFORCED = {
    "reward": "reward", "task_reward": "task_reward", "rollout_accuracy": "accuracy",
    "rollout_mean_depth": "mean_depth", "rollout_total_depth": "total_depth", "rollout_length": "length",
}  # fmt: skip
"""Columns of the table and what they are called in results.json and metrics.jsonl."""
TAIL = 0.25
"""Share of the RL steps, the last ones, that `reward` and its like are means of."""


def measure(cfg: RunConfig, stages: Mapping[str, Path]) -> dict[str, Any]:
    """One row of the table, without what varies and the status. `stages`: the run's finished stages by name."""
    dims = read_dims(cfg)
    layout = one_rank(cfg, dims)
    row: dict[str, Any] = {"seed": cfg.rl.seed}
    if "imported" in stages:
        row |= imported(json.loads((stages["imported"] / "imported.json").read_text()))
    if "pretrain" in stages:
        row |= pretrained(json.loads((stages["pretrain"] / "pretrain.json").read_text()), cfg, dims)
    if "evaluate" in stages:
        results = json.loads((stages["evaluate"] / "results.json").read_text())
        row |= evaluated(results, layout) | chosen_styles(results.get("choice") or {}, cfg.rl)
    if "rl" in stages:
        row |= reinforced(read_metrics(stages["rl"] / "metrics.jsonl"), cfg, layout)
    return row | parameters(dims, layout) | spent(stages)


def alone(cfg: RunConfig, dims: ModelDims) -> RunConfig:
    """The run as a single rank would do it: what it costs, whoever shares the work."""
    single = copy.deepcopy(cfg)
    # Default exits follow the stage boundaries of the real layout.
    single.exits.depths = list(resolve_exits(cfg, dims).depths)
    parallel = single.parallel
    parallel.tensor = parallel.pipeline = parallel.data = parallel.virtual = 1
    parallel.sequence_parallel, parallel.stage_layers = False, []
    return single


def one_rank(cfg: RunConfig, dims: ModelDims) -> Layout:
    return Layout.of(alone(cfg, dims), dims)


def pretrained(figures: Mapping[str, float], cfg: RunConfig, dims: ModelDims) -> dict[str, Any]:
    """Held-out loss, predicted tokens and FLOPs of training from random weights (training/pretrain.py)."""
    flops = pretrain_flops(alone(cfg, dims), dims, figures["length"], round(figures["sequences"]))
    return {
        "loss": figures["loss"],
        "loss_answer": figures["answer_loss"],
        "tokens_pretrain": round(figures["tokens"]),
        "flops_pretrain": flops,
    }


def imported(figures: Mapping[str, int]) -> dict[str, Any]:
    """Updates and tokens behind an imported checkpoint, where it says so (training/imported.py)."""
    names = {"iteration": "iteration", "tokens": "tokens_pretrain"}
    return {column: figures[name] for name, column in names.items() if name in figures}


def evaluated(results: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The last model at its chosen threshold; beside it the same model at full depth and sampled, and the teacher."""
    rows, meta = results["rows"], results["meta"]
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
    histogram = results["exit_histogram"].get(f"{model}, {chosen['exits']}")
    prompt = meta.get("prompt_tokens")
    if histogram and prompt:
        load = workload(layout, {int(d): int(c) for d, c in histogram.items()}, prompt, chosen["length"], chosen["n"])
        answer = decode_cost(layout, load)
        figures["flops_prompt"] = prefill_cost(layout.dims, load.prompt - load.first_token)
        figures["flops_answer"] = answer
        # A first token that can't exit comes with the prompt.
        figures["flops_token"] = answer / load.later if load.later > 0 else None
    return figures


def workload(layout: Layout, counts: Mapping[int, float], prompt: float, length: float, answers: float) -> Workload:
    """Exits as they were counted over all tokens of `answers` answers -> the load of one of them.

    An answer's first token that can't exit is counted at full depth, though it comes from the prompt and is no choice:
    it is taken out. Lengths are means, not whole numbers; products are linear in them, attention nearly.
    """
    outcomes, first_token = layout.spec.layout.outcomes, layout.spec.first_token
    later = {depth: float(counts.get(depth, 0.0)) for depth in outcomes}
    later[outcomes[-1]] = max(0.0, later[outcomes[-1]] - answers * (not first_token))
    total = sum(later.values())
    shares = tuple(later[d] / total if total else float(d == outcomes[-1]) for d in outcomes)
    return Workload(round(prompt), length, outcomes, shares, first_token=first_token)


def reinforced(rows: Sequence[Mapping[str, float]], cfg: RunConfig, layout: Layout) -> dict[str, Any]:
    """Tokens trained on, the reward at the end, FLOPs of all steps by phase."""
    if not rows:
        return {}
    tail = rows[-max(1, round(TAIL * len(rows))) :]
    figures: dict[str, Any] = {"steps": len(rows), "tokens": round(sum(row["tokens"] for row in rows))}
    figures |= {column: sum(row[name] for row in tail) / len(tail) for column, name in REINFORCED.items()}
    if not all("prompt_length" in row for row in rows):
        return figures
    phases, single = dict[str, float](), alone(cfg, layout.dims)
    for row in rows:
        counts = {int(k.split("/")[1]): v * row["tokens"] for k, v in row.items() if k.startswith("exit_share/")}
        load = workload(layout, counts, row["prompt_length"], row["length"], rollouts_per_step(cfg))
        for phase, flops in phase_flops(layout, load, single).items():
            phases[phase] = phases.get(phase, 0.0) + flops
    figures |= {f"flops_{phase}": flops for phase, flops in phases.items()}
    return figures | {"flops_rl": sum(phases.values())}


def parameters(dims: ModelDims, layout: Layout) -> dict[str, int]:
    """Elements by kind. `parameters_embedding`: embedding and, where it is not tied, head; the rest of the base are
    layers and the last norm."""
    count = rank_parameters(layout, 0)
    embedding = dims.vocab * dims.hidden * (1 if dims.tied else 2)
    return {
        "parameters_embedding": embedding,
        "parameters_layers": count.base - embedding,
        "parameters_adapters": count.adapters,
        "parameters_gates": count.gates,
        "parameters_trained": count.trained(layout.spec.full),
    }


def spent(stages: Mapping[str, Path]) -> dict[str, float | None]:
    """Wall-clock and device seconds of RL, and of all stages; None where a stage was made outside a sweep."""
    files = {stage: read_spent(path) for stage, path in stages.items()}
    columns: dict[str, float | None] = {}
    for kind in ("seconds", "device_seconds"):
        for name, chosen in (("rl", ("rl",)), ("all_stages", tuple(files))):
            values = [files[stage].get(kind) for stage in chosen if stage in files]
            known = [value for value in values if value is not None]
            columns[f"{kind}_{name}"] = round(sum(known), 3) if known and len(known) == len(values) else None
    return columns
