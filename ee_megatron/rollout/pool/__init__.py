"""Pools of replicas behind one interface: in this process or as Ray actors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ...config.schema import RolloutConfig
from ...policy import PolicySpec
from ..vllm.pipe import check_python
from .interface import ReplicaSettings, RolloutPool
from .local import LocalPool
from .ray_pool import RayPool
from .transport import sync_dtype


def make_pool(
    rollout: RolloutConfig, model_path: str | Path, spec: PolicySpec | None, dtype: torch.dtype, device: str
) -> RolloutPool:
    """The pool that `rollout.backend` names. Raises ValueError for another name, and where there is no vLLM."""
    if rollout.backend == "local":
        narrow = sync_dtype(rollout)
        return LocalPool(model_path, spec, dtype, device, rollout.rows, rollout.threads, narrow)
    replica = ReplicaSettings(str(Path(model_path).resolve()), spec, dtype, device, rollout.rows, rollout.threads)
    if rollout.backend == "ray":
        return RayPool(replica, rollout)
    if rollout.backend == "vllm":
        python = str(Path(rollout.vllm_python).absolute())
        check_python(python)
        replica = replace(replica, vllm_python=python, vllm_compile=rollout.vllm_compile, tensor=rollout.tensor)
        return RayPool(replica, rollout)
    raise ValueError(f"rollout.backend {rollout.backend!r} is unknown; expected 'local', 'ray' or 'vllm'")
