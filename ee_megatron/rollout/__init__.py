"""Rollouts: a plain PyTorch decoder with exact early exit, continuous batching, and pools of replicas."""

from __future__ import annotations

from .engine.decoder import Decoder
from .engine.generation import generate, stream
from .engine.request import Event, GenerationRequest, Request
from .engine.sampling import SamplingParams
from .engine.scheduler import Scheduler
from .engine.scoring import Score
from .pool import make_pool
from .pool.interface import ReplicaSettings, RolloutPool
from .pool.local import LocalPool

__all__ = [
    "Decoder",
    "Event",
    "GenerationRequest",
    "LocalPool",
    "ReplicaSettings",
    "Request",
    "RolloutPool",
    "SamplingParams",
    "Scheduler",
    "Score",
    "generate",
    "make_pool",
    "stream",
]
