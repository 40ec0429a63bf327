"""The exits that are proposed: against every set there is, and read where the model itself has none."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ee_megatron.exit_rules import Off
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.types import Prompt
from tests.tiny import tiny_hf
from tools.choose_exits import best_sets, evaluated, readouts


def test_a_token_takes_the_cheapest_of_the_exits_and_full_depth() -> None:
    # Layers 1 to 3 of 4; a price of .4 makes a layer worth .1.
    divergences = np.array([[0.0, 0.0, 0.0], [1.0, 0.15, 0.1], [1.0, 1.0, 0.2]])
    both = evaluated(divergences, (1, 2), 0.4)
    assert both.depth == pytest.approx((1 + 2 + 4) / 12) and both.kl == pytest.approx(0.15 / 3)
    assert both.cost == pytest.approx((0.1 + 0.35 + 0.4) / 3)
    assert evaluated(divergences, (), 0.4).cost == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"\[4\].*\b3\b"):
        evaluated(divergences, (4,), 0.4)


@pytest.mark.parametrize("seed", range(5))
def test_the_sets_found_are_nearly_the_best_there_are_and_never_worse_with_one_more(seed: int) -> None:
    generator = np.random.default_rng(seed)
    divergences = np.sort(generator.exponential(0.5, (40, 7)), axis=1)[:, ::-1] * generator.random((40, 1))
    found = best_sets(divergences, 9, 1.0)
    assert [len(s.depths) for s in found] == list(range(1, 8))
    for size, got in enumerate(found, 1):
        least = min(evaluated(divergences, s, 1.0).cost for s in combinations(range(1, 8), size))
        assert least <= got.cost <= least * 1.005
        assert got == evaluated(divergences, got.depths, 1.0)
    assert all(b.cost <= a.cost for a, b in pairwise(found))


def test_every_layer_is_read_as_an_exit_there_would_be(tmp_path: Path) -> None:
    model = tiny_hf("llama", tmp_path / "model")
    spec = PolicySpec(6, (2, 4), rank=4)
    pool = LocalPool(model, spec)
    dims = pool.decoder.dims
    tensors = initial_policy(dims, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if name.endswith("lora_B.weight"):
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    prompts = [Prompt(id=f"p{i}", text=f"Question {i}", answer="", task="") for i in range(5)]
    sampling = SamplingParams(0.0, 6)
    got = readouts(model, (spec, tensors), prompts, sampling, torch.float32)
    pool.load(WeightSet(1, tensors))
    answers = [group[0] for group in pool.generate(GenerationRequest(prompts, 1, sampling, Off(), 0))]
    own = np.concatenate([i.divergences for i in pool.inspect(answers)])
    assert got.shape == (len(own), 5)
    np.testing.assert_allclose(got[:, [1, 3]], own, rtol=1e-4, atol=1e-5)
    untrained = readouts(model, (spec, {}), prompts, sampling, torch.float32)
    assert untrained.shape[1] == 5 and not np.allclose(untrained[: len(got)], got[: len(untrained)])
