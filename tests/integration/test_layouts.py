"""Whatever the layout: the same logits, the same gradients, and to the bit the same model where no gate fires.

The reference is transformers' own layers with the frozen mask around them (tests/reference.py), not this project's
model at world size 1. fp32; tolerances are on logits of order 1 and relative to a gradient's norm.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks
from test_parallel_model import make_batch
from transformers import AutoModelForCausalLM

from ee_megatron.families import FAMILIES
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, initial_policy
from tests.covering import covering
from tests.reference import Reference, random_policy
from tests.tiny import tiny_hf

LAYERS, ROWS, WIDTH = 6, 4, 16
SPEC = PolicySpec(LAYERS, (1, 2, 3, 4), rank=4, alpha=8.0)
FULL = PolicySpec(LAYERS, (1, 2, 3, 4), rank=0, full=True)
OUTCOMES = (1, 2, 3, 4, 6)

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# An odd vocabulary is padded under tensor parallelism; Qwen3's heads are wider than hidden / heads.
MODELS = {
    "llama": dict(family="llama", tied=True, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3, vocab=131),
    "llama_untied": dict(
        family="llama", tied=False, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "qwen2": dict(family="qwen2", tied=True, vocab=131),
    "qwen3": dict(family="qwen3", tied=False, head_dim=24),
}
MODELS |= {family: dict(family=family, tied=True) for family in sorted(FAMILIES.keys() - MODELS.keys())}
# Models whose first generated tokens exit.
FIRST = ("llama", "qwen3")
# (tensor, pipeline, data), layers per stage, options
LAYOUTS = {
    "TP1": ((1, 1, 1), (6,), {}),
    "TP1_recompute": ((1, 1, 1), (6,), {"recompute": True}),
    "TP2": ((2, 1, 1), (6,), {}),
    "TP2_SP": ((2, 1, 1), (6,), {"sequence_parallel": True}),
    "PP2": ((1, 2, 1), (4, 2), {}),
    "DP2": ((1, 1, 2), (6,), {}),
    "PP4_uneven": ((1, 4, 1), (1, 2, 1, 2), {}),
    "TP2_PP2": ((2, 2, 1), (2, 4), {}),
    "TP2_PP2_SP": ((2, 2, 1), (3, 3), {"sequence_parallel": True}),
    "TP2_PP2_SP_recompute": ((2, 2, 1), (3, 3), {"sequence_parallel": True, "recompute": True}),
}


def world(layout: str) -> int:
    tensor, pipeline, data = LAYOUTS[layout][0]
    return tensor * pipeline * data


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: tiny_hf(path=tmp_path_factory.mktemp(name), **settings_) for name, settings_ in MODELS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Ranks by world size; a new size ends the ranks of the one before."""
    running: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in running:
            for others in running.values():
                others.__exit__()
            running.clear()
            running[size] = Ranks(size, tmp_path_factory.mktemp(f"ranks{size}"))
        return running[size]

    yield get
    for others in running.values():
        others.__exit__()


def drawn_patterns():
    """Exit patterns that hypothesis finds worth trying: a few random ones, nothing exits, everything exits at once."""
    patterns: list[torch.Tensor] = []

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.lists(st.sampled_from(OUTCOMES), min_size=ROWS * WIDTH, max_size=ROWS * WIDTH),
        st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS),
    )
    def draw(depths, prompts):
        table = torch.tensor(depths).view(ROWS, WIDTH)
        for row, length in enumerate(prompts):
            table[row, :length] = LAYERS
        patterns.append(table)

    draw()
    return [torch.full((ROWS, WIDTH), LAYERS), torch.full((ROWS, WIDTH), 1), *patterns]


def last_stage(results, read):
    """The tensor-parallel shards of the last stage, joined along the vocabulary."""
    shards = {r["tensor_rank"]: read(r) for r in results if read(r) is not None}
    return torch.cat([shards[rank] for rank in sorted(shards)], dim=-1)


def likelihood_loss(reference: Reference, batch, weights):
    log_probs = torch.log_softmax(reference.logits(batch.tokens, batch.exit_depths), -1)
    tokens = log_probs.gather(-1, batch.labels()[..., None])[..., 0] * batch.loss_mask
    exits = reference.log_q(reference.gate_logits(batch.tokens, batch.exit_depths), batch.exit_depths) * batch.gate_mask
    return -(tokens * weights.token).sum() - (exits * weights.exit).sum()


def gates_loss(reference: Reference, batch, weights):
    """Every gate with weights of its own: of the log of what it did, or of the cross-entropy to its target, and of its
    hazard, where the position comes by."""
    hazards = torch.sigmoid(reference.gate_logits(batch.tokens, batch.exit_depths).double())
    ends = batch.exit_depths.unsqueeze(-1)
    depths = torch.tensor(SPEC.exit_depths)
    reached = batch.gate_mask.unsqueeze(-1) & (ends >= depths)
    wanted = (ends == depths).double() if weights.target_hazards is None else weights.target_hazards
    did = wanted * hazards.log() + (1 - wanted) * (1 - hazards).log()
    return ((weights.hazard * hazards - weights.exit * did) * reached).sum()


def assert_gradients(found, exact, plain):
    """Within 1e-5 of the exact ones or, where rounding costs transformers' own layers in float32 more than a quarter of
    that, within four times of what it costs them.

    What they lose is one draw of it: behind Qwen3's normalised queries, which leave little of large terms, nine ways to
    compute one gradient (attention by blocks, together, in float64; TP 1 and 2; by the book) were 0.45 to 1.4e-5 off.
    """
    assert found.keys() == exact.keys() == plain.keys()
    for name, wanted in exact.items():
        scale = wanted.norm().clamp(min=1e-6)
        error, allowed = float((found[name] - wanted).norm() / scale), float((plain[name] - wanted).norm() / scale)
        assert error < max(1e-5, 4 * allowed), (
            f"{name}: relative error {error:.1e}, in float32 by the book {allowed:.1e}"
        )


