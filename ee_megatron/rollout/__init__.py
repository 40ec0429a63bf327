"""Rollouts: a plain PyTorch decoder with exact early exit, continuous batching, and pools of replicas."""

from __future__ import annotations

from .decoder import Decoder
from .pool import LocalPool, ReplicaSettings, RolloutPool, make_pool
from .sampling import ExitPolicy, SamplingParams
from .scheduler import StreamedToken, generate, stream
from .scoring import Score

__all__ = [
    "Decoder",
    "ExitPolicy",
    "LocalPool",
    "ReplicaSettings",
    "RolloutPool",
    "SamplingParams",
    "Score",
    "StreamedToken",
    "generate",
    "make_pool",
    "stream",
]
