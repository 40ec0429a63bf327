"""The verdict's sentences follow the figures: other figures, other sentences; without figures no question."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ee_megatron.report.data import StageData
from ee_megatron.report.results import Results
from ee_megatron.report.verdict import Finding, verdict
from ee_megatron.statistics import discordant_p, fragility, mcnemar_exact, proportion_difference, welch_interval

QUESTIONS = {
    "kept": r"calibration.*accuracy",
    "accuracy": r"\bRL\b.*accuracy",
    "depth": r"\bRL\b.*depth",
    "fronts": r"\bfronts\b",
    "speed": r"\bseconds\b",
    "few": r"\bfew\b.*reinforced against calibrated",
}
"""A term of each question by which it is told from the others."""


def row(model: str, exits: str, accuracy: float, depth: float, speed: float = 500.0) -> dict[str, Any]:
    return {"model": model, "exits": exits, "n": 400, "accuracy": accuracy, "mean_depth": depth, "length": 20.0} | {
        "tokens_per_s": speed
    }


def compared(accuracy: tuple, depth: tuple, only: tuple[int, int]) -> dict[str, Any]:
    def estimate(values: tuple) -> dict[str, float]:
        return dict(zip(("value", "low", "high"), values, strict=True))

    test = discordant_p(*only)
    return {"against": "", "n": 400, "groups": 90, "only_before": only[0], "only_after": only[1], "p_value": test} | {
        "accuracy": estimate(accuracy), "depth": estimate(depth)
    }  # fmt: skip


def results(**parts: Any) -> Results:
    found = Results(
        meta={"num_layers": 30, "threshold_calibrated": 0.5, "threshold_reinforced": 0.8},
        rows=[
            row("teacher", "full depth", 0.815, 1.0, 600),
            row("calibrated", "hazard > 0.5", 0.788, 0.786),
            row("reinforced", "full depth", 0.82, 1.0, 580),
            row("reinforced", "hazard > 0.8", 0.818, 0.792, 504),
        ],
        compared={
            "calibrated, hazard > 0.5": compared((-0.027, -0.05, -0.004), (-0.214, -0.22, -0.2), (25, 14)),
            "reinforced, hazard > 0.8": compared((0.03, -0.002, 0.06), (0.006, -0.004, 0.016), (12, 24)),
        },
    )
    for name, part in parts.items():
        setattr(found, name, part)
    return found


def said(found: Results, which: str, rl: StageData | None = None) -> Finding:
    (finding,) = (f for f in verdict(found, rl) if re.search(QUESTIONS[which], f.question))
    return finding


def test_a_loss_beyond_its_interval_is_called_one_and_its_figures_stand_beside_it() -> None:
    finding = said(results(), "kept")
    assert finding.answer.startswith("No") and "2.7 points" in finding.answer
    for words in ("78.8%", "81.5%", "n = 400", "-2.7 points [-5.0, -0.4]", "90 groups", "0.786"):
        assert words in finding.evidence, words


@pytest.mark.parametrize(
    ("interval", "answer"),
    [
        ((-0.01, -0.03, 0.01), "No.*3.0 points"),
        ((0.02, 0.005, 0.035), "Yes.*gain.*2.0 points"),
        ((-0.02, -0.03, -0.001), "No.*lost.*2.0 points"),
    ],
)
def test_the_answer_depends_on_where_the_interval_lies(interval: tuple, answer: str) -> None:
    found = results()
    found.compared["calibrated, hazard > 0.5"] = compared(interval, (0.0, 0.0, 0.0), (5, 5))
    assert re.match(answer, said(found, "kept").answer)


def test_depth_is_said_to_move_only_beyond_its_interval_and_training_is_told_apart() -> None:
    rising = [(s, 0.772 + 0.024 * s / 20 + 0.001 * (s % 2)) for s in range(1, 21)]
    stage = StageData("rl", Path("rl"), curves={"mean_depth": rising, "lambda": [(s, 1.0) for s in range(1, 21)]})
    finding = said(results(), "depth", stage)
    assert finding.answer.startswith("No") and "+0.006 [-0.004, +0.016]" in finding.evidence
    assert re.search(r"\brose\b.*λ = 1.*\b5 steps", finding.evidence)
    flat = [(s, 0.77 + 0.01 * (s % 2)) for s in range(1, 21)]
    stage.curves["mean_depth"] = flat
    assert not re.search(r"\b(rose|fell)\b", said(results(), "depth", stage).evidence)
    found = results()
    found.compared["reinforced, hazard > 0.8"] = compared((0, -0.01, 0.01), (-0.04, -0.05, -0.03), (3, 3))
    assert re.match("Yes.*earlier", said(found, "depth").answer)
    found.compared["reinforced, hazard > 0.8"] = compared((0, -0.01, 0.01), (0.04, 0.03, 0.05), (3, 3))
    assert re.match("Yes.*deeper", said(found, "depth").answer)


def test_slower_exits_are_explained_by_what_flops_do_not_count() -> None:
    flops = {"reinforced, full depth": 9e9, "reinforced, hazard > 0.8": 7.2e9}
    depth = {label: {"flops": {"value": v, "low": v, "high": v}} for label, v in flops.items()}
    finding = said(results(depth=depth), "speed")
    assert finding.answer == "Slower, 0.87×"
    for words in (
        "504",
        "580",
        "0.80",
        "1.15",
        "0.35",
    ):
        assert words in finding.evidence, words
    fast = results(depth=depth)
    fast.rows[-1]["tokens_per_s"] = 1160.0
    assert said(fast, "speed").answer == "Faster, 2.00×"
    fast.rows[-1]["tokens_per_s"] = 590.0
    assert re.match(r"Neither\b.*\b5%", said(fast, "speed").answer)
    assert "FLOPs" not in said(results(), "speed").evidence, "not counted, not explained"


def front(shift: float, n: int = 200) -> dict[str, list[dict[str, Any]]]:
    depths = (0.6, 0.7, 0.8)
    return {
        model: [{"threshold": d, "n": n, "accuracy": 0.5 + d / 3 + move, "mean_depth": d + off} for d in depths]
        for model, move, off in (("calibrated", 0.0, 0.0), ("reinforced", shift, 0.05))
    }


def test_fronts_coincide_within_intervals_that_are_widened_for_every_look() -> None:
    near = said(results(pareto=front(0.01)), "fronts")
    assert re.search(r"\byes\b", near.answer) and re.search(r"\b2 comparisons", near.evidence)
    far = said(results(pareto=front(-0.3)), "fronts")
    assert re.match(r"No\b.*reinforced.*worse.*depth 0\.", far.answer) and "n = 200" in far.evidence
    # 9 points at n = 200: beyond a single interval of 95 %, not beyond two that are to hold together.
    single = proportion_difference((138, 200), (156, 200))
    assert single.low > 0
    assert said(results(pareto=front(0.09)), "fronts").answer == near.answer
    apart = front(0.0)
    apart["reinforced"] = [{**e, "mean_depth": e["mean_depth"] + 0.3} for e in apart["reinforced"]]
    assert not re.search(r"\b(yes|No)\b", said(results(pareto=apart), "fronts").answer)


def test_how_few_problems_decide_is_counted_from_the_discordant_ones() -> None:
    finding = said(results(), "few")
    assert discordant_p(12, 24) > 0.05
    assert finding.answer == f"{fragility(12, 24)} of 400"
    assert re.search(r"\b24\D*reinforced\D*\b12\D*calibrated", finding.evidence)
    found = results()
    found.compared["reinforced, hazard > 0.8"] = compared((0.1, 0.05, 0.15), (0, -1, 1), (2, 40))
    assert said(found, "few").answer == f"{fragility(2, 40)} of 400" and fragility(2, 40) > 0


def test_what_is_missing_is_not_asked_about() -> None:
    assert verdict(Results()) == []
    found = results(compared={})
    found.rows = found.rows[:2]
    asked = [f.question for f in verdict(found)]
    assert [which for which, term in QUESTIONS.items() if any(re.search(term, q) for q in asked)] == ["kept", "speed"]
    assert "independent" in said(found, "kept").evidence


def test_fragility_is_where_the_test_turns() -> None:
    for b, c in ((2, 40), (12, 24), (0, 6), (10, 10), (0, 0)):
        moved = fragility(b, c)
        significant = discordant_p(b, c) < 0.05
        less, more = sorted((b, c))
        step = -1 if significant else 1
        assert moved > 0 and (discordant_p(less, more + step * moved) < 0.05) != significant
        assert (discordant_p(less, more + step * (moved - 1)) < 0.05) == significant
    assert mcnemar_exact([True] * 6, [False] * 6).p_value == discordant_p(6, 0)


def test_differences_of_proportions_and_means_against_published_and_known_values() -> None:
    # Newcombe 1998, table II: 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    found = proportion_difference((48, 80), (56, 70))
    assert found.value == pytest.approx(0.2) and (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    # Equal variances and sizes: Welch's is Student's, t(0.975, 8) = 2.306004.
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0]
    half = 2.306004 * (2 * 2.5 / 5) ** 0.5
    assert welch_interval(first, second) == pytest.approx((1.0, 1.0 - half, 1.0 + half), abs=1e-5)
