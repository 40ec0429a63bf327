"""Exit rules as values: what they look at, their forms, their memory, and that all who name rules name the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ee_megatron import cli
from ee_megatron.checkpoint.export_files.configuration_early_exit import POLICY_KINDS, check_exit_policy
from ee_megatron.exit_rules import (
    CONTROLS,
    OFFERED,
    RULES,
    AtExit,
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
from ee_megatron.rollout.server.protocol import CompletionRequest

LAYOUT = ExitLayout(6, (2, 4))
DEPTHS = {("p", 0): [6, 2, 4], ("p", 1): [6, 4, 2]}
EXAMPLES: tuple[ExitRule, ...] = (
    Threshold(0.4), Threshold(0.4, other=0.9, mix=0.5), Sample(), Fixed(2), Random((0.2, 0.3, 0.5)), Confidence(0.3),
    Entropy(1.0), Patience(2), Off(), Prescribed(DEPTHS),
)  # fmt: skip


def at_exit(rule: ExitRule, index: int = 0, asked: set[str] | None = None) -> AtExit:
    """Two rows at an exit; `asked` takes the names of what is looked at."""
    seen = set() if asked is None else asked
    generator = torch.Generator().manual_seed(index)
    logits, uniforms = torch.randn(2, generator=generator), torch.rand(2, 3, generator=generator, dtype=torch.float64)
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
        notes=torch.zeros(2, rule.notes, dtype=torch.float64),
    )  # fmt: skip


def test_every_rule_has_an_example_here() -> None:
    assert {type(rule) for rule in EXAMPLES} == set(RULES.values())
    assert all(RULES[rule.kind] is type(rule) for rule in EXAMPLES)


@pytest.mark.parametrize("rule", EXAMPLES, ids=str)
def test_a_rule_looks_at_what_it_says_it_needs_and_no_more(rule: ExitRule) -> None:
    asked: set[str] = set()
    for index in range(2):
        fired = rule.fires(at_exit(rule, index, asked))
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
    assert Sample().fires(at).sum() == round(1000 * hazard)
    bounds = Sample().ahead(np.stack([uniform.numpy()] * 3, axis=1), LAYOUT.depths, [("p", 0, 1)] * 1000)
    assert (torch.from_numpy(bounds[:, 0]) < hazard).sum() == round(1000 * hazard)


def test_a_replay_decides_row_by_row() -> None:
    rule = Prescribed(DEPTHS)
    assert rule.fires(at_exit(rule, 0)).tolist() == [True, False]
    assert rule.fires(at_exit(rule, 1)).tolist() == [False, True]


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
    rule = RULES[kind].of(2) if kind == "fixed" else make_rule(kind)
    assert parse(str(rule)) == rule == make_rule(**rule.to_json())
    body = {"model": "m", "prompt": "x", "exit_policy": rule.to_json()}
    (request,) = CompletionRequest.model_validate(body).requests([[1]], [1], Off())
    assert request.exits == rule
    if kind in POLICY_KINDS:
        check_exit_policy(rule.to_json(), list(LAYOUT.depths), LAYOUT.num_layers)
    assert RULES[kind].usage in usage()


def test_who_names_rules_names_those_of_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.findall(r"[\w:]+", usage().replace(" or ", " ")) == [
        "threshold:HAZARD", "sample", "fixed:DEPTH", "confidence:PROBABILITY", "patience:EXITS", "off",
    ]  # fmt: skip
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
        "hazard > 0.4", "hazard > 0.4 (or 0.9: 50%)", "sampled", "fixed 2", "random 0.20/0.30/0.50",
        "confidence > 0.3", "entropy < 1", "patience 2", "full depth", "prescribed",
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
    dial = rule.dial(DialRange((2, 4, 6), 9, (0.2, 0.3, 0.5)))
    shallow, deep = dial(0.25), dial(0.75)
    mixed = shallow.mixed(deep, 0.5)
    mixed.check(LAYOUT, True)
    assert mixed not in (shallow, deep) and mixed != shallow.mixed(deep, 0.25)
    if isinstance(shallow, Random):
        assert isinstance(mixed, Random) and isinstance(deep, Random)
        np.testing.assert_allclose(mixed.shares, (np.array(shallow.shares) + np.array(deep.shares)) / 2)
    with pytest.raises(NotImplementedError, match=r"\boff\b"):
        Off.dial(DialRange((2, 6), 9, (0.5, 0.5)))


def test_a_mixed_bound_holds_for_the_share_of_rows_that_drew_it() -> None:
    rule = Threshold(0.0, other=1.0, mix=0.5)
    drawn = torch.tensor([[0.4, 0.9], [0.6, 0.1]], dtype=torch.float64)
    for index in range(2):
        at = replace(at_exit(rule), index=index, uniform=lambda i: drawn[:, i])
        # Once for all exits: the first exit's number decides at the second, too.
        assert rule.fires(at).tolist() == [False, True]


def test_the_rules_load_without_torch() -> None:
    code = "import sys, ee_megatron.exit_rules as r; r.usage(); assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
