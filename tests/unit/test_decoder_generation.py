"""Generation: greedy text, reproducibility whatever the batching, recorded probabilities, stopping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_megatron.exit_rules import (
    Confidence,
    Entropy,
    Fixed,
    Off,
    Patience,
    Prescribed,
    Random,
    Sample,
    Threshold,
    make_rule,
)
from ee_megatron.exits import exit_distribution
from ee_megatron.families import FAMILIES
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.rollout import Decoder, GenerationRequest, SamplingParams, generate, stream
from ee_megatron.rollout.engine import scoring
from ee_megatron.rollout.engine.request import StopChecker
from ee_megatron.rollout.engine.sampling import sample_tokens, stream_key, uniforms
from ee_megatron.rollout.engine.scoring import inspect, read_exits, score, trace
from ee_megatron.types import Prompt, Rollout
from tests.covering import covering
from tests.tiny import tiny_hf, tiny_tokenizer

SPEC = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0)
EARLY = replace(SPEC, first_token=True)
EITHER = pytest.mark.parametrize(
    "policy", [False, True], ids=["prompts never exit", "first token exits"], indirect=True
)
LENGTHS = [1, 40, 17, 8, 25, 11, 30]
PROMPTS = [Prompt(id=f"p{i}", text=f"Q{i}: " + "abc x 12 " * 9, answer="", task="") for i in range(7)]
PROMPTS = [Prompt(id=p.id, text=p.text[:n], answer="", task="") for p, n in zip(PROMPTS, LENGTHS, strict=True)]
# The first, a single token, is answered by nothing but the end of the sequence.
TALKED_ABOUT = PROMPTS[1:]
SHARED = [Prompt(id=p.id, text="Some worked examples come first.\n" + p.text, answer="", task="") for p in PROMPTS]
OFF = Off()
# Of 130 tokens the untrained model gives its favourite about this much.
CONFIDENCE = 0.04
# Of log 130 = 4.87 nats.
ENTROPY = 4.68
SHARES = (0.4, 0.1, 0.2, 0.3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("qwen3", tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def tokenizer(path: Path):
    return AutoTokenizer.from_pretrained(path)


def lively_policy(decoder: Decoder, bias: float = 3.5) -> dict[str, torch.Tensor]:
    """Random adapters and gates that fire about as often as not."""
    generator = torch.Generator().manual_seed(0)
    tensors = initial_policy(decoder.dims, SPEC, 0)
    tensors = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    return {n: t + bias if n.endswith("fc2.bias") else t for n, t in tensors.items()}


@pytest.fixture(scope="module")
def policies(path: Path) -> list[Decoder]:
    """Two with the same weights; the second lets first tokens exit."""
    decoders = [Decoder.from_hf(path, spec, torch.float32, "cpu") for spec in (SPEC, EARLY)]
    for decoder in decoders:
        decoder.load_policy(lively_policy(decoder))
    return decoders


@pytest.fixture
def policy(policies: list[Decoder], request: pytest.FixtureRequest) -> Decoder:
    return policies[getattr(request, "param", False)]


def flat(answers: list[list[Rollout]]) -> list[Rollout]:
    return [rollout for group in answers for rollout in group]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers(tmp_path, family):
    path = tiny_hf(family, tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    for rows, prompts in [(3, PROMPTS), (64, SHARED)]:
        answers = generate(
            decoder, tokenizer, GenerationRequest(prompts, 1, SamplingParams(0.0, 30), OFF, 0), version=4, rows=rows
        )
        for prompt, (rollout,) in zip(prompts, answers, strict=True):
            read = tokenizer(prompt.text, add_special_tokens=False, return_tensors="pt")
            expected = model.generate(**read, max_new_tokens=30, do_sample=False)[0, read.input_ids.shape[1] :]
            assert rollout.tokens.tolist() == expected.tolist()
            assert rollout.text == tokenizer.decode(expected, skip_special_tokens=True)
            assert rollout.finished == (128 in expected.tolist())
            assert rollout.weight_version == 4 and (rollout.exit_depths == 6).all() and not rollout.exit_logprobs.any()


@EITHER
@pytest.mark.parametrize(
    ("exits", "prompts"),
    covering(
        [
            Sample(), Threshold(0.5), Confidence(CONFIDENCE),
            Entropy(ENTROPY), Random(SHARES),
            Threshold(0.3, other=0.7, mix=0.5), Patience(2),
        ],
        [PROMPTS, SHARED],
    ),
    ids=lambda value: {id(PROMPTS): "apart", id(SHARED): "shared prefix"}.get(id(value), str(value)),
)  # fmt: skip
def test_a_seed_gives_the_same_answers_whatever_the_batching(policy, tokenizer, exits, prompts):
    def run(asked, rows, seed=1):
        return generate(
            policy, tokenizer, GenerationRequest(asked, 3, SamplingParams(1.0, 20), exits, seed), version=0, rows=rows
        )

    expected = run(prompts, 1)
    for found in (run(prompts, 3), run(prompts, 64), run(prompts[::-1], 5)[::-1], [run([p], 2)[0] for p in prompts]):
        for a, b in zip(flat(found), flat(expected), strict=True):
            assert a.prompt_id == b.prompt_id
            assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.exit_depths, b.exit_depths)
            np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-4)
            np.testing.assert_allclose(a.exit_logprobs, b.exit_logprobs, atol=1e-4)
    depths = np.concatenate([r.exit_depths[1:] for r in flat(expected)])
    assert set(depths) == {1, 3, 4, 6} or not isinstance(exits, Sample)
    first = {int(r.exit_depths[0]) for r in flat(expected)}
    assert len(set(depths)) > 1 and (min(first) < 6 if policy.layout.first_token else first == {6})
    assert any(
        a.tokens.tolist() != b.tokens.tolist() for a, b in zip(flat(run(prompts, 8, 2)), flat(expected), strict=True)
    )
    assert len({tuple(r.tokens) for r in expected[0]}) > 1


@EITHER
@pytest.mark.parametrize("exits", [Sample(), Threshold(0.5), Fixed(3), OFF], ids=str)
def test_recorded_logprobs_equal_rescoring_under_the_recorded_exits(policy, tokenizer, exits):
    answers = flat(
        generate(policy, tokenizer, GenerationRequest(PROMPTS, 4, SamplingParams(1.0, 24), exits, 2), version=0, rows=6)
    )
    scores = score(policy, lively_policy(policy), answers)
    for rollout, entry in zip(answers, scores, strict=True):
        np.testing.assert_allclose(rollout.token_logprobs, entry.policy_logprobs, atol=2e-4)
        np.testing.assert_allclose(rollout.exit_logprobs, entry.exit_logprobs, atol=2e-4)
        free = 0 if policy.layout.first_token else 1
        assert not rollout.exit_logprobs[:free].any()
        if isinstance(exits, Fixed):
            assert (rollout.exit_depths[free:] == 3).all()
        assert (rollout.exit_logprobs[free:] < 0).all()


def test_where_first_tokens_may_exit_full_depth_says_what_it_said(policies, tokenizer):
    asked = GenerationRequest([*PROMPTS, *SHARED], 2, SamplingParams(1.0, 16), OFF, 3)
    plain, early = (flat(generate(policy, tokenizer, asked, version=0, rows=5)) for policy in policies)
    for a, b in zip(plain, early, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.exit_depths, b.exit_depths)
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-4)
        # Its gates were asked, and none fired.
        assert a.exit_logprobs[0] == 0 > b.exit_logprobs[0]


@EITHER
def test_prescribed_exits_replay_a_rollout(policy, tokenizer):
    sampled = flat(
        generate(policy, tokenizer, GenerationRequest(PROMPTS, 2, SamplingParams(1.0, 16), Sample(), 3), version=0)
    )
    depths = {(r.prompt_id, i % 2): r.exit_depths.tolist() for i, r in enumerate(sampled)}
    replay = Prescribed(depths)
    again = flat(
        generate(
            policy, tokenizer, GenerationRequest(PROMPTS, 2, SamplingParams(1.0, 16), replay, 3), version=0, rows=5
        )
    )
    for a, b in zip(again, sampled, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.exit_depths, b.exit_depths)
        np.testing.assert_allclose(a.exit_logprobs, b.exit_logprobs, atol=1e-4)
    with pytest.raises(ValueError, match=r"'p0', 0.*\[2\]"):
        generate(
            policy, tokenizer, GenerationRequest(PROMPTS, 1, SamplingParams(), Prescribed({("p0", 0): [6, 2]}), 0), 0
        )
    with pytest.raises(ValueError, match=r"'p\d', 0"):
        generate(policy, tokenizer, GenerationRequest(PROMPTS, 1, SamplingParams(), Prescribed(), 0), 0)


@EITHER
def test_exits_are_sampled_with_the_gates_probabilities(policy, tokenizer):
    at = 0 if policy.layout.first_token else 1
    answers = generate(
        policy, tokenizer, GenerationRequest(PROMPTS[1:2], 2000, SamplingParams(0.0, 1 + at), Sample(), 0), 0, rows=256
    )[0]
    tokens = torch.tensor([[*answers[0].prompt_tokens, *answers[0].tokens[:at]]])
    _, residuals = policy.forward_with_residuals(tokens, torch.tensor([tokens.shape[1]]))
    hazards = torch.stack([policy.gate_logit(i, r[0, -1]) for i, r in enumerate(residuals)]).sigmoid()
    q = exit_distribution(hazards).numpy()
    counts = np.array([sum(r.exit_depths[at] == depth for r in answers) for depth in policy.layout.outcomes]) / 2000
    assert q.max() < 0.95
    np.testing.assert_allclose(counts, q, atol=4 * 0.5 / np.sqrt(2000))


def test_tokens_are_sampled_with_the_softmax_probabilities():
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 12)
    keys = np.array([stream_key(0, "p", k) for k in range(20000)], dtype=np.uint64)
    uniform = torch.from_numpy(uniforms(keys, np.zeros(20000, dtype=int), 4)[:, -1])
    for params, kept in [
        (SamplingParams(0.7), torch.ones(12, dtype=torch.bool)),
        (SamplingParams(1.0, top_k=3), logits[0] >= logits[0].topk(3).values[-1]),
    ]:
        expected = (logits[0] / params.temperature).masked_fill(~kept, float("-inf")).softmax(-1)
        tokens, logprobs, _ = sample_tokens(logits.expand(20000, -1), params, uniform)
        np.testing.assert_allclose(np.bincount(tokens, minlength=12) / 20000, expected, atol=0.015)
        np.testing.assert_allclose(logprobs, expected.log()[tokens], atol=1e-5)
    nucleus, _, _ = sample_tokens(logits.expand(20000, -1), SamplingParams(1.0, top_p=0.5), uniform)
    probabilities = logits[0].softmax(-1)
    kept = nucleus.unique()
    assert probabilities[kept].sum() >= 0.5 > probabilities[kept].sum() - probabilities[kept].min()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.integers(0, 10**6), st.integers(1, 9))
def test_uniforms_depend_on_key_position_and_draw_only(keys, position, draws):
    table = uniforms(np.array(keys, dtype=np.uint64), np.full(len(keys), position), draws)
    assert table.shape == (len(keys), draws) and (table >= 0).all() and (table < 1).all()
    alone = uniforms(np.array(keys[-1:], dtype=np.uint64), np.array([position]), draws)
    assert np.array_equal(table[-1:], alone)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 5))
def test_a_token_without_probability_is_never_sampled(u, forbidden):
    logits = torch.zeros(1, 6)
    logits[0, forbidden] = float("-inf")
    token, _, _ = sample_tokens(logits, SamplingParams(1.0), torch.tensor([u], dtype=torch.float64))
    assert token.item() != forbidden


def test_stop_strings_end_the_text_but_keep_their_tokens():
    tokenizer = tiny_tokenizer()
    stopping = StopChecker(tokenizer, [128], ["END", "\n"])
    ids = tokenizer("abENcENDx").input_ids
    assert [stopping.ends(ids[:n], ids[n]) for n in range(len(ids))] == [False] * 7 + [True, True][:1] + [False]
    assert stopping.text(ids[:8]) == "abENc" and stopping.settled(ids[:4]) == "ab"
    assert stopping.ends([97], 10) and stopping.ends([97], 128) and not stopping.ends([], 97)
    assert StopChecker(tokenizer, [], []).ends([], 128)
    assert StopChecker(tokenizer, [1], ["<|end|>"]).ends([97], 128)


def test_generation_ends_at_a_stop_string_and_streams_the_same(policy, tokenizer):
    sampling = SamplingParams(1.0, 40)
    free = flat(generate(policy, tokenizer, GenerationRequest(PROMPTS, 1, sampling, Sample(), 5), version=0))
    stop = tuple({r.text[6:8] for r in free if len(r.text) > 10})
    sampling = SamplingParams(1.0, 40, stop)
    stopped = flat(generate(policy, tokenizer, GenerationRequest(PROMPTS, 1, sampling, Sample(), 5), version=0, rows=3))
    assert sum(r.finished for r in stopped) > sum(r.finished for r in free)
    for prompt, long, short in zip(PROMPTS, free, stopped, strict=True):
        assert long.tokens[: short.length].tolist() == short.tokens.tolist()
        assert not any(s in short.text for s in stop) and long.text.startswith(short.text)
        pieces = list(stream(policy, tokenizer, prompt, sampling, Sample(), seed=5))
        assert "".join(piece.text for piece in pieces) == short.text
        assert [piece.token for piece in pieces] == short.tokens.tolist()
        assert [piece.depth for piece in pieces] == short.exit_depths.tolist()


def test_samples_share_one_prefill_and_prompts_their_prefix(policy, tokenizer, monkeypatch):
    read: list[int] = []
    real = policy.prefill
    monkeypatch.setattr(policy, "prefill", lambda tokens, *rest: read.append(tokens.numel()) or real(tokens, *rest))
    asked = [Prompt(id=str(i), text="x" * 50 + str(i), answer="", task="") for i in range(4)]
    generate(policy, tokenizer, GenerationRequest(asked, 8, SamplingParams(1.0, 3), OFF, 0), version=0, rows=2)
    assert sum(read) == 50 + 4


def test_impossible_requests_are_refused_in_one_line(path, policy, tokenizer):
    teacher = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    cases = [
        (teacher, PROMPTS, SamplingParams(), Sample(), "gates"),
        (policy, PROMPTS, SamplingParams(), Fixed(2), "2"),
        (policy, PROMPTS, SamplingParams(max_new_tokens=600), OFF, "512"),
        (policy, [Prompt("e", "", "", "")], SamplingParams(), OFF, "tokens"),
    ]
    for decoder, prompts, sampling, exits, message in cases:
        with pytest.raises(ValueError, match=message):
            generate(decoder, tokenizer, GenerationRequest(prompts, 1, sampling, exits, 0), 0, rows=2)
    for wrong in [lambda: make_rule("never"), lambda: Threshold(2), lambda: SamplingParams(-1)]:
        with pytest.raises(ValueError):
            wrong()


def test_trace_equals_its_definition(path, tokenizer):
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    answers = flat(
        generate(decoder, tokenizer, GenerationRequest(PROMPTS, 2, SamplingParams(0.8, 12), OFF, 0), version=0)
    )
    for rollout, found in zip(answers, trace(decoder, answers, top_k=5), strict=True):
        sequence = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        hidden, residuals = decoder.forward_with_residuals(sequence, torch.tensor([sequence.shape[1]]))
        at = slice(len(rollout.prompt_tokens) - 1, sequence.shape[1] - 1)
        final = decoder.readout(hidden[0, at]).double().log_softmax(-1)
        for i, residual in enumerate(residuals):
            early = decoder.readout(residual[0, at]).double().log_softmax(-1)
            expected = (final.exp() * (final - early)).sum(-1)
            np.testing.assert_allclose(found.divergences[:, i], expected, atol=2e-5)
        np.testing.assert_allclose(found.entropy, -(final.exp() * final).sum(-1), atol=1e-5)
        np.testing.assert_allclose(found.topk_logprobs, final.topk(5).values, atol=1e-5)
        assert found.topk_ids.tolist() == final.topk(5).indices.tolist() and found.topk_ids.dtype == np.int32
        assert found.prompt_id == rollout.prompt_id and found.divergences.shape == (rollout.length, 3)


def test_score_measures_the_divergence_from_the_teacher_and_leaves_the_policy_loaded(path, policy, tokenizer):
    answers = flat(
        generate(policy, tokenizer, GenerationRequest(PROMPTS, 1, SamplingParams(1.0, 12), Sample(), 0), version=0)
    )
    teacher, tensors = Decoder.from_hf(path, SPEC, torch.float32, "cpu"), lively_policy(policy)
    for rollout, found in zip(answers, score(policy, tensors, answers), strict=True):
        sequence = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        lengths, at = torch.tensor([sequence.shape[1]]), slice(len(rollout.prompt_tokens) - 1, sequence.shape[1] - 1)
        depths = torch.full_like(sequence, 6)
        depths[0, at] = torch.tensor(rollout.exit_depths).long()
        theirs = teacher.readout(teacher.forward_parallel(sequence, lengths)[0, at]).log_softmax(-1)
        ours = policy.readout(policy.forward_parallel(sequence, lengths, depths)[0, at]).log_softmax(-1)
        np.testing.assert_allclose(found.divergence, (theirs.exp() * (theirs - ours)).sum(-1), atol=2e-5)
        tokens = torch.tensor(rollout.tokens)[:, None]
        np.testing.assert_allclose(found.teacher_logprobs, theirs.gather(1, tokens)[:, 0], atol=1e-5)
        np.testing.assert_allclose(found.teacher_entropy, -(theirs.exp() * theirs).sum(-1), atol=1e-5)
    same = score(teacher, None, [r for r in answers if r.length == 1] or answers[:1])
    assert teacher.gates is None and policy.gates is not None and len(same) >= 1


READINGS = {
    "score": lambda decoder, answers: [vars(x) for x in score(decoder, lively_policy(decoder), answers)],
    "exits": lambda decoder, answers: [x._asdict() for x in read_exits(decoder, lively_policy(decoder), answers)],
    "inspect": lambda decoder, answers: [
        {**vars(x.score), **vars(x), "score": None} for x in inspect(decoder, lively_policy(decoder), answers, True)
    ],
    "trace": lambda decoder, answers: [vars(x) for x in trace(decoder, answers, 5)],
}


@EITHER
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("passing", [0, 12])
def test_answers_are_read_as_each_would_be_alone_and_a_prompt_that_they_share_once(
    policy, tokenizer, monkeypatch, reading, passing
):
    """Groups that are read in parts, and one answer that shares its prompt with none. `passing`: what a pass costs
    beside its positions; if anything, prompts are read together as far as the shortest of them goes."""
    request = GenerationRequest(PROMPTS, 5, SamplingParams(1.0, 12), Sample(), 4)
    (first, *_), *groups = generate(policy, tokenizer, request, version=0)
    answers = [first, *flat(groups)]
    answers = [answers[i] for i in np.random.default_rng(0).permutation(len(answers))]
    policy.load_policy(lively_policy(policy))
    parallel, beginnings, read, begun = Decoder._parallel, Decoder.beginnings, [], []

    def counted(decoder, tokens, lengths, *rest, **named):
        read.append(int(lengths.sum()))
        return parallel(decoder, tokens, lengths, *rest, **named)

    def counted_beginnings(decoder, tokens):
        begun.append(len(tokens))
        return beginnings(decoder, tokens)

    monkeypatch.setattr(Decoder, "beginnings", counted_beginnings)
    monkeypatch.setattr(scoring, "FORWARD_POSITIONS", 100)
    monkeypatch.setattr(scoring, "PASS_POSITIONS", passing)
    monkeypatch.setattr(Decoder, "_parallel", counted)
    together, passes = READINGS[reading](policy, answers), 1 if reading == "trace" else 2
    prompts = {a.prompt_id: len(a.prompt_tokens) for a in answers}
    # One prompt has no position that its answers could share.
    assert begun == ([2, 1, 2, 1] if passing else [1] * 6) * passes
    once = sum(prompts.values()) + sum(1 + a.length for a in answers)
    assert sum(read) <= passes * once + 2 * passing * len(begun)
    for found, answer in zip(together, answers, strict=True):
        read.clear()
        (expected,) = READINGS[reading](policy, [answer])
        assert sum(read) == passes * (len(answer.prompt_tokens) + answer.length)
        for name, value in expected.items():
            # Streams are float16.
            close = {"atol": 1e-3 if name == "streams" else 2e-5, "err_msg": name}
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(found[name], value, **close)
            else:
                assert found[name] == value


@EITHER
@pytest.mark.parametrize("rows", [3, 64])
def test_answers_by_several_rules_are_those_by_each_alone_and_their_prompts_are_read_once(
    policy, tokenizer, monkeypatch, rows
):
    rules = (Threshold(0.4), Sample(), Threshold(0.6), Fixed(3), OFF)
    request = GenerationRequest(PROMPTS, 2, SamplingParams(1.0, 12), rules[0], 4, rules[1:])
    prefill, read = Decoder.prefill, []

    def counted(decoder, tokens, lengths, *rest, **named):
        read.append(len(tokens))
        return prefill(decoder, tokens, lengths, *rest, **named)

    monkeypatch.setattr(Decoder, "prefill", counted)
    seen = []
    found = generate(policy, tokenizer, request, 0, lambda done, total: seen.append((done, total)), rows)
    # Where first tokens may exit, the shortest prompt has nothing to read before it runs.
    assert sum(read) == len(PROMPTS) - policy.layout.first_token
    assert seen[-1] == (70, 70) == (request.answers, request.answers) and request.per_prompt == 10
    for i, rule in enumerate(rules):
        alone = generate(policy, tokenizer, request.by(rule), 0, rows=rows)
        for group, expected in zip(found, alone, strict=True):
            for a, b in zip(group[2 * i : 2 * i + 2], expected, strict=True):
                assert all(np.array_equal(vars(a)[name], value) for name, value in vars(b).items())
    depths = [
        tuple(int(d) for group in found for a in group[2 * i : 2 * i + 2] for d in a.exit_depths) for i in range(5)
    ]
    assert len(set(depths)) == 5, "rules that differ"


@pytest.mark.parametrize("reading", [score, inspect, read_exits])
def test_the_teachers_own_answers_at_full_depth_are_read_once_and_as_by_two(path, tokenizer, monkeypatch, reading):
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    answers = flat(generate(decoder, tokenizer, GenerationRequest(PROMPTS, 2, SamplingParams(1.0, 12), OFF, 4), 0))
    decoder.load_policy(lively_policy(decoder))
    passes, parallel = [], Decoder._parallel

    def counted(one, *rest, **named):
        passes.append(one.gates is None)
        return parallel(one, *rest, **named)

    monkeypatch.setattr(Decoder, "_parallel", counted)
    found = [entry if reading is read_exits else vars(entry) for entry in reading(decoder, None, answers)]
    assert passes and all(passes) and decoder.gates is None, "by the teacher, whatever was loaded"
    once = len(passes)
    # One answer that left early, and each is read twice.
    early = replace(answers[-1], exit_depths=np.where(np.arange(answers[-1].length) > 0, 3, 6))
    others = reading(decoder, None, [*answers[:-1], early])[:-1]
    assert len(passes) == 3 * once
    for entry, other in zip(found[:-1], others, strict=True):
        if reading is read_exits:
            np.testing.assert_allclose(entry.divergences, other.divergences, atol=2e-5)
            continue
        pairs = {**entry, **vars(entry["score"]), "score": None} if reading is inspect else entry
        against = {**vars(other), **vars(other.score), "score": None} if reading is inspect else vars(other)
        for name, value in pairs.items():
            if value is not None:
                np.testing.assert_allclose(value, against[name], atol=2e-5, err_msg=name)
        assert pairs["exit_logprobs"].max() == 0 and (pairs.get("divergence") < 2e-5).all()


def test_divergences_of_exits_are_those_of_one_token_that_leaves_there_and_not_where_it_did(path, policy, tokenizer):
    answers = flat(
        generate(policy, tokenizer, GenerationRequest(PROMPTS[:3], 1, SamplingParams(1.0, 8), Sample(), 1), version=0)
    )
    teacher = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    known = 0
    read = read_exits(policy, lively_policy(policy), answers)
    inspected = inspect(policy, lively_policy(policy), answers)
    for rollout, (found, hazards), other in zip(answers, read, inspected, strict=True):
        sequence = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        lengths, first = torch.tensor([sequence.shape[1]]), len(rollout.prompt_tokens) - 1
        depths = torch.full_like(sequence, 6)
        depths[0, first : first + rollout.length] = torch.tensor(rollout.exit_depths).long()
        theirs = teacher.readout(teacher.forward_parallel(sequence, lengths)[0]).log_softmax(-1)
        assert found.shape == (rollout.length, 4) and found.dtype == np.float32
        np.testing.assert_array_equal(hazards, other.hazards)
        for t, taken in enumerate(rollout.exit_depths):
            for i, depth in enumerate(SPEC.layout.outcomes):
                if t == 0 or depth > taken:
                    assert np.isnan(found[t, i])
                    continue
                changed = depths.clone()
                changed[0, first + t] = depth
                ours = policy.readout(policy.forward_parallel(sequence, lengths, changed)[0, first + t]).log_softmax(-1)
                expected = (ours.exp() * (ours - theirs[first + t])).sum()
                np.testing.assert_allclose(found[t, i], expected, atol=2e-5)
                known += depth < taken
    assert known > 10


@pytest.mark.parametrize("exits", [Sample(), Threshold(0.5)], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_an_answer_prefilled_with_its_own_beginning_is_the_same_answer(policy, tokenizer, exits, rows):
    """Given tokens choose their exits as generated ones do: greedy answers can't tell the difference."""
    sampling = SamplingParams(0.0, 20)
    expected = flat(generate(policy, tokenizer, GenerationRequest(TALKED_ABOUT, 1, sampling, exits, 3), version=0))
    assert all(a.length > 3 + i for i, a in enumerate(expected))
    # The tiny tokenizer has one token per character, so texts cut anywhere are tokens cut there.
    texts = [tokenizer.decode(a.tokens[: 3 + i], clean_up_tokenization_spaces=False) for i, a in enumerate(expected)]
    begun = [replace(p, prefill=text) for p, text in zip(TALKED_ABOUT, texts, strict=True)]
    found = flat(generate(policy, tokenizer, GenerationRequest(begun, 1, sampling, exits, 3), version=0, rows=rows))
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.exit_depths, b.exit_depths)
        assert a.text == b.text and a.finished == b.finished
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-4)
        np.testing.assert_allclose(a.exit_logprobs, b.exit_logprobs, atol=1e-4)


