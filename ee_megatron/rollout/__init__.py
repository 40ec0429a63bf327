"""Rollouts: a plain PyTorch decoder with exact early exit, continuous batching, and pools of replicas.

Importing the package imports nothing else: plans take a number from here and there, and needn't wait for an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.decoder import Decoder as Decoder
    from .engine.generation import generate as generate
    from .engine.request import Event as Event
    from .engine.request import GenerationRequest as GenerationRequest
    from .engine.request import Request as Request
    from .engine.sampling import SamplingParams as SamplingParams
    from .engine.scheduler import Scheduler as Scheduler
    from .engine.scoring import Score as Score
    from .pool import make_pool as make_pool
    from .pool.interface import ReplicaSettings as ReplicaSettings
    from .pool.interface import RolloutPool as RolloutPool
    from .pool.local import LocalPool as LocalPool
else:
    import importlib

    _NAMES = {
        ".engine.decoder": ("Decoder",),
        ".engine.generation": ("generate",),
        ".engine.request": ("Event", "GenerationRequest", "Request"),
        ".engine.sampling": ("SamplingParams",),
        ".engine.scheduler": ("Scheduler",),
        ".engine.scoring": ("Score",),
        ".pool": ("make_pool",),
        ".pool.interface": ("ReplicaSettings", "RolloutPool"),
        ".pool.local": ("LocalPool",),
    }

    def __getattr__(name: str):
        for module, names in _NAMES.items():
            if name in names:
                return getattr(importlib.import_module(module, __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
