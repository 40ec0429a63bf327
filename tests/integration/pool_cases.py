"""A tiny model, its policies and a pool of actors, for the tests that kill these."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from ee_megatron.config.schema import RolloutConfig
from ee_megatron.exit_rules import Sample
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
from ee_megatron.rollout import ReplicaSettings, SamplingParams
from ee_megatron.rollout.pool.ray_driver import Actor
from ee_megatron.rollout.pool.ray_pool import RayPool
from ee_megatron.types import Prompt, Rollout

ADAPTERS = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0)
FULL = PolicySpec(6, (1, 3, 4), rank=0, full=True)
PROMPTS = [Prompt(id=f"p{i}", text=f"Question: {i} x {i * 7 % 13}\nAnswer:", answer="", task="") for i in range(48)]
LONG, EXITS = SamplingParams(1.0, 120), Sample()


def policy(path: Path, spec: PolicySpec, version: int) -> WeightSet:
    """Random weights of a version, with gates that fire often."""
    source = HFDirectory(path)
    tensors = initial_policy(source.dims, spec, seed=version, base=source.tensor)
    generator = torch.Generator().manual_seed(version)
    tensors = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    return WeightSet(version, {n: t + 3.5 if n.endswith("fc2.bias") else t for n, t in tensors.items()})


def make(path: Path, spec: PolicySpec, budget: int, rows: int = 8) -> RayPool:
    settings = ReplicaSettings(str(path), spec, torch.float32, "cpu", rows=rows, threads=1)
    return RayPool(settings, RolloutConfig(
        actors=2, timeout_s=120, failure_budget=budget, device_share=0.5
    ))  # fmt: skip


def bits(answers: list[list[Rollout]]) -> list[tuple]:
    """All of every answer, in order, to the last bit."""
    return [
        (r.prompt_id, r.text, r.finished, r.weight_version, r.tokens.tobytes(), r.exit_depths.tobytes(),
         np.asarray(r.token_logprobs).tobytes(), r.exit_logprobs.tobytes())
        for group in answers for r in group
    ]  # fmt: skip


class Killer:
    """While entered, a thread sends SIGKILL to actors of the pool, `kills` times.

    Each time up to `apart` seconds after all have started or, with `syncing`, after the next of them has begun to take
    up weights. `struck` are the processes that it ended, `loading` those among them that were just taking up weights.
    """

    def __init__(self, pool: RayPool, kills: int, apart: float, seed: int, syncing: bool = False):
        self.pool, self.kills, self.apart, self.random = pool, kills, apart, random.Random(seed)
        self.syncing = syncing
        self.struck: list[int] = []
        self.loading: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while len(self.struck) < self.kills:
            while not (chosen := self._ready()):
                if self._stop.wait(0.001):
                    return
            victim = self.random.choice(chosen)
            if self._stop.wait(self.random.uniform(0, self.apart)):
                return
            during_sync = victim.loading is not None
            os.kill(victim.pid, signal.SIGKILL)
            self.struck.append(victim.pid)
            self.loading += [victim.pid] if during_sync else []

    def _ready(self) -> list[Actor]:
        actors = list(self.pool._actors)
        if any(actor.pid in (0, *self.struck) for actor in actors):
            return []
        return [actor for actor in actors if actor.loading is not None] if self.syncing else actors

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
