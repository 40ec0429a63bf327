"""A tiny model, its policies and a pool of actors, for the tests that kill these."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ee_megatron.config.schema import RolloutConfig
from ee_megatron.exit_rules import Sample
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
from ee_megatron.rollout import ReplicaSettings, SamplingParams
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
    rollout = RolloutConfig(
        actors=2, max_num_seqs=rows, threads=1, timeout_s=120, failure_budget=budget, device_share=0.5
    )  # fmt: skip
    return RayPool(ReplicaSettings(str(path), spec, torch.float32, "cpu", rollout))


def bits(answers: list[list[Rollout]]) -> list[tuple]:
    """All of every answer, in order, to the last bit."""
    return [
        (r.prompt_id, r.text, r.finished, r.weight_version, r.tokens.tobytes(), r.exit_depths.tobytes(),
         np.asarray(r.token_logprobs).tobytes(), r.exit_logprobs.tobytes())
        for group in answers for r in group
    ]  # fmt: skip


@contextmanager
def killing(pool: RayPool, kills: int, apart: float, seed: int, syncing: bool = False) -> Iterator[list[int]]:
    """While entered, a thread sends SIGKILL to actors of the pool, `kills` times: each time up to `apart` seconds after
    all have started or, with `syncing`, after the next of them has begun to take up weights. Yields the processes that
    it has ended so far."""
    struck: list[int] = []
    over, chance = threading.Event(), random.Random(seed)

    def strike() -> None:
        while len(struck) < kills and not over.wait(0.001):
            places = pool._driver.places
            if any(place.handle is None or place.pid in (0, *struck) for place in places):
                continue
            chosen = [place.pid for place in places if place.held is None or not syncing]
            if chosen and not over.wait(chance.uniform(0, apart)):
                struck.append(chance.choice(chosen))
                os.kill(struck[-1], signal.SIGKILL)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield struck
    finally:
        over.set()
        thread.join()
