"""The Megatron model under real layouts against the reference on transformers' layers: scores, gradients, updates."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import Ranks

from ee_megatron.config.schema import DeepspeedConfig
from ee_megatron.families import FAMILIES
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.batch import pack
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.objectives.weights import Weights, mean_weights
from ee_megatron.planning.roofline import idle_share
from ee_megatron.policy import PolicySpec, initial_policy
from tests.pipeline import Work, one_call, slowdown
from tests.reference import Reference, random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (1, 2, 3, 4), rank=4, alpha=8.0)
OUTCOMES = [1, 2, 3, 4, 6]
UNCLIPPED = DeepspeedConfig(gradient_clipping=0.0)

# family, (tensor, pipeline, data), layers per stage, options
LAYOUTS = [
    ("llama", (1, 1, 1), (6,), {"recompute": True}),
    ("qwen2", (1, 2, 1), (2, 4), {}),
    ("qwen3", (2, 1, 1), (6,), {}),
    ("llama", (1, 1, 2), (6,), {}),
    ("qwen3", (2, 2, 1), (4, 2), {"sequence_parallel": True}),
]
LAYOUTS += [(family, (2, 1, 1), (6,), {}) for family in sorted(FAMILIES.keys() - {layout[0] for layout in LAYOUTS})]


def make_batch(seed: int = 0, rows: int = 5, first_token: bool = False):
    """A batch, and weights of both signs for its tokens and exits; first_token: answers' first tokens exit, too."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, 128, n) for n in generator.integers(2, 10, rows)]
    # As in a group of samples, and as with few-shot examples: the whole prompt of the sequence before, or some of it.
    if rows > 3:
        prompts[1], prompts[3] = prompts[0], np.concatenate([prompts[2][:-1], prompts[2][:1]])
    answers = [generator.integers(0, 128, n) for n in generator.integers(1, 10, rows)]
    depths = [np.concatenate([[6], generator.choice(OUTCOMES, len(a) - 1)]) for a in answers]
    if first_token:
        for row, taken in enumerate(depths):
            taken[0] = OUTCOMES[row % len(OUTCOMES)]
    batch = pack(prompts, answers, depths, 6, first_token)
    scale = torch.linspace(-1, 1.5, rows)[:, None]
    token = scale * mean_weights(batch, batch.loss_mask)
    return batch, Weights(token, 0.7 * scale * mean_weights(batch, batch.gate_mask))


def learn_on(ranks, path, policy, degrees=(1, 1, 1), stages=None, spec=SPEC, tokens=36, **options) -> None:
    """Make a learner on these ranks."""
    ranks.call(
        "parallel_cases:make_learner", path=path, spec=spec, policy=policy, degrees=degrees, stages=stages,
        options={"tokens_per_micro_batch": tokens, **options},
    )  # fmt: skip


def reference_scores(path, policy, batch):
    reference = Reference(path, SPEC, policy)
    log_probs = torch.log_softmax(reference.logits(batch.tokens, batch.exit_depths), -1)
    tokens = log_probs.gather(-1, batch.labels()[..., None])[..., 0] * batch.loss_mask
    exits = reference.log_q(reference.gate_logits(batch.tokens, batch.exit_depths), batch.exit_depths) * batch.gate_mask
    return tokens, exits


