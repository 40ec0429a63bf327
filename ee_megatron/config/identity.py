"""Where a stage's results live: one directory per set of settings that can change them.

A run with other ranks, actors or deadlines finds the same directory and goes on; one with another learning rate has
its own, and so has one whose data set has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .aliases import REMOVED
from .content import digest, recorded
from .derive import model_dir, read_dims, resolve_exits
from .schema import RunConfig, settings

# What each stage adds to the settings of the stage before it.
STAGES: dict[str, tuple[str, ...]] = {
    "imported": ("model",),
    "pretrain": ("task", "pretrain", "deepspeed"),
    "teacher": ("teacher", "rollout", "adapter"),
    "traces": ("traces", "exits"),
    "calibrate": ("calibrate",),
    "rl": ("rl", "start", "freshness"),
    "evaluate": ("evaluate",),
}

# Stages that a run may do without: model.checkpoint says so, or a section of the stage's name.
OPTIONAL = ("imported", "pretrain", "teacher")


def stage_dir(cfg: RunConfig, stage: str) -> Path:
    """<runs>/<name>/<stage>-<8 hex digits>; nothing is created. Raises ValueError for an unknown stage.

    The digits are those of the settings; where the directory of that name was made from another content of task.path,
    those of settings and content.
    """
    known, content = identity(cfg, stage), digest(cfg.task.path)
    plain = Path(cfg.runs) / cfg.name / f"{stage}-{_digits(known)}"
    if recorded(plain) in ("", content) or not content:
        return plain
    return plain.with_name(f"{stage}-{_digits(known | {'data': content})}")


def outdated(cfg: RunConfig, stage: str) -> Path | None:
    """The directory that the stage would have had if the data at task.path had not changed since; None if it hasn't."""
    plain = Path(cfg.runs) / cfg.name / f"{stage}-{_digits(identity(cfg, stage))}"
    return None if stage_dir(cfg, stage) == plain else plain


def _digits(known: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]


def identity(cfg: RunConfig, stage: str) -> dict[str, Any]:
    """The settings that `stage` and the stages before it depend on, as plain JSON values by section."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r}: expected one of {', '.join(STAGES)}")
    names = list(STAGES)
    sections = [section for name in names[: names.index(stage) + 1] for section in STAGES[name]]
    return {section: _section(cfg, section) for section in sections}


def stage_order(cfg: RunConfig) -> list[str]:
    """The stages of the whole method under this configuration."""
    wanted = {"imported": bool(cfg.model.checkpoint), "pretrain": cfg.pretrain.enabled, "teacher": cfg.teacher.enabled}
    return [stage for stage in STAGES if wanted.get(stage, True)]


def to_yaml(cfg: RunConfig) -> str:
    """The whole configuration as YAML that `load` would accept again."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _section(cfg: RunConfig, name: str) -> Any:
    if name == "start":
        return os.path.normpath(cfg.start) if cfg.start else ""
    # How the policy that learns reaches the pool is set in `rollout` but counts from RL on only.
    values = dict(_results(cfg.rollout, name) if name == "freshness" else _results(getattr(cfg, name)))
    values |= _constants(name)
    if name in OPTIONAL and not values["enabled"]:
        return {"enabled": False}
    if name == "exits" and not cfg.exits.depths and (model_dir(cfg) / "config.json").is_file():
        # Exits by default follow the stage boundaries: what was chosen counts, not how it was asked for.
        values["depths"] = list(resolve_exits(cfg, read_dims(cfg)).depths)
    return values


def _constants(name: str) -> dict[str, Any]:
    """What settings of this section that there are no more contribute, by their names without it."""
    return {
        key.split(".")[1]: gone.default
        for key, gone in REMOVED.items()
        if gone.hashed and name == ("freshness" if key == "rollout.partial" else key.split(".")[0])
    }


def _results(section: Any, part: str = "") -> Iterator[tuple[str, Any]]:
    """What of a section's settings, or of those of its named part, makes a difference to results."""
    defaults = type(section)()
    for name, value, rules in settings(section):
        off = rules.only_with and not getattr(section, rules.only_with)
        unset = rules.added_later and value == getattr(defaults, name)
        if rules.part == part and not (rules.execution or off or unset):
            yield name, os.path.normpath(value) if rules.path and value else value
