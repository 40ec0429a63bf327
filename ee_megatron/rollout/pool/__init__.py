"""Pools of replicas behind one interface: in this process or as Ray actors."""

from __future__ import annotations

from pathlib import Path

import torch

from ...config.schema import RolloutConfig
from ...policy import PolicySpec
from .interface import ReplicaSettings, RolloutPool
from .local import LocalPool
from .ray_pool import RayPool
from .transport import sync_dtype


def make_pool(
    rollout: RolloutConfig, model_path: str | Path, spec: PolicySpec | None, dtype: torch.dtype, device: str
) -> RolloutPool:
    """The pool that `rollout.backend` names: "local" or "ray". Raises ValueError for another name."""
    if rollout.backend == "local":
        narrow = sync_dtype(rollout)
        return LocalPool(model_path, spec, dtype, device, rollout.rows, rollout.threads, narrow)
    if rollout.backend == "ray":
        path = str(Path(model_path).resolve())
        return RayPool(ReplicaSettings(path, spec, dtype, device, rollout.rows, rollout.threads), rollout)
    raise ValueError(f"rollout.backend {rollout.backend!r} is unknown; expected 'local' or 'ray'")
