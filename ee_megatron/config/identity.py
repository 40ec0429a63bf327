"""Where a stage's results live: one directory per set of settings that can change them.

A run with other ranks, actors or deadlines finds the same directory and goes on; one with another learning rate has
its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .schema import RunConfig
from .validate import read_dims, resolve_exits

# What each stage adds to the settings of the stage before it.
STAGES: dict[str, tuple[str, ...]] = {
    "pretrain": ("model", "task", "pretrain", "deepspeed"),
    "teacher": ("teacher", "rollout", "adapter"),
    "traces": ("traces", "exits"),
    "calibrate": ("calibrate",),
    "rl": ("rl", "start", "freshness"),
    "evaluate": ("evaluate",),
}

# Stages that a run may do without: each has a section of its name that says so.
OPTIONAL = ("pretrain", "teacher")

# Of these sections only some fields change results, of the others all but EXECUTION do.
RESULT_FIELDS = {
    "rollout": ("max_new_tokens", "stop", "prompt_template"),
    "deepspeed": ("gradient_clipping", "betas", "eps", "weight_decay"),
}
# Of `rollout` too, from RL on only: how the policy that learns reaches the pool.
FRESHNESS = ("max_staleness", "partial", "sync_dtype")
EXECUTION = {
    "task": ("verifier_workers", "verifier_deadline_s", "verifier_memory_mb"),
    "pretrain": ("checkpoint_every",),
    "calibrate": ("checkpoint_every",),
    "rl": ("checkpoint_every", "dump_rollouts"),
}
# Settings that came later: no part of the identity while they have the default, which changes nothing.
LATER = {"rl.surrogate"}


def stage_dir(cfg: RunConfig, stage: str) -> Path:
    """<runs>/<name>/<stage>-<8 hex digits>; nothing is created. Raises ValueError for an unknown stage."""
    text = json.dumps(identity(cfg, stage), sort_keys=True)
    return Path(cfg.runs) / cfg.name / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def identity(cfg: RunConfig, stage: str) -> dict[str, Any]:
    """The settings that `stage` and the stages before it depend on, as plain JSON values by section."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r}: expected one of {', '.join(STAGES)}")
    names = list(STAGES)
    sections = [section for name in names[: names.index(stage) + 1] for section in STAGES[name]]
    return {section: _section(cfg, section) for section in sections}


def stage_order(cfg: RunConfig) -> list[str]:
    """The stages of the whole method under this configuration."""
    left_out = {name for name in OPTIONAL if not getattr(cfg, name).enabled}
    return [stage for stage in STAGES if stage not in left_out]


def to_yaml(cfg: RunConfig) -> str:
    """The whole configuration as YAML that `load` would accept again."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _section(cfg: RunConfig, name: str) -> Any:
    if name == "start":
        return os.path.normpath(cfg.start) if cfg.start else ""
    if name == "freshness":
        return {field: getattr(cfg.rollout, field) for field in FRESHNESS}
    values = asdict(getattr(cfg, name))
    if name in RESULT_FIELDS:
        return {field: values[field] for field in RESULT_FIELDS[name]}
    for field in EXECUTION.get(name, ()):
        del values[field]
    for field, default in asdict(type(getattr(cfg, name))()).items():
        if f"{name}.{field}" in LATER and values[field] == default:
            del values[field]
    if name == "model":
        values["path"] = os.path.normpath(values["path"])
    if name == "evaluate":
        return _evaluation(values)
    if name in OPTIONAL and not values["enabled"]:
        return {"enabled": False}
    if name == "exits" and not cfg.exits.depths and (Path(cfg.model.path) / "config.json").is_file():
        # Exits by default follow the stage boundaries: what was chosen counts, not how it was asked for.
        values["depths"] = list(resolve_exits(cfg, read_dims(cfg)).depths)
    return values


def _evaluation(values: dict[str, Any]) -> dict[str, Any]:
    """A part that is switched off isn't named, so that results from before there was a switch are found again."""
    kept = {key: value for key, value in values.items() if not key.startswith(("control", "externalisation"))}
    if values["controls"]:
        given = values["control_policy"]
        kept |= {"controls": True, "control_policy": os.path.normpath(given) if given else ""}
    if values["externalisation"]:
        kept |= {key: values[key] for key in ("externalisation", "externalisation_prompts")}
    return kept
