"""Figures of answers that the report draws: depth, FLOPs and KL by exit, and how depth follows what is hard.

Keys are "model, exits". Every function takes answers of any number of models and rules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from ..statistics import bootstrap_interval, spearman_interval, wilson_interval
from .chain import CLASSES, answer_span, token_class
from .evaluate import Answer

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
ANSWER = "answer"
GROUPS = ("all", *(name for name in CLASSES if name != "other"), ANSWER)
RESAMPLES = 200
Measure = Literal["entropy", "surprisal", "kl"]


def by_label(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Answers by their label, "model, exits", in order of appearance."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(f"{answer['model']}, {answer['exits']}", []).append(answer)
    return groups


def depth_figures(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Depth in layers and FLOPs, with 95 % bootstrap intervals over answers; the report's tables in one place.

    - mean: over all tokens; quantiles: depths that occur, over all tokens; total: layers per answer
    - answer: mean over the tokens that write the final answer, and how many answers have such
    - flops: per answer, prompt included; None where they were not counted
    - classes: {class: {"depth", "tokens"}} without the answers' first tokens, whose depth may be no choice
    """
    found: dict[str, dict[str, Any]] = {}
    for name, group in by_label(answers).items():
        depths = [np.array([t["depth"] for t in a["tokens"]], dtype=np.float64) for a in group]
        tokens = np.concatenate(depths)
        if not len(tokens):
            continue
        spans = [d[answer_span([t["text"] for t in a["tokens"]])] for a, d in zip(group, depths, strict=True)]
        flops = [f for a in group if (f := a.get("flops")) is not None]
        found[name] = {
            "mean": _ratio(depths),
            "quantiles": {f"{q:g}": float(np.quantile(tokens, q, method="inverted_cdf")) for q in QUANTILES},
            "total": bootstrap_interval([d.sum() for d in depths])._asdict(),
            "answer": {**_ratio(spans), "answers": sum(len(s) > 0 for s in spans)},
            "flops": bootstrap_interval(flops)._asdict() if flops else None,
            "classes": _by_class(group),
        }
    return found


def _ratio(parts: Sequence[np.ndarray]) -> dict[str, float]:
    """The mean over the tokens of all answers; answers are resampled."""
    sums = np.array([(p.sum(), len(p)) for p in parts if len(p)], dtype=np.float64)
    return bootstrap_interval(sums, lambda s: float(s[:, 0].sum() / s[:, 1].sum()))._asdict()


def _by_class(group: Sequence[Answer]) -> dict[str, dict[str, float | int]]:
    depths: dict[str, list[int]] = {name: [] for name in CLASSES}
    for token in (t for a in group for t in a["tokens"][1:]):
        depths[token_class(token["text"])].append(token["depth"])
    return {name: {"depth": float(np.mean(d)), "tokens": len(d)} for name, d in depths.items() if d}


def by_task(answers: Sequence[Answer]) -> dict[str, dict[str, dict[str, Any]]]:
    """{label: {task: {"n", "accuracy", "low", "high" (Wilson, 95 %), "mean_depth" (layers per token)}}}, where answers
    are to problems of more than one task or family; {} else."""
    tasks = dict.fromkeys(task for answer in answers if (task := answer.get("task")))
    if len(tasks) < 2:
        return {}
    return {
        name: {task: _task_entry(part) for task in tasks if (part := [a for a in group if a.get("task") == task])}
        for name, group in by_label(answers).items()
    }


def _task_entry(group: Sequence[Answer]) -> dict[str, Any]:
    right = sum(answer["correct"] for answer in group)
    interval = wilson_interval(right, len(group))
    return {
        "n": len(group),
        "accuracy": right / len(group),
        "low": interval.low,
        "high": interval.high,
        "mean_depth": _ratio([np.array([t["depth"] for t in a["tokens"]], dtype=np.float64) for a in group]),
    }


def paired(
    answers: Sequence[Answer], measure: Measure, places: Sequence[Collection[int]] | None = None
) -> list[np.ndarray]:
    """float64 [T, 2] per answer: depth and measure of its tokens, those at its `places` where these are given.

    Left out: first tokens, whose depth may be no choice, tokens without the measure, and answers without any other.
    """
    columns = []
    for i, answer in enumerate(answers):
        pairs = [
            (token["depth"], value)
            for t, token in enumerate(answer["tokens"])
            if t and (places is None or t in places[i]) and (value := token.get(measure)) is not None
        ]
        if pairs:
            columns.append(np.array(pairs, dtype=np.float64))
    return columns


def kl_by_exit(answers: Sequence[Answer]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Mean KL(teacher at full depth ‖ model) of the tokens that exited at each depth, nats: {label: {depth: {"kl",
    "low", "high", "tokens"}}}, tokens as `paired` has them."""
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for name, group in by_label(answers).items():
        columns = paired(group, "kl")
        for depth in np.unique(np.concatenate(columns)[:, 0]) if columns else ():
            parts = [c[c[:, 0] == depth, 1] for c in columns]
            mean = _ratio(parts)
            entry = {"kl": mean["value"], "low": mean["low"], "high": mean["high"], "tokens": sum(map(len, parts))}
            found.setdefault(name, {})[str(int(depth))] = entry
    return found


def depth_correlations(answers: Sequence[Answer], resamples: int = RESAMPLES) -> dict[str, dict[str, Any]]:
    """Spearman's rank correlation of depth with the teacher's entropy and surprisal, by class of token.

    {label: {"entropy" | "surprisal": {group: {"value", "low", "high", "tokens"}}}}, groups as in `GROUPS`; "answer" are
    the tokens of the final answer, whatever their class. Within a class the correlation can't come from digits being
    both harder and deeper than words. Tokens as `paired` has them; groups whose depth or measure never varies are left
    out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, group in by_label(answers).items():
        places = [_places(answer) for answer in group]
        entry = {m: _correlations(group, m, places, resamples) for m in ("entropy", "surprisal")}
        if any(entry.values()):
            found[name] = entry
    return found


def _places(answer: Answer) -> dict[str, set[int]]:
    """The tokens of each group in `GROUPS`."""
    texts = [t["text"] for t in answer["tokens"]]
    every = range(len(texts))
    classes = {name: {t for t in every if token_class(texts[t]) == name} for name in CLASSES}
    return {**classes, "all": set(every), ANSWER: set(every[answer_span(texts)])}


def _correlations(
    answers: Sequence[Answer], measure: Measure, places: Sequence[dict[str, set[int]]], resamples: int
) -> dict[str, dict[str, float | int]]:
    found = {}
    for group in GROUPS:
        columns = paired(answers, measure, [each[group] for each in places])
        if columns and (np.ptp(tokens := np.concatenate(columns), axis=0) > 0).all():
            estimate = spearman_interval([c[:, 0] for c in columns], [c[:, 1] for c in columns], resamples=resamples)
            found[group] = {**estimate._asdict(), "tokens": len(tokens)}
    return found
