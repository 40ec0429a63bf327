"""Five clipped AdamW updates on four ranks equal those of a single process on transformers' layers; and a state that
was saved under one layout goes on under another as if nothing had happened."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from safetensors.torch import save_file
from test_layouts import likelihood_loss
from test_parallel_model import make_batch

from ee_megatron.config.schema import DeepspeedConfig
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.engine import DEEPSPEED, PRIVATE
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.tensors import digest
from tests.covering import covering, some
from tests.reference import Reference, random_policy
from tests.tiny import tiny_hf

LORA = PolicySpec(6, (1, 2, 3, 4), rank=4, alpha=8.0)
FULL = PolicySpec(6, (1, 2, 3, 4), rank=0, full=True)
UPDATES, CLIP = 5, 0.3
# An eps of the gradients' own order: with 1e-8 AdamW's first steps are the gradient's sign, and rounding decides the
# sign of a gradient that is zero.
EPS = 1e-4
RATES = {"body": 1e-3, "gates": 3e-3}
# (tensor, pipeline, data), layers per stage
LAYOUTS = {
    "DP4": ((1, 1, 4), (6,)),
    "TP2_DP2": ((2, 1, 2), (6,)),
    "PP2_DP2": ((1, 2, 2), (2, 4)),
    "TP2_PP2": ((2, 2, 1), (4, 2)),
}
CASES = [(3, "DP4"), *((stage, layout) for layout in LAYOUTS for stage in (0, 1, 2))]
MODELS = {"llama_tied": ("llama", True), "qwen3": ("qwen3", False)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(4, tmp_path_factory.mktemp("ranks")) as running:
        yield running


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory, spec, start and, by plain torch, the weights after five updates and the norms on the way."""
    found = {}
    for name, (family, tied) in MODELS.items():
        path = tiny_hf(family, tmp_path_factory.mktemp(name), tied=tied)
        for mode, spec in (("lora", LORA), ("full", FULL)):
            policy = start(path, spec)
            found[name, mode] = (path, spec, policy, by_the_book(path, spec, policy))
    return found


def start(path, spec):
    source = HFDirectory(path)
    if not spec.full:
        return random_policy(source.dims, spec)
    policy = initial_policy(source.dims, spec, 0, source.tensor)
    return policy | {n: t for n, t in random_policy(source.dims, spec).items() if n.startswith("gates.")}


def by_the_book(path, spec, policy):
    reference = Reference(path, spec, {name: value.clone() for name, value in policy.items()})
    trained = dict(reference.policy)
    if spec.full:
        trained |= dict(reference.model.named_parameters())
    for value in trained.values():
        value.requires_grad_()
    groups = [
        {"params": [v for n, v in trained.items() if n.startswith("gates.") == gates], "lr": RATES[group]}
        for group, gates in (("body", False), ("gates", True))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    norms = []
    for update in range(UPDATES):
        optimizer.zero_grad()
        likelihood_loss(reference, *make_batch(update, rows=6)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP)))
        optimizer.step()
    assert min(norms) > CLIP, "clipping was not active"
    return {name: trained[name].detach() for name in policy}, norms


def settings(stage, **options):
    return DeepspeedConfig(stage, gradient_clipping=CLIP, eps=EPS, **options)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_deepspeed_without_what_is_used_of_it_is_refused_by_name(stage, ranks, models):
    build(ranks, models["llama_tied", "lora"], "DP4", settings(stage))
    said = ranks.call("parallel_cases:lacking")[0]
    assert said.keys() == set(PRIVATE[stage])
    for name, error in said.items():
        assert name in error and f"deepspeed{DEEPSPEED}" in error
    wanted = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"deepspeed{DEEPSPEED}" in wanted


def build(ranks, case, layout, optimizer):
    path, spec, policy, _ = case
    degrees, stages = LAYOUTS[layout]
    ranks.call(
        "parallel_cases:make_learner", path=path, spec=spec, policy=policy, degrees=degrees, stages=stages,
        options={"tokens_per_micro_batch": 36, "deepspeed": optimizer},
    )  # fmt: skip


def update(ranks, first, last):
    """Updates first..last-1 -> norms seen."""
    return [one_update(ranks, i).norms for i in range(first, last)]


def one_update(ranks, seed, rates=RATES):
    batch, weights = make_batch(seed, rows=6)
    return ranks.call("parallel_cases:step", batch=batch, weights=weights, rates=rates)[0][0]


