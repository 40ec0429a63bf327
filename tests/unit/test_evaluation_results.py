"""Rows, the choice of a threshold, and the results file, from planted answers."""

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

from ee_megatron.evaluation.evaluate import Answer, EvaluationRow, choose_threshold, pooled, summarise
from ee_megatron.evaluation.results import on_wide, table, write_results
from ee_megatron.report.tables import wide_table
from ee_megatron.statistics import wilson_interval
from ee_megatron.tasks import Verdict
from ee_megatron.types import Prompt, Rollout

RIGHT, WRONG = Verdict(True, True, True), Verdict(False, True, True)
LOST = Verdict(False, False, False, timed_out=True)


def rollout(name: str, depths: list[int]) -> Rollout:
    zeros = np.zeros(len(depths), dtype=np.float32)
    tokens = np.arange(len(depths), dtype=np.int64)
    return Rollout(name, np.arange(4), tokens, np.array(depths, np.int32), zeros, zeros, "text", True, 0)


def prompt(name: str) -> Prompt:
    return Prompt(name, "Question", "1", "t")


def row(exits: str, accuracy: float, depth: float) -> EvaluationRow:
    n = 200
    low, high = wilson_interval(round(accuracy * n), n)
    return EvaluationRow("calibrated", exits, n, round(accuracy * n), accuracy, low, high, depth, depth * 300, 17.0)


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
    assert found.to_json() == json.loads(json.dumps(found.to_json()))
    bare = summarise([prompt("a")], rollouts[:1], [RIGHT], 10)
    assert bare.kl is None and bare.tokens_per_s is None


def test_summary_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"\b2\b.*\b1\b.*\b1\b"):
        summarise([prompt("a"), prompt("b")], [rollout("a", [1])], [RIGHT], 10)
    with pytest.raises(ValueError, match="'b'"):
        summarise([prompt("a"), prompt("b")], [rollout("b", [1]), rollout("a", [1])], [RIGHT, RIGHT], 10)
    with pytest.raises(ValueError, match="prompt"):
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
    with pytest.raises(ValueError, match="0 rows"):
        choose_threshold([], 0.02)
    with pytest.raises(ValueError, match="-1"):
        choose_threshold(rows, -1)


