"""What a run found, in words: each sentence is chosen and filled in by the run's figures, with their intervals and n.

Where a figure is missing its question isn't asked. Differences whose interval holds zero are called not shown, never
absent; the rest of the page has the figures themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

from ..statistics import Estimate, fragility, proportion_difference, welch_interval
from .data import Curve, Inputs, StageData
from .numbers import is_number, or_nan
from .results import Results

LIKE = 0.05
"""Speeds that differ by less are called alike: they are timed once."""
QUARTER = 4


@dataclass(frozen=True)
class Finding:
    """A question, its answer in a few words, and the figures that it rests on."""

    question: str
    answer: str
    evidence: str


@dataclass(frozen=True)
class Change:
    """One model against the one before it on the same problems. Accuracy and depth as shares."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    accuracy: Estimate
    how: str
    """What the accuracy's interval is over."""
    depth: Estimate | None
    only_before: int | None
    only_after: int | None
    p_value: float

    @property
    def names(self) -> tuple[str, str]:
        return str(self.before["model"]), str(self.after["model"])


def verdicts(inputs: Inputs) -> list[tuple[str, list[Finding]]]:
    """(label, findings) per run, those without any left out; the label of a single run is empty."""
    found = []
    for run, results in inputs.by_run:
        rl = next((s for s in inputs.stages if s.name == "rl" and _is_of(s, run, inputs)), None)
        findings = verdict(results, rl)
        if findings:
            found.append((run, findings))
    return found


def _is_of(stage: StageData, run: str, inputs: Inputs) -> bool:
    return len(inputs.by_run) == 1 or stage.run == run


def verdict(results: Results, rl: StageData | None = None) -> list[Finding]:
    """Every question that the results of one run have figures for. `rl`: its RL stage."""
    calibration = _change(results, "teacher", "calibrated")
    reinforcement = _change(results, "calibrated", "reinforced")
    found = [_kept(calibration)] if calibration else []
    if reinforcement:
        found += [_moved_accuracy(reinforcement), *_moved_depth(reinforcement, rl)]
    found += _fronts(results)
    found += _speed(results)
    found += [f for c in (calibration, reinforcement) if c for f in _few(c)]
    return found


# -- one model against another ----------------------------------------------------------------------------------------


def _change(results: Results, first: str, second: str) -> Change | None:
    before, after = results.chosen(first), results.chosen(second)
    if before is None or after is None or not _counted(before) or not _counted(after):
        return None
    label = f"{second}, {after['exits']}"
    compared = results.compared.get(label)
    if compared:
        how = f"95 % over {compared['groups']:,} groups of problems"
        accuracy, depth = (_estimate(compared.get(key)) for key in ("accuracy", "depth"))
        return Change(
            before, after, accuracy or _apart(before, after), how, depth,
            compared["only_before"], compared["only_after"], compared["p_value"],
        )  # fmt: skip
    paired = results.paired.get(label) if first == "teacher" else None
    if paired and is_number(paired.get("difference")):
        low, high = (paired.get(f"group_{end}", paired.get(end)) for end in ("low", "high"))
        over = f"{paired['groups']:,} groups of problems" if "groups" in paired else "problems"
        accuracy = Estimate(paired["difference"], or_nan(low), or_nan(high))
        return Change(
            before, after, accuracy, f"95 % over {over}", None,
            paired.get("only_teacher"), paired.get("only_model"), or_nan(paired.get("p_value")),
        )  # fmt: skip
    how = "95 %, as if of independent answers, which for the same problems is mostly too wide"
    depth = _depth_apart(results, f"{first}, {before['exits']}", label)
    return Change(before, after, _apart(before, after), how, depth, None, None, math.nan)


def _counted(row: Mapping[str, Any]) -> bool:
    return bool(row.get("n")) and is_number(row.get("accuracy"))


def _estimate(found: Mapping[str, Any] | None) -> Estimate | None:
    if not found or not is_number(found.get("value")):
        return None
    return Estimate(*(or_nan(found.get(key)) for key in ("value", "low", "high")))


def _apart(before: Mapping[str, Any], after: Mapping[str, Any], z: float | None = None) -> Estimate:
    first, second = ((round(row["accuracy"] * row["n"]), int(row["n"])) for row in (before, after))
    return proportion_difference(first, second) if z is None else proportion_difference(first, second, z)


def _depth_apart(results: Results, first: str, second: str) -> Estimate | None:
    """From the intervals of the two means, as of independent answers."""
    ends = [_estimate((results.depth.get(label) or {}).get("mean")) for label in (first, second)]
    a, b = ends
    if a is None or b is None:
        return None
    value = b.value - a.value
    low = value - math.hypot(b.value - b.low, a.high - a.value)
    high = value + math.hypot(b.high - b.value, a.value - a.low)
    return Estimate(*(x / results.num_layers for x in (value, low, high)))


