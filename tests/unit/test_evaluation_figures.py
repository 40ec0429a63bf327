"""Depth, FLOPs, KL by exit, correlations, gate calibration and the Pareto front, from planted answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ee_megatron.evaluation.controls import gate_calibration
from ee_megatron.evaluation.evaluate import Answer
from ee_megatron.evaluation.results import by_task, depth_correlations, depth_figures, kl_by_exit
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.planning.flops import answer_cost, gate, prefill_cost
from ee_megatron.report.numbers import pareto_front
from ee_megatron.report.tables import externalisation_table
from tests.tiny import tiny_hf

TEXTS = [" 3", " x", " 8", " =", " 24", ".", " The", " answer", " is", " 2", "4", "."]


def planted(name: str, depths: list[int], entropies: list[float], flops: float | None = None) -> Answer:
    tokens = [
        {"text": text, "depth": d, "logprob": 0.0, "exit_logprob": 0.0, "entropy": e, "surprisal": -e, "kl": d / 10}
        for text, d, e in zip(TEXTS, depths, entropies, strict=True)
    ]
    return Answer(
        id=name, prompt="", reference="", model="m", exits="x", correct=True, text="", tokens=tokens, flops=flops
    )  # type: ignore[typeddict-item]


def test_depth_figures_of_planted_answers() -> None:
    depths = [10, 2, 2, 2, 4, 2, 2, 2, 2, 8, 6, 2]
    found = depth_figures([planted("a", depths, [0.0] * 12, 5.0), planted("b", [10] * 12, [0.0] * 12, 7.0)])["m, x"]
    assert found["mean"]["value"] == pytest.approx((sum(depths) + 120) / 24)
    assert found["total"]["value"] == pytest.approx((sum(depths) + 120) / 2)
    assert found["quantiles"] == {"0.1": 2, "0.25": 2, "0.5": 10, "0.75": 10, "0.9": 10}
    # The final answer is " 2" and "4", not its full stop and not the 24 of the calculation.
    assert found["answer"]["value"] == pytest.approx((8 + 6 + 20) / 4) and found["answer"]["answers"] == 2
    assert found["flops"]["value"] == 6.0 and found["flops"]["low"] == 5.0
    # Without the first tokens: 8, 24, 2, 4 of either answer.
    assert found["classes"]["digits"] == {"depth": (2 + 4 + 8 + 6 + 40) / 8, "tokens": 8}
    assert found["classes"]["operators"]["tokens"] == 4 and found["classes"]["words"]["tokens"] == 6
    assert depth_figures([planted("a", depths, [0.0] * 12)])["m, x"]["flops"] is None


def test_tasks_are_told_apart_where_there_are_several() -> None:
    easy, hard = planted("a", [2] * 12, [0.0] * 12), planted("b", [8] * 12, [0.0] * 12)
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
    found = kl_by_exit([planted("a", depths, [0.0] * 12)])["m, x"]
    assert {d: (round(v["kl"], 6), v["tokens"]) for d, v in found.items()} == {
        "2": (0.2, 8),
        "4": (0.4, 1),
        "8": (0.8, 2),
    }


def test_depth_follows_entropy_within_each_class_where_that_was_planted() -> None:
    rng = np.random.default_rng(0)
    answers = []
    for i in range(30):
        entropies = rng.random(12)
        # Rising with entropy, in words the other way round.
        depths = [round(100 * (1 - e if t in (6, 7, 8) else e)) for t, e in enumerate(entropies)]
        answers.append(planted(f"p{i}", depths, entropies.tolist()))
    found = depth_correlations(answers, resamples=50)["m, x"]
    assert found["entropy"]["digits"]["value"] > 0.99 and found["entropy"]["words"]["value"] < -0.99
    assert found["entropy"]["answer"]["tokens"] == 60 and found["entropy"]["answer"]["value"] > 0.99
    assert 0 < found["entropy"]["all"]["low"] < found["entropy"]["all"]["value"] < 0.9
    # Surprisal was planted as the negative of entropy.
    assert found["surprisal"]["operators"]["value"] == pytest.approx(-found["entropy"]["operators"]["value"])
    assert depth_correlations([planted("a", [6] * 12, [0.1] * 12)]) == {}


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


def test_the_externalisation_table_shows_what_is_defined() -> None:
    def estimate(v: float) -> dict[str, float]:
        return {"value": v, "low": v - 0.1, "high": v + 0.1}

    probes = [{"ahead": 1, "uplift": [estimate(0.1), estimate(0.3)]}]
    models = {
        "teacher": {"exits": "full depth", "chain_necessity": estimate(0.25), "planning_probe": probes},
        "reinforced": {"exits": "hazard > 0.5", "chain_necessity": estimate(math.nan), "hint_monitor": None},
    }
    lines = externalisation_table(models).text().splitlines()
    assert lines[0].split() == ["figure", "teacher,", "full", "depth", "reinforced,", "hazard", ">", "0.5"]
    (necessity,) = [line for line in lines if line.startswith("chain necessity")]
    assert "0.25 [0.15, 0.35]" in necessity and necessity.endswith("–")
    assert "0.30 [0.20, 0.40]" in next(
        line for line in lines if line.startswith("probe uplift at its best depth, 1 ahead")
    )
