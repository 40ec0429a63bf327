"""The engine: whatever arrives when and however rows are grouped, every answer is the one that it would be alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ee_megatron.exit_rules import Confidence, Fixed, Off, Prescribed, Sample, Threshold
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine.cache import PAGE
from ee_megatron.rollout.engine.layer_backends import TorchOps
from ee_megatron.rollout.engine.request import Event, Request
from ee_megatron.rollout.engine.scheduler import Scheduler, SegmentQueues
from ee_megatron.types import Rollout
from tests.reference import Reference, random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0)
OUTCOMES = (1, 3, 4, 6)
NO_STOP = frozenset({10**6})
EITHER = pytest.mark.parametrize(
    "decoder", [False, True], ids=["prompts never exit", "first token exits"], indirect=True
)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf(request.param, tmp_path_factory.mktemp(request.param), tied=False)


@pytest.fixture(scope="module")
def tokenizer(path: Path):
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def decoders(path: Path) -> list[Decoder]:
    """Two with the same weights; the second lets first tokens exit."""
    made = []
    for first_token in (False, True):
        made.append(Decoder.from_hf(path, replace(SPEC, first_token=first_token), torch.float32, "cpu"))
        made[-1].load_policy(random_policy(made[-1].dims, SPEC))
        made[-1].eos_ids = NO_STOP
    return made


@pytest.fixture
def decoder(decoders: list[Decoder], request: pytest.FixtureRequest) -> Decoder:
    return decoders[getattr(request, "param", False)]


@pytest.fixture
def read(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of every prefill, padding included."""
    made: list[int] = []
    real = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda tokens, *rest: made.append(tokens.numel()) or real(tokens, *rest))
    return made


def finish(scheduler: Scheduler, ids: list[int]) -> list[Rollout]:
    while scheduler.busy:
        scheduler.advance()
    return [scheduler.take(i, version=3) for i in ids]


def alone(decoder: Decoder, tokenizer, request: Request) -> Rollout:
    scheduler = Scheduler(decoder, tokenizer, in_flight=1)
    return finish(scheduler, [scheduler.add(request)])[0]


def same(a: Rollout, b: Rollout) -> None:
    assert a.tokens.tolist() == b.tokens.tolist() and a.exit_depths.tolist() == b.exit_depths.tolist()
    assert (a.text, a.finished) == (b.text, b.finished)
    for name in ("token_logprobs", "full_logprobs", "exit_logprobs"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-4)


def by_the_book(reference: Reference, rollout: Rollout, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a rollout's tokens and exits by the masked forward pass over the whole sequence."""
    tokens = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
    at = slice(len(rollout.prompt_tokens) - 1, tokens.shape[1] - 1)
    depths = torch.full_like(tokens, 6)
    depths[0, at] = torch.tensor(rollout.exit_depths).long()
    logp = (reference.logits(tokens, depths) / temperature).log_softmax(-1)[0, at]
    exits = reference.log_q(reference.gate_logits(tokens, depths), depths)[0, at]
    if not reference.spec.first_token:
        exits[0] = 0
    return logp.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0].numpy(), exits.numpy()


@st.composite
def traffic(draw):
    """Requests with prescribed exits: (prompt tokens, depths, after how many pieces of work it arrives); whether first
    tokens exit, how many requests are in flight and run together, positions of the cache. Some have one prompt."""
    asked, prompts, first_token = [], [], draw(st.booleans())
    for i in range(draw(st.integers(1, 9))):
        if not prompts or draw(st.booleans()):
            length = draw(st.one_of(st.integers(1, 12), st.integers(PAGE - 1, 2 * PAGE + 2)))
            prompts.append(draw(st.lists(st.integers(0, 127), min_size=length, max_size=length)))
        depths = draw(st.lists(st.sampled_from(OUTCOMES), min_size=0, max_size=9))
        first = draw(st.sampled_from(OUTCOMES)) if first_token else 6
        asked.append((draw(st.sampled_from(prompts)), [first, *depths], draw(st.integers(0, 12)) if i else 0))
    positions = draw(st.one_of(st.none(), st.integers(3 * PAGE, 8 * PAGE)))
    return asked, first_token, draw(st.integers(1, 6)), draw(st.integers(1, 6)), positions, draw(st.booleans())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(traffic())
