"""A pool of one replica whose answers vLLM makes, in a process of an environment of its own."""

from __future__ import annotations

from collections.abc import Sequence

from ...policy import WeightSet
from ...tensors import digest
from ...types import ExitReading, Rollout, Trace
from ..engine.lens import Lens
from ..engine.request import GenerationRequest, Progress
from ..engine.scoring import Inspection, Score
from ..vllm.engine import EngineSettings
from ..vllm.pipe import EngineProcess, packed
from .interface import ReplicaSettings, identity
from .local import LocalPool

PROCESS = f"{__package__}.vllm_process"


class VllmPool:
    """Answers come from vLLM; what is read again (`trace`, `score`, `inspect`, `read_exits`) from the embedded
    engine, which is the reference and is made when it is first asked for."""

    def __init__(self, settings: ReplicaSettings):
        self.settings = settings
        engine = EngineSettings(
            settings.model_path, settings.spec, settings.dtype, rows=settings.rows, tensor=settings.tensor,
            cache_gib=settings.cache_gib, compile=settings.vllm_compile,
            compact=settings.vllm_compact,
        )  # fmt: skip
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": str(max(1, settings.threads))}
        self._engine = EngineProcess(settings.vllm_python, PROCESS, engine, environment, settings.start_s)
        self._reader: LocalPool | None = None
        self._weights: WeightSet | None = None

    def load(self, weights: WeightSet | None) -> None:
        """As `LocalPool.load`."""
        if weights is not None and digest(weights.tensors) != weights.digest:
            raise ValueError(f"weights version {weights.version}: not the tensors that were sent; send them again")
        self._engine.call("load", identity(weights)[0], packed(weights.tensors if weights else None))
        self._weights = weights
        if self._reader is not None:
            self._reader.load(weights)

    def held_hashes(self) -> dict[str, str]:
        """Hash of every policy tensor: gates and a whole base as vLLM holds them, adapters, which are merged, as they
        came."""
        return self._engine.call("held")

    def generate(
        self,
        request: GenerationRequest,
        progress: Progress | None = None,
    ) -> list[list[Rollout]]:
        return self._engine.call("generate", request)

    @property
    def reader(self) -> LocalPool:
        if self._reader is None:
            self._reader = LocalPool.of(self.settings)
            self._reader.load(self._weights)
        return self._reader

    def trace(self, rollouts: Sequence[Rollout], top_k: int, progress: Progress | None = None) -> list[Trace]:
        return self.reader.trace(rollouts, top_k, progress)

    def score(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[Score]:
        return self.reader.score(rollouts, progress)

    def inspect(
        self, rollouts: Sequence[Rollout], streams: bool = False, progress: Progress | None = None
    ) -> list[Inspection]:
        return self.reader.inspect(rollouts, streams, progress)

    def read_exits(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[ExitReading]:
        return self.reader.read_exits(rollouts, progress)

    def lens(self, rollouts: Sequence[Rollout], top_k: int, prompt: int, answer: int) -> list[Lens]:
        return self.reader.lens(rollouts, top_k, prompt, answer)

    def close(self) -> None:
        self._engine.close()
