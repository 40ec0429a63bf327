"""The lines that a dry run adds to its settings."""

from __future__ import annotations

from pathlib import Path

from ..config.derive import read_dims
from ..config.schema import RunConfig
from .command import launch_commands


def dry_run_lines(cfg: RunConfig, stage: str, overrides: list[str]) -> list[str]:
    """The commands; before them, where the model directory is there, parameters, memory and time by arithmetic. Raises
    ValueError as `plan.make_plan` does."""
    commands = [f"command: {line}" for line in launch_commands(cfg, stage, overrides)]
    if not (Path(cfg.model.path) / "config.json").is_file():
        return commands
    # megatron-core, whose configuration the arithmetic shares, takes seconds to import.
    from .entry import Options, pick_device
    from .plan import Assumptions, make_plan
    from .report import summary

    return [*summary(make_plan(cfg, read_dims(cfg), pick_device(cfg, Options()), Assumptions())), *commands]
