"""Tiny models that vLLM's CPU attention takes (its heads have 32 elements at least), and engines for them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from ee_megatron.exit_rules import Prescribed
from ee_megatron.families import VLLM
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.rollout.engine.generation import generate
from ee_megatron.rollout.engine.request import GenerationRequest
from ee_megatron.rollout.engine.sampling import SamplingParams
from ee_megatron.rollout.pool.vllm import EngineProcess, packed
from ee_megatron.rollout.vllm.engine import EngineSettings
from ee_megatron.types import Prompt, Rollout
from tests.reference import random_policy
from tests.tiny import exit_rules, tiny_hf

TOKENS, LAYERS, EXITS = 24, 6, (1, 3, 4)
LORA = PolicySpec(LAYERS, EXITS, rank=4, alpha=8.0)
FULL = PolicySpec(LAYERS, EXITS, rank=0, full=True)
FIRST = replace(LORA, first_token=True)
# family, tied embeddings, policy
MODELS = {
    "llama": ("llama", True, LORA),
    "llama_untied": ("llama", False, FIRST),
    "qwen2": ("qwen2", False, LORA),
    "qwen3": ("qwen3", True, FIRST),
}
MODELS |= {family: (family, True, FIRST) for family in VLLM.keys() - MODELS.keys()}
TEXTS = (
    "1 2 3",
    "4 5 6 7 8 9 10 11",
    "2 2",
    "7 8 9 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
    "9",
    # The last position ends a block of 32.
    "3 1 4 1 5 9 2 6 5 3 5 8 9 7 9 32",
)
PROMPTS = [Prompt(f"p{i}", text, "", "t") for i, text in enumerate(TEXTS)]
SAMPLES = 2
REPLAYED = {
    (prompt.id, k): [LAYERS, *([1, 3, 4, 6] * TOKENS)[p + k :]] for p, prompt in enumerate(PROMPTS) for k in range(2)
}
ASKED = exit_rules(REPLAYED)
SAMPLINGS = {
    "greedy": SamplingParams(0.0, TOKENS),
    "whole": SamplingParams(1.0, TOKENS),
    "cut": SamplingParams(1.2, TOKENS, top_k=20, top_p=0.8),
    "penalised": SamplingParams(
        1.1, TOKENS, min_p=0.5, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.3
    ),
}
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip
START_S = 240.0


def make_model(name: str, path: Path) -> Path:
    family, tied, _ = MODELS[name]
    return tiny_hf(family, path, tied=tied, hidden=128)


def policy_of(path: Path, spec: PolicySpec = LORA, seed: int = 0) -> dict[str, Tensor]:
    """A policy that differs from the base and whose gates matter."""
    source = HFDirectory(path)
    drawn = random_policy(source.dims, spec, seed)
    if not spec.full:
        return drawn
    whole = {
        name: value + 0.01 * (seed + 1) for name, value in initial_policy(source.dims, spec, 0, source.tensor).items()
    }
    return whole | {name: value for name, value in drawn.items() if name.startswith("gates.")}


def request(
    rule: str, sampling: str = "whole", prompts: Sequence[Prompt] = PROMPTS, seed: int = 3, spec: PolicySpec = LORA
) -> GenerationRequest:
    exits = ASKED[rule]
    if isinstance(exits, Prescribed) and spec.first_token:
        exits = Prescribed({name: depths[1:] for name, depths in exits.depths.items()})
    return GenerationRequest(prompts, SAMPLES, SAMPLINGS[sampling], exits, seed)


@dataclass
class Own:
    """The embedded engine, which is the reference."""

    path: Path
    spec: PolicySpec = LORA

    def __post_init__(self) -> None:
        self.decoder = Decoder.from_hf(self.path, self.spec, torch.float32, "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(str(self.path))

    def request(self, rule: str, sampling: str = "whole", **more) -> GenerationRequest:
        return request(rule, sampling, spec=self.spec, **more)

    def answers(self, asked: GenerationRequest) -> list[Rollout]:
        return [r for group in generate(self.decoder, self.tokenizer, asked, 0) for r in group]


@dataclass
class Engines:
    """Engines by their settings; one at a time is alive. `cache`: where they keep what they compile."""

    python: str
    cache: Path
    _running: dict[EngineSettings, EngineProcess] = field(default_factory=dict)

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._running.values():
            engine.close()
        self._running.clear()

    def __call__(self, path: Path, policy: dict[str, Tensor] | None, spec: PolicySpec = LORA, **more) -> EngineProcess:
        """With this policy loaded; `more`: settings of the engine, and vLLM's own."""
        known = {one.name for one in fields(EngineSettings)}
        others = {"max_model_len": 256} | {name: more.pop(name) for name in more.keys() - known}
        settings = EngineSettings(str(path), spec, torch.float32, others=tuple(others.items()), **more)
        if settings not in self._running:
            self.__exit__()
            environment = {**ENVIRONMENT, "VLLM_CACHE_ROOT": str(self.cache)}
            self._running[settings] = EngineProcess(self.python, settings, environment, START_S)
        engine = self._running[settings]
        engine.call("load", 1, packed(policy))
        return engine


def answers(engine: EngineProcess, asked: GenerationRequest) -> list[Rollout]:
    return [r for group in engine.call("generate", asked, deadline_s=300) for r in group]


def assert_same(found: Sequence[Rollout], expected: Sequence[Rollout], atol: float = 1e-4) -> None:
    """Tokens and depths equal, log-probabilities within rounding."""
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.tokens.tolist() == right.tokens.tolist(), left.prompt_id
        assert left.exit_depths.tolist() == right.exit_depths.tolist(), left.prompt_id
        for name in ("token_logprobs", "full_logprobs", "exit_logprobs"):
            np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=0, atol=atol, err_msg=name)
        assert (left.text, left.finished) == (right.text, right.finished)


def by_vllm(python: str, home: Path, function: str, *arguments: str) -> Any:
    """What a function of inside.py returns in vLLM's own interpreter."""
    root = Path(__file__).parents[2]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": str(root), **ENVIRONMENT}
    command = [python, str(Path(__file__).with_name("inside.py")), function, *arguments]
    ran = subprocess.run(command, env=environment, check=True, timeout=START_S, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout.splitlines()[-1])
