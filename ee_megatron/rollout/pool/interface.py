"""Interface of rollout pools, which generate answers and score them for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...config.schema import RolloutConfig
from ...policy import PolicySpec, WeightSet
from ...tensors import Stream
from ...types import ExitReading, Rollout, Trace
from ..engine.request import GenerationRequest, Progress
from ..engine.scoring import Inspection, Score

# What a pool that holds the teacher reports as its weights.
TEACHER: tuple[int, str] = (0, "teacher")


def identity(weights: WeightSet | None) -> tuple[int, str]:
    """(version, digest) of weights to load; `TEACHER` for None."""
    return TEACHER if weights is None else (weights.version, weights.digest)


class Pending(Protocol):
    """Answers in progress."""

    def result(self, progress: Progress | None = None) -> list[list[Rollout]]:
        """Wait; returns and raises as `RolloutPool.generate`. `progress(done, total)` counts answers."""


class Readings(Protocol):
    """Scoring passes over finished answers with the current weights; results are in the order of `rollouts`."""

    def read(self, reading: str, rollouts: Sequence[Rollout], settings: tuple, progress: Progress | None) -> list:
        """Call the method below of this name, with its arguments between `rollouts` and `progress`."""

    def trace(self, rollouts: Sequence[Rollout], top_k: int, progress: Progress | None = None) -> list[Trace]:
        """Compute full-depth traces of answers."""
        return self.read("trace", rollouts, (top_k,), progress)

    def score(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[Score]:
        """Score answers under the policy and the teacher."""
        return self.read("score", rollouts, (), progress)

    def inspect(
        self, rollouts: Sequence[Rollout], streams: bool = False, progress: Progress | None = None
    ) -> list[Inspection]:
        """Compute hazards and exit costs at every exit reached; with `streams` the hidden states there, too."""
        return self.read("inspect", rollouts, (streams,), progress)

    def read_exits(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[ExitReading]:
        """Compute divergence from the teacher and gate hazards at every outcome that a token reached."""
        return self.read("read_exits", rollouts, (), progress)


class RolloutPool(Readings, Protocol):
    """Interface of the pool in process and the pool of actors. Results are in the order of the request."""

    def store_weights(self, version: int, stream: Stream) -> WeightSet:
        """Store a version of the weights where the replicas can load it, block by block as the tensors arrive: at most
        a few blocks are in memory elsewhere. The digest is that of the tensors that the pool sends on."""

    def load(self, weights: WeightSet | None) -> None:
        """Load these weights (None: the teacher). Raises ValueError if they don't fit the model."""

    def generate(self, request: GenerationRequest, progress: Progress | None = None) -> list[list[Rollout]]:
        """Generate the samples of each prompt, rule by rule; a pure function of weights and request."""

    def begin(self, weights: WeightSet, request: GenerationRequest) -> Pending:
        """`load` and `generate` without waiting: earlier calls run first, with their own weights."""

    def health(self) -> dict:
        """State of the pool: backend, actors, alive, restarts, version, digest."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class ReplicaSettings:
    """Settings to make a replica in any process, within `start_s` seconds. With rollout.backend=vllm it answers with
    vLLM, in the environment of rollout.vllm.python."""

    model_path: str
    spec: PolicySpec | None
    dtype: torch.dtype
    device: str
    rollout: RolloutConfig
    start_s: float = 600.0
