"""The exact commands that start a planned run."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..config.cluster import as_options, job_shape, merged, site_options
from ..config.derive import ranks
from ..config.identity import stage_order
from ..config.schema import RunConfig

SCRIPTS = Path(__file__).parents[2] / "slurm"


def launch_commands(cfg: RunConfig, command: str, overrides: list[str]) -> list[str]:
    """`launch_command` of a stage. For the whole method ("run") on a cluster one per stage, to be submitted in turn."""
    stages = stage_order(cfg) if command == "run" and on_cluster(cfg) else [command]
    return [launch_command(cfg, stage, overrides) for stage in stages]


def launch_command(cfg: RunConfig, stage: str, overrides: list[str]) -> str:
    """On a cluster the sbatch line, to be run in the checkout, with the stage's script for this experiment if slurm/
    has one, else the script for any stage. Elsewhere torchrun on this machine, or plain Python for one rank."""
    settings, world = shlex.join(overrides), ranks(cfg)
    if not on_cluster(cfg):
        torchrun = f"torchrun --nnodes=1 --nproc-per-node={world} -m ee_megatron.cli"
        return f"{'ee-megatron' if world == 1 else torchrun} {stage} {settings}".rstrip()
    flags = shlex.join(allocation(cfg, stage))
    experiment = next((t.split("=", 1)[1] for t in overrides if t.startswith("experiment=")), "")
    script = f"{stage}_{experiment.removeprefix('rl_')}.sh"
    if experiment and (SCRIPTS / script).is_file():
        settings = shlex.join(text for text in overrides if not text.startswith("experiment="))
    else:
        script = "eval.sh" if stage == "evaluate" and (SCRIPTS / "eval.sh").is_file() else f"stage.sh {stage}"
    return f"sbatch {flags} slurm/{script} {settings}".rstrip()


def allocation(cfg: RunConfig, stage: str) -> list[str]:
    """sbatch's options for the nodes of a stage's job: on each one task slot, with its share of the cores, per GPU; the
    site's after them. Raises ValueError for a wrong EE_SBATCH."""
    shape = job_shape(cfg, stage)
    gpus = shape.gpus_per_node
    options = {"nodes": str(shape.nodes), "ntasks-per-node": str(gpus or shape.ranks_per_node)}
    return as_options(merged(options, {"gpus-per-node": str(gpus)} if gpus else {}, site_options(os.environ)))


def on_cluster(cfg: RunConfig) -> bool:
    return cfg.job.gpus_per_node > 0 or cfg.job.nodes > 1
