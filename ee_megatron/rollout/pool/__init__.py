"""Rollout pools with one interface: replicas in this process, or as Ray actors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ...config.derive import check_cache
from ...config.schema import RolloutConfig, VllmConfig
from ...families.hf_directory import HFDirectory
from ...policy import PolicySpec
from .interface import ReplicaSettings, RolloutPool
from .local import LocalPool
from .ray_pool import RayPool
from .vllm import check_python


def make_pool(
    rollout: RolloutConfig, model_path: str | Path, spec: PolicySpec | None, dtype: torch.dtype, device: str
) -> RolloutPool:
    """Make the pool that `rollout.backend` names. Raises ValueError for a cache that no answer fits, or without
    vLLM."""
    source = HFDirectory(model_path)
    check_cache(rollout, source.dims, dtype.itemsize)
    source.close()
    if rollout.backend == "vllm":
        vllm = rollout.vllm or VllmConfig()
        vllm = replace(vllm, python=str(Path(vllm.python).absolute()))
        check_python(vllm.python)
        rollout = replace(rollout, vllm=vllm)
    replica = ReplicaSettings(str(Path(model_path).resolve()), spec, dtype, device, rollout)
    return LocalPool.of(replica) if rollout.backend == "local" else RayPool(replica)
