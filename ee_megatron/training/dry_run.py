"""What a run would be: settings, ranks, directories, memory and time, and what it would not find on this machine."""

from __future__ import annotations

from ..config.derive import model_dir, ranks, read_dims, resolve_exits, stage_sizes
from ..config.identity import OPTIONAL, STAGES, stage_dir, stage_order
from ..config.schema import RunConfig
from ..planning.command import launch_commands


def remarks(cfg: RunConfig, command: str, overrides: list[str], missing: list[str]) -> list[str]:
    """Line by line; those that start it come last. `command`: a stage, up to which directories are named, or "run";
    `missing`: what it would be refused for here. Without a model directory what depends on the model is left out."""
    parallel, estimates = cfg.parallel, list[str]()
    lines = [f"ranks: {ranks(cfg)} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {parallel.data}"]
    if (model_dir(cfg) / "config.json").is_file():
        dims = read_dims(cfg)
        exits = resolve_exits(cfg, dims)
        sizes = stage_sizes(parallel, exits)
        lines.append(f"exits: {list(exits.depths)} of {dims.num_layers} layers; layers per stage: {list(sizes)}")
        # Late: the arithmetic needs torch, which takes seconds to import.
        from ..planning.plan import dry_run_lines

        estimates = dry_run_lines(cfg, dims)
    else:
        lines.append(f"exits: not checked against the model: no {cfg.model.path}/config.json here")
    recorded = f"recorded ones, from {cfg.rl.replay}; no actors" if command == "rl" and cfg.rl.replay else ""
    lines.append(f"rollouts: {recorded or f'{cfg.rollout.backend}, {cfg.rollout.actors} actor(s)'}")
    last = "evaluate" if command == "run" else command
    left_out = set(OPTIONAL) - {*stage_order(cfg), last}
    stages = [name for name in list(STAGES)[: list(STAGES).index(last) + 1] if name not in left_out]
    lines += [f"{name}: {stage_dir(cfg, name)}" for name in stages]
    lines += estimates
    lines += [f"not ready here: {line}" for line in missing]
    if missing:
        lines.append("started here it would be refused; fine if this is only a plan for another machine")
    return [*lines, *(f"command: {line}" for line in launch_commands(cfg, command, overrides))]
