"""The plan against real learners on gloo ranks: FLOPs of scoring and of a step by torch's counter, memory by the
tensors that exist, on SmolLM2 and two tiny models."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from ranks import Ranks

from ee_megatron.config.schema import RunConfig
from ee_megatron.families import FAMILIES
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.planning.flops import PassMode, pass_cost, whole_pass
from ee_megatron.planning.layout import Layout
from ee_megatron.planning.memory import Training, learner_memory
from ee_megatron.planning.workload import Workload, pack_pass
from ee_megatron.policy import ATTENTION, PolicySpec
from tests.covering import EXTENDED, covering, some
from tests.processes import ROOT
from tests.tiny import tiny_hf

pytestmark = EXTENDED

FLOPS, MEMORY = 0.05, 0.10
LORA = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0)
SPECS = {
    "lora": LORA, "attention": PolicySpec(6, (1, 3, 4), rank=4, targets=ATTENTION),
    "full": PolicySpec(6, (1, 3, 4), rank=0, full=True),
}  # fmt: skip
# (tensor, pipeline, data), layers per stage, options
TINY = {
    "TP2_DP2": ((2, 1, 2), (6,), {}),
    "SP2_DP2": ((2, 1, 2), (6,), {"sequence_parallel": True}),
    "PP2_DP2_recompute": ((1, 2, 2), (3, 3), {"recompute": True}),
    "TP2_PP2_zero2": ((2, 2, 1), (3, 3), {"zero_stage": 2}),
    "DP4_zero0": ((1, 1, 4), (6,), {"zero_stage": 0}),
}
SMOL = {
    "TP3": ((3, 1, 1), (30,), {}),
    "PP3": ((1, 3, 1), (10, 10, 10), {}),
    "DP3_recompute": ((1, 1, 3), (30,), {"recompute": True}),
}
SMOL_SPEC = PolicySpec(30, (10, 15, 20, 25), rank=32, alpha=32.0)
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder, size = tmp_path_factory.mktemp("models"), {"hidden": 128, "vocab": 512}
    return {
        "llama": tiny_hf("llama", folder / "llama", tied=False, heads=4, intermediate=256, **size),
        "qwen3": tiny_hf("qwen3", folder / "qwen3", tied=True, heads=8, intermediate=192, **size),
    }


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    with Ranks(4, tmp_path_factory.mktemp("four")) as running:
        yield running


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    if not (MODEL / "config.json").is_file():
        pytest.skip("the demo model is not here; run `make model` once")
    with Ranks(3, tmp_path_factory.mktemp("three")) as running:
        yield running


def compare(ranks, path, spec, layout, sequences, prompt, answer, depth, tokens, group=1) -> None:
    """Prediction against measurement for every rank and kind; tokens: of a micro-batch."""
    (degrees, sizes, options), cfg = layout, RunConfig()
    cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.data = degrees
    cfg.parallel.tokens_per_micro_batch = tokens
    packed = pack_pass(cfg, Workload.of(prompt, answer, spec.layout.outcomes, depth), sequences, group)
    plan = Layout(HFDirectory(path).dims, spec, *degrees, options.get("sequence_parallel", False), sizes)
    measured = ranks.call(
        "plan_cases:measure", path=path, spec=spec, degrees=degrees, sizes=sizes, sequences=sequences, prompt=prompt,
        answer=answer, shares=packed.load.shares, group=group, tokens=tokens, options=options,
    )  # fmt: skip
    again = options.get("recompute", False)
    training = Training(4, again, options.get("zero_stage", 1), on_cpu=True)
    passes = {
        "flops score": PassMode(train=False),
        "flops reference": PassMode(train=False, policy=False),
        "flops step": PassMode(train=True, recompute=again, input_gradient=again),
    }
    for rank, found in enumerate(measured):
        stage = rank // (plan.tensor * plan.data)
        memory = learner_memory(plan, packed, training, stage)
        for kind in ("weights", "gradients", "optimizer", "activations"):
            assert memory[kind] == pytest.approx(found[kind], rel=MEMORY), (kind, rank)
        for name, how in passes.items():
            assert pass_cost(plan, packed.load, sequences, how)[stage] == pytest.approx(found[name], rel=FLOPS), rank
    for name, how in passes.items():
        whole = whole_pass(plan, packed.load, sequences, how)
        assert whole == pytest.approx(sum(found[name] for found in measured), rel=FLOPS), name


@pytest.mark.parametrize(("layout", "case"), covering(TINY, itertools.product(("llama", "qwen3"), SPECS)))
def test_tiny_models_cost_what_was_planned(four, models, layout, case) -> None:
    compare(four, models[case[0]], SPECS[case[1]], TINY[layout], 16, 24, 39, 0.7, 256)


@pytest.mark.parametrize("spec", ["lora", "full"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama", "qwen3"}))
def test_other_families_cost_what_was_planned(four, tmp_path, family, spec) -> None:
    path = tiny_hf(family, tmp_path, tied=False, hidden=128, vocab=512, intermediate=256)
    compare(four, path, SPECS[spec], TINY["TP2_DP2"], 16, 24, 39, 0.7, 256)


@pytest.mark.parametrize("depth", [1.0, 0.45])
def test_other_depths_cost_what_was_planned(four, models, depth) -> None:
    compare(four, models["llama"], LORA, TINY["TP2_DP2"], 16, 8, 71, depth, 320)


@pytest.mark.parametrize("layout", ["TP2_DP2", "PP2_DP2_recompute", "TP2_PP2_zero2"])
def test_a_prompt_that_a_group_shares_costs_what_was_planned(four, models, layout) -> None:
    compare(four, models["qwen3"], LORA, TINY[layout], 16, 40, 31, 0.7, 176, group=4)


@pytest.mark.parametrize("layout", some(SMOL, ["PP3"]))
def test_smollm2_costs_what_was_planned(three, layout) -> None:
    compare(three, MODEL, SMOL_SPEC, SMOL[layout], 3, 24, 47, 0.7, 72)
