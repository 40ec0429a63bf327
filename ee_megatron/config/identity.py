"""Result directories of stages: one per set of settings that can change the results.

A run with other ranks, actors or deadlines resumes in the same directory; one with another learning rate has its own,
and so has one whose data set has changed: a hash of the data that a stage was made from is recorded in its directory.
The identity uses each setting's original name (`Rules.was`), so that renaming one loses no results.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .aliases import MAY_BE_OFF, REMOVED
from .derive import model_dir, read_dims, resolve_exits
from .fields import MANDATORY, code_file, environment, find
from .schema import KEYS, RunConfig, TaskConfig

# What each stage adds to the settings of the stage before it.
STAGES: dict[str, tuple[str, ...]] = {
    "import-checkpoint": ("model",),
    "pretrain": ("task", "pretrain", "deepspeed"),
    "teacher": ("teacher", "rollout", "adapter"),
    "traces": ("traces", "exits"),
    "calibrate": ("calibrate",),
    "rl": ("rl", "start", "freshness"),
    "evaluate": ("evaluate",),
}

PREFIX = {stage: {"import-checkpoint": "imported"}.get(stage, stage) for stage in STAGES}
"""What the names of a stage's directories begin with: the stage's first name, so that renaming one loses no results."""

# Stages that a run may skip: model.checkpoint decides, or the section of the stage's name.
OPTIONAL = ("import-checkpoint", "pretrain", "teacher")
RECORD = "data.json"
"""In a stage's directory: {"sha256": of the content of task.path and of the task's code}. Stages of older versions
have none."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")

_digests: dict[tuple[object, ...], str] = {}


def stage_dir(cfg: RunConfig, stage: str) -> Path:
    """<runs>/<name>/<stage>-<8 hex digits>, where a stage's results go. Raises ValueError for an unknown stage.

    The digits are those of the settings; where the directory of that name was made from another content of task.path,
    those of settings and content.
    """
    settings, content = identity(cfg, stage), task_content(cfg)
    plain = Path(cfg.runs) / cfg.name / f"{PREFIX[stage]}-{_digits(settings)}"
    if recorded(plain) in ("", content) or not content:
        return plain
    return plain.with_name(f"{PREFIX[stage]}-{_digits(settings | {'data': content})}")


def outdated(cfg: RunConfig, stage: str) -> Path | None:
    """The stage's directory for the data that task.path had before it changed; None if it has not changed."""
    plain = Path(cfg.runs) / cfg.name / f"{PREFIX[stage]}-{_digits(identity(cfg, stage))}"
    return None if stage_dir(cfg, stage) == plain else plain


def _digits(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def identity(cfg: RunConfig, stage: str) -> dict[str, Any]:
    """Settings that the result of `stage` depends on, earlier stages' included, as plain JSON values by section."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r}: expected one of {', '.join(STAGES)}")
    names, every = list(STAGES), _results(cfg)
    sections = {part: every[part] for name in names[: names.index(stage) + 1] for part in STAGES[name]}
    if "exits" in sections and not cfg.exits.depths and (model_dir(cfg) / "config.json").is_file():
        # Default exits follow the stage boundaries: the resulting depths count, not how they were set.
        sections["exits"]["depths"] = list(resolve_exits(cfg, read_dims(cfg)).depths)
    return sections


def stage_order(cfg: RunConfig) -> list[str]:
    """The stages of the whole method under this configuration."""
    wanted = {"import-checkpoint": cfg.model.checkpoint, "pretrain": cfg.pretrain, "teacher": cfg.teacher}
    return [stage for stage in STAGES if (wanted | {"rl": cfg.rl.steps}).get(stage, True)]


def to_yaml(cfg: RunConfig) -> str:
    """The whole configuration as YAML that `load` would accept again."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _results(cfg: RunConfig) -> dict[str, Any]:
    """Every setting that affects results, under its original section and name."""
    sections: dict[str, dict[str, Any]] = {part: {} for parts in STAGES.values() for part in parts}
    off = {key for key in MAY_BE_OFF if find(cfg, key) is None}
    left_out = {k.key for k in KEYS if k.switch and k.key in off}
    for k in KEYS:
        if k.kind is not None:
            if k.switch and (k.key not in off or k.switch.endswith(".enabled")):
                _put(sections, k.switch, k.key not in off)
            continue
        if k.rules.execution or left_out.intersection(k.inside):
            continue
        unset = k.rules.off if k.default == MANDATORY else k.default
        value = find(cfg, k.key)
        if off.intersection(k.inside):
            value = k.rules.off if k.is_switch else k.default
        if not (k.rules.added_later and value == unset):
            path = k.rules.kind in ("path", "code") and value
            _put(sections, k.rules.was or k.key, os.path.normpath(value) if path else value)
    sections["rl"]["credit"] = cfg.rl.credit
    if cfg.rl.kl_penalty.kind == "reward_sum":
        sections["rl"] |= {"kl": "reward", "kl_sum": True}
    for key, gone in REMOVED.items():
        if gone.hashed and key.split(".")[0] not in left_out:
            _put(sections, "freshness.partial" if key == "rollout.partial" else key, gone.default)
    return sections | {"start": os.path.normpath(cfg.init_policy) if cfg.init_policy else ""}


def _put(sections: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    if section in sections and name:
        sections[section][name] = value


def task_content(cfg: RunConfig) -> str:
    """SHA-256 of what the task reads: its data and the files of its code; "" without any."""
    parts = [_data(cfg.task), digest(code_file(cfg.task.reward)), digest(code_file(cfg.task.name))]
    while len(parts) > 1 and not parts[-1]:
        parts.pop()
    return hashlib.sha256(" ".join(parts).encode()).hexdigest() if len(parts) > 1 else parts[0]


def _data(task: TaskConfig) -> str:
    if task.name != "verifiers":
        return digest(task.path)
    code = find_spec(environment(task.path) or "none")
    if code is None or not code.origin:
        return ""
    return digest(str(Path(code.origin).parent) if code.submodule_search_locations else code.origin, (".py",))


def digest(path: str, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """SHA-256 of a data set's files, by name and content; of a single file by its content alone. "" without files.

    Files are read once per process unless their sizes or times change.
    """
    if not path:
        # Path("") is the working directory, which may hold environments and a million files.
        return ""
    root = Path(path)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.suffix in suffixes and f.is_file())
    if not files:
        return ""
    stats = [file.stat() for file in files]
    key = (path, *((str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)))
    if key not in _digests:
        whole = hashlib.sha256()
        for file in files:
            with file.open("rb") as data:
                content = hashlib.file_digest(data, "sha256").hexdigest()
            whole.update(f"{file.relative_to(root) if file != root else ''}\0{content}\n".encode())
        _digests[key] = whole.hexdigest()
    return _digests[key]


def recorded(stage: Path) -> str:
    """Hash of the data that a stage was made from; "" if unknown."""
    file = stage / RECORD
    return str(json.loads(file.read_text())["sha256"]) if file.is_file() else ""
