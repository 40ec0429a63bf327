"""Figures of answers that the report draws: depth, FLOPs and KL by exit, and how depth follows what is hard.

Keys are "model, exits". Every function takes answers of any number of models and rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .chain import CLASSES, answer_span, token_class
from .evaluate import Answer, Token
from .statistics import bootstrap_interval, spearman_interval, wilson_interval

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
ANSWER = "answer"
GROUPS = ("all", *(name for name in CLASSES if name != "other"), ANSWER)
RESAMPLES = 200


def label(answer: Answer) -> str:
    """What an answer's figures stand under: model and exits."""
    return f"{answer['model']}, {answer['exits']}"


def by_label(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Answers by their label, in order of appearance."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(label(answer), []).append(answer)
    return groups


def depth_figures(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Depth in layers and FLOPs, with 95 % bootstrap intervals over answers; the report's tables in one place.

    - mean: over all tokens; quantiles: depths that occur, over all tokens; total: layers per answer
    - answer: mean over the tokens that write the final answer, and how many answers have such
    - flops: per answer, prompt included; None where they were not counted
    - classes: {class: {"depth", "tokens"}} without the answers' first tokens, whose depth is no choice
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


def kl_by_exit(answers: Sequence[Answer]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Mean KL(teacher at full depth ‖ model) of the tokens that exited at each depth, nats: {label: {depth: {"kl",
    "low", "high", "tokens"}}}. The answers' first tokens and tokens without a measured KL are left out."""
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for name, group in by_label(answers).items():
        table: dict[int, list[np.ndarray]] = {}
        for answer in group:
            measured = [(t["depth"], kl) for t in answer["tokens"][1:] if (kl := t.get("kl")) is not None]
            for depth in {d for d, _ in measured}:
                table.setdefault(depth, []).append(np.array([kl for d, kl in measured if d == depth]))
        if table:
            found[name] = {str(depth): _kl_entry(table[depth]) for depth in sorted(table)}
    return found


def _kl_entry(parts: Sequence[np.ndarray]) -> dict[str, float | int]:
    estimate = _ratio(parts)
    return {"kl": estimate["value"], "low": estimate["low"], "high": estimate["high"], "tokens": sum(map(len, parts))}


def depth_correlations(answers: Sequence[Answer], resamples: int = RESAMPLES) -> dict[str, dict[str, Any]]:
    """Spearman's rank correlation of depth with the teacher's entropy and surprisal, by class of token.

    {label: {"entropy" | "surprisal": {group: {"value", "low", "high", "tokens"}}}}, groups as in `GROUPS`; "answer" are
    the tokens of the final answer, whatever their class. Within a class the correlation can't come from digits being
    both harder and deeper than words. Left out: first tokens, and groups whose depth or measure never varies.
    """
    measures: dict[str, Callable[[Token], float | None]] = {
        "entropy": lambda t: t["entropy"],
        "surprisal": lambda t: t.get("surprisal"),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, group in by_label(answers).items():
        members = [_groups(answer) for answer in group]
        entry = {
            measure: {which: e for which in GROUPS if (e := _correlation(group, members, which, read, resamples))}
            for measure, read in measures.items()
        }
        if any(entry.values()):
            found[name] = entry
    return found


def _groups(answer: Answer) -> list[set[str]]:
    texts = [t["text"] for t in answer["tokens"]]
    span = range(len(texts))[answer_span(texts)]
    return [{"all", token_class(text), *([ANSWER] if t in span else [])} for t, text in enumerate(texts)]


def _correlation(
    group: Sequence[Answer],
    members: Sequence[Sequence[set[str]]],
    which: str,
    read: Callable[[Token], float | None],
    resamples: int,
) -> dict[str, float | int] | None:
    columns = []
    for answer, names in zip(group, members, strict=True):
        pairs = [
            (t["depth"], value)
            for t, belongs in list(zip(answer["tokens"], names, strict=True))[1:]
            if which in belongs and (value := read(t)) is not None
        ]
        if pairs:
            columns.append(np.array(pairs, dtype=np.float64))
    tokens = np.concatenate(columns) if columns else np.zeros((0, 2))
    if len(tokens) < 2 or any(len(np.unique(tokens[:, k])) < 2 for k in (0, 1)):
        return None
    estimate = spearman_interval([c[:, 0] for c in columns], [c[:, 1] for c in columns], resamples=resamples)
    return {**estimate._asdict(), "tokens": len(tokens)}
