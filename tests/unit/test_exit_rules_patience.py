"""The patience rule against a brute force: every exit's readout by the parallel forward, choices counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ee_megatron.exit_rules import AtExit, DialRange, Patience, make_rule, parse
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.sampling import stream_key, uniforms
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.types import Rollout
from tests.reference import random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (1, 2, 3, 4, 5), rank=4, alpha=8.0)
M, SEED = 5, 3
# The cached and the parallel forward round differently: first choices nearer than this may be either's.
TIE = 1e-4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("llama", tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def tokenizer(path: Path):
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def decoder(path: Path) -> Decoder:
    made = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    made.load_policy(random_policy(made.dims, SPEC))
    made.eos_ids = frozenset({10**6})
    return made


def first_choices(decoder: Decoder, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Of every token but the first: each exit's most probable token [T-1, M], and by how much it leads.

    Beyond the exit that was taken the stream is frozen, so that only those up to it mean something.
    """
    tokens = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
    at = torch.arange(len(rollout.prompt_tokens), tokens.shape[1] - 1)
    depths = torch.full_like(tokens, 6)
    depths[0, at] = torch.tensor(rollout.exit_depths[1:]).long()
    _, residuals = decoder.forward_with_residuals(tokens, torch.tensor([tokens.shape[1]]), depths)
    best = torch.stack([decoder.readout(r[0, at]) for r in residuals], dim=1).topk(2)
    return best.indices[..., 0].numpy(), (best.values[..., 0] - best.values[..., 1]).numpy()


def by_hand(choices: list[int], patience: int) -> int:
    """The depth at which the last `patience` choices are first the same; 6 if they never are."""
    for i in range(len(choices)):
        last = choices[max(0, i - patience + 1) : i + 1]
        if len(last) == patience and len(set(last)) == 1:
            return SPEC.exit_depths[i]
    return 6


@pytest.mark.parametrize(
    ("choices", "depths"),
    [
        ([7, 7, 7, 7, 7], [1, 2, 3, 4, 5, 6]),
        ([7, 8, 8, 7, 7], [1, 3, 6, 6, 6, 6]),
        ([0, 0, 9, 9, 9], [1, 2, 5, 6, 6, 6]),
    ],
)
def test_a_choice_counts_as_long_as_it_stands(choices: list[int], depths: list[int]) -> None:
    """For n = 1 to 6; token 0 is one like any other, although the memory begins with zeros."""
    for patience, depth in enumerate(depths, 1):
        rule, left = Patience(patience), 6
        notes = torch.zeros(2, rule.notes, dtype=torch.float64)
        for i, choice in enumerate(choices):
            # The second row's first choice is another at every exit.
            logits = torch.eye(10)[[choice, i]]
            at = AtExit(i, i + 1, torch.zeros(2), lambda logits=logits: logits, lambda _: torch.zeros(2), list, notes)
            fired = rule.fires(at).tolist()
            assert fired[1] == (patience == 1)
            left = i + 1 if fired[0] and left == 6 else left
        assert left == depth == by_hand(choices, patience)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@example([("2", 1, 0), ("1", 1, 0.4)], 2, 1)
@given(
    st.lists(
        st.tuples(st.text("abcdef123 ", min_size=1, max_size=9), st.integers(1, M + 1), st.sampled_from([0, 0.4, 1])),
        min_size=1, max_size=6,
    ),
    st.integers(1, 6), st.integers(1, 6),
)  # fmt: skip
def test_any_traffic_leaves_where_a_brute_force_says(decoder, tokenizer, asked, in_flight, batch) -> None:
    scheduler = Scheduler(decoder, tokenizer, in_flight, batch)
    rules = [Patience(n, other=n % 3 + 1, mix=mix) for _, n, mix in asked]
    ids = [
        scheduler.add(Request(text, SamplingParams(1.0, 12), rule, SEED, f"p{i}"))
        for i, ((text, _, _), rule) in enumerate(zip(asked, rules, strict=True))
    ]
    while scheduler.busy:
        scheduler.advance()
    for i, rule in enumerate(rules):
        rollout = scheduler.take(ids[i], 0)
        choices, leads = first_choices(decoder, rollout)
        for t, depth in enumerate(rollout.exit_depths[1:].tolist()):
            key = np.array([stream_key(SEED, f"p{i}", 0)], dtype=np.uint64)
            drawn = uniforms(key, np.array([t + 1]), M + 1)[0, 0]
            patience = rule.other if drawn < rule.mix else rule.value
            asked_exits = [d <= depth for d in SPEC.exit_depths]
            if leads[t][asked_exits].min() > TIE:
                assert by_hand(choices[t].tolist(), int(patience)) == depth


def test_with_patience_tokens_leave_everywhere_and_later_with_more(decoder, tokenizer) -> None:
    depths = []
    for patience in range(1, M + 2):
        scheduler = Scheduler(decoder, tokenizer, 8)
        for k in range(8):
            scheduler.add(Request("abc", SamplingParams(1.0, 30), Patience(patience), k, "p"))
        while scheduler.busy:
            scheduler.advance()
        found = np.concatenate([scheduler.finished[i].exit_depths[1:] for i in range(8)])
        # The choice of n exits can stand at the n-th at the earliest.
        assert set(found) <= {*range(patience, 6), 6}
        depths.append(found)
    assert set(depths[0]) == {1} and set(depths[M]) == {6}
    assert len(set(depths[1])) > 2 and np.all(np.diff([d.mean() for d in depths]) > 0)


def test_the_dial_runs_through_all_patiences_and_the_mixtures_between() -> None:
    dial = Patience.dial(DialRange((1, 2, 3, 4, 5, 6), 130, (1 / 6,) * 6))
    assert [dial(n / M) for n in range(M + 1)] == [Patience(n + 1) for n in range(M + 1)]
    assert dial(0.5) == Patience(3, other=4, mix=0.5) and dial(0.5).label == "patience 3 (or 4: 50%)"
    means = [dial(p).mean for p in np.linspace(0, 1, 41)]
    np.testing.assert_allclose(means, np.linspace(1, M + 1, 41))
    shallow, deep = dial(0.1), dial(0.9)
    assert [shallow.mixed(deep, share).mean for share in (0, 0.5, 1)] == pytest.approx([1.5, 3.5, 5.5])


def test_patience_is_written_as_a_whole_number_of_exits() -> None:
    assert parse("patience") == parse("patience:2") == make_rule("patience", 2.0) == Patience() == Patience(2)
    assert str(Patience(3)) == "patience:3" and Patience(3).to_json() == {"kind": "patience", "value": 3}
    assert Patience().label == "patience 2"
    for wrong in (0, -1, 1.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{wrong:g}"):
            Patience(wrong)
    with pytest.raises(ValueError, match=r"2\.5"):
        Patience(2, other=2.5, mix=0.5)
