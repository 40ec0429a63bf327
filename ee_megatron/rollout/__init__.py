"""Rollouts: a plain PyTorch decoder with exact early exit, continuous batching, and pools of replicas.

Importing the package imports nothing else: plans take a number from here and there, and needn't wait for an engine.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "Decoder": ".engine.decoder",
    "generate": ".engine.generation",
    "stream": ".engine.generation",
    "GenerationRequest": ".engine.request",
    "Request": ".engine.request",
    "SamplingParams": ".engine.sampling",
    "Scheduler": ".engine.scheduler",
    "Score": ".engine.scoring",
    "make_pool": ".pool",
    "ReplicaSettings": ".pool.interface",
    "LocalPool": ".pool.local",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name], __name__), name)
