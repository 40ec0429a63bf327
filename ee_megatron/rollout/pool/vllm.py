"""A pool of one replica whose answers vLLM makes, in a process of an environment of its own."""

from __future__ import annotations

from typing import Any

from ...config.schema import VllmConfig
from ...policy import WeightSet
from ...types import Rollout
from ..engine.request import GenerationRequest
from ..vllm.engine import EngineSettings
from ..vllm.ipc import EngineProcess, packed
from .interface import ReplicaSettings, identity
from .local import LocalPool

PROCESS = f"{__package__}.vllm_process"


class VllmPool:
    """What a `Replica` asks of a pool. Answers come from vLLM; what is read again (`trace`, `score`, `inspect`,
    `read_exits`, `lens`) from the embedded engine, which is the reference and is made when it is first asked for."""

    def __init__(self, settings: ReplicaSettings):
        self.settings = settings
        r = settings.rollout
        vllm = r.vllm or VllmConfig()
        engine = EngineSettings(
            settings.model_path, settings.spec, settings.dtype, rows=r.max_num_seqs, tensor=r.tensor,
            cache_gib=r.cache_gib, compile=vllm.compile, compact=vllm.exits == "compact",
        )  # fmt: skip
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": str(max(1, r.threads))}
        self._engine = EngineProcess(vllm.python, PROCESS, engine, environment, settings.start_s)
        self._reader: LocalPool | None = None
        self._weights: WeightSet | None = None

    def load(self, weights: WeightSet | None) -> None:
        """As `LocalPool.load`."""
        self._engine.call("load", identity(weights)[0], packed(weights.tensors if weights else None))
        self._weights = weights
        if self._reader is not None:
            self._reader.load(weights)

    def held_hashes(self) -> dict[str, str]:
        """Hash of every policy tensor: gates and a whole base as vLLM holds them, adapters, which are merged, as they
        came."""
        return self._engine.call("held")

    def generate(self, request: GenerationRequest) -> list[list[Rollout]]:
        """As `LocalPool.generate`."""
        return self._engine.call("generate", request)

    def close(self) -> None:
        self._engine.close()

    @property
    def reader(self) -> LocalPool:
        """The embedded engine, under the weights held."""
        if self._reader is None:
            self._reader = LocalPool.of(self.settings)
            self._reader.load(self._weights)
        return self._reader

    def __getattr__(self, reading: str) -> Any:
        if reading not in ("trace", "score", "inspect", "read_exits", "lens"):
            raise AttributeError(reading)
        return getattr(self.reader, reading)