def assert_same(found, expected, started):
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        moved = float((wanted - started[name]).norm())
        assert float((found[name] - wanted).norm()) < 2e-3 * moved + 1e-6, f"{name}: differs by a part of its movement"


@pytest.mark.parametrize(("zero", "trained"), covering(CASES, [(m, mode) for m in MODELS for mode in ("lora", "full")]))
def test_five_updates(zero, trained, ranks, models):
    (stage, layout), case = zero, models[trained]
    build(ranks, case, layout, settings(stage))
    norms = update(ranks, 0, UPDATES)
    expected, book = case[3]
    assert [n["all"] for n in norms] == pytest.approx(book, rel=1e-4)
    for policy, _ in ranks.call("parallel_cases:state"):
        assert policy.keys() == expected.keys()
        assert_same(policy, expected, case[2])


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_zero_3_scores_as_whole_weights_do(mode, ranks, models):
    scored = []
    for stage in (1, 3):
        build(ranks, models["llama_tied", mode], "DP4", settings(stage))
        before = ranks.call("parallel_cases:score", batch=make_batch(1, rows=6)[0])[0]
        one_update(ranks, 0)
        options = {"teacher": Teacher.REFERENCE, "hazards": True}
        scored.append((before, ranks.call("parallel_cases:score", batch=make_batch(1, rows=6)[0], **options)[0]))
    for whole, sharded in zip(*scored, strict=True):
        for name, wanted in vars(whole).items():
            torch.testing.assert_close(getattr(sharded, name), wanted, rtol=1e-5, atol=1e-5, msg=name)
    assert float(scored[0][1].kl.sum()) > 0.1 and float(scored[0][1].hazards.sum()) > 0.1


MOVES = [
    ((1, "TP2_PP2"), (2, "DP4")),
    ((2, "DP4"), (0, "PP2_DP2")),
    ((0, "TP2_DP2"), (3, "DP4")),
    ((3, "DP4"), (1, "TP2_DP2")),
]


@pytest.mark.parametrize(("move", "mode"), covering(MOVES, ["lora", "full"]))
def test_resume_under_another_layout_and_stage(move, mode, ranks, models):
    """Three updates here, two there: weights and moments are those of five updates in one place."""
    before, after = move
    path, spec, policy, (expected, _) = models["llama_tied", mode]
    build(ranks, (path, spec, policy, None), before[1], settings(before[0]))
    update(ranks, 0, 3)
    middle, optimizer = ranks.call("parallel_cases:state")[0]
    assert optimizer.updates == 3
    build(ranks, (path, spec, middle, None), after[1], settings(after[0]))
    ranks.call("parallel_cases:resume", optimizer=optimizer)
    assert_same_state(ranks.call("parallel_cases:state")[0][1], optimizer)
    update(ranks, 3, 5)
    assert_same(ranks.call("parallel_cases:state")[0][0], expected, policy)


@pytest.mark.parametrize("stage", some([0, 1, 2, 3], [3]))
def test_resume_in_place_is_exact_to_the_bit(stage, ranks, models):
    path, spec, policy, _ = models["llama_tied", "lora"]
    build(ranks, (path, spec, policy, None), "DP4", settings(stage))
    update(ranks, 0, 2)
    middle, optimizer = ranks.call("parallel_cases:state")[0]
    update(ranks, 2, 5)
    straight = ranks.call("parallel_cases:state")[0][0]
    build(ranks, (path, spec, middle, None), "DP4", settings(stage))
    ranks.call("parallel_cases:resume", optimizer=optimizer)
    update(ranks, 2, 5)
    again = ranks.call("parallel_cases:state")[0][0]
    for name, value in straight.items():
        assert torch.equal(value, again[name]), name


CHECKPOINTS = [
    (0, "PP2_DP2", torch.float32),
    (1, "TP2_PP2", torch.bfloat16),
    (2, "TP2_DP2", torch.bfloat16),
    (2, "DP4", torch.float32),
    (3, "DP4", torch.float32),
]


