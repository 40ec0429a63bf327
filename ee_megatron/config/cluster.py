"""Assigns nodes and devices of a Slurm job to ranks and actors, and sets the sbatch options of jobs beside nodes.

Learner ranks take the first nodes of a job, rollout actors the last: cluster.rollout_nodes of their own or, where that
is 0, all of them, beside the ranks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from .derive import actor_share, has_actors, ranks
from .schema import RunConfig

LEARNS = ("pretrain", "teacher", "calibrate", "rl")
"""Stages with learner ranks; in the others one process drives the rollout pool."""
WITHOUT_ROLLOUTS = ("import-checkpoint", "pretrain", "calibrate")
MOST_VERIFIERS = 16
"""Each is a Python process to start, and judges an answer in milliseconds."""


@dataclass(frozen=True)
class JobShape:
    """Nodes and devices of a job: `ranks` on the first `learner_nodes` of `nodes`, at most `ranks_per_node` each;
    actors on the last `rollout_nodes` (0: none by Ray), at most `actors_per_node` each, on that node's devices from
    `first_device` on. `gpus_per_node` 0: a cluster without GPUs."""

    nodes: int
    learner_nodes: int
    ranks: int
    ranks_per_node: int
    rollout_nodes: int
    actors_per_node: int
    first_device: int
    gpus_per_node: int

    @property
    def shares_devices(self) -> bool:
        """Whether actors have to share devices with learner ranks."""
        apart = self.learner_nodes + self.rollout_nodes <= self.nodes or self.first_device > 0
        return bool(self.gpus_per_node) and not apart


def job_shape(cfg: RunConfig, stage: str) -> JobShape:
    """Compute the shape of this stage's job. The configuration must be valid (validate.py)."""
    cluster, rollout = cfg.job, cfg.rollout
    own = cluster.rollout_nodes
    needs_actors = has_actors(rollout) and stage not in WITHOUT_ROLLOUTS
    if stage not in LEARNS:
        nodes, world, available = (own or cluster.nodes) if needs_actors else 1, 1, 1
    else:
        world = ranks(cfg)
        nodes, available = cluster.nodes if needs_actors else cluster.nodes - own, cluster.nodes - own
    per_node = -(-world // min(available, world))
    hosts = ((own or cluster.nodes) if stage in LEARNS else nodes) if needs_actors else 0
    actors = -(-rollout.actors // hosts) if hosts else 0
    # On a node with learner ranks, actors get the devices after the ranks' if these are enough.
    behind = per_node if stage in LEARNS and hosts == nodes else 0
    enough = seats(cluster.gpus_per_node - behind, actor_share(rollout)) >= actors
    return JobShape(
        nodes=nodes,
        learner_nodes=-(-world // per_node),
        ranks=world,
        ranks_per_node=per_node,
        rollout_nodes=hosts,
        actors_per_node=actors,
        first_device=behind if enough else 0,
        gpus_per_node=cluster.gpus_per_node,
    )


def verifier_workers(cfg: RunConfig, stage: str, device: str, environment: Mapping[str, str], cores: int) -> int:
    """Number of rank 0's `cores` that no other process on its node needs: at least 1, at most MOST_VERIFIERS. `device`:
    of ranks and actors, "cpu" or "cuda"."""
    busy = 1
    # srun binds a rank to cores of its own; elsewhere all processes of a node share the same cores.
    if cores > int(environment.get("SLURM_CPUS_PER_TASK", "0")):
        shape = job_shape(cfg, stage)
        actors = shape.actors_per_node if shape.rollout_nodes == shape.nodes else 0
        busy = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        busy += actors * (cfg.rollout.threads if device == "cpu" else 1)
    return min(MOST_VERIFIERS, max(1, cores - busy))


def seats(devices: int, share: float) -> int:
    """Number of actors, each with a `share` of a device (or `share` whole ones), that fit on so many devices."""
    if devices <= 0:
        return 0
    # 1 / 0.1 and its like may come out a hair below the whole number.
    return devices * int(1 / share + 1e-9) if share <= 1 else devices // int(share)


def require_ray_tokens() -> None:
    """Raises ValueError if the installed Ray is older than token authentication: it ignores RAY_AUTH_MODE, and anybody
    who reaches such a cluster can run code on it."""
    version = metadata.version("ray")
    if [int(part) for part in re.findall(r"\d+", version)[:2]] < [2, 52]:
        raise ValueError(
            f"ray {version} has no token authentication, so that a cluster of several machines would be open to all; "
            "install ray 2.52 or newer: pip install 'ray>=2.52,<3'"
        )


# ---- sbatch: the job scripts' own options, and a site's instead of them ----

SITE = "EE_SBATCH"
"""Environment variable, set in slurm/site.env: options of every job."""
DEFAULTS = {"cpus-per-task": "8", "mem": "0"}
"""Cores of a task slot, memory of a node (0: all of it), as the #SBATCH lines of slurm/*.sh say."""
# Alternative options for the same resource; sbatch takes one of each.
SAME = (
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("cpus-per-task", "cpus-per-gpu"),
    ("gpus-per-node", "gpus-per-task", "gpus", "gres"),
)
SETTINGS = ("nodes", "ntasks", "ntasks-per-node", "array")


def site_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Parse EE_SBATCH as option -> value, "" for one without. Raises ValueError for a word that is not --option=value,
    an option that follows from the settings, an alternative (SAME) to an option of the scripts' #SBATCH lines."""
    options: dict[str, str] = {}
    text = environment.get(SITE, "")
    try:
        given = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{SITE}: {text!r}: {error}; expected options of sbatch as --option=value") from None
    for word in given:
        key, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ValueError(f"{SITE}: {word!r}: expected options of sbatch as --option=value")
        if key in SETTINGS:
            raise ValueError(f"{SITE}: --{key} follows from the settings (cluster.*); leave it out")
        for group in SAME[:2]:
            if key in group[1:]:
                raise ValueError(f"{SITE}: --{key}: the job scripts set --{group[0]}, beside which sbatch refuses it")
        if key == "gres" and "gpu" in value:
            raise ValueError(
                f"{SITE}: {word}: the job scripts set --gpus-per-node, beside which sbatch refuses it; name the type "
                "there: --gpus-per-node=h100:8"
            )
        options[key] = value
    return options


def merged(*given: Mapping[str, str]) -> dict[str, str]:
    """Merge options; a later one replaces its alternatives (SAME). --gres may ask for something that isn't a GPU."""
    union: dict[str, str] = {}
    for options in given:
        for key, value in options.items():
            for group in SAME:
                if key in group and (key != "gres" or "gpu" in value):
                    union = {k: v for k, v in union.items() if k not in group}
            union[key] = value
    return union


def as_options(options: Mapping[str, str]) -> list[str]:
    """Options as words of a command line."""
    return [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]
