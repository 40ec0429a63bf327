"""The rollout pool: training and evaluation ask it for answers, traces and scores, wherever they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...config.schema import RolloutConfig
from ...policy import PolicySpec, WeightSet
from ...tensors import Stream
from ...types import ExitReading, Rollout, Trace
from ..engine.lens import Lens
from ..engine.request import GenerationRequest, Progress
from ..engine.scoring import Inspection, Score

# What a pool that holds the teacher reports as its weights.
TEACHER: tuple[int, str] = (0, "teacher")


def identity(weights: WeightSet | None) -> tuple[int, str]:
    """(version, digest) of what is to be loaded; `TEACHER` for None."""
    return TEACHER if weights is None else (weights.version, weights.digest)


class Pending(Protocol):
    """Answers that are being made."""

    def result(self, progress: Progress | None = None) -> list[list[Rollout]]:
        """Wait for them; what `RolloutPool.generate` returns and raises. `progress(done, total)` counts answers."""


class Readings(Protocol):
    """Finished answers read again under the weights held; results are in the order of `rollouts`."""

    def read(self, reading: str, rollouts: Sequence[Rollout], settings: tuple, progress: Progress | None) -> list:
        """The method below of this name, with what it takes between `rollouts` and `progress`."""

    def trace(self, rollouts: Sequence[Rollout], top_k: int, progress: Progress | None = None) -> list[Trace]:
        """Full-depth traces of answers."""
        return self.read("trace", rollouts, (top_k,), progress)

    def score(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[Score]:
        """Answers read again, under the teacher, too."""
        return self.read("score", rollouts, (), progress)

    def inspect(
        self, rollouts: Sequence[Rollout], streams: bool = False, progress: Progress | None = None
    ) -> list[Inspection]:
        """Hazards and costs of exiting at every exit reached; with `streams` the hidden states at every exit."""
        return self.read("inspect", rollouts, (streams,), progress)

    def read_exits(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[ExitReading]:
        """Divergence from the teacher and gate hazards at every outcome that a token reached."""
        return self.read("read_exits", rollouts, (), progress)

    def lens(self, rollouts: Sequence[Rollout], top_k: int, prompt: int, answer: int) -> list[Lens]:
        """What every exit would write, `top_k` tokens each: at the last `prompt` positions of each prompt and for the
        first `answer` tokens of each answer."""
        return self.read("lens", rollouts, (top_k, prompt, answer), None)


class RolloutPool(Readings, Protocol):
    """One interface for the pool in process and the pool of actors. Results are in the order of the request."""

    def store_weights(self, version: int, stream: Stream) -> WeightSet:
        """Store a version of the weights where the replicas can load it, block by block as the tensors arrive: at most
        a few blocks are anywhere else. The digest is that of the tensors that the pool sends on."""

    def load(self, weights: WeightSet | None) -> None:
        """Hold these weights from now on (None: the teacher). Raises ValueError if they don't fit the model."""

    def generate(self, request: GenerationRequest, progress: Progress | None = None) -> list[list[Rollout]]:
        """The samples of each prompt, rule by rule; a pure function of weights and request."""

    def begin(self, weights: WeightSet, request: GenerationRequest) -> Pending:
        """`load` and `generate` without waiting: earlier calls go first, under their own weights."""

    def health(self) -> dict:
        """backend, actors, alive, restarts, version, digest."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class ReplicaSettings:
    """What it takes to make a replica in any process, within `start_s` seconds. With rollout.backend=vllm the answers
    are vLLM's, in the environment of rollout.vllm.python."""

    model_path: str
    spec: PolicySpec | None
    dtype: torch.dtype
    device: str
    rollout: RolloutConfig
    start_s: float = 600.0