def gradients_by_the_book(path, spec, policy, batch, weights, exact):
    """By transformers' own layers: of the policy's tensors, and where every weight is trained of the model's."""
    for value in policy.values():
        value.grad = None
    reference = Reference(path, spec, policy, exact=exact)
    reference.model.requires_grad_(spec.full)
    likelihood_loss(reference, batch, weights).backward()
    trained = {name: p.grad for name, p in reference.model.named_parameters() if name in policy and spec.full}
    return trained | {name: value.grad for name, value in policy.items() if value.requires_grad}


LAYOUT_ORDER = sorted(LAYOUTS, key=world)


@pytest.mark.parametrize(("layout", "model"), covering(LAYOUT_ORDER, MODELS))
def test_logits_and_gradients_with_adapters(layout, model, models, ranks):
    path, patterns, (batch, weights) = models[model], drawn_patterns(), make_batch(rows=6, first_token=model in FIRST)
    policy = random_policy(HFDirectory(path).dims, SPEC)
    tokens = torch.randint(0, 128, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1))
    degrees, stages, options = LAYOUTS[layout]
    results = ranks(world(layout)).call(
        "layout_cases:everything", path=path, spec=SPEC, policy=policy, degrees=degrees, stages=stages,
        options=options, tokens=tokens, patterns=patterns, batch=batch, weights=weights,
    )  # fmt: skip
    vocab = HFDirectory(path).dims.vocab
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
    for ours in (last_stage(results, lambda r: r["base"][0]), last_stage(results, lambda r: r["plain"])):
        torch.testing.assert_close(ours[..., :vocab], theirs, rtol=1e-5, atol=1e-5)

    reference = Reference(path, SPEC, policy)
    for index, depths in enumerate(patterns):
        found = last_stage(results, lambda r, i=index: r["patterns"][i])[..., :vocab]
        torch.testing.assert_close(found, reference.logits(tokens, depths), rtol=1e-5, atol=2e-5)

    for name in ("never", "base"):
        left, right = (last_stage(results, lambda r, n=name, s=side: r[n][s]) for side in (0, 1))
        assert torch.equal(left, right), f"{name}: not the same to the bit"

    for value in policy.values():
        value.requires_grad_()
    by_the_book = [gradients_by_the_book(path, SPEC, policy, batch, weights, exact) for exact in (True, False)]
    for result in results:
        assert_gradients(result["gradients"], *by_the_book)


@pytest.mark.parametrize(("layout", "model"), covering(LAYOUT_ORDER, reversed(MODELS)))
def test_logits_and_gradients_of_full_fine_tuning(layout, model, models, ranks):
    path, (batch, weights) = models[model], make_batch(rows=6, first_token=model in FIRST)
    source = HFDirectory(path)
    policy = initial_policy(source.dims, FULL, 0, source.tensor)
    policy.update({name: t for name, t in random_policy(source.dims, FULL).items() if name.startswith("gates.")})
    degrees, stages, options = LAYOUTS[layout]
    results = ranks(world(layout)).call(
        "layout_cases:everything", path=path, spec=FULL, policy=policy, degrees=degrees, stages=stages,
        options=options, tokens=batch.tokens[:4], patterns=[batch.exit_depths[:4]], batch=batch,
        weights=weights,
    )  # fmt: skip
    for name in policy:
        if name.startswith("gates."):
            policy[name].requires_grad_()
    reference = Reference(path, FULL, policy)
    found = last_stage(results, lambda r: r["patterns"][0])[..., : source.dims.vocab]
    # Padding is never read out, and is frozen at depth 0 in both.
    torch.testing.assert_close(found, reference.logits(batch.tokens[:4], batch.exit_depths[:4]), rtol=1e-5, atol=2e-5)
    by_the_book = [gradients_by_the_book(path, FULL, policy, batch, weights, exact) for exact in (True, False)]
    for result in results:
        assert_gradients(result["gradients"], *by_the_book)


@pytest.mark.parametrize("targets", [False, True], ids=["taken", "targets"])
@pytest.mark.parametrize("layout", [name for name in LAYOUT_ORDER if world(name) <= 2])
def test_gradients_where_every_gate_has_weights_of_its_own(layout, targets, models, ranks):
    """What exits answer for themselves. The two stages of PP2 meet at an exit, whose gate the second one has."""
    path, (batch, weights) = models["qwen3"], make_batch(rows=6, first_token=True)
    generator = torch.Generator().manual_seed(3)
    shape = (*batch.tokens.shape, len(SPEC.exit_depths))
    # Padding, prompts and gates behind the exit have weights too, which must not count.
    exits, hazard = torch.randn(2, *shape, generator=generator)
    wanted = (hazard < 0).float() if targets else None
    weights = replace(weights, token=None, exit=exits / 30, hazard=hazard / 30, target_hazards=wanted)
    policy = random_policy(HFDirectory(path).dims, SPEC)
    degrees, stages, options = LAYOUTS[layout]
    results = ranks(world(layout)).call(
        "layout_cases:gradients_alone", path=path, spec=SPEC, policy=policy, degrees=degrees, stages=stages,
        options=options, batch=batch, weights=weights,
    )  # fmt: skip
    for value in policy.values():
        value.requires_grad_()
    gates_loss(Reference(path, SPEC, policy), batch, weights).backward()
    expected = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in policy.items()}
    assert all(expected[name].any() for name in expected if name.startswith("gates."))
    for result in results:
        assert_gradients(result, expected, expected)
