"""A made-up study whose runs share their answers among the styles as the closed form says, written as finished
evaluations."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ee_megatron.config.identity import stage_dir, to_yaml
from ee_megatron.config.schema import PretrainConfig, RLConfig, RunConfig
from ee_megatron.externalise.study import STYLES

LAYERS, ANSWERS, BETA = 6, 300, 0.1
WEIGHTS = {"terse": 0.4, "steps": 0.4, "padded": 0.2}
# Layers that a terse answer's token takes, and how often it is right when held to 1 ... 6 of them; by hops.
SERIAL = {1: 2.1, 2: 3.2, 3: 5.1}
HELD = {
    1: (0.41, 0.99, 0.99, 0.99, 0.99, 0.99), 2: (0.11, 0.67, 0.95, 0.98, 0.98, 0.98),
    3: (0.08, 0.24, 0.49, 0.8, 0.95, 0.98),
}  # fmt: skip
OBJECTIVES: dict[str, dict[str, Any]] = {
    "no exits": {"fixed_depth": LAYERS}, "lambda 0": {}, "cap 2": {"fixed_depth": 2},
    **{f"{cost} 1": {"depth_cost": cost, "lambda_exit": 1.0} for cost in ("mean", "total", "max")},
    "max 0.5": {"depth_cost": "max", "lambda_exit": 0.5}, "max 2": {"depth_cost": "max", "lambda_exit": 2.0},
    "length 0.5": {"lambda_length": 0.5},
}  # fmt: skip


@dataclass
class Run:
    """A run; `models`: results.json's entries by model and family; `also`: settings of its own, by key."""

    condition: str
    base: int = 1
    seed: int = 1
    tau: int = 1
    layers: int = LAYERS
    trained_on: Sequence[int] = (3,)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rl(self) -> dict[str, Any]:
        chosen = {"depth_cost": "mean", "lambda_exit": 0.0, "lambda_length": 0.0, "fixed_depth": 0}
        chosen |= OBJECTIVES[self.condition]
        return chosen | ({"fixed_depth": self.layers} if self.condition == "no exits" else {})


def run(
    condition: str, base: int = 1, seed: int = 1, tau: int = 1, hops: Sequence[int] = (3,), layers: int = LAYERS,
    **share: float,
) -> Run:  # fmt: skip
    """A run as the closed form has it, or with these shares (what is not named is terse). lambda 0 has measured
    teacher and start too. `layers`: of which its depths are the same shares as of the usual number."""
    made = Run(condition, base, seed, tau, layers, tuple(hops))
    for k in hops:
        rng = random.Random(f"{condition}{base}{seed}{tau}{k}")
        found = {"steps": 0.0, "padded": 0.0, **share} if share else boltzmann(k, tau, made.rl, rng)
        found = {"terse": 1 - sum(found.values()), **found} if share else found
        depth = min(made.rl["fixed_depth"], LAYERS)
        made.models.setdefault("reinforced", {})[f"hop{k}"] = family(k, tau, found, depth)
        if condition == "lambda 0":
            made.models.setdefault("teacher", {})[f"hop{k}"] = family(k, tau, WEIGHTS, LAYERS)
            made.models.setdefault("start", {})[f"hop{k}"] = family(k, tau, WEIGHTS, start=True)
    return made


def figures(correct: float, depths: Sequence[float]) -> dict[str, Any]:
    """Of answers all of whose tokens take these depths (layers)."""
    shares = [depth / LAYERS for depth in depths]
    return {
        "n": ANSWERS, "correct": correct, "mean_depth": sum(shares) / len(shares), "total_depth": sum(shares),
        "max_depth": max(shares), "length": len(shares),
    }  # fmt: skip