def adamw(policy):
    groups = [
        {"params": [v for k, v in policy.items() if not k.startswith("gates")], "lr": 1e-3},
        {"params": [v for k, v in policy.items() if k.startswith("gates")], "lr": 3e-3},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


@pytest.mark.parametrize(("family", "degrees", "stages", "options"), LAYOUTS, ids=lambda v: str(v).replace(" ", ""))
def test_scores_and_updates_equal_the_reference(family, degrees, stages, options, tmp_path):
    """Two clipped AdamW updates under the layout equal two of a single process on transformers' layers."""
    path = tiny_hf(family, tmp_path / "model", tied=family != "qwen2")
    # Two sequences have one prompt, whose last position they leave at different exits.
    batch, weights = make_batch(first_token=family.startswith("qwen"))
    policy = random_policy(HFDirectory(path).dims, SPEC)
    with Ranks(int(np.prod(degrees)), tmp_path / "ranks") as ranks:
        learn_on(ranks, path, policy, degrees, stages, deepspeed=DeepspeedConfig(gradient_clipping=0.3), **options)
        scores = ranks.call("parallel_cases:score", batch=batch)
        with_hazards = ranks.call("parallel_cases:score", batch=batch, hazards=True)
        alone = ranks.call("parallel_cases:hazards", batch=batch)
        teacher = ranks.call("parallel_cases:score", batch=batch, reference=True)
        steps = ranks.call("parallel_cases:step", batch=batch, weights=weights, times=2)
    for value in policy.values():
        value.requires_grad_()
    tokens, exits = reference_scores(path, policy, batch)
    logits = Reference(path, SPEC, policy).gate_logits(batch.tokens, batch.exit_depths).detach()
    reached = batch.exit_depths.unsqueeze(-1) >= torch.tensor(SPEC.exit_depths)
    hazards = torch.sigmoid(logits) * (reached & batch.gate_mask.unsqueeze(-1))
    for found in (*(scores.hazards for scores in with_hazards), *alone):
        torch.testing.assert_close(found, hazards, rtol=1e-5, atol=1e-5)
    assert all(found.hazards.size(-1) == 0 for found in scores) and 0 < float((hazards > 0).float().mean()) < 1
    for found in (*scores, *with_hazards, *(update.scores for update, _ in steps)):
        torch.testing.assert_close(found.token_logprobs, tokens.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.exit_logprobs, exits.detach(), rtol=1e-5, atol=1e-5)
    plain = Reference(path).logits(batch.tokens, torch.full_like(batch.exit_depths, 6)).log_softmax(-1)
    plain = plain.gather(-1, batch.labels()[..., None])[..., 0] * batch.loss_mask
    torch.testing.assert_close(teacher[0].token_logprobs, plain, rtol=1e-5, atol=1e-5)

    optimizer = adamw(policy)
    for update in range(2):
        optimizer.zero_grad()
        tokens, exits = reference_scores(path, policy, batch)
        (-(tokens * weights.token).sum() - (exits * weights.exit).sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(policy.values()), 0.3)
        optimizer.step()
        if update == 0:
            assert steps[0][0].norms["all"] == pytest.approx(float(norm), rel=1e-5)
    assert float(norm) > 0.3, "clipping was not active"
    for _, after in steps:
        assert after.keys() == policy.keys()
        for name, value in policy.items():
            # AdamW's first steps are lr * sign(gradient) where a gradient is tiny: an absolute bound of 10% of lr.
            torch.testing.assert_close(
                after[name], value.detach(), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_prompt_that_sequences_share_is_run_once(tmp_path):
    """Four answers to one prompt cost what one of them does and three answers alone."""
    path = tiny_hf("llama", tmp_path / "model")
    policy = random_policy(HFDirectory(path).dims, SPEC)
    generator = np.random.default_rng(0)
    prompts = [np.concatenate([[i], generator.integers(0, 128, 47)]) for i in range(4)]
    answers = [generator.integers(0, 128, 16) for _ in range(4)]
    apart, together = pack(prompts, answers, None, 6), pack([prompts[0]] * 4, answers, None, 6)
    with Ranks(1, tmp_path / "ranks") as ranks:
        learn_on(ranks, path, policy, tokens=1024)
        costs = [ranks.call("parallel_cases:cost_of_scoring", batch=b)[0] for b in (apart, together)]
    # Positions: 4 x 63 against 63 + 3 x 16; attention and the readout, which nobody shares, are the rest.
    assert 111 / 252 < costs[1] / costs[0] < 0.55


def test_a_learner_scores_without_dropout_before_its_first_step(tmp_path):
    path = tiny_hf("llama", tmp_path / "model")
    policy, (batch, _) = random_policy(HFDirectory(path).dims, SPEC), make_batch()
    with Ranks(1, tmp_path / "ranks") as ranks:
        learn_on(ranks, path, policy, adapter_dropout=0.5)
        first, second = (ranks.call("parallel_cases:score", batch=batch)[0] for _ in range(2))
    assert torch.equal(first.token_logprobs, second.token_logprobs)
    tokens, _ = reference_scores(path, policy, batch)
    torch.testing.assert_close(first.token_logprobs, tokens, rtol=1e-5, atol=1e-5)


def test_copies_that_came_apart_are_noticed_on_every_rank(tmp_path):
    """One bit of a gate on one tensor-parallel rank."""
    path = tiny_hf("llama", tmp_path / "model")
    policy, (batch, weights) = random_policy(HFDirectory(path).dims, SPEC), make_batch()
    with Ranks(2, tmp_path / "ranks") as ranks:
        learn_on(ranks, path, policy, (2, 1, 1))
        ranks.call("parallel_cases:step", batch=batch, weights=weights, times=2)
        assert ranks.call("parallel_cases:drift") == ["", ""]
        found = ranks.call("parallel_cases:drift", rank=1, name="gates.3.fc1.weight")
    assert all(re.match(r"1\b.*gates\.3\.fc1\.weight", text) for text in found)


def test_a_data_parallel_rank_without_a_sequence_takes_part(tmp_path):
    """One sequence on two ranks: the second has only padding, and both end with the update of a single process."""
    path = tiny_hf("llama", tmp_path / "model")
    policy, (batch, weights) = random_policy(HFDirectory(path).dims, SPEC), make_batch(rows=1)
    after = {}
    for world in (1, 2):
        with Ranks(world, tmp_path / f"ranks{world}") as ranks:
            learn_on(ranks, path, policy, (1, 1, world), tokens=18)
            after[world] = ranks.call("parallel_cases:step", batch=batch, weights=weights, timeout=90)[-1][1]
    for name, value in after[1].items():
        torch.testing.assert_close(after[2][name], value, rtol=1e-5, atol=1e-6)


def test_gradients_of_distillation_equal_the_reference(tmp_path):
    """The top-k plus tail divergence in both directions, at PP2 with a soft gate target, through one plain update."""
    path = tiny_hf("llama", tmp_path / "model")
    dims = HFDirectory(path).dims
    policy, (batch, weights) = random_policy(dims, SPEC), make_batch(3)
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(*batch.tokens.shape, dims.vocab, generator=generator).mul(2).log_softmax(-1)
    logprobs, ids = teacher.topk(8, dim=-1)
    batch = replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)
    targets = torch.rand(*batch.tokens.shape, 4, generator=generator)
    weights = Weights(divergence=weights.token.abs(), exit=weights.exit.abs(), target_hazards=targets)
    with Ranks(2, tmp_path / "ranks") as ranks:
        learn_on(ranks, path, policy, (1, 2, 1), tokens=90, deepspeed=UNCLIPPED)
        update, _ = ranks.call("parallel_cases:step", batch=batch, weights=weights, teacher=Teacher.STORED)[0]
    for value in policy.values():
        value.requires_grad_()
    reference = Reference(path, SPEC, policy)
    student = reference.logits(batch.tokens, batch.exit_depths).log_softmax(-1).gather(-1, batch.teacher_ids)
    p, q = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (student, batch.teacher_logprobs))
    kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(update.scores.kl, (kl * batch.loss_mask).detach(), rtol=1e-4, atol=1e-4)
    hazards = torch.sigmoid(reference.gate_logits(batch.tokens, batch.exit_depths))
    entropy = torch.nn.functional.binary_cross_entropy(hazards, targets, reduction="none")
    reached = batch.exit_depths[..., None] >= torch.tensor(SPEC.exit_depths)
    loss = (kl * weights.divergence).sum() + ((entropy * reached).sum(-1) * weights.exit).sum()
    loss.backward()
    expected = torch.stack([v.grad.norm() for v in policy.values()]).norm()
    assert update.norms["all"] == pytest.approx(float(expected), rel=1e-4)