def _kept(c: Change) -> Finding:
    d = c.accuracy
    if d.low > 0:
        answer = f"Yes, and gained {_points(d.value)}"
    elif d.high < 0:
        answer = f"No: it lost {_points(-d.value)}"
    else:
        answer = f"No loss shown; up to {_points(max(0.0, -d.low))} would not show" if d.low < 0 else "No loss shown"
    evidence = f"{_accuracies(c)}. Mean depth {c.after['mean_depth']:.3f} of the layers."
    return Finding("Did calibration hold the teacher's accuracy?", answer, evidence)


def _moved_accuracy(c: Change) -> Finding:
    d = c.accuracy
    if d.low > 0:
        answer = f"Yes: it rose by {_points(d.value)}"
    elif d.high < 0:
        answer = f"Yes: it fell by {_points(-d.value)}"
    else:
        answer = "Not beyond its interval"
    return Finding("Did RL change the accuracy?", answer, _accuracies(c) + ".")


def _accuracies(c: Change) -> str:
    (first, second), d = c.names, c.accuracy
    p = f", p = {c.p_value:.2g} (McNemar)" if is_number(c.p_value) else ""
    return (
        f"{second} {c.after['accuracy']:.1%} ({c.after['exits']}), {first} {c.before['accuracy']:.1%} "
        f"({c.before['exits']}), n = {c.after['n']:,} problems: {100 * d.value:+.1f} points "
        f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}], {c.how}{p}"
    )


def _moved_depth(c: Change, rl: StageData | None) -> list[Finding]:
    d, before, after = c.depth, c.before, c.after
    if not (is_number(before.get("mean_depth")) and is_number(after.get("mean_depth"))):
        return []
    change = after["mean_depth"] - before["mean_depth"]
    if d is None or not is_number(d.low):
        answer, interval = "No interval is known for it", f"{change:+.3f}"
    else:
        interval = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
        shown = d.low > 0 or d.high < 0
        answer = f"Yes: answers leave {'deeper' if d.value > 0 else 'earlier'}" if shown else "Not beyond its interval"
    evidence = (
        f"Mean depth {after['mean_depth']:.3f} of the layers at the exits chosen for {c.names[1]}, "
        f"{before['mean_depth']:.3f} at those for {c.names[0]}, n = {after['n']:,} problems: {interval}. "
    )
    return [Finding("Did RL change the depth?", answer, evidence + _training_depth(rl))]


def _training_depth(rl: StageData | None) -> str:
    """How the depth of sampled rollouts went in training."""
    curve = (rl.curves.get("mean_depth") if rl else None) or []
    size = len(curve) // QUARTER
    if rl is None or size < 2:
        return ""
    first, last = [v for _, v in curve[:size]], [v for _, v in curve[-size:]]
    d = welch_interval(first, last)
    moved = "rose" if d.low > 0 else "fell" if d.high < 0 else "did not move beyond its interval"
    price, interval = _price(rl.curves.get("lambda")), f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return (
        f"In training the depth of sampled answers {moved}{price}: {sum(first) / size:.3f} over the first {size} "
        f"steps, {sum(last) / size:.3f} over the last {size}, {interval} (Welch, over steps)."
    )


def _price(curve: Curve | None) -> str:
    values = [v for _, v in curve or [] if math.isfinite(v)]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f" at λ = {low:g}" if low == high else f" at λ from {low:.3g} to {high:.3g}"


# -- fronts, speed, few examples --------------------------------------------------------------------------------------


def _fronts(results: Results) -> list[Finding]:
    """Whether RL's thresholds give what calibration's give at the same depth, on the validation split."""
    before, after = (_points_of(results.pareto.get(model) or []) for model in ("calibrated", "reinforced"))
    if not before or not after:
        return []
    question = "Do the fronts over thresholds coincide on validation?"
    shared = [(e, near) for e in after if (near := _at_depth(before, e["mean_depth"])) is not None]
    spans = [f"{es[0]['mean_depth']:.3f} to {es[-1]['mean_depth']:.3f}" for es in (before, after)]
    if not shared:
        answer = "They share no depth, so this doesn't say"
        evidence = (
            f"Mean depths calibrated {spans[0]}, reinforced {spans[1]}, over {len(before)} and {len(after)} thresholds."
        )
        return [Finding(question, answer, evidence)]
    # Several looks: the interval of each is widened so that all hold together (Bonferroni).
    z = NormalDist().inv_cdf(1 - 0.025 / len(shared))
    gaps = [(e["mean_depth"], _apart(near, e, z)) for e, near in shared]
    beyond = [(x, g) for x, g in gaps if g.low > 0 or g.high < 0]
    x, gap = max(beyond or gaps, key=lambda item: abs(item[1].value))
    words = f"{100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] at depth {x:.3f}"
    if not beyond:
        answer = "Within their intervals, yes"
        evidence = f"Nowhere do they differ by more; greatest: {words}"
    else:
        answer = f"No: reinforced is {'better' if gap.value > 0 else 'worse'} at depth {x:.3f}"
        evidence = f"Greatest difference: {words}"
    evidence += (
        f", reinforced minus calibrated at the same depth (calibrated's thresholds joined by lines), n = "
        f"{shared[0][0]['n']:,} validation problems each, intervals widened for {len(shared)} comparison"
        f"{'s' if len(shared) > 1 else ''}. Depths: calibrated {spans[0]}, reinforced {spans[1]}."
    )
    return [Finding(question, answer, evidence)]


