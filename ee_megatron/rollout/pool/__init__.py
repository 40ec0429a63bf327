"""Pools of replicas behind one interface: in this process or as Ray actors."""

from __future__ import annotations

from pathlib import Path

import torch

from ...policy import PolicySpec
from .interface import ReplicaSettings, RolloutPool
from .local import LocalPool
from .ray_pool import RayPool


def make_pool(
    backend: str,
    model_path: str | Path,
    spec: PolicySpec | None,
    dtype: torch.dtype,
    device: str,
    rows: int = 64,
    threads: int = 2,
    actors: int = 1,
    start_timeout_s: float = 180.0,
    timeout_s: float = 600.0,
    failure_budget: int = 3,
    device_share: float = 1.0,
    sync_dtype: torch.dtype | None = None,
) -> RolloutPool:
    """The pool that `rollout.backend` names: "local" or "ray". Raises ValueError for another name."""
    if backend == "local":
        return LocalPool(model_path, spec, dtype, device, rows, threads, sync_dtype)
    if backend == "ray":
        replica = ReplicaSettings(str(Path(model_path).resolve()), spec, dtype, device, rows, threads)
        return RayPool(replica, actors, start_timeout_s, timeout_s, failure_budget, device_share, sync_dtype)
    raise ValueError(f"rollout.backend {backend!r} is unknown; expected 'local' or 'ray'")
