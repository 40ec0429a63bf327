"""Exit rules as values: what they look at, their forms, their memory, and that all who name rules name the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ee_megatron import cli
from ee_megatron.checkpoint.export_files.configuration_early_exit import POLICY_KINDS, check_exit_policy
from ee_megatron.exit_rules import (
    CONTROLS,
    OFFERED,
    RULES,
    AtExit,
    Bound,
    Confidence,
    DialRange,
    Entropy,
    ExitRule,
    Fixed,
    Off,
    Patience,
    Prescribed,
    Random,
    Sample,
    Threshold,
    make_rule,
    parse,
    usage,
)
from ee_megatron.exits import ExitLayout
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.sampling import stream_key, uniforms
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.server.protocol import CompletionRequest
from ee_megatron.types import Rollout
from tests.reference import random_policy
from tests.tiny import exit_rules, tiny_hf, tiny_tokenizer

ROOT = Path(__file__).parents[2]

LAYOUT = ExitLayout(6, (1, 3, 4))
SPAN = DialRange(LAYOUT.outcomes, 9, (0.2, 0.3, 0.1, 0.4))
DEPTHS = {("p", 0): [6, 1, 3], ("p", 1): [6, 3, 1]}
EXAMPLES = tuple(exit_rules(DEPTHS).values())


def at_exit(rule: ExitRule, index: int = 0, asked: set[str] | None = None) -> AtExit:
    """Two rows at an exit; `asked` takes the names of what is looked at."""
    seen = set() if asked is None else asked
    generator = torch.Generator().manual_seed(index)
    logits, uniforms = torch.randn(2, generator=generator), torch.rand(2, 4, generator=generator, dtype=torch.float64)
    readout = torch.randn(2, 9, generator=generator)

    class Watched(AtExit):
        def __getattribute__(self, name: str):
            if name == "gate_logits" and sys._getframe(1).f_code.co_name != "everywhere":
                seen.add("gates")
            return super().__getattribute__(name)

    return Watched(
        index, LAYOUT.depths[index], logits,
        readout=lambda: seen.add("readout") or readout,
        uniform=lambda i: seen.add("random") or uniforms[:, i],
        tokens=lambda: [("p", 0, 1), ("p", 1, 1)],
        state=torch.zeros(2, rule.state_size, dtype=torch.float64),
    )  # fmt: skip


def test_every_rule_has_an_example_here() -> None:
    assert {type(rule) for rule in EXAMPLES} == set(RULES.values())
    assert all(RULES[rule.kind] is type(rule) for rule in EXAMPLES)


@pytest.mark.parametrize("rule", EXAMPLES, ids=str)
def test_a_rule_looks_at_what_it_says_it_needs_and_no_more(rule: ExitRule) -> None:
    asked: set[str] = set()
    for index in range(2):
        fired = rule.should_exit(at_exit(rule, index, asked))
        assert fired.dtype == torch.bool and fired.shape == (2,)
    # Rules with a bound draw only if they are mixed.
    assert asked == rule.needs - ({"random"} if hasattr(rule, "mix") and not rule.mix else set())
    assert ("gates" in rule.needs) == (type(rule) in (Threshold, Sample))
    if "gates" in rule.needs:
        with pytest.raises(ValueError, match=f"{rule.kind}.*gates"):
            rule.check(LAYOUT, False)
    rule.check(LAYOUT, True)


@pytest.mark.parametrize("hazard", [0.003, 0.03, 0.3, 0.97])
def test_sampling_fires_with_the_gate_s_hazard_however_small(hazard: float) -> None:
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = torch.full((1000,), hazard).logit()
    at = AtExit(0, 2, logits, lambda: logits, lambda _: uniform, list, torch.zeros(1000, 0))
    assert Sample().should_exit(at).sum() == round(1000 * hazard)
    bounds = Sample().hazard_bounds(np.stack([uniform.numpy()] * 3, axis=1), LAYOUT.depths, [("p", 0, 1)] * 1000)
    assert (torch.from_numpy(bounds[:, 0]) < hazard).sum() == round(1000 * hazard)


def test_a_replay_decides_row_by_row() -> None:
    rule = Prescribed(DEPTHS)
    assert rule.should_exit(at_exit(rule, 0)).tolist() == [True, False]
    assert rule.should_exit(at_exit(rule, 1)).tolist() == [False, True]


@pytest.mark.parametrize("rule", EXAMPLES, ids=str)
def test_equal_rules_are_one_key_and_travel(rule: ExitRule) -> None:
    import cloudpickle

    copy = cloudpickle.loads(cloudpickle.dumps(rule))
    assert copy == rule and hash(copy) == hash(rule) and len({rule: 0, copy: 1}) == 1
    assert all(other == rule or other not in {rule: 0} for other in EXAMPLES)
    json.dumps(rule.to_results())
    assert list(rule.to_results()) == ["kind", "value", "shares", "other", "mix"]


@pytest.mark.parametrize("kind", OFFERED)
def test_what_users_may_name_is_read_back_as_it_was_written(kind: str) -> None:
    """On the command line, in a request and, where exported models know the rule, in their configuration."""
    rule = RULES[kind].of(3) if kind in ("fixed", "speculate") else make_rule(kind)
    assert parse(str(rule)) == rule == make_rule(**rule.to_json())
    body = {"model": "m", "prompt": "x", "exit_policy": rule.to_json()}
    (request,) = CompletionRequest.model_validate(body).requests([[1]], [1], Off())
    assert request.exits == rule
    if kind in POLICY_KINDS:
        check_exit_policy(rule.to_json(), list(LAYOUT.depths), LAYOUT.num_layers)
    assert RULES[kind].usage in usage()


def test_who_names_rules_names_those_of_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    pages = {name: (ROOT / "docs" / name).read_text() for name in ("api.md", "serving.md", "vllm.md", "evaluation.md")}
    assert all(
        ", ".join(f"`{RULES[kind].usage}`" for kind in OFFERED) in pages[name] for name in ("api.md", "serving.md")
    )
    assert f"kinds {', '.join(OFFERED)}." in pages["vllm.md"]
    assert all(f"\n| {rule.control} | " in pages["evaluation.md"] for rule in CONTROLS)
    assert set(POLICY_KINDS) <= set(OFFERED)
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    assert usage() in " ".join(capsys.readouterr().out.split())
    for wrong in ("never", "entropy", "prescribed"):
        body = {"model": "m", "prompt": "x", "exit_policy": {"kind": wrong}}
        with pytest.raises(ValidationError, match=", ".join(f"'{kind}'" for kind in OFFERED[:-1])):
            CompletionRequest.model_validate(body)
    with pytest.raises(ValueError, match=r"'never'.*threshold, sample"):
        make_rule("never")


def test_labels_are_those_of_the_tables() -> None:
    assert [rule.label for rule in EXAMPLES] == [
        "full depth", "sampled", "hazard > 0.5", "hazard > 0.5 (or 0.9: 50%)", "fixed 3", "random 0.20/0.20/0.20/0.40",
        "confidence > 0.04", "entropy < 4.4 (or 4: 50%)", "patience 2", "speculated from 3", "prescribed",
    ]  # fmt: skip


def test_results_keep_the_fields_that_they_have_always_had() -> None:
    plain = {"shares": [], "other": 0.0, "mix": 0.0}
    assert Threshold(0.4, 0.9, 0.5).to_results() == {
        "kind": "threshold", "value": 0.4, "shares": [], "other": 0.9, "mix": 0.5,
    }  # fmt: skip
    assert Random((0.5, 0.5)).to_results() == {**plain, "kind": "random", "value": 0.5, "shares": [0.5, 0.5]}
    assert Off().to_results() == {**plain, "kind": "off", "value": 0.5}


@pytest.mark.parametrize("rule", [*CONTROLS, Threshold], ids=lambda rule: rule.kind)
def test_two_places_on_a_dial_can_be_mixed(rule: type[ExitRule]) -> None:
    dial = rule.sweep_curve(SPAN)
    shallow, deep = dial(0.25), dial(0.75)
    mixed = shallow.mixed(deep, 0.5)
    mixed.check(LAYOUT, True)
    assert mixed not in (shallow, deep) and mixed != shallow.mixed(deep, 0.25)
    if isinstance(shallow, Random):
        assert isinstance(mixed, Random) and isinstance(deep, Random)
        np.testing.assert_allclose(mixed.shares, (np.array(shallow.shares) + np.array(deep.shares)) / 2)
    with pytest.raises(NotImplementedError, match=r"\boff\b"):
        Off.sweep_curve(DialRange((2, 6), 9, (0.5, 0.5)))


@pytest.mark.parametrize(
    "kind", [rule for rule in RULES.values() if issubclass(rule, Bound)], ids=lambda rule: rule.kind
)
def test_a_mixed_bound_holds_for_the_share_of_rows_that_drew_it(kind: type[Bound]) -> None:
    shallow, deep = map(kind.sweep_curve(SPAN), (0.0, 1.0))
    rule = replace(shallow, other=deep.value, mix=0.5)
    drawn = torch.tensor([[0.4, 0.9, 0.9], [0.6, 0.1, 0.1]], dtype=torch.float64)
    state = torch.zeros(2, rule.state_size, dtype=torch.float64)
    fired = [
        rule.should_exit(replace(at_exit(rule, index), uniform=lambda i: drawn[:, i], state=state)).tolist()
        for index in range(3)
    ]
    # Once for all exits: the first exit's number decides at the others, too. A memory may need two of them.
    assert not any(deep for deep, _ in fired) and all(shallow for _, shallow in fired[1:])


@pytest.mark.parametrize("rule", [rule for rule in EXAMPLES if rule.state_size], ids=str)
def test_a_memory_decides(rule: ExitRule) -> None:
    """Of equal readouts at two exits some rows leave at the second that would not leave there without the first."""
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    at = replace(at_exit(rule), readout=lambda: logits, state=torch.zeros(64, rule.state_size, dtype=torch.float64))
    alone = rule.should_exit(at)
    assert (rule.should_exit(replace(at, index=1)) != alone).any()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Threshold(2), r"threshold.*\b2"),
        (lambda: Threshold(0.3, mix=-0.5), "-0.5"),
        (lambda: Entropy(3, mix=1.5), "1.5"),
        (lambda: Entropy(-0.1), "-0.1"),
        (lambda: Random(), r"\[\]"),
        (lambda: Random((0.5, 0.6)), "0.6"),
        (lambda: Random((1.5, -0.5)), "-0.5"),
        (lambda: Random((0.5, 0.5)).check(LAYOUT, True), r"\b2\b.*\b4\b"),
        (lambda: Fixed(2).check(LAYOUT, True), "fixed.*2"),
        (lambda: Prescribed({("p", 0): [6, 2]}).check(LAYOUT, True), r"'p', 0.*\[2\]"),
        (lambda: Prescribed({("p", 0): [3, 3]}).check(LAYOUT, True), r"'p', 0.*\b3\b"),
        (lambda: Prescribed().should_exit(at_exit(Prescribed())), "'p', 0"),
        *((lambda wrong=wrong: Patience(wrong), f"{wrong:g}") for wrong in (0, -1, 1.5, float("inf"), float("nan"))),
        (lambda: Patience(2, other=2.5, mix=0.5), r"2\.5"),
    ],
)
def test_impossible_rules_are_refused(make, named) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_the_rules_load_without_torch() -> None:
    code = "import sys, ee_megatron.exit_rules as r; r.usage(); assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- rules that look at readouts, against a brute force over every exit's readout by the parallel forward ----

SPEC = PolicySpec(6, (1, 2, 3, 4, 5), rank=4, alpha=8.0)
M, SEED = 5, 3
# The cached and the parallel forward round differently: what lies nearer to a bound than this may be on either side.
TIE = 1e-4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    made = Decoder.from_hf(tiny_hf("llama", tmp_path_factory.mktemp("model"), tied=False), SPEC, torch.float32, "cpu")
    made.load_policy(random_policy(made.dims, SPEC))
    made.eos_ids = frozenset({10**6})
    return made


def answers_by(decoder: Decoder, rules: list[ExitRule], texts: list[str], *rows: int) -> list[Rollout]:
    scheduler = Scheduler(decoder, tiny_tokenizer(), *rows)
    ids = [
        scheduler.add(Request(text, SamplingParams(1.0, 30), rule, SEED, f"p{i}"))
        for i, (text, rule) in enumerate(zip(texts, rules, strict=True))
    ]
    while scheduler.busy:
        scheduler.advance()
    return [scheduler.take(i, 0) for i in ids]


def readouts(decoder: Decoder, rollout: Rollout) -> torch.Tensor:
    """Logits [T-1, M, V] at each exit, of every token but the first; behind the exit that was taken the stream is
    frozen, so that only those up to it mean something."""
    tokens = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
    at = torch.arange(len(rollout.prompt_tokens), tokens.shape[1] - 1)
    depths = torch.full_like(tokens, 6)
    depths[0, at] = torch.tensor(rollout.exit_depths[1:]).long()
    _, residuals = decoder.forward_with_residuals(tokens, torch.tensor([tokens.shape[1]]), depths)
    return torch.stack([decoder.readout(r[0, at]) for r in residuals], dim=1)


@pytest.mark.parametrize("rule", [Confidence(0.045), Entropy(4.6)], ids=str)
def test_a_bound_on_readouts_leaves_at_the_first_that_is_sharp_enough(decoder, rule) -> None:
    taken = set()
    for rollout in answers_by(decoder, [rule] * 4, ["abc", "Q: 1 + 1 =", "x", "12"], 3):
        p = readouts(decoder, rollout).softmax(-1)
        sharp = p.amax(-1) - rule.value if isinstance(rule, Confidence) else rule.value + (p * p.log()).sum(-1)
        for margins, depth in zip(sharp, rollout.exit_depths[1:].tolist(), strict=True):
            asked = margins[:depth]
            if asked.abs().min() > TIE:
                assert depth == next((i + 1 for i, margin in enumerate(margins.tolist()) if margin > 0), 6)
            taken.add(depth)
    assert len(taken) > 1


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
        state = torch.zeros(2, rule.state_size, dtype=torch.float64)
        for i, choice in enumerate(choices):
            # The second row's first choice is another at every exit.
            logits = torch.eye(10)[[choice, i]]
            at = AtExit(i, i + 1, torch.zeros(2), lambda logits=logits: logits, lambda _: torch.zeros(2), list, state)
            fired = rule.should_exit(at).tolist()
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
def test_patience_leaves_where_a_brute_force_says_in_any_traffic(decoder, asked, in_flight, batch) -> None:
    rules = [Patience(n, other=n % 3 + 1, mix=mix) for _, n, mix in asked]
    answers = answers_by(decoder, rules, [text for text, _, _ in asked], in_flight, batch)
    for i, (rule, rollout) in enumerate(zip(rules, answers, strict=True)):
        best = readouts(decoder, rollout).topk(2)
        leads = best.values[..., 0] - best.values[..., 1]
        for t, depth in enumerate(rollout.exit_depths[1:].tolist()):
            key = np.array([stream_key(SEED, f"p{i}", 0)], dtype=np.uint64)
            drawn = uniforms(key, np.array([t + 1]), M + 1)[0, 0]
            patience = rule.other if drawn < rule.mix else rule.value
            if leads[t, :depth].min() > TIE:
                assert by_hand(best.indices[t, :, 0].tolist(), int(patience)) == depth


def test_with_patience_tokens_leave_everywhere_and_later_with_more(decoder) -> None:
    depths = []
    for patience in range(1, M + 2):
        answers = answers_by(decoder, [Patience(patience)] * 8, ["abc"] * 8, 8)
        found = np.concatenate([answer.exit_depths[1:] for answer in answers])
        # The choice of n exits can stand at the n-th at the earliest.
        assert set(found) <= {*range(patience, 6), 6}
        depths.append(found)
    assert set(depths[0]) == {1} and set(depths[M]) == {6}
    assert len(set(depths[1])) > 2 and np.all(np.diff([d.mean() for d in depths]) > 0)


def test_the_dial_runs_through_all_patiences_and_the_mixtures_between() -> None:
    dial = Patience.sweep_curve(DialRange((1, 2, 3, 4, 5, 6), 130, (1 / 6,) * 6))
    assert [dial(n / M) for n in range(M + 1)] == [Patience(n + 1) for n in range(M + 1)]
    assert dial(0.5) == Patience(3, other=4, mix=0.5) and dial(0.5).label == "patience 3 (or 4: 50%)"
    means = [dial(p).mean for p in np.linspace(0, 1, 41)]
    np.testing.assert_allclose(means, np.linspace(1, M + 1, 41))
    shallow, deep = dial(0.1), dial(0.9)
    assert [shallow.mixed(deep, share).mean for share in (0, 0.5, 1)] == pytest.approx([1.5, 3.5, 5.5])


def test_patience_is_written_as_a_whole_number_of_exits() -> None:
    assert parse("patience") == parse("patience:2") == make_rule("patience", 2.0) == Patience() == Patience(2)
    assert str(Patience(3)) == "patience:3" and Patience(3).to_json() == {"kind": "patience", "value": 3}