def test_a_prefill_that_the_model_would_not_write_is_taken_and_scored(policy, tokenizer):
    forced = [replace(p, prefill=" 7 x 8") for p in PROMPTS]
    sampling = SamplingParams(1.0, 16, top_k=1)
    for answer in flat(generate(policy, tokenizer, GenerationRequest(forced, 1, sampling, Threshold(0.5), 0), 0)):
        assert answer.text.startswith(" 7 x 8") and answer.length > 6
        read = score(policy, lively_policy(policy), [answer])[0]
        np.testing.assert_allclose(answer.token_logprobs[:6], read.policy_logprobs[:6], atol=1e-4)


def test_a_prefill_that_leaves_nothing_to_say_is_refused(policy, tokenizer):
    asked = [replace(PROMPTS[0], prefill="12345")]
    with pytest.raises(ValueError, match="5"):
        generate(policy, tokenizer, GenerationRequest(asked, 1, SamplingParams(0.0, 5), OFF, 0), 0)
    with pytest.raises(ValueError, match="stop"):
        generate(policy, tokenizer, GenerationRequest(asked, 1, SamplingParams(0.0, 9, ("34",)), OFF, 0), 0)


def test_random_exits_have_the_shares_that_were_asked_for(policy, tokenizer):
    exits = Random(SHARES)
    answers = flat(
        generate(policy, tokenizer, GenerationRequest(PROMPTS, 12, SamplingParams(1.0, 24), exits, 2), version=0)
    )
    depths = np.concatenate([a.exit_depths[1:] for a in answers])
    found = np.array([(depths == d).mean() for d in (1, 3, 4, 6)])
    assert np.abs(found - SHARES).max() < 4 * np.sqrt(0.25 / len(depths)) and len(depths) > 1000
    # The token has no part in it: under other tokens the same place exits alike.
    other = flat(
        generate(policy, tokenizer, GenerationRequest(PROMPTS, 12, SamplingParams(0.0, 24), exits, 2), version=0)
    )
    for a, b in zip(answers, other, strict=True):
        shared = min(a.length, b.length)
        assert np.array_equal(a.exit_depths[:shared], b.exit_depths[:shared])
    never = Random((0.0, 1.0, 0.0, 0.0))
    answers = flat(generate(policy, tokenizer, GenerationRequest(PROMPTS, 1, SamplingParams(0.0, 9), never, 0), 0))
    assert {3} == {int(d) for answer in answers for d in answer.exit_depths[1:]}