@given(st.lists(st.lists(st.integers(1, 10), max_size=5), min_size=2, max_size=9), st.data())
def test_rows_of_parts_pool_to_the_row_of_the_whole(depths: list[list[int]], data: st.DataObject) -> None:
    names = [str(i) for i in range(len(depths))]
    prompts, rollouts = [prompt(n) for n in names], [rollout(n, d) for n, d in zip(names, depths, strict=True)]
    verdicts = [data.draw(st.sampled_from([RIGHT, WRONG, LOST])) for _ in names]
    cut = data.draw(st.integers(1, len(names) - 1))
    kind = {"model": "reinforced", "exits": "hazard > 0.5"}
    parts = [summarise(prompts[s], rollouts[s], verdicts[s], 10, **kind) for s in (slice(cut), slice(cut, None))]
    whole, found = summarise(prompts, rollouts, verdicts, 10, **kind), pooled(parts)
    for name, value in whole.to_json().items():
        assert found.to_json()[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_rows_of_other_models_or_exits_do_not_pool() -> None:
    with pytest.raises(ValueError, match=r"hazard > 0.5.*hazard > 0.9"):
        pooled([row("hazard > 0.5", 0.8, 0.6), row("hazard > 0.9", 0.8, 0.7)])
    with pytest.raises(ValueError, match="rows"):
        pooled([])


def answer(name: str, model: str, correct: bool, depths: list[int], entropies: list[float | None]) -> Answer:
    tokens = [
        {"text": "x", "depth": d, "logprob": -0.1, "exit_logprob": -0.2, "entropy": e}
        for d, e in zip(depths, entropies, strict=True)
    ]
    exits = "full depth" if model == "teacher" else "hazard > 0.5"
    return Answer(
        id=name, prompt=f"Question {name}", reference="1", model=model, exits=exits, correct=correct, text="é",
        tokens=tokens,
    )  # fmt: skip


def planted() -> list[Answer]:
    answers = []
    for i in range(40):
        entropies: list[float | None] = [9.0, *(float((i * 7 + t) % 11) for t in range(8))]
        depths = [10, *(2 if e < 4 else 5 if e < 8 else 10 for e in entropies[1:] if e is not None)]
        answers.append(answer(f"p{i}", "teacher", i % 4 != 0, [10] * 9, entropies))
        answers.append(answer(f"p{i}", "reinforced", i % 4 != 0 and i >= 6, depths, entropies))
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
    assert [paired[key] for key in ("n", "only_teacher", "only_model", "p_value")] == [40, 4, 0, 2 / 16]
    assert paired["difference"] == pytest.approx(-0.1) and paired["low"] < -0.1 < paired["high"] <= 0
    # Without groups every prompt is one of its own.
    assert paired["groups"] == 40
    assert (paired["group_low"], paired["group_high"]) == (paired["low"], paired["high"])
    assert not list(path.parent.glob(".*")), "no temporary file is left"


def test_the_interval_of_the_difference_is_that_of_its_groups(tmp_path: Path) -> None:
    answers = planted()
    for each in answers:
        # All four that the model misses have one group: with it they go or come together.
        each["group"] = "3,8" if each["id"] in ("p1", "p2", "p3", "p5") else each["id"]
    write_results(tmp_path / "results.json", [], answers, {})
    paired = json.loads((tmp_path / "results.json").read_text())["paired"]["reinforced, hazard > 0.5"]
    assert paired["groups"] == 37
    assert paired["group_low"] < paired["low"] < paired["high"] <= paired["group_high"]


def test_what_was_measured_on_wide_operands_is_kept_by_label_and_told_in_a_table() -> None:
    answers = planted()
    for i, each in enumerate(answers):
        each["task"] = "sum" if i % 4 < 2 else "word"
    rows = [
        replace(row("full depth", 0.75, 1.0), model="teacher"),
        replace(row("hazard > 0.5", 0.65, 0.4), model="reinforced"),
    ]
    found = on_wide(rows, answers)
    assert list(found) == ["teacher, full depth", "reinforced, hazard > 0.5"]
    assert found["teacher, full depth"]["paired"] == {}
    entry = found["reinforced, hazard > 0.5"]
    assert entry["row"]["mean_depth"] == 0.4 and entry["paired"]["only_teacher"] == 4
    assert {task: part["n"] for task, part in entry["by_task"].items()} == {"sum": 20, "word": 20}
    # As the report reads it: a file's null is no number.
    lines = wide_table(json.loads(json.dumps(found))).text().splitlines()
    assert lines[2].split()[-5:] == ["–"] * 5 and "75.0% [" in lines[2]
    assert lines[3].split()[-4:] == ["4", "0", "40", "0.12"] and "-10.0% [" in lines[3] and "0.400" in lines[3]


def test_depth_follows_entropy_where_it_was_planted_and_first_tokens_are_left_out(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", [], planted(), {})
    found = json.loads((tmp_path / "results.json").read_text())["depth_by_entropy"]
    assert list(found) == ["reinforced, hazard > 0.5"], "the teacher's depth never varies"
    values = found["reinforced, hazard > 0.5"]
    assert values["tokens"] == 320 and values["answers"] == 40
    assert 0.9 < values["low"] <= values["spearman"] <= values["high"] < 1.0
    depths = [b["depth"] for b in values["bins"]]
    assert depths == sorted(depths) and depths[0] == 2 and depths[-1] == 10
    unmeasured = [answer("p", "reinforced", True, [10, 5, 2], [None] * 3)]
    write_results(tmp_path / "results.json", [], unmeasured, {})
    assert json.loads((tmp_path / "results.json").read_text())["depth_by_entropy"] == {}


def test_a_failed_write_leaves_the_old_results_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, [], planted()[:2], {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_results(path, [], [], {"bad": object()})
    assert path.read_bytes() == before
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_results(path, [], [], {})
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_the_table_shows_every_figure_aligned() -> None:
    rows = [row("full depth", 0.86, 1.0), replace(row("hazard > 0.5", 0.85, 0.77), kl=0.0321, tokens_per_s=322.4)]
    lines = table(rows).splitlines()
    assert lines[0].split() == [
        "model",
        "exits",
        "accuracy",
        "n",
        "mean",
        "depth",
        "total",
        "depth",
        "length",
        "KL",
        "tok/s",
    ]
    assert "86.0% [80.5%, 90.1%]" in lines[2] and lines[2].endswith("–")
    assert lines[3].split()[-4:] == ["231", "17.0", "0.0321", "322"]
    assert len({line.index("%]") for line in lines[2:]}) == 1
