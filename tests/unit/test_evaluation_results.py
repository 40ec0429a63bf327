"""Rows, the choice of a threshold, the results file, its figures and the gates' calibration, from planted answers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron.evaluation.controls import gate_calibration
from ee_megatron.evaluation.evaluate import AnswerRecord, EvaluationRow, choose_threshold, pooled, summarise
from ee_megatron.evaluation.results import (
    by_task,
    depth_correlations,
    depth_figures,
    kl_by_exit,
    tokens_of,
    write_results,
)
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.planning.flops import answer_cost, gate, prefill_cost
from ee_megatron.report.results import pareto_front
from ee_megatron.statistics import wilson_interval
from ee_megatron.tasks import Verdict
from ee_megatron.types import Prompt, Rollout
from tests.by_hand import a_row, an_answer
from tests.tiny import tiny_hf

RIGHT, WRONG = Verdict(True, True, True), Verdict(False, True, True)
LOST = Verdict(False, False, False, timed_out=True)


def rollout(name: str, depths: list[int]) -> Rollout:
    zeros = np.zeros(len(depths), dtype=np.float32)
    tokens = np.arange(len(depths), dtype=np.int64)
    return Rollout(name, np.arange(4), tokens, np.array(depths, np.int32), zeros, zeros, "text", True, 0)


def prompt(name: str) -> Prompt:
    return Prompt(name, "Question", "1", "t")


def row(exits: str, accuracy: float, depth: float) -> EvaluationRow:
    return a_row(accuracy, depth, exits, "calibrated")


def test_summary_of_planted_answers() -> None:
    rollouts = [rollout("a", [10, 5]), rollout("b", [10, 5, 5, 5, 5, 5]), rollout("c", [10, 10])]
    divergences = [np.array([0.0, 1.0]), np.full(6, 2.0), np.array([3.0, 4.0])]
    found = summarise(
        [prompt(n) for n in "abc"], rollouts, [RIGHT, WRONG, LOST], 10, divergences, 0.5,
        model="teacher", exits="fixed 5",
    )  # fmt: skip
    assert (found.n, found.correct, found.accuracy, found.timed_out) == (3, 1, 1 / 3, 1)
    assert (found.low, found.high) == wilson_interval(1, 3)
    # Over tokens, not over answers: the mean of the answers' means would be 0.778.
    assert found.mean_depth == pytest.approx((15 + 35 + 20) / 100)
    assert found.total_depth == pytest.approx(70 / 3)
    assert found.length == pytest.approx(10 / 3)
    assert found.kl == pytest.approx(2.0)
    assert found.tokens_per_s == pytest.approx(20.0)
    bare = summarise([prompt("a")], rollouts[:1], [RIGHT], 10)
    assert bare.kl is None and bare.tokens_per_s is None


def test_summary_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError):
        summarise([prompt("a"), prompt("b")], [rollout("a", [1])], [RIGHT], 10)
    with pytest.raises(ValueError, match="'b'"):
        summarise([prompt("a"), prompt("b")], [rollout("b", [1]), rollout("a", [1])], [RIGHT, RIGHT], 10)
    with pytest.raises(ValueError):
        summarise([], [], [], 10)


def test_the_least_depth_within_tolerance_of_the_best_is_chosen_in_any_order() -> None:
    rows = [
        row("full depth", 0.86, 1.0),
        row("hazard > 0.9", 0.87, 0.84),
        row("hazard > 0.7", 0.85, 0.80),
        row("hazard > 0.5", 0.845, 0.77),
        row("sampled", 0.70, 0.70),
    ]
    for seed in range(10):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert choose_threshold(shuffled, 0.02).exits == "hazard > 0.7"
        assert choose_threshold(shuffled, 0.025).exits == "hazard > 0.5"
        assert choose_threshold(shuffled, 0.0).exits == "hazard > 0.9"
        assert choose_threshold(shuffled, 1.0).exits == "sampled"
        tied = [*shuffled, row("hazard > 0.65", 0.86, 0.80), row("hazard > 0.66", 0.86, 0.80)]
        assert choose_threshold(tied, 0.02).exits == "hazard > 0.65"
    for wrong in (([], 0.02), (rows, -1)):
        with pytest.raises(ValueError, match="tolerance"):
            choose_threshold(*wrong)


@given(st.lists(st.lists(st.integers(1, 10), max_size=5), min_size=2, max_size=9), st.data())
def test_rows_of_parts_pool_to_the_row_of_the_whole(depths: list[list[int]], data: st.DataObject) -> None:
    names = [str(i) for i in range(len(depths))]
    prompts, rollouts = [prompt(n) for n in names], [rollout(n, d) for n, d in zip(names, depths, strict=True)]
    verdicts = [data.draw(st.sampled_from([RIGHT, WRONG, LOST])) for _ in names]
    cut = data.draw(st.integers(1, len(names) - 1))
    kind = {"model": "reinforced", "exits": "hazard > 0.5"}
    parts = [summarise(prompts[s], rollouts[s], verdicts[s], 10, **kind) for s in (slice(cut), slice(cut, None))]
    whole, found = summarise(prompts, rollouts, verdicts, 10, **kind), pooled(parts)
    assert (found.accuracy, found.mean_depth) == pytest.approx((whole.accuracy, whole.mean_depth))


def planted() -> list[AnswerRecord]:
    answers = []
    for i in range(40):
        entropies: list[float | None] = [9.0, *(float((i * 7 + t) % 11) for t in range(8))]
        depths = [10, *(2 if e < 4 else 5 if e < 8 else 10 for e in entropies[1:] if e is not None)]
        kept = {"of_tokens": {"entropy": entropies}, "group": "3,8" if i in (1, 2, 3, 5) else f"p{i}"}
        teacher = {"model": "teacher", "exits": "full depth"}
        answers.append(an_answer(f"p{i}", [10] * 9, i % 4 != 0, **teacher, **kept))
        policy = {"model": "reinforced", "exits": "hazard > 0.5"}
        answers.append(an_answer(f"p{i}", depths, i % 4 != 0 and i >= 6, **policy, **kept))
    return answers


def test_results_hold_rows_histogram_correlation_and_the_paired_test(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "results.json"
    rows = [row("full depth", 0.86, 1.0), replace(row("sampled", 0.5, 0.5), kl=math.nan)]
    more = {"gates": {"reinforced": {"ece": math.nan}}}
    write_results(path, rows, planted(), {"num_layers": 10, "exit_depths": (2, 5)}, keep=3, more=more)
    data = json.loads(path.read_text())
    parts = {"meta", "rows", "answers", "depth_by_entropy", "exit_histogram", "paired"}
    assert set(data) == parts | {"depth", "by_task", "kl_by_exit", "depth_correlations", "gates"}
    assert data["gates"] == {"reinforced": {"ece": None}}
    assert data["meta"] == {"num_layers": 10, "exit_depths": [2, 5]}
    assert [r["exits"] for r in data["rows"]] == ["full depth", "sampled"] and data["rows"][1]["kl"] is None
    assert [(a["id"], a["model"]) for a in data["answers"]] == [
        (f"p{i}", model) for i in range(3) for model in ("teacher", "reinforced")
    ]
    histogram = data["exit_histogram"]
    assert histogram["teacher, full depth"] == {"10": 360}
    assert list(histogram["reinforced, hazard > 0.5"]) == ["2", "5", "10"]
    assert sum(histogram["reinforced, hazard > 0.5"].values()) == 360
    # 40 answers: of the teacher's 30 right ones (0, 4, 8, ... wrong) the model misses 1, 2, 3 and 5.
    (label, paired), *others = data["paired"].items()
    assert label == "reinforced, hazard > 0.5" and not others
    assert [paired[key] for key in ("n", "only_teacher", "only_model", "p_value")] == [40, 4, 0, 1.0]
    assert paired["difference"] == pytest.approx(-0.1) and paired["low"] < -0.1 < paired["high"] <= 0
    # All four that the model misses have one group: with it they go or come together, so one group says nothing.
    assert paired["groups"] == 37
    assert paired["group_low"] < paired["low"] < paired["high"] <= paired["group_high"]
    assert not list(path.parent.glob(".*")), "no temporary file is left"


def test_depth_follows_entropy_where_it_was_planted_and_first_tokens_are_left_out(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", [], planted(), {})
    found = json.loads((tmp_path / "results.json").read_text())["depth_by_entropy"]
    assert list(found) == ["reinforced, hazard > 0.5"], "the teacher's depth never varies"
    values = found["reinforced, hazard > 0.5"]
    assert values["tokens"] == 320 and values["answers"] == 40
    assert 0.9 < values["low"] <= values["spearman"] <= values["high"] < 1.0
    depths = [b["depth"] for b in values["bins"]]
    assert depths == sorted(depths) and depths[0] == 2 and depths[-1] == 10


TEXTS = [" 3", " x", " 8", " =", " 24", ".", " The", " answer", " is", " 2", "4", "."]


def with_depths(name: str, depths: list[int], entropies: list[float], flops: float | None = None) -> AnswerRecord:
    surprisals, divergences = [-e for e in entropies], [d / 10 for d in depths]
    columns = {"text": TEXTS, "entropy": entropies, "surprisal": surprisals, "kl": divergences}
    return an_answer(name, depths, of_tokens=columns, flops=flops)


def test_depth_figures_of_planted_answers() -> None:
    depths = [10, 2, 2, 2, 4, 2, 2, 2, 2, 8, 6, 2]
    answers = [with_depths("a", depths, [0.0] * 12, 5.0), with_depths("b", [10] * 12, [0.0] * 12, 7.0)]
    found = depth_figures(answers, tokens_of(answers))["m, x"]
    assert found["mean"]["value"] == pytest.approx((sum(depths) + 120) / 24)
    assert found["total"]["value"] == pytest.approx((sum(depths) + 120) / 2)
    assert found["quantiles"] == {"0.1": 2, "0.25": 2, "0.5": 10, "0.75": 10, "0.9": 10}
    # The final answer is " 2" and "4", not its full stop and not the 24 of the calculation.
    assert found["answer"]["value"] == pytest.approx((8 + 6 + 20) / 4) and found["answer"]["answers"] == 2
    assert found["flops"]["value"] == 6.0 and found["flops"]["low"] == 5.0
    # Without the first tokens: 8, 24, 2, 4 of either answer.
    assert found["classes"]["digits"] == {"depth": (2 + 4 + 8 + 6 + 40) / 8, "tokens": 8}
    assert found["classes"]["operators"]["tokens"] == 4 and found["classes"]["words"]["tokens"] == 6
    del answers[0]["flops"], answers[1]["flops"]
    assert depth_figures(answers, tokens_of(answers))["m, x"]["flops"] is None


def test_tasks_are_told_apart_where_there_are_several() -> None:
    easy, hard = with_depths("a", [2] * 12, [0.0] * 12), with_depths("b", [8] * 12, [0.0] * 12)
    answers = [easy | {"task": "sum"}, hard | {"task": "word"}, hard | {"task": "word", "correct": False}]
    found = by_task(answers)["m, x"]  # type: ignore[arg-type]
    assert list(found) == ["sum", "word"] and found["word"]["n"] == 2
    assert (found["sum"]["accuracy"], found["word"]["accuracy"]) == (1.0, 0.5)
    assert (found["sum"]["mean_depth"]["value"], found["word"]["mean_depth"]["value"]) == (2.0, 8.0)
    # Wilson's interval for 1 of 2, 95 %.
    assert [found["word"][end] for end in ("low", "high")] == pytest.approx([0.0945, 0.9055], abs=1e-3)
    assert by_task(answers[1:]) == {} and by_task([easy]) == {}  # type: ignore[arg-type]


def test_kl_is_told_apart_by_the_exit_taken() -> None:
    depths = [10, 2, 2, 2, 4, 2, 2, 2, 2, 8, 8, 2]
    found = kl_by_exit(tokens_of([with_depths("a", depths, [0.0] * 12)]))["m, x"]
    assert {d: (round(v["kl"], 6), v["tokens"]) for d, v in found.items()} == {
        "2": (0.2, 8),
        "4": (0.4, 1),
        "8": (0.8, 2),
    }


def test_depth_follows_entropy_within_each_class_where_that_was_with_depths() -> None:
    rng = np.random.default_rng(0)
    answers = []
    for i in range(30):
        entropies = rng.random(12)
        # Rising with entropy, in words the other way round.
        depths = [round(100 * (1 - e if t in (6, 7, 8) else e)) for t, e in enumerate(entropies)]
        answers.append(with_depths(f"p{i}", depths, entropies.tolist()))
    found = depth_correlations(tokens_of(answers), resamples=50)["m, x"]
    assert found["entropy"]["digits"]["value"] > 0.99 and found["entropy"]["words"]["value"] < -0.99
    assert found["entropy"]["answer"]["tokens"] == 60 and found["entropy"]["answer"]["value"] > 0.99
    assert 0 < found["entropy"]["all"]["low"] < found["entropy"]["all"]["value"] < 0.9
    # Surprisal was planted as the negative of entropy.
    assert found["surprisal"]["operators"]["value"] == pytest.approx(-found["entropy"]["operators"]["value"])
    assert depth_correlations(tokens_of([with_depths("a", [6] * 12, [0.1] * 12)])) == {}


def divergence(target: np.ndarray, c: float) -> np.ndarray:
    """The divergence whose target hazard is this: 1 - tanh(c d / 2) = s."""
    return np.arctanh(1 - target) * 2 / c


def test_calibrated_gates_have_no_error_and_a_constant_gate_has_its_distance() -> None:
    rng = np.random.default_rng(0)
    targets = [rng.uniform(0.05, 0.95, (20, 2)) for _ in range(25)]
    costs = [divergence(t, 4.0) for t in targets]
    exact = gate_calibration(targets, costs, 4.0, (2, 4))
    assert exact is not None and exact["ece"]["value"] == pytest.approx(0, abs=1e-9)
    assert exact["mean_error"]["value"] == pytest.approx(0, abs=1e-9) and exact["asked"] == 1000
    assert [e["depth"] for e in exact["exits"]] == [2, 4] and len(exact["bins"]) == 10
    shut = gate_calibration([np.full_like(t, 0.1) for t in targets], costs, 4.0, (2, 4))
    mean = float(np.mean(targets))
    assert shut is not None and shut["ece"]["value"] == pytest.approx(mean - 0.1)
    assert shut["bins"] == [{"hazard": pytest.approx(0.1), "target": pytest.approx(mean), "asked": 1000}]
    assert shut["ece"]["low"] < mean - 0.1 < shut["ece"]["high"]
    # Right on average and blind: no calibration error, but an error at each gate.
    blind = gate_calibration([np.full_like(t, mean) for t in targets], costs, 4.0, (2, 4))
    assert blind is not None and blind["ece"]["value"] == pytest.approx(0, abs=1e-9)
    assert blind["mean_error"]["value"] == pytest.approx(0.225, abs=0.02), "a quarter of the range of 0.9"
    # Another factor asks for other hazards.
    other = gate_calibration(targets, costs, 1.0, (2, 4))
    assert other is not None and other["ece"]["value"] > 0.1


def test_gates_that_were_not_asked_do_not_count() -> None:
    hazards, costs = np.array([[0.5, np.nan], [0.5, 1.0]]), np.array([[np.inf, np.nan], [np.inf, 0.0]])
    found = gate_calibration([hazards], [costs], 1.0, (2, 4))
    assert found is not None and found["asked"] == 3
    assert [(e["depth"], e["asked"], e["ece"]) for e in found["exits"]] == [(2, 2, 0.5), (4, 1, 0.0)]
    assert gate_calibration([np.full((3, 2), np.nan)], [np.full((3, 2), np.nan)], 1.0, (2, 4)) is None
    assert gate_calibration([], [], 1.0, (2, 4)) is None


def test_the_pareto_front_is_what_nothing_beats() -> None:
    accuracy, depth = [0.9, 0.8, 0.8, 0.7, 0.5, 0.5], [0.9, 0.5, 0.6, 0.5, 0.3, 0.3]
    assert pareto_front(depth, accuracy) == [True, True, False, False, True, True]
    assert pareto_front(depth[::-1], accuracy[::-1]) == [True, True, False, False, True, True][::-1]
    assert pareto_front([], []) == []


def test_flops_of_an_answer_are_those_of_the_layers_it_ran(tmp_path: Path) -> None:
    dims = HFDirectory(tiny_hf("llama", tmp_path)).dims
    exits, prompt = (2, 4), 10

    def cost(depths: list[int], asks: str = "") -> float:
        return answer_cost(dims, exits, 2, prompt, depths, {asks})

    head = 2 * dims.vocab * dims.hidden
    assert cost([6]) == prefill_cost(dims, prompt)
    # One layer: q, k, v, o, three MLP products, and attention over the prompt and the token itself.
    q, kv, hidden, inner = dims.heads * dims.head_dim, 2 * dims.kv_heads * dims.head_dim, dims.hidden, dims.intermediate
    layer = 2 * (2 * q * hidden + kv * hidden + 3 * hidden * inner) + 4 * q * 11
    skipped = 2 * kv * hidden
    for depth in (2, 4, 6):
        assert cost([6, depth]) - cost([6]) == pytest.approx(depth * layer + (6 - depth) * skipped + head)
    one = gate(dims, 2, 1)
    assert [cost([6, d], "gates") - cost([6, d]) for d in (2, 4, 6)] == pytest.approx([one, 2 * one, 2 * one])
    assert [cost([6, d], "readout") - cost([6, d]) for d in (2, 4, 6)] == pytest.approx([0, head, 2 * head])