def _points_of(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(
        (e for e in entries if _counted(e) and is_number(e.get("mean_depth"))), key=lambda e: float(e["mean_depth"])
    )


def _at_depth(entries: Sequence[Mapping[str, Any]], depth: float) -> dict[str, Any] | None:
    """Accuracy at a depth between two of the entries, by a line; None outside of them."""
    for left, right in pairwise(entries):
        low, high = left["mean_depth"], right["mean_depth"]
        if low <= depth <= high:
            share = (depth - low) / (high - low) if high > low else 0.0
            accuracy = left["accuracy"] + share * (right["accuracy"] - left["accuracy"])
            return {"accuracy": accuracy, "n": min(left["n"], right["n"])}
    if len(entries) == 1 and math.isclose(entries[0]["mean_depth"], depth, abs_tol=5e-4):
        return dict(entries[0])
    return None


def _speed(results: Results) -> list[Finding]:
    """The last model's chosen exits against the same weights at full depth, in seconds and in FLOPs."""
    row = results.last_chosen()
    if row is None:
        return []
    model = row["model"]
    full = next((r for r in results.rows if r["model"] == model and r.get("exits") == "full depth"), None)
    full = full or next((r for r in results.rows if r.get("exits") == "full depth"), None)
    if full is None or not all(is_number(r.get("tokens_per_s")) and r["tokens_per_s"] > 0 for r in (row, full)):
        return []
    ratio = row["tokens_per_s"] / full["tokens_per_s"]
    if abs(ratio - 1) < LIKE:
        answer = f"Neither by more than {LIKE:.0%}"
    else:
        answer = f"Faster, {ratio:.2f}×" if ratio > 1 else f"Slower, {ratio:.2f}×"
    whose = "the same weights" if full["model"] == model else f"the {full['model']}"
    evidence = (
        f"{row['tokens_per_s']:,.0f} tokens a second at {row['exits']}, {full['tokens_per_s']:,.0f} by {whose} at full "
        f"depth; n = {row['n']:,} answers, {row['length']:.1f} tokens each, timed once on this machine, whatever else "
        f"ran there; no interval. {_why(results, row, full)}"
    )
    return [Finding("Are exits faster or slower here, in seconds?", answer, evidence.strip())]


def _why(results: Results, row: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    costs = [_estimate((results.depth.get(f"{r['model']}, {r['exits']}") or {}).get("flops")) for r in (row, full)]
    mine, whole = costs
    if mine is None or whole is None or not whole.value:
        return ""
    counted = mine.value / whole.value
    # Of an answer: what differs in length differs in both.
    seconds = (row["length"] / row["tokens_per_s"]) / (full["length"] / full["tokens_per_s"])
    rows = results.meta.get("answers in flight")
    flight = f"The up to {rows} answers in flight" if rows else "Answers in flight"
    said = f"An answer with exits has {counted:.2f} of the FLOPs and took {seconds:.2f} of the time: "
    if seconds > counted:
        return said + (
            f"{seconds - counted:.2f} of the full-depth time went into what FLOPs don't count. {flight} are decoded in "
            "the smaller batches that stand at each exit, and the fewer they are, the more each token costs."
        )
    return said + "no overhead of the exits shows."


def _few(c: Change) -> list[Finding]:
    if c.only_before is None or c.only_after is None or not is_number(c.p_value):
        return []
    (first, second), n = c.names, int(c.after["n"])
    differ = c.only_before + c.only_after
    question = f"How few problems decide {second} against {first}?"
    count = fragility(c.only_before, c.only_after)
    evidence = (
        f"{differ:,} of {n:,} problems were right with one of the two alone: {c.only_after:,} with {second}, "
        f"{c.only_before:,} with {first} (p = {c.p_value:.2g}). "
    )
    if c.p_value < 0.05:
        evidence += f"Had {count:,} of them come out alike, p would not be below .05."
    elif count <= n - differ:
        evidence += f"Had {count:,} more been right with one of them alone, p would be below .05."
    else:
        return [Finding(question, "No difference could show on so few", evidence)]
    return [Finding(question, f"{count:,} of {n:,}", evidence)]


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
