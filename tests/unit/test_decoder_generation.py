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
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from ee_megatron.exit_rules import Confidence, Entropy, ExitRule, Fixed, Off, Patience, Random, Sample, Threshold
from ee_megatron.exits import exit_distribution
from ee_megatron.families import FAMILIES
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.rollout import Decoder, GenerationRequest, SamplingParams, generate
from ee_megatron.rollout.engine import scoring
from ee_megatron.rollout.engine.generation import answer_requests
from ee_megatron.rollout.engine.request import Request, StopChecker
from ee_megatron.rollout.engine.sampling import sample_tokens, stream_key, uniforms
from ee_megatron.rollout.engine.scheduler import Scheduler
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


def answers_of(
    decoder: Decoder, prompts: list[Prompt], samples: int, sampling: SamplingParams, exits: ExitRule, seed: int = 0,
    rows: int = 64,
) -> list[Rollout]:  # fmt: skip
    request = GenerationRequest(prompts, samples, sampling, exits, seed)
    return flat(generate(decoder, tiny_tokenizer(), request, version=4, rows=rows))


def same(found: list[Rollout], expected: list[Rollout]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.prompt_id, a.text, a.finished) == (b.prompt_id, b.text, b.finished)
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.exit_depths, b.exit_depths)
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-4)
        np.testing.assert_allclose(a.exit_logprobs, b.exit_logprobs, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers(tmp_path, family):
    path = tiny_hf(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    for rows, prompts in [(3, PROMPTS), (64, SHARED)]:
        answers = answers_of(decoder, prompts, 1, SamplingParams(0.0, 30), OFF, rows=rows)
        for prompt, rollout in zip(prompts, answers, strict=True):
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
def test_a_seed_gives_the_same_answers_whatever_the_batching(policy, exits, prompts):
    def run(asked, rows, seed=1):
        return answers_of(policy, asked, 3, SamplingParams(1.0, 20), exits, seed, rows)

    expected = run(prompts, 1)
    same(run(prompts, 3), expected)
    same(run(prompts, 64), expected)
    same(sorted(run(prompts[::-1], 5), key=lambda r: r.prompt_id), expected)
    same([rollout for p in prompts for rollout in run([p], 2)], expected)
    depths = {int(depth) for r in expected for depth in r.exit_depths[1:]}
    assert depths == {1, 3, 4, 6} or not isinstance(exits, Sample)
    first = {int(r.exit_depths[0]) for r in expected}
    assert len(depths) > 1 and (min(first) < 6 if policy.layout.first_token else first == {6})
    other = run(prompts, 8, 2)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(other, expected, strict=True))
    assert len({tuple(r.tokens) for r in expected[:3]}) > 1


@EITHER
@pytest.mark.parametrize("exits", [Sample(), Threshold(0.5), Fixed(3), OFF], ids=str)
def test_recorded_logprobs_equal_rescoring_under_the_recorded_exits(policy, exits):
    answers = answers_of(policy, PROMPTS, 4, SamplingParams(1.0, 24), exits, 2, rows=6)
    scores = score(policy, lively_policy(policy), answers)
    for rollout, entry in zip(answers, scores, strict=True):
        np.testing.assert_allclose(rollout.token_logprobs, entry.policy_logprobs, atol=2e-4)
        np.testing.assert_allclose(rollout.exit_logprobs, entry.exit_logprobs, atol=2e-4)
        free = 0 if policy.layout.first_token else 1
        assert not rollout.exit_logprobs[:free].any()
        if isinstance(exits, Fixed):
            assert (rollout.exit_depths[free:] == 3).all()
        assert (rollout.exit_logprobs[free:] < 0).all()


@EITHER
def test_exits_are_sampled_with_the_gates_probabilities(policy):
    at = 0 if policy.layout.first_token else 1
    answers = answers_of(policy, PROMPTS[1:2], 2000, SamplingParams(0.0, 1 + at), Sample(), rows=256)
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


PENALISED = [
    SamplingParams(0.0, 24, repetition_penalty=1.6),
    SamplingParams(0.0, 24, presence_penalty=-1.5, frequency_penalty=0.7),
    SamplingParams(0.8, 24, repetition_penalty=0.7, frequency_penalty=1.1),
    SamplingParams(1.3, 24, min_p=0.4, presence_penalty=1.9, top_p=0.95),
    SamplingParams(1.0, 24, min_p=0.6),
]


def processed(logits: torch.Tensor, params: SamplingParams, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits [1, V] by transformers' processors, and by OpenAI's formula of the two penalties that it lacks."""
    logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([[*prompt, *answer]]), logits)
    for token in set(answer):
        logits[0, token] -= params.presence_penalty + answer.count(token) * params.frequency_penalty
    if not params.temperature:
        return logits
    logits = TemperatureLogitsWarper(params.temperature)(None, logits)
    return MinPLogitsWarper(params.min_p)(None, logits) if params.min_p else logits


@pytest.mark.parametrize("params", PENALISED, ids=str)
def test_penalties_and_min_p_draw_from_the_distribution_of_transformers_processors(params):
    logits = 2 * torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
    histories = [([1, 2, 2], [3, 3, 3, 4]), ([5] * 9, []), ([0], [11, 0, 11, 11])]
    draws, before = 8000, logits.clone()
    keys = np.array([stream_key(0, "p", k) for k in range(draws)], dtype=np.uint64)
    uniform = torch.from_numpy(uniforms(keys, np.zeros(draws, dtype=int), 1)[:, -1])
    for row, history in enumerate(histories):
        wanted = processed(logits[row : row + 1].clone(), params, *history)[0]
        best, own, full = sample_tokens(logits, params, uniform[:3], histories)
        if params.temperature == 0:
            assert best[row] == wanted.argmax()
            assert own[row].item() == pytest.approx(wanted.log_softmax(-1).max().item(), abs=1e-5)
            assert full[row].item() == pytest.approx(logits[row].log_softmax(-1)[best[row]].item(), abs=1e-5)
            continue
        if params.top_p < 1:
            order = wanted.softmax(-1).sort(descending=True)
            wanted[order.indices[order.values.cumsum(0) - order.values >= params.top_p]] = float("-inf")
        expected = wanted.softmax(-1)
        many = logits[row].expand(draws, -1)
        tokens, logprobs, full = sample_tokens(many, params, uniform, [history] * draws)
        np.testing.assert_allclose(np.bincount(tokens, minlength=12) / draws, expected, atol=0.02)
        np.testing.assert_allclose(logprobs, expected.log()[tokens], atol=1e-5)
        np.testing.assert_allclose(full, (logits[row] / params.temperature).log_softmax(-1)[tokens], atol=1e-5)
    assert torch.equal(logits, before)


def test_answers_with_penalties_have_the_probabilities_of_transformers_whatever_the_batch(path, tokenizer):
    """Rows of different penalties beside each other, and beside rows without any, which answer as alone."""
    decoder = Decoder.from_hf(path, PolicySpec(6, (), rank=0), torch.float32, "cpu")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [tokenizer(prompt.text).input_ids for prompt in TALKED_ABOUT]
    kinds = [*PENALISED, SamplingParams(1.0, 24)]
    requests = [Request(prompts[i], params, OFF, 3, str(i)) for i, params in enumerate(kinds)]
    together = answer_requests(Scheduler(decoder, tokenizer, 4), requests, 0)
    for request, found in zip(requests, together, strict=True):
        params, answer = request.sampling, found.tokens.tolist()
        same([found], answer_requests(Scheduler(decoder, tokenizer, 1), [request], 0))
        with torch.inference_mode():
            logits = model(torch.tensor([[*request.prompt, *answer]])).logits[0, len(request.prompt) - 1 : -1]
        for t, token in enumerate(answer):
            wanted = processed(logits[t : t + 1].clone(), params, request.prompt, answer[:t])[0]
            if params.top_p == 1:
                assert found.token_logprobs[t] == pytest.approx(wanted.log_softmax(-1)[token].item(), abs=1e-4)
            assert params.temperature or wanted[token] == wanted.max()
            raw = (logits[t] / (params.temperature or 1)).log_softmax(-1)
            assert found.full_logprobs[t] == pytest.approx(raw[token].item(), abs=1e-4)
    greedy = model.generate(
        torch.tensor([prompts[0]]), do_sample=False, max_new_tokens=24, repetition_penalty=1.6, pad_token_id=129
    )
    assert greedy[0, len(prompts[0]) :].tolist() == together[0].tokens.tolist()
    assert len(set(together[0].tokens.tolist())) > 12


def test_a_stop_token_ends_an_answer_and_stays_in_it(policy):
    free = answers_of(policy, PROMPTS, 1, SamplingParams(1.0, 40), Sample(), 5)
    ends = {int(rollout.tokens[7]) for rollout in free if rollout.length > 8}
    stopped = answers_of(policy, PROMPTS, 1, SamplingParams(1.0, 40, stop_token_ids=tuple(ends)), Sample(), 5)
    for long, short in zip(free, stopped, strict=True):
        at = next((t for t, token in enumerate(long.tokens.tolist()) if token in ends), long.length - 1)
        assert short.tokens.tolist() == long.tokens[: at + 1].tolist() and long.text.startswith(short.text)
    assert sum(short.finished for short in stopped) > sum(long.finished for long in free)


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


def test_generation_ends_at_a_stop_string(policy):
    free = answers_of(policy, PROMPTS, 1, SamplingParams(1.0, 40), Sample(), 5)
    stop = tuple({r.text[6:8] for r in free if len(r.text) > 10})
    stopped = answers_of(policy, PROMPTS, 1, SamplingParams(1.0, 40, stop), Sample(), 5, rows=3)
    assert sum(r.finished for r in stopped) > sum(r.finished for r in free)
    for long, short in zip(free, stopped, strict=True):
        assert long.tokens[: short.length].tolist() == short.tokens.tolist()
        assert not any(s in short.text for s in stop) and long.text.startswith(short.text)


def test_trace_equals_its_definition(path):
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    answers = answers_of(decoder, PROMPTS, 2, SamplingParams(0.8, 12), OFF)
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


def test_score_measures_the_divergence_from_the_teacher_and_leaves_the_policy_loaded(path, policy):
    answers = answers_of(policy, PROMPTS, 1, SamplingParams(1.0, 12), Sample())
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


def columns(entry) -> dict:
    """The arrays of a record, and of the score in it."""
    fields = entry._asdict() if hasattr(entry, "_asdict") else vars(entry)
    return {**vars(fields["score"]), **fields, "score": None} if "score" in fields else fields


READINGS = {
    "score": lambda decoder, answers: score(decoder, lively_policy(decoder), answers),
    "exits": lambda decoder, answers: read_exits(decoder, lively_policy(decoder), answers),
    "inspect": lambda decoder, answers: inspect(decoder, lively_policy(decoder), answers, True),
    "trace": lambda decoder, answers: trace(decoder, answers, 5),
}


@EITHER
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("passing", [0, 12])
def test_answers_are_read_as_each_would_be_alone_and_a_prompt_that_they_share_once(
    policy, monkeypatch, reading, passing
):
    """Groups that are read in parts, and one answer that shares its prompt with none. `passing`: what a pass costs
    beside its positions; if anything, prompts are read together as far as the shortest of them goes."""
    first, *others = answers_of(policy, PROMPTS, 5, SamplingParams(1.0, 12), Sample(), 4)
    answers = [first, *others[4:]]
    answers = [answers[i] for i in np.random.default_rng(0).permutation(len(answers))]
    policy.load_policy(lively_policy(policy))
    parallel, prefill, read, begun = Decoder._parallel, Decoder.prefill, [], []

    def counted(decoder, tokens, lengths, *rest, **named):
        read.append(int(lengths.sum()))
        return parallel(decoder, tokens, lengths, *rest, **named)

    def counted_prefill(decoder, tokens, lengths):
        begun.append(len(tokens))
        return prefill(decoder, tokens, lengths)

    monkeypatch.setattr(Decoder, "prefill", counted_prefill)
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
        for name, value in columns(expected).items():
            if isinstance(value, np.ndarray):
                # Streams are float16.
                atol = 1e-3 if name == "streams" else 2e-5
                np.testing.assert_allclose(columns(found)[name], value, atol=atol, err_msg=name)
            else:
                assert columns(found)[name] == value


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
def test_the_teachers_own_answers_at_full_depth_are_read_once_and_as_by_two(path, monkeypatch, reading):
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    answers = answers_of(decoder, PROMPTS, 2, SamplingParams(1.0, 12), OFF, 4)
    decoder.load_policy(lively_policy(decoder))
    passes, parallel = [], Decoder._parallel

    def counted(one, *rest, **named):
        passes.append(one.gates is None)
        return parallel(one, *rest, **named)

    monkeypatch.setattr(Decoder, "_parallel", counted)
    found = reading(decoder, None, answers)
    assert passes and all(passes) and decoder.gates is None, "by the teacher, whatever was loaded"
    once = len(passes)
    # One answer that left early, and each is read twice.
    early = replace(answers[-1], exit_depths=np.where(np.arange(answers[-1].length) > 0, 3, 6))
    others = reading(decoder, None, [*answers[:-1], early])[:-1]
    assert len(passes) == 3 * once
    for entry, other in zip(map(columns, found[:-1]), map(columns, others), strict=True):
        for name, value in entry.items():
            if value is not None:
                np.testing.assert_allclose(value, other[name], atol=2e-5, err_msg=name)
        assert reading is read_exits or (entry["exit_logprobs"].max() == 0 and (entry["divergence"] < 2e-5).all())


def test_divergences_of_exits_are_those_of_one_token_that_leaves_there_and_not_where_it_did(path, policy):
    answers = answers_of(policy, PROMPTS[:3], 1, SamplingParams(1.0, 8), Sample(), 1)
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
    expected = answers_of(policy, TALKED_ABOUT, 1, sampling, exits, 3)
    assert all(a.length > 3 + i for i, a in enumerate(expected))
    # The tiny tokenizer has one token per character, so texts cut anywhere are tokens cut there.
    texts = [tokenizer.decode(a.tokens[: 3 + i], clean_up_tokenization_spaces=False) for i, a in enumerate(expected)]
    begun = [replace(p, prefill=text) for p, text in zip(TALKED_ABOUT, texts, strict=True)]
    same(answers_of(policy, begun, 1, sampling, exits, 3, rows), expected)


def test_random_exits_have_the_shares_that_were_asked_for(policy):
    answers = answers_of(policy, PROMPTS, 12, SamplingParams(1.0, 24), Random(SHARES), 2)
    depths = np.concatenate([a.exit_depths[1:] for a in answers])
    found = np.array([(depths == d).mean() for d in (1, 3, 4, 6)])
    assert np.abs(found - SHARES).max() < 4 * np.sqrt(0.25 / len(depths)) and len(depths) > 1000
    # The token has no part in it: under other tokens the same place exits alike.
    for a, b in zip(answers, answers_of(policy, PROMPTS, 12, SamplingParams(0.0, 24), Random(SHARES), 2), strict=True):
        shared = min(a.length, b.length)
        assert np.array_equal(a.exit_depths[:shared], b.exit_depths[:shared])


@pytest.mark.parametrize(
    ("prompt", "sampling", "exits", "named"),
    [
        (PROMPTS[0], SamplingParams(), Fixed(2), "2"),
        (PROMPTS[0], SamplingParams(1.0, 600), OFF, "512"),
        (Prompt("e", "", "", ""), SamplingParams(), OFF, "tokens"),
        (replace(PROMPTS[0], prefill="12345"), SamplingParams(0.0, 5), OFF, "5"),
        (replace(PROMPTS[0], prefill="12345"), SamplingParams(0.0, 9, ("34",)), OFF, "stop"),
    ],
)
def test_impossible_requests_are_refused(policy, prompt, sampling, exits, named):
    with pytest.raises(ValueError, match=named):
        answers_of(policy, [prompt], 1, sampling, exits)
