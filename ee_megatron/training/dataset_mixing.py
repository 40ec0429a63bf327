"""Which problems a stage answers: the task's own, and some on wider operands than these have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.schema import RunConfig
from ..tasks import Task, task_of
from ..tasks.base import Split
from ..types import Prompt


def training_problems(
    cfg: RunConfig, model_path: Path, task: Task, wide_share: float, limit: int | None = None
) -> list[Prompt]:
    """The first training problems of `task`, the configuration's own, and after them, for the share `wide_share`,
    `wider_problems`; as many as keep the share, at most `limit`."""
    own = task.prompts("train")
    if not wide_share:
        return own[:limit]
    others = wider_problems(cfg, model_path, task, "train")
    bounds = [len(others) / wide_share]
    if wide_share < 1:
        bounds.append(len(own) / (1 - wide_share))
    if limit is not None:
        bounds.append(limit)
    total = int(min(bounds))
    wide = round(wide_share * total)
    return own[: total - wide] + others[:wide]


def wider_problems(cfg: RunConfig, model_path: Path, task: Task, split: Split) -> list[Prompt]:
    """Problems of a split on wide operands, as many as `cfg.task` asks for but for those that `task`, the
    configuration's own, has as well. Both hold out the same pairs."""
    known = {prompt.text for prompt in task.prompts(split)}
    problems = task_of(replace(cfg, task=replace(cfg.task, operands="wide")), model_path).prompts(split)
    return [replace(p, id=f"{p.id}/wide") for p in problems if p.text not in known]


def wide_problems(cfg: RunConfig, model_path: Path, task: Task, split: Split) -> list[Prompt]:
    """What an evaluation answers beside a split's own problems: to choose a threshold `evaluate.wide_problems` of the
    validation split's `wider_problems`, to be measured `evaluate.wide_test` of the evaluation split's."""
    count = cfg.evaluate.wide_problems if split == "validation" else cfg.evaluate.wide_test
    if not count:
        return []
    sized: dict[str, Any] = {split: count}
    return wider_problems(replace(cfg, task=replace(cfg.task, **sized)), model_path, task, split)
