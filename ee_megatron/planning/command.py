"""The exact command that starts a planned run."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config.schema import RunConfig
from ..config.validate import ranks


def launch_command(cfg: RunConfig, stage: str, overrides: list[str], scripts: Path = Path("slurm")) -> str:
    """The sbatch line where the cluster section names devices: of the stage's script for this experiment if there is
    one below `scripts`, else a step of plain srun in an allocation of its own. Elsewhere torchrun on this machine, or
    plain Python for one rank."""
    settings = " ".join(shlex.quote(text) for text in overrides)
    world, cluster = ranks(cfg), cfg.cluster
    run = f"ee-megatron {stage} {settings}".rstrip()
    if not cluster.gpus_per_node:
        if world == 1:
            return run
        module = f"-m ee_megatron.cli {stage} {settings}".rstrip()
        return f"torchrun --nnodes=1 --nproc-per-node={world} {module}"
    nodes = -(-world // cluster.gpus_per_node)
    shape = f"--nodes={nodes} --ntasks-per-node={-(-world // nodes)} --gpus-per-node={cluster.gpus_per_node}"
    experiment = next((t.split("=", 1)[1] for t in overrides if t.startswith("experiment=")), "")
    script = scripts / f"{stage}_{experiment.removeprefix('rl_')}.sh"
    if script.is_file():
        rest = " ".join(shlex.quote(text) for text in overrides if not text.startswith("experiment="))
        return f"sbatch {shape} {script.as_posix()} {rest}".rstrip()
    return f"srun {shape} --kill-on-bad-exit=1 {run}"
