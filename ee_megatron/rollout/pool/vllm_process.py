"""What runs in vLLM's environment, by `EngineProcess`: python -m ee_megatron.rollout.pool.vllm_process HANDLE"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ...types import Rollout
from ..engine.generation import answer
from ..engine.request import GenerationRequest
from ..vllm import register
from ..vllm.engine import EngineSettings, VllmEngine
from ..vllm.ipc import listen, unpacked
from .transport import hashes


class Served:
    """An engine's methods as the caller has them."""

    def __init__(self, settings: EngineSettings):
        register()
        self.engine, self.version = VllmEngine(settings), 0

    def load(self, version: int, data: bytes | None) -> None:
        self.engine.load(unpacked(data))
        self.version = version

    def held(self) -> dict[str, str]:
        return hashes(self.engine.held())

    def generate(self, request: GenerationRequest) -> list[list[Rollout]]:
        return answer(self.engine, self.engine.tokenizer, request, self.version)


def methods(settings: EngineSettings) -> Mapping[str, Callable[..., Any]]:
    served = Served(settings)
    return {
        "load": served.load, "held": served.held, "generate": served.generate,
        "counter": served.engine.counter,
    }  # fmt: skip


if __name__ == "__main__":
    listen(int(sys.argv[1]), methods)
    # Nothing of vLLM's is worth waiting for when the caller is gone.
    os._exit(0)
