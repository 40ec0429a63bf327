"""Whether the nodes of a job work together: parts of slurm/check.sh, each a step of the job that prints its finding.

python -m tools.gpu_check.nodes node device=cuda 8      # a task per node: what the node has
python -m tools.gpu_check.nodes reduce device=cuda      # every rank: an all-reduce over all nodes
python -m tools.gpu_check.nodes ray                     # one task: objects from Ray's head to every node
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

WAIT_S = 60
SHARED_GIB = 1.0
"""Of /dev/shm: NCCL's and vLLM's ranks of a node talk through it; containers may have 64 MB."""
SLOWEST = 5.0
"""GB/s of an all-reduce between GPUs: less is a management network, not the one that is meant for this."""


def node(device: str, count: str) -> str:
    """What ranks, actors and compilers need of each node."""
    from ee_megatron.config.device import require_compiler, require_gpus

    scratch = Path(os.environ.get("EE_SCRATCH", "/tmp"))
    shared, free = (shutil.disk_usage(path).free / 2**30 for path in ("/dev/shm", scratch))
    with tempfile.TemporaryFile(dir=scratch):
        pass
    if device == "cuda":
        require_gpus(int(count), "device=cuda")
        require_compiler(sys.executable, "device=cuda")
        if shared < SHARED_GIB:
            raise ValueError(
                f"/dev/shm has {shared:.2f} GiB free, ranks that share a node need "
                f"{SHARED_GIB:g}; enlarge it (--shm-size of a container), or mount the host's"
            )
    name = socket.gethostname()
    address = os.popen("slurm/node_address.sh").read().strip()
    return f"{name} is {address}; free: /dev/shm {shared:.1f} GiB, {scratch} {free:.0f} GiB"


def reduce(device: str) -> str:
    """Sums over all ranks, as the data-parallel ones sum gradients. GB/s as NCCL's tests count (bus bandwidth)."""
    from ee_megatron.training.ranks import adopt_rank

    adopt_rank(os.environ)
    import torch
    import torch.distributed as dist

    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=WAIT_S))
    world, seconds = dist.get_world_size(), []
    values = torch.empty(2**28 if cuda else 2**20, device=device)
    for _ in range(5):
        values.fill_(dist.get_rank() + 1)
        dist.barrier()
        begun = time.monotonic()
        dist.all_reduce(values)
        wrong = int((values != world * (world + 1) / 2).sum())
        seconds.append(time.monotonic() - begun)
        if wrong:
            raise ValueError(f"{wrong} of {values.numel()} sums are wrong")
    speed = 2 * (world - 1) / world * values.nbytes / min(seconds) / 1e9
    dist.destroy_process_group()
    if cuda and speed < SLOWEST:
        raise ValueError(
            f"all-reduce over {world} ranks: {speed:.1f} GB/s, expected at least {SLOWEST:g}; NCCL may use a slow "
            "network: EE_INTERFACE and NCCL_IB_HCA in slurm/site.env, NCCL_DEBUG=INFO says which"
        )
    return f"{world} ranks, {values.nbytes / 2**20:.0f} MiB at {speed:.2f} GB/s"


def ray() -> str:
    """An object from the head to an actor's place on every node, as weights go."""
    import numpy as np

    from ee_megatron.rollout.pool.ray_cluster import EXPECTED, prepare_environment, start_ray

    prepare_environment()
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    start_ray(ray, 0, 1.0, 0, WAIT_S)
    expected, alive = int(os.environ[EXPECTED]), [one for one in ray.nodes() if one["Alive"]]
    if len(alive) < expected:
        raise ValueError(f"{len(alive)} of {expected} Ray nodes joined; ray-<node>.log beside this log says why")

    def fetch(data: np.ndarray) -> int:
        return int(data.sum())

    data, begun = np.ones(2**23), time.monotonic()
    sent = ray.put(data)
    places = [NodeAffinitySchedulingStrategy(one["NodeID"], soft=False) for one in alive]
    task = ray.remote(num_cpus=1)(fetch)
    sums = ray.get([task.options(scheduling_strategy=place).remote(sent) for place in places], timeout=WAIT_S)
    assert sums == [data.size] * expected, sums
    return f"{expected} nodes, {data.nbytes / 2**20:.0f} MiB to a process on each in {time.monotonic() - begun:.1f} s"


def main(words: Sequence[str]) -> int:
    parts = {"node": node, "reduce": reduce, "ray": ray}
    try:
        finding = parts[words[0]](*(word.removeprefix("device=") for word in words[1:]))  # type: ignore[operator]
    except Exception as error:
        traceback.print_exc()
        why = " ".join(str(error).split())[:400] or type(error).__name__
        print(f"error: {socket.gethostname()}: {why}", file=sys.stderr)
        return 1
    if os.environ.get("SLURM_PROCID", "0") == "0" or words[0] == "node":
        print(finding, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