def test_any_traffic_gives_the_masked_references_probabilities_and_runs_no_skipped_layer(
    path, decoders, tokenizer, case
):
    asked, first_token, in_flight, batch, positions, torch_ops = case
    decoder = decoders[first_token]
    reference = Reference(path, decoder.spec, random_policy(decoder.dims, SPEC))
    kept, ids = decoder.ops, []
    if torch_ops:
        decoder.use(TorchOps(decoder.dims))
    try:
        scheduler = Scheduler(decoder, tokenizer, in_flight, batch, positions)
        for i, (prompt, depths, wait) in enumerate(asked):
            for _ in range(wait):
                scheduler.advance()
            exits = Prescribed({(f"p{i}", 0): depths})
            ids.append(scheduler.add(Request(prompt, SamplingParams(1.0, len(depths)), exits, 7, f"p{i}")))
        answers = finish(scheduler, ids)
    finally:
        decoder.use(kept)
    for rollout, (prompt, depths, _) in zip(answers, asked, strict=True):
        assert rollout.exit_depths.tolist() == depths and rollout.prompt_tokens.tolist() == prompt
        tokens, exits = by_the_book(reference, rollout)
        np.testing.assert_allclose(rollout.token_logprobs, tokens, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(rollout.exit_logprobs, exits, atol=1e-4, rtol=1e-4)
    # Work done: what the exits prescribe (a first token that can't exit comes from reading the prompt), not rows times
    # layers.
    assert scheduler.row_layers == sum(sum(depths[not first_token :]) for _, depths, _ in asked)


def mixed_requests() -> list[Request]:
    kinds = [
        (SamplingParams(1.0, 12), Sample()),
        (SamplingParams(0.7, 20, top_k=9), Threshold(0.5)),
        (SamplingParams(0.0, 9), Fixed(3)),
        (SamplingParams(1.0, 15, ("a", "xy"), top_p=0.6), Off()),
        (SamplingParams(1.3, 14), Confidence(0.04)),
    ]
    texts = ["Q: 1 + 1 =", "abc", "Q: 1 + 1 =", "a much longer prompt than the others have", "x"]
    return [
        Request(texts[(i + k) % 5], *kinds[i], seed=k, prompt_id=f"p{i}", sample=k) for k in range(4) for i in range(5)
    ]


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.permutations(range(20)), st.integers(1, 25), st.integers(1, 25), st.booleans())
def test_requests_of_every_kind_answer_as_they_would_alone(decoders, tokenizer, order, in_flight, batch, first_token):
    requests, decoder = mixed_requests(), decoders[first_token]
    expected = [alone(decoder, tokenizer, request) for request in requests] if order[0] % 4 == 0 else None
    scheduler = Scheduler(decoder, tokenizer, in_flight, batch)
    ids = {}
    for n, i in enumerate(order):
        ids[i] = scheduler.add(requests[i])
        for _ in range(n % 3):
            scheduler.advance()
    answers = finish(scheduler, [ids[i] for i in range(20)])
    assert not scheduler.finished_rows and scheduler.free == in_flight
    for rollout, other in zip(answers, expected or [alone(decoder, tokenizer, r) for r in requests], strict=True):
        same(rollout, other)


def test_rows_at_different_tokens_and_depths_run_together(decoder, tokenizer):
    """Rows that got ahead of others share segments with them: batches are regrouped, not advanced in lock-step."""
    scheduler = Scheduler(decoder, tokenizer, in_flight=16, batch=4)
    generator = np.random.default_rng(0)
    for i in range(16):
        depths = [6, *generator.choice(OUTCOMES, 30)]
        exits = Prescribed({(f"p{i}", 0): depths})
        scheduler.add(Request([i + 1, 2, 3], SamplingParams(1.0, 31), exits, 0, f"p{i}"))
    sizes, spread = [], 0
    real = scheduler._run

    def watched(segment, rows):
        nonlocal spread
        sizes.append(len(rows))
        spread = max(spread, len({len(row.tokens) for row in rows}))
        return real(segment, rows)

    scheduler._run = watched
    # While all rows are in flight; at the end there is nobody left to wait for.
    while not scheduler.finished_rows:
        scheduler.advance()
    # In lock-step at mean depth 0.58 a batch of four would thin out to fewer than three rows on average.
    assert spread > 1 and np.mean(sizes) > 3.8