def forced(hops: int, tau: int, held: int = 0) -> dict[str, Any]:
    """The styles given: under own gates, or all tokens held to a depth."""
    deep, easy = (held, held) if held else (SERIAL[hops], 1)
    right = HELD[hops][(held or LAYERS) - 1]
    steps = (0.95 if held == 1 else 0.98) if held else right
    return {
        "terse": figures(right, [easy, deep, easy]),
        "steps": figures(steps, [easy] * (hops * tau + 2)),
        "padded": figures(right, [easy] * (hops * tau + 1) + [deep, easy]),
    }


def family(hops: int, tau: int, share: Mapping[str, float], held: int = 0, start: bool = False) -> dict[str, Any]:
    """One family of a model under its gates, or `held` to a depth."""
    of = forced(hops, tau, held)
    mean = {key: sum(share[s] * of[s][key] for s in STYLES) for key in of["terse"] if key != "n"}
    return {
        "hops": hops, "free": {**mean, "n": ANSWERS, "share": {**share, "other": 0.0}}, "forced": of,
        "forced_full": forced(hops, tau, LAYERS),
        "fixed": {str(d): forced(hops, tau, d) for d in range(1, LAYERS + 1)} if start else None,
        "corrupted": {"n": ANSWERS, "correct": 0.02, "followed": 0.95} if hops > 1 else None,
    }  # fmt: skip


def boltzmann(hops: int, tau: int, rl: Mapping[str, Any], rng: random.Random) -> dict[str, float]:
    """WEIGHTS exp((right - price) / beta) over its sum, written out anew, with a little noise."""
    odds = {}
    for style, f in forced(hops, tau, min(rl["fixed_depth"], LAYERS)).items():
        cost = {"mean": f["mean_depth"], "total": f["total_depth"] / 3, "max": f["max_depth"]}[rl["depth_cost"]]
        value = f["correct"] - rl["lambda_exit"] * cost - rl["lambda_length"] * f["length"] / 3
        odds[style] = WEIGHTS[style] * math.exp(value / BETA + rng.gauss(0, 0.05))
    return {style: value / sum(odds.values()) for style, value in odds.items()}


def config(made: Run) -> RunConfig:
    """The settings of a made-up run."""
    cfg = RunConfig(name="study")
    cfg.model.path = "no/such/model"
    cfg.task.name, cfg.task.tokens_per_step = "hops", made.tau
    layers = made.layers if made.layers != LAYERS else 0
    cfg.pretrain, cfg.teacher, cfg.rl.seed = PretrainConfig(seed=made.base, layers=layers), None, made.seed
    cfg.rl.families, cfg.exits.first_token = [f"hop{k}" for k in made.trained_on], True
    cfg.rl.kl_penalty.kind = "reward_sum"
    set_columns(cfg.rl, {"beta": BETA, "cost_length": 3, **made.rl})
    for key, value in made.also.items():
        *path, name = key.split(".")
        setattr(functools.reduce(getattr, path, cfg), name, value)
    return cfg


def set_columns(rl: RLConfig, values: Mapping[str, Any]) -> RLConfig:
    """Settings of RL by the names of the study's columns."""
    penalty = rl.depth_penalty
    places = {
        "beta": (rl.kl_penalty, "weight"), "depth_cost": (penalty, "cost"), "lambda_exit": (penalty, "weight"),
        "cost_length": (penalty, "cost_tokens"), "lambda_length": (penalty, "length_weight"),
    }  # fmt: skip
    for name, value in values.items():
        setattr(*places.get(name, (rl, name)), value)
    return rl


def write(root: Path, *runs: Run) -> Path:
    """The runs' finished evaluations under `root`; returns the last one's directory."""
    for made in runs:
        cfg = config(made)
        stage = root / cfg.name / stage_dir(cfg, "evaluate").name
        stage.mkdir(parents=True)
        (stage / "config.yaml").write_text(to_yaml(cfg))
        models = {name: {"exits": "sampled", "families": families} for name, families in made.models.items()}
        choice = {"styles": list(STYLES), "weights": list(WEIGHTS.values()), "num_layers": made.layers}
        (stage / "results.json").write_text(json.dumps({"choice": choice | {"models": models}}))
        (stage / "DONE").touch()
    return stage
