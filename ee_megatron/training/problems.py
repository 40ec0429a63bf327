"""Which training problems a stage answers: the task's own, and some on wider operands than these have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config.schema import RunConfig
from ..tasks import Task, task_of
from ..types import Prompt


def training_problems(
    cfg: RunConfig, model_path: Path, task: Task, wide_share: float, limit: int | None = None
) -> list[Prompt]:
    """The first training problems of `task`, the configuration's own, and after them, for the share `wide_share`,
    problems on wide operands that it does not have; as many as keep the share, at most `limit`. Both hold out the same
    pairs."""
    own = task.prompts("train")
    if not wide_share:
        return own[:limit]
    known = {prompt.text for prompt in own}
    wider = task_of(replace(cfg, task=replace(cfg.task, operands="wide")), model_path).prompts("train")
    others = [replace(p, id=f"{p.id}/wide") for p in wider if p.text not in known]
    bounds = [len(others) / wide_share]
    if wide_share < 1:
        bounds.append(len(own) / (1 - wide_share))
    if limit is not None:
        bounds.append(limit)
    total = int(min(bounds))
    wide = round(wide_share * total)
    return own[: total - wide] + others[:wide]
