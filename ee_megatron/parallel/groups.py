"""Start and end the ranks' process groups, and present them to DeepSpeed."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from . import cpu_shims


@dataclass(frozen=True)
class Degrees:
    """Parallel degrees; ranks = tensor * pipeline * data."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.tensor * self.pipeline * self.data


def initialise(degrees: Degrees, *, device: str = "cpu", timeout_s: float = 1800.0, seed: int = 0) -> torch.device:
    """Join the process group that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and split it.

    gloo on a CPU, nccl with gloo beside it on GPUs. Without these variables the process is a world of its own.
    Raises ValueError if the number of ranks is not what `degrees` says. Returns this rank's device.
    """
    cpu_shims.install()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != degrees.world:
        raise ValueError(
            f"{world} ranks were started, but tensor={degrees.tensor} x pipeline={degrees.pipeline} x "
            f"data={degrees.data} needs {degrees.world}"
        )
    if device == "cuda":
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(local)
    else:
        local = torch.device("cpu")
        if int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        deadline = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=deadline)
        else:
            # DeepSpeed insists on this variable, also in a world of one.
            os.environ.setdefault("LOCAL_RANK", "0")
            dist.init_process_group(backend, timeout=deadline, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=degrees.tensor,
        pipeline_model_parallel_size=degrees.pipeline,
        # In whole minutes; rounded down it would contradict the deadline of the group of all ranks.
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed)
    return local


def finish() -> None:
    """Leave the groups; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class MegatronUnits:
    """The `mpu` object of DeepSpeed: which ranks share data parallelism and which share one model replica."""

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)

    @staticmethod
    def get_model_parallel_rank() -> int:
        return dist.get_rank(group=parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return dist.get_world_size(group=parallel_state.get_model_parallel_group())
