"""A made-up study of styles whose runs share their answers as the closed form says, for the tests of its page."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ee_megatron.config.identity import stage_dir, to_yaml
from ee_megatron.config.schema import PretrainConfig, RunConfig
from ee_megatron.externalise.choice import STYLES, FamilyChoice, read_models
from ee_megatron.externalise.shape import Shape
from ee_megatron.externalise.study import Objective, Record, Study

LAYERS, ANSWERS, BETA = 6, 300, 0.1
MODEL = "no/such/model"
WEIGHTS = {"terse": 0.4, "steps": 0.4, "padded": 0.2}
# Layers that a terse answer's token takes, and how often it is right when held to 1 ... 6 of them; by hops.
SERIAL = {1: 2.1, 2: 3.2, 3: 5.1}
HELD = {
    1: (0.41, 0.99, 0.99, 0.99, 0.99, 0.99), 2: (0.11, 0.67, 0.95, 0.98, 0.98, 0.98),
    3: (0.08, 0.24, 0.49, 0.8, 0.95, 0.98),
}  # fmt: skip
OBJECTIVES = {
    "no exits": Objective(BETA, cost_length=3, fixed_depth=LAYERS),
    "lambda 0": Objective(BETA, cost_length=3),
    **{f"{cost} 1": Objective(BETA, cost, 1.0, 3) for cost in ("mean", "total", "max")},
    "cap 2": Objective(BETA, cost_length=3, fixed_depth=2),
    "length 0.5": Objective(BETA, cost_length=3, lambda_length=0.5),
}


def figures(correct: float, depths: Sequence[float], n: int = ANSWERS) -> dict[str, Any]:
    """Of answers all of whose tokens take these depths (layers)."""
    shares = [depth / LAYERS for depth in depths]
    return {
        "n": n, "correct": correct, "mean_depth": sum(shares) / len(shares), "total_depth": sum(shares),
        "max_depth": max(shares), "square": sum(s * s for s in shares) / len(shares), "length": len(shares),
    }  # fmt: skip


def forced(hops: int, tau: int, held: int = 0) -> dict[str, Any]:
    """The styles given: under own gates, or all tokens held to a depth."""
    deep, easy = (held, held) if held else (SERIAL[hops], 1)
    right = HELD[hops][min(held or LAYERS, LAYERS) - 1]
    steps = (0.95 if held == 1 else 0.98) if held else right
    return {
        "terse": figures(right, [easy, deep, easy]),
        "steps": figures(steps, [easy] * (hops * tau + 2)),
        "padded": figures(right, [easy] * (hops * tau + 1) + [deep, easy]),
    }


def family(hops: int, tau: int, share: Mapping[str, float], exits: int = 0, start: bool = False) -> dict[str, Any]:
    """One family of a model: `exits`: 0 under its gates, else held to that depth."""
    of = forced(hops, tau, exits)
    mean = {key: sum(share[s] * of[s][key] for s in STYLES) for key in of["terse"] if key != "n"}
    found = {
        "hops": hops, "free": {**mean, "n": ANSWERS, "share": {**share, "other": 0.0}}, "forced": of,
        "forced_full": forced(hops, tau, LAYERS),
        "corrupted": {"n": ANSWERS, "correct": 0.02, "followed": 0.95} if hops > 1 else None,
    }  # fmt: skip
    return found | ({"fixed": {str(d): forced(hops, tau, d) for d in range(1, LAYERS + 1)}} if start else {})


def part(models: Mapping[str, Mapping[str, Any]], layers: int = LAYERS) -> dict[str, Any]:
    """results.json's part."""
    return {
        "styles": list(STYLES), "weights": list(WEIGHTS.values()), "num_layers": layers, "answers_per_family": ANSWERS,
        "models": {name: {"exits": "sampled", "families": families} for name, families in models.items()},
    }  # fmt: skip


def boltzmann(hops: int, tau: int, objective: Objective, rng: random.Random) -> dict[str, float]:
    """WEIGHTS exp((right - price) / beta) over its sum, written out anew, with a little noise."""
    odds = {}
    for style, f in forced(hops, tau, objective.fixed_depth).items():
        cost = {"mean": f["mean_depth"], "total": f["total_depth"] / 3, "max": f["max_depth"]}[objective.depth_cost]
        value = f["correct"] - objective.lambda_exit * cost - objective.lambda_length * f["length"] / 3
        odds[style] = WEIGHTS[style] * math.exp(value / BETA + rng.gauss(0, 0.05))
    return {style: value / sum(odds.values()) for style, value in odds.items()}