def moved_base(source) -> dict[str, torch.Tensor]:
    """The base's tensors, each a little off."""
    generator = torch.Generator().manual_seed(7)
    shapes = source.dims.tensor_shapes()
    return {n: source.tensor(n) + 0.02 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def gradient_norm(reference, policy) -> float:
    gradients = [p.grad for p in reference.model.parameters() if p.grad is not None]
    gradients += [value.grad for value in policy.values() if value.grad is not None]
    return float(torch.stack([g.norm() for g in gradients]).norm())


def trainable(path, spec, policy) -> Reference:
    """The reference with the policy's tensors in it, all of which get gradients."""
    reference = Reference(path, spec, policy)
    for name, value in policy.items():
        value.requires_grad_()
        if name in dict(reference.model.named_parameters()):
            reference.model.get_parameter(name).data.copy_(value.detach())
            reference.model.get_parameter(name).requires_grad_()
    return reference


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student", "jensen_shannon"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradients_of_distillation_over_the_whole_vocabulary(mode, direction, tmp_path):
    """TP2 x SP with a padded vocabulary, against autograd through the full distributions."""
    spec = SPEC if mode == "lora" else replace(SPEC, rank=0, full=True)
    path = tiny_hf("llama", tmp_path / "model", vocab=131, tied=False)
    source = HFDirectory(path)
    policy = random_policy(source.dims, SPEC if mode == "lora" else replace(SPEC, rank=0))
    batch, weights = make_batch(3)
    weights = Weights(divergence=weights.token.abs(), exit=weights.exit.abs())
    if spec.full:
        policy |= moved_base(source)
    with Ranks(2, tmp_path / "ranks") as ranks:
        learn_on(
            ranks,
            path,
            policy,
            (2, 1, 1),
            spec=spec,
            kl_direction=direction,
            sequence_parallel=True,
            deepspeed=UNCLIPPED,
        )
        update, _ = ranks.call("parallel_cases:step", batch=batch, weights=weights, teacher=Teacher.REFERENCE)[0]
    reference = trainable(path, spec, policy)
    student = reference.logits(batch.tokens, batch.exit_depths).log_softmax(-1)
    teacher = Reference(path).logits(batch.tokens, torch.full_like(batch.exit_depths, 6)).log_softmax(-1)
    if direction == "jensen_shannon":
        middle = (0.5 * (student.exp() + teacher.exp())).log()
        kl = 0.5 * ((student.exp() * (student - middle)).sum(-1) + (teacher.exp() * (teacher - middle)).sum(-1))
    else:
        p, q = (student, teacher) if direction == "student_teacher" else (teacher, student)
        kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(update.scores.kl, (kl * batch.loss_mask).detach(), rtol=1e-4, atol=1e-5)
    exits = reference.log_q(reference.gate_logits(batch.tokens, batch.exit_depths), batch.exit_depths) * batch.gate_mask
    ((kl * batch.loss_mask * weights.divergence).sum() - (exits * weights.exit).sum()).backward()
    assert update.norms["all"] == pytest.approx(gradient_norm(reference, policy), rel=1e-4)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize(("degrees", "temperature"), [((1, 2, 1), 1.0), ((2, 1, 1), 0.7)])
def test_gradients_of_the_likelihood_with_the_exact_kl_beside_it(mode, degrees, temperature, tmp_path):
    """RL's objective with rl.kl_penalty.kind=exact at PP2, and at TP2 with a padded vocabulary and a temperature,
    against autograd through both terms; scores against the same distributions."""
    spec = SPEC if mode == "lora" else replace(SPEC, rank=0, full=True)
    path = tiny_hf("llama", tmp_path / "model", vocab=131 if degrees[0] > 1 else 130, tied=False)
    source = HFDirectory(path)
    policy, (batch, weights) = random_policy(source.dims, spec), make_batch(3)
    if spec.full:
        policy |= moved_base(source)
    divergence = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(2)) / 10
    weights = replace(weights, divergence=divergence)
    with Ranks(2, tmp_path / "ranks") as ranks:
        learn_on(ranks, path, policy, degrees, spec=spec, temperature=temperature, deepspeed=UNCLIPPED)
        scores = ranks.call("parallel_cases:score", batch=batch, teacher=Teacher.REFERENCE)[0]
        update, _ = ranks.call("parallel_cases:step", batch=batch, weights=weights, teacher=Teacher.REFERENCE)[0]
    reference = trainable(path, spec, policy)
    student = (reference.logits(batch.tokens, batch.exit_depths) / temperature).log_softmax(-1)
    teacher = Reference(path).logits(batch.tokens, torch.full_like(batch.exit_depths, 6))
    teacher = (teacher / temperature).log_softmax(-1)
    kl = (student.exp() * (student - teacher)).sum(-1)
    tokens = student.gather(-1, batch.labels()[..., None])[..., 0] * batch.loss_mask
    for found in (scores, update.scores):
        torch.testing.assert_close(found.kl, (kl * batch.loss_mask).detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.token_logprobs, tokens.detach(), rtol=1e-4, atol=1e-4)
    entropy = -(student.exp() * student).sum(-1) * batch.loss_mask
    torch.testing.assert_close(scores.token_entropy, entropy.detach(), rtol=1e-4, atol=1e-5)
    exits = reference.log_q(reference.gate_logits(batch.tokens, batch.exit_depths), batch.exit_depths) * batch.gate_mask
    loss = (kl * batch.loss_mask * weights.divergence).sum() - (tokens * weights.token).sum()
    (loss - (exits * weights.exit).sum()).backward()
    assert update.norms["all"] == pytest.approx(gradient_norm(reference, policy), rel=1e-4)