@pytest.mark.parametrize("case", some(CHECKPOINTS, CHECKPOINTS[1::3]))
def test_a_checkpoint_s_bytes_and_what_ranks_hold_of_it_meanwhile(case, ranks, models, tmp_path):
    """The files are those that one process writes which has all tensors; no rank has more than a few buckets of them,
    and what the ranks read of them again is as it was to the bit."""
    (stage, layout, dtype), (path, spec, policy, _) = case, models["llama_tied", "full"]
    degrees, stages = LAYOUTS[layout]

    def build(start):
        ranks.call(
            "parallel_cases:make_learner", path=path, spec=spec, policy=start, degrees=degrees, stages=stages,
            options={"tokens_per_micro_batch": 36, "deepspeed": settings(stage), "dtype": dtype},
        )  # fmt: skip

    build(policy)
    update(ranks, 0, 2)
    found = ranks.call("parallel_cases:checkpoint", folder=tmp_path)
    expected, state = ranks.call("parallel_cases:state")[0]
    assert set(state.tensors) == {"exp_avg", "exp_avg_sq", *(["master"] if dtype == torch.bfloat16 else [])}
    save_file(expected, tmp_path / "expected")
    assert (tmp_path / "policy.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert json.loads((tmp_path / "policy.json").read_text())["sha256"] == digest(expected)
    for kind, tensors in state.tensors.items():
        save_file(tensors, tmp_path / "expected")
        written = (tmp_path / "optimizer" / f"{kind}.safetensors").read_bytes()
        assert written == (tmp_path / "expected").read_bytes(), kind
    size = sum(4 * tensor.numel() for tensor in expected.values())
    (bucket, sent, most, alive), *others = found
    assert size > 20 * bucket and sent == most == 0
    assert 0 < alive <= 3 * bucket, f"{alive} bytes of blocks alive on the leader"
    assert sum(sent for _, sent, _, _ in others) > size / 4
    for _, _, most, alive in others:
        # Each run of numbers in a message begins at a multiple of 8 bytes.
        assert most < 1.1 * bucket and alive == 0, "a rank sent more than a bucket at once, or kept blocks"
    build(tmp_path)
    ranks.call("parallel_cases:resume", optimizer=tmp_path)
    again, restored = ranks.call("parallel_cases:state")[0]
    assert_same_state(restored, state)
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name


def assert_same_state(found, expected):
    assert found.updates == expected.updates
    for kind, tensors in expected.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(found.tensors[kind][name], tensor), f"{kind} {name}"


def test_a_gradient_that_is_not_finite_changes_nothing(ranks, models):
    build(ranks, models["llama_tied", "lora"], "TP2_DP2", settings(1))
    update(ranks, 0, 1)
    policy, optimizer = ranks.call("parallel_cases:state")[0]
    batch, weights = make_batch(1, rows=6)
    weights.token[0] = float("inf")
    assert not ranks.call("parallel_cases:step", batch=batch, weights=weights, rates=RATES)[0][0].applied
    after, state = ranks.call("parallel_cases:state")[0]
    assert_same_state(state, optimizer)
    for name, value in policy.items():
        assert torch.equal(after[name], value), name
    update(ranks, 1, 5)
    assert_same(ranks.call("parallel_cases:state")[0][0], models["llama_tied", "lora"][3][0], policy)


@pytest.mark.parametrize("stage", some([1, 2], [2]))
def test_bfloat16_weights_keep_float32_masters(stage, ranks, models):
    """Updates far below bfloat16's resolution add up in the masters; a resumed run goes on from these to the bit."""
    path, spec, policy, _ = models["qwen3", "full"]
    tiny = {"body": 1e-6, "gates": 1e-6}

    def build_narrow(start):
        ranks.call(
            "parallel_cases:make_learner", path=path, spec=spec, policy=start, degrees=(2, 1, 2), stages=(6,),
            options={"tokens_per_micro_batch": 36, "dtype": torch.bfloat16,
                     "deepspeed": DeepspeedConfig(stage, gradient_clipping=CLIP)},
        )  # fmt: skip

    def updates(first, last):
        for i in range(first, last):
            assert one_update(ranks, i, tiny).applied
        return ranks.call("parallel_cases:state")[0]

    build_narrow(policy)
    before, _ = ranks.call("parallel_cases:state")[0]
    middle, optimizer = updates(0, 3)
    name = "model.layers.3.mlp.up_proj.weight"
    moved = (optimizer.tensors["master"][name] - before[name]).abs()
    assert 0 < float(moved.max()) < 1e-5, f"masters moved by {float(moved.max()):.1e}"
    straight, _ = updates(3, 6)
    build_narrow(middle)
    ranks.call("parallel_cases:resume", optimizer=optimizer)
    again, _ = updates(3, 6)
    for key, value in straight.items():
        assert torch.equal(value, again[key]), key