def test_requests_join_and_leave_a_running_engine(decoder, tokenizer):
    scheduler = Scheduler(decoder, tokenizer, in_flight=2)
    sampling = SamplingParams(1.0, 40)
    first, second, third = (scheduler.add(Request("abc", sampling, Sample(), 0, name)) for name in ("a", "b", "c"))
    for _ in range(10):
        scheduler.advance()
    assert {row.id for row in scheduler.queues} == {first, second}
    assert scheduler.cancel(first) and scheduler.cancel(third) and not scheduler.cancel(first)
    late = scheduler.add(Request("abc", SamplingParams(1.0, 5), Sample(), 0, "d"))
    events: list[Event] = []
    while scheduler.busy:
        events.extend(scheduler.advance())
    assert {event.request for event in events} == {second, late}
    assert [e.finished for e in events if e.request == late] == [None] * 4 + ["length"]
    with pytest.raises(KeyError):
        scheduler.take(first, 0)
    same(
        scheduler.take(late, 0),
        alone(decoder, tokenizer, Request("abc", SamplingParams(1.0, 5), Sample(), 0, "d")),
    )
    assert scheduler.cancel(second) and not scheduler.finished_rows and scheduler.free == 2


def test_events_stream_the_answer(decoder, tokenizer):
    requests = [Request(r.prompt, r.sampling, r.exits, r.seed, r.prompt_id, r.sample, True) for r in mixed_requests()]
    scheduler = Scheduler(decoder, tokenizer, in_flight=7)
    ids = [scheduler.add(request) for request in requests]
    events: dict[int, list[Event]] = {i: [] for i in ids}
    while scheduler.busy:
        for event in scheduler.advance():
            events[event.request].append(event)
    for i in ids:
        rollout = scheduler.take(i, 0)
        assert "".join(event.text for event in events[i]) == rollout.text
        assert [event.token for event in events[i]] == rollout.tokens.tolist()
        assert [event.depth for event in events[i]] == rollout.exit_depths.tolist()
        np.testing.assert_allclose([event.full_logprob for event in events[i]], rollout.full_logprobs, rtol=1e-6)
        assert events[i][-1].finished == ("stop" if rollout.finished else "length")


@pytest.mark.parametrize(
    "sampling", [SamplingParams(0.7, 25), SamplingParams(1.0, 25, top_k=4), SamplingParams(1.0, 25, top_p=0.4)]
)
def test_truncated_sampling_records_both_log_probabilities(path, decoder, tokenizer, sampling):
    rollout = alone(decoder, tokenizer, Request("abc", sampling, Sample(), 1, "p"))
    reference = Reference(path, SPEC, random_policy(decoder.dims, SPEC))
    expected, _ = by_the_book(reference, rollout, sampling.temperature)
    np.testing.assert_allclose(rollout.full_logprobs, expected, atol=1e-4)
    # Cutting the tail off gives what is left more weight.
    cut = sampling.top_k or sampling.top_p < 1
    assert (rollout.token_logprobs > rollout.full_logprobs + 0.1).all() == bool(cut)
    assert cut or np.array_equal(rollout.token_logprobs, rollout.full_logprobs)


def test_prescribed_tokens_are_recorded_under_the_temperature(path, decoder, tokenizer):
    given = [5, 90, 17, 64]
    rollout = alone(decoder, tokenizer, Request("abc", SamplingParams(0.7, 8), Sample(), 1, "p", prefill=given))
    assert rollout.tokens[:4].tolist() == given and rollout.length == 8
    expected, _ = by_the_book(Reference(path, SPEC, random_policy(decoder.dims, SPEC)), rollout, 0.7)
    for found in (rollout.token_logprobs, rollout.full_logprobs):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_equal_prompts_and_a_common_beginning_are_read_once(decoder, tokenizer, read):
    scheduler = Scheduler(decoder, tokenizer, in_flight=3)
    head = list(range(1, 51))
    ids = [
        scheduler.add(Request([*head, 60 + p], SamplingParams(1.0, 3), seed=0, prompt_id=str(p), sample=k))
        for p in range(4)
        for k in range(5)
    ]
    apart = scheduler.add(Request([9, 9], SamplingParams(1.0, 3)))
    scheduler.share_prefix(head)
    answers = finish(scheduler, [*ids, apart])
    assert sum(read) == 50 + 4 + 2 and not scheduler.prefiller._read
    same(answers[7], alone(decoder, tokenizer, Request([*head, 61], SamplingParams(1.0, 3), prompt_id="1", sample=2)))