def record(
    condition: str,
    base: int = 1,
    seed: int = 1,
    tau: int = 1,
    hops: int = 3,
    share: Mapping[str, float] | None = None,
    layers: int = LAYERS,
) -> Record:
    """A run as the closed form has it; lambda 0 has measured teacher and start too. `layers`: of which its depths are
    the same shares as of the usual number."""
    objective = OBJECTIVES[condition]
    if condition == "no exits":
        objective = replace(objective, fixed_depth=layers)
    share = share or boltzmann(hops, tau, objective, random.Random(f"{condition}{base}{seed}{tau}{hops}"))
    name, exits = f"hop{hops}", objective.fixed_depth
    models = {"reinforced": {name: family(hops, tau, share, exits)}}
    if condition == "lambda 0":
        start = family(hops, tau, WEIGHTS, start=True)
        models = {"teacher": {name: family(hops, tau, WEIGHTS, LAYERS)}, "start": {name: start}, **models}
    return Record(
        path=f"b{base}t{tau}l{layers}/evaluate-{condition.replace(' ', '')}{hops}{seed}", base=base, seed=seed, tau=tau,
        families=(name,), objective=objective, shape=Shape(layers, path=MODEL),
        models=read_models(part(models, layers)), weights=WEIGHTS, origin=f"b{base}t{tau}l{layers}",
    )  # fmt: skip


def records(
    bases: Sequence[int] = (1, 2, 3),
    seeds: Sequence[int] = (1, 2),
    taus: Sequence[int] = (1, 4),
    hops: Sequence[int] = (1, 3),
) -> list[Record]:
    return [
        record(condition, base, seed, tau, k)
        for tau in taus for k in hops for condition in OBJECTIVES for base in bases for seed in seeds
    ]  # fmt: skip


def study(**chosen: Sequence[int]) -> Study:
    return Study(records(**chosen))


def with_share(made: Record, **share: float) -> Record:
    """The run, had it shared its answers so; what is not named is terse."""
    (name,) = made.families
    share = {"steps": 0.0, "padded": 0.0, **share}
    share = {"terse": 1 - sum(share.values()), **share, "other": 0.0}
    changed = replace(made.found(name), share=share)
    return replace(made, models={**made.models, "reinforced": {name: changed}})


def answer(style: str, prompt: str, model: str = "reinforced", depth: int = 1) -> dict[str, Any]:
    """An answer as results.json keeps it, in one token a character."""
    texts = {"terse": "T5", "steps": "S375", "padded": "P...5"}
    tokens = [
        {"text": piece, "depth": LAYERS if piece == "5" else depth, "logprob": -0.1, "exit_logprob": -0.2}
        for piece in texts[style] + "\n"
    ]
    return {
        "id": prompt, "prompt": prompt, "reference": "5", "model": model, "exits": "sampled", "correct": True,
        "text": texts[style], "tokens": tokens, "task": "hops.hop3",
    }  # fmt: skip


def config(made: Record) -> RunConfig:
    """The settings of a made-up run."""
    cfg = RunConfig(name="study")
    cfg.model.path = MODEL
    cfg.task.name, cfg.task.tokens_per_step = "hops", made.tau
    cfg.pretrain, cfg.teacher = cfg.pretrain or PretrainConfig(), None
    cfg.pretrain.seed, cfg.rl.seed = made.base, made.seed
    cfg.pretrain.layers = made.num_layers if made.num_layers != LAYERS else 0
    cfg.rl.families, cfg.rl.kl_penalty.sum, cfg.exits.first_token = (
        list(made.families),
        True,
        made.objective.first_exits,
    )
    given, penalty = made.objective, cfg.rl.depth_penalty
    cfg.rl.kl_penalty.weight, cfg.rl.fixed_depth = given.beta, given.fixed_depth
    penalty.cost, penalty.weight = given.depth_cost, given.lambda_exit
    penalty.cost_tokens, penalty.length_weight = given.cost_length, given.lambda_length
    return cfg


def write(root: Path, made: Record, cfg: RunConfig | None = None) -> Path:
    """The run's finished evaluation under `root`; returns its directory."""
    cfg = cfg or config(made)
    stage = root / cfg.name / stage_dir(cfg, "evaluate").name
    stage.mkdir(parents=True)
    (stage / "config.yaml").write_text(to_yaml(cfg))
    models = {name: {f: to_json(found) for f, found in model.items()} for name, model in made.models.items()}
    answers = [answer(style, f"ca_b{i}") for i, style in enumerate(STYLES)]
    meta = {"num_layers": made.num_layers, "exit_depths": [1, 2, 3, 4, 5]}
    results = {"meta": meta, "answers": answers, "choice": part(models, made.num_layers)}
    (stage / "results.json").write_text(json.dumps(results))
    (stage / "DONE").touch()
    return stage


def to_json(found: FamilyChoice) -> dict[str, Any]:
    data = asdict(found)
    return data | {"free": {**data["free"], "share": data.pop("share")}}
