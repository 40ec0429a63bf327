"""A pool of one replica in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...policy import PolicySpec, WeightSet
from ...tensors import Digest, Hasher, Stream, collect
from ...types import Rollout
from ..engine import generation, scoring
from ..engine.cache import PAGE, pages_in
from ..engine.decoder import Decoder
from ..engine.prompts import load_tokenizer
from ..engine.request import GenerationRequest, Progress
from .interface import Pending, ReplicaSettings, RolloutPool, identity
from .transport import narrowed, sync_dtype


class LocalPool(RolloutPool):
    """A pool of one replica in this process. Sets torch's thread count if `threads` > 0 and the device is a CPU.

    `sync_dtype`: what weights are narrowed to before they are loaded, as for a pool of actors; None: nothing is.
    `cache_gib`: the most that the cache may take; 0: as much as the rows do.
    """

    def __init__(
        self,
        model_path: str | Path,
        spec: PolicySpec | None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        rows: int = 64,
        threads: int = 0,
        sync_dtype: torch.dtype | None = None,
        cache_gib: float = 0.0,
    ):
        if threads > 0 and device == "cpu":
            torch.set_num_threads(threads)
        self.decoder = Decoder.from_hf(model_path, spec, dtype, device)
        self.tokenizer = load_tokenizer(model_path)
        self.rows, self.sync_dtype = rows, sync_dtype
        self.positions = pages_in(cache_gib, self.decoder.dims, dtype.itemsize) * PAGE if cache_gib else None
        self._weights: WeightSet | None = None

    @staticmethod
    def of(replica: ReplicaSettings) -> LocalPool:
        """Make the pool of a replica; weights for an actor arrive already narrowed."""
        rollout = replica.rollout
        narrow = sync_dtype(rollout) if rollout.backend == "local" else None
        rows, threads, gib = rollout.max_num_seqs, rollout.threads, rollout.cache_gib
        return LocalPool(replica.model_path, replica.spec, replica.dtype, replica.device, rows, threads, narrow, gib)

    @property
    def version(self) -> int:
        return identity(self._weights)[0]

    def store_weights(self, version: int, stream: Stream) -> WeightSet:
        """Hold the tensors in this process. They are hashed while they arrive, once."""
        with Hasher(0) as hasher:
            digest = Digest(hasher)
            tensors = collect(digest.passing(stream))
            return WeightSet(version, tensors, digest.hexdigest())

    def load(self, weights: WeightSet | None) -> None:
        """Raises ValueError if the tensors do not fit the policy."""
        if weights is not None:
            weights = narrowed(weights, self.sync_dtype, self.decoder.dtype)
        self.decoder.load_policy(dict(weights.tensors) if weights else None)
        self._weights = weights

    def generate(self, request: GenerationRequest, progress: Progress | None = None) -> list[list[Rollout]]:
        return generation.generate(
            self.decoder, self.tokenizer, request, self.version, progress, self.rows, positions=self.positions
        )

    def begin(self, weights: WeightSet, request: GenerationRequest) -> Pending:
        """Generate at once: no other process could compute meanwhile."""
        self.load(weights)
        return Finished(self.generate(request))

    def read(self, reading: str, rollouts: Sequence[Rollout], settings: tuple, progress: Progress | None) -> list:
        if reading == "trace":
            (top_k,) = settings
            return scoring.trace(self.decoder, rollouts, top_k, progress)
        tensors = dict(self._weights.tensors) if self._weights else None
        return getattr(scoring, reading)(self.decoder, tensors, rollouts, *settings, progress)

    def health(self) -> dict:
        version, name = identity(self._weights)
        return {"backend": "local", "actors": 1, "alive": 1, "restarts": 0, "version": version, "digest": name}

    def close(self) -> None:
        """Nothing to end: the replica is freed with the object."""


@dataclass
class Finished:
    """`Pending` with results already there."""

    answers: list[list[Rollout]]

    def result(self, progress: Progress | None = None) -> list[list[Rollout]]:
        return self.answers
