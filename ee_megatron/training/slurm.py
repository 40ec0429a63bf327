"""A stage as a Slurm job: what its batch script has to know, and what its ranks are told by srun."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, MutableMapping, Sequence

from ..config.cluster import JobShape, job_shape, require_ray_tokens, seats
from ..config.derive import actor_share, start_timeout
from ..config.device import asks_for_gpus, gpu_files, hides_all, pick_device
from ..config.identity import stage_dir
from ..config.schema import RunConfig
from ..families.hf_directory import HFDirectory
from ..planning.command import allocation, launch_command
from . import stages
from .ranks import is_rank


def describe_job(cfg: RunConfig, stage: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What slurm/common.sh asks for at the start of a job, once it is sure that the stage's inputs are there and that
    the allocation (SLURM_* in `environment`, if there is one) is large enough.

    Raises ValueError or FileNotFoundError.
    """
    shape = job_shape(cfg, stage)
    check_allocation(shape, environment, " ".join(allocation(cfg, stage)))
    weights = 0
    if not stages.is_done(cfg, stage):
        stages.check_inputs(cfg, stage)
        if shape.rollout_nodes:
            require_ray_tokens()
        if asks_for_gpus(cfg) and shape.rollout_nodes and not shape.gpus_per_node:
            raise ValueError(
                f"device={cfg.device} with cluster.gpus_per_node=0: actors get the GPUs that the settings name; give "
                "cluster.gpus_per_node=<GPUs of a node>, or set device=cpu"
            )
        # This step sees what those of the ranks and of Ray will see of their nodes, which are alike.
        pick_device(cfg, shape.gpus_per_node or shape.ranks_per_node)
        weights = HFDirectory(stages.ready_model(cfg, stage)).size()
    cpu = cfg.device == "cpu" or not shape.gpus_per_node
    devices = range(shape.first_device, shape.gpus_per_node)
    share = actor_share(cfg.rollout)
    # On GPUs an actor takes one core of Ray's accounts besides its share of a device: as many as devices have room for.
    cores = math.ceil(shape.actors_per_node * share) if cpu else seats(len(devices), share)
    found = {
        "nodes": str(shape.nodes),
        "learner_nodes": str(shape.learner_nodes),
        "ranks": str(shape.ranks),
        "ranks_per_node": str(shape.ranks_per_node),
        "rollout_nodes": str(shape.rollout_nodes),
        "ray_cpus": str(cores),
        "ray_gpus": "" if cpu else ",".join(map(str, devices)),
        "start_timeout_s": str(math.ceil(start_timeout(cfg.rollout, weights))),
        "directory": str(stage_dir(cfg, stage).resolve()),
        "requeue_limit": str(cfg.job.requeue_limit),
        "done": "yes" if stages.is_done(cfg, stage) else "no",
    }
    for key, value in found.items():
        if not value.isprintable():
            raise ValueError(
                f"{key}={value!r}: expected printable characters only; the job's script reads it as a line"
            )
    return found


def check_allocation(shape: JobShape, environment: Mapping[str, str], flags: str) -> None:
    """Raises ValueError if the job has fewer nodes, or its nodes fewer GPUs, than `shape` needs."""
    if "SLURM_JOB_NUM_NODES" not in environment:
        return
    nodes, gpus = int(environment["SLURM_JOB_NUM_NODES"]), int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if nodes < shape.nodes or gpus < shape.gpus_per_node:
        raise ValueError(
            f"this job has {nodes} node(s) with {gpus} GPU(s) each, the settings need {shape.nodes} with "
            f"{shape.gpus_per_node}: submit with sbatch {flags}, or change cluster.nodes and cluster.gpus_per_node"
        )


def check_place(cfg: RunConfig, wanted: Sequence[str], overrides: list[str], environment: Mapping[str, str]) -> None:
    """Raises ValueError on a login node if these stages need more nodes or GPUs than this machine has: what would start
    here belongs into jobs."""
    if "SLURM_JOB_ID" in environment or is_rank(environment) or not shutil.which("sbatch"):
        return
    shapes = [job_shape(cfg, stage) for stage in wanted]
    nodes, gpus = max(shape.nodes for shape in shapes), max(shape.gpus_per_node for shape in shapes)
    if gpus and hides_all(environment.get("CUDA_VISIBLE_DEVICES")):
        # Whoever hides this machine's GPUs is told of that instead.
        return
    here = len(gpu_files())
    if nodes > 1 or gpus > here:
        commands = "; ".join(launch_command(cfg, stage, overrides) for stage in wanted)
        raise ValueError(
            f"the settings need {nodes} node(s) with {gpus} GPU(s) each, this machine has {here} and is no Slurm job: "
            f"submit {commands}; to run here, set cluster.nodes=1 cluster.rollout_nodes=0 cluster.gpus_per_node=0"
        )


def adopt_rank(environment: MutableMapping[str, str]) -> None:
    """In an srun step of several tasks each process is a rank already; say so in the variables that torch reads.

    MASTER_ADDR and MASTER_PORT come from the batch script, which knows the first learner node. Raises ValueError
    without them.
    """
    # Unlike SLURM_NTASKS this one is set by srun only, not in the batch script, which is no rank.
    world = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or world < 2:
        return
    if "MASTER_ADDR" not in environment:
        raise ValueError("SLURM_PROCID is set but MASTER_ADDR is not; start ranks through slurm/*.sh, or export it")
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(world)
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(tasks[int(environment["SLURM_NODEID"])])
    environment.setdefault("MASTER_PORT", "29500")


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" -> [2, 2, 2, 1]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected numbers as in 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found
