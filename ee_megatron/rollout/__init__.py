"""Rollouts: a plain PyTorch decoder with exact early exit, continuous batching, and pools of replicas."""

from __future__ import annotations

from .decoder import Decoder
from .pool import LocalPool, ReplicaSettings, RolloutPool, make_pool
from .request import Event, Request
from .sampling import ExitPolicy, SamplingParams
from .scheduler import Scheduler, StreamedToken, generate, stream
from .scoring import Score

__all__ = [
    "Decoder",
    "Event",
    "ExitPolicy",
    "LocalPool",
    "ReplicaSettings",
    "Request",
    "RolloutPool",
    "SamplingParams",
    "Scheduler",
    "Score",
    "StreamedToken",
    "generate",
    "make_pool",
    "stream",
]