def test_the_entropy_rule_exits_where_the_readout_is_sharp_enough(policy, tokenizer):
    asked = GenerationRequest(TALKED_ABOUT, 1, SamplingParams(0.0, 20), Entropy(ENTROPY), 0)
    taken = set()
    for rollout in flat(generate(policy, tokenizer, asked, 0)):
        tokens = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        start, depths = len(rollout.prompt_tokens) - 1, torch.full(tokens.shape, 6)
        depths[0, start : start + rollout.length] = torch.tensor(rollout.exit_depths)
        _, residuals = policy.forward_with_residuals(tokens, torch.tensor([tokens.shape[1]]), depths)
        for t in range(1, rollout.length):
            for depth, residual in zip((1, 3, 4), residuals, strict=True):
                p = policy.readout(residual[0, start + t]).softmax(-1)
                sharp = float(-(p * p.log()).sum()) < ENTROPY
                if depth <= rollout.exit_depths[t]:
                    assert sharp == (depth == rollout.exit_depths[t])
        taken |= set(rollout.exit_depths[1:].tolist())
    assert len(taken) > 1


def test_a_mixed_bound_is_one_or_the_other_token_by_token(policy, tokenizer):
    def run(rule):
        found = flat(generate(policy, tokenizer, GenerationRequest(PROMPTS, 6, SamplingParams(1.0, 24), rule, 4), 0))
        return np.concatenate([r.exit_depths[1:] for r in found])

    # At bound 0 every first gate fires, at 1 none: what is left is the draw.
    depths = run(Threshold(0.0, other=1.0, mix=0.25))
    assert set(depths) == {1, 6}
    assert abs((depths == 6).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(depths))
    assert np.array_equal(run(Entropy(ENTROPY, other=0.0, mix=1.0)), run(Entropy(0.0)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Threshold(0.3, mix=-0.5), "-0.5"),
        (lambda: Entropy(3, mix=1.5), "1.5"),
        (lambda: Random(), r"\[\]"),
        (lambda: Random((0.5, 0.6)), "0.6"),
        (lambda: Random((1.5, -0.5)), "-0.5"),
        (lambda: Entropy(-0.1), "-0.1"),
        (lambda: Random((0.5, 0.5)).check(SPEC.layout, True), r"\b2\b.*\b4\b"),
    ],
)
def test_impossible_controls_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