def test_stages_wait_for_each_other_once_per_update_as_the_plan_has_it(tmp_path):
    """The schedule of real learners' updates with the exact divergence, simulated: PP1, PP2 and PP4. Tied embeddings
    and a second model as the reference, which stages can only build together."""
    path = tiny_hf("llama", tmp_path / "model", tied=True)
    source, spec = HFDirectory(path), replace(SPEC, rank=0, full=True)
    policy = initial_policy(source.dims, spec, 0, source.tensor)
    with Ranks(4, tmp_path / "ranks") as ranks:
        for pipeline, stages in ((1, (6,)), (2, (4, 2)), (4, (1, 2, 1, 2))):
            # Micro-batches of the longest sequence's length.
            batch, weights = make_batch(rows=80 * 4 // pipeline)
            weights = replace(weights, divergence=weights.token.abs())
            learn_on(ranks, path, policy, (1, pipeline, 4 // pipeline), stages, spec, tokens=1)
            every = ranks.call("parallel_cases:schedule", batch=batch, weights=weights)
            found = every[:: 4 // pipeline]
            count = len(found[0]) // 2
            assert count >= 40 and found == one_call(pipeline, count, forward=2, train=True, call=1)
            assert slowdown(found) == pytest.approx(1 + idle_share(pipeline, count))
            assert slowdown(found) <= 1.08


@pytest.mark.parametrize(("stages", "expected"), [(2, 1.375), (4, 1.5625)])
def test_the_simulation_sees_what_a_reference_costs_that_runs_ahead_in_small_groups(stages, expected):
    found = [list[Work]() for _ in range(stages)]
    for call in range(12):
        for works, more in zip(
            found, one_call(stages, stages, forward=1, train=bool(call % 2), call=call), strict=True
        ):
            works += more
    assert slowdown(found) == pytest.approx(expected)