@EITHER
@pytest.mark.parametrize("common", [0, 20], ids=["a prompt of its own", "a common beginning"])
@pytest.mark.parametrize("length", [5 * PAGE, 5 * PAGE + 1, 5 * PAGE + 3])
def test_a_group_computes_and_holds_its_prompt_once(length, common, decoder, tokenizer, read):
    """Whole pages of it; answers lie behind, each in pages of its own, and so does what exits of the prompt."""
    prompt, group = [1 + i % 90 for i in range(length)], 8
    once = length - decoder.layout.first_token
    asked = [Request(prompt, SamplingParams(1.0, 3 + 9 * k), Sample(), 0, "p", k) for k in range(group)]
    # Three rows wait: they join when others have left.
    scheduler = Scheduler(decoder, tokenizer, in_flight=5)
    ids = [scheduler.add(request) for request in asked]
    scheduler.share_prefix(prompt[:common])
    while scheduler.busy:
        scheduler.advance()
        rows = list(scheduler.queues)
        whole = once // PAGE
        own = sum(max(1, -(-row.length // PAGE) - whole) for row in rows)
        assert not rows or whole < scheduler.cache.used <= whole + own
        tables = {tuple(scheduler.cache.table[row.slot, :whole].tolist()) for row in rows}
        assert len(tables) == (len(rows) > 0)
    assert sum(read) == once and not scheduler.cache.used and not scheduler.slots.together
    for i, request in zip(ids, asked, strict=True):
        same(scheduler.take(i, 0), alone(decoder, tokenizer, request))


def test_a_bounded_cache_counts_what_a_group_shares_once(decoder, tokenizer):
    prompt, group = [1 + i % 90 for i in range(8 * PAGE)], 8
    asked = [Request(prompt, SamplingParams(1.0, PAGE), Sample(), 0, "p", k) for k in range(group)]
    other = Request(prompt[::-1], SamplingParams(1.0, PAGE), Sample(), 0, "q")
    # Eight pages of the prompt and one for each answer; with copies it would be one answer at a time.
    scheduler = Scheduler(decoder, tokenizer, in_flight=group + 1, positions=(8 + group) * PAGE)
    ids = [scheduler.add(request) for request in [*asked, other]]
    scheduler.advance()
    assert len(scheduler.queues) == group and scheduler.waiting[0].request is other
    answers = finish(scheduler, ids)
    assert scheduler.cache.pages <= 8 + group
    for answer, request in zip(answers, [*asked, other], strict=True):
        same(answer, alone(decoder, tokenizer, request))


def test_answers_of_one_token_take_no_page(decoder, tokenizer):
    """Where prompts never exit, it comes from reading the prompt."""
    scheduler = Scheduler(decoder, tokenizer, in_flight=3)
    one = [Request([n, 2, 3], SamplingParams(1.0, 1), Sample(), 0, str(n)) for n in range(7)]
    answers = finish(scheduler, [scheduler.add(request) for request in one])
    assert [answer.length for answer in answers] == [1] * 7
    assert not scheduler.cache.pages and scheduler.free == 3


def test_many_prompts_are_read_a_bounded_number_of_positions_at_a_time(decoder, tokenizer, read, monkeypatch):
    requests = [Request([n + 1] * (n % 17 + 1), SamplingParams(1.0, 4), prompt_id=str(n)) for n in range(40)]
    monkeypatch.setattr("ee_megatron.rollout.engine.model_runner.PREFILL_POSITIONS", 20)
    scheduler = Scheduler(decoder, tokenizer, in_flight=40)
    answers = finish(scheduler, [scheduler.add(request) for request in requests])
    assert max(read) <= 20 and sum(read) >= sum(len(r.prompt) for r in requests)
    for rollout, request in zip(answers, requests, strict=True):
        same(rollout, alone(decoder, tokenizer, request))


def test_a_nearly_empty_queue_waits_and_no_row_waits_for_ever():
    def queues(batch: int, *counts: int) -> SegmentQueues:
        made = SegmentQueues(3, batch)
        for queue, count in enumerate(counts):
            for number in range(count):
                made.put(queue, number)  # type: ignore[arg-type]
        return made

    nearly = queues(100, 37, 3)
    assert nearly.pick() == (0, list(range(37)))
    nearly.queues[0].clear()
    assert nearly.pick() == (1, [0, 1, 2])
    assert queues(4, 5, 6, 3).pick() == (1, [0, 1, 2, 3]), "the deepest full one"


def test_a_request_that_fails_can_be_cancelled_and_the_others_go_on(decoder, tokenizer):
    scheduler = Scheduler(decoder, tokenizer, in_flight=4)
    good = Request("abc", SamplingParams(1.0, 30), Sample(), 0, "good")
    short = Request("abc", SamplingParams(1.0, 30), Prescribed({("bad", 0): [6, 3, 6]}), 0, "bad")
    kept, bad = scheduler.add(good), scheduler.add(short)
    with pytest.raises(ValueError, match=r"\('bad', 0\).*\b3\b"):
        finish(scheduler, [kept])
    assert scheduler.cancel(bad)
    same(finish(scheduler, [kept])[0], alone(decoder, tokenizer, good))


@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_memory_follows_the_tokens_that_are_there(decoder, tokenizer, platform, monkeypatch):
    """While rows come and go and while they only go; elsewhere than on Linux the pool is copied to change its size."""
    monkeypatch.setattr("sys.platform", platform)
    scheduler = Scheduler(decoder, tokenizer, in_flight=128)
    monkeypatch.undo()
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(4.6, 0.7, 150).clip(8, 400).astype(int).tolist()
    for i, (n, prompt) in enumerate(zip(lengths, generator.integers(20, 100, 150).tolist(), strict=True)):
        scheduler.add(Request([1 + i % 9] * prompt, SamplingParams(1.0, n), Fixed(1), 0, f"p{i}"))
    held, there = [], []
    while scheduler.busy:
        scheduler.advance()
        there.append(sum(row.length for row in scheduler.queues))
        held.append(sum(layer.numel() for layer in scheduler.cache.layers) // scheduler.decoder.dims.num_layers)
    held, there = np.array(held) / scheduler.cache.layers[0][0].numel() * PAGE, np.array(there)
    # A few rows' worth of positions: then a page's rest is a larger share of so little.
    many = there > there.max() / 10
    assert there.max() > 128 * 80 and many.sum() > 400
    assert (held[many] / there[many]).max() < 1.2 and held.max() < 1.15 * there.max()
    assert scheduler.cache.pages < 20 and not scheduler.cache.held.any()


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    order=st.permutations(range(20)),
    positions=st.integers(80, 200),
    in_flight=st.integers(1, 25),
    mapped=st.booleans(),
    first_token=st.booleans(),
)
def test_a_bounded_cache_gives_the_same_answers_and_is_never_exceeded(
    decoders, tokenizer, order, positions, in_flight, mapped, first_token
):
    """Requests that wait for pages, pages that were others' before and pages that moved change nothing."""
    requests, decoder = mixed_requests(), decoders[first_token]
    scheduler = Scheduler(decoder, tokenizer, in_flight, positions=positions)
    if not mapped:
        scheduler.cache._maps = []
    ids = {i: scheduler.add(requests[i]) for i in order}
    together = 0
    while scheduler.busy:
        scheduler.advance()
        together = max(together, len(scheduler.queues))
        assert scheduler.cache.pages <= positions // PAGE
    assert together <= in_flight and (together > 1 or in_flight == 1)
    for i in order[:4]:
        same(scheduler.take(ids[i], 0), alone(decoder, tokenizer, requests[i]))


def test_what_the_engine_cannot_hold_is_refused(decoder, tokenizer):
    with pytest.raises(ValueError, match="0"):
        Scheduler(decoder, tokenizer, 0)
    with pytest.raises(ValueError, match=r"\b16\b"):
        Scheduler(decoder, tokenizer, 1, positions=15)
    with pytest.raises(ValueError, match=r"\b41\b.*\b32\b"):
        Scheduler(decoder, tokenizer, 1, positions=40).add(Request([1], SamplingParams(1.0, 40)))
