"""The evaluation's results: a file for the report, a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..observe.rundir import write_atomic
from ..report.numbers import strict_json
from ..report.results import Results
from ..report.tables import TextTable
from ..statistics import clustered_difference, mcnemar_exact, spearman_interval
from .evaluate import Answer
from .figures import by_label, by_task, depth_correlations, depth_figures, kl_by_exit, paired
from .summary import EvaluationRow

BINS = 8
"""Entropy bins, each with as many tokens."""
REFERENCE = "teacher"


def write_results(
    path: Path,
    rows: Sequence[EvaluationRow],
    answers: Sequence[Answer],
    meta: Mapping[str, Any],
    keep: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write results.json at `path`, whole or not at all: the parts of `Results`, those in `more` too; NaN is null.

    The statistics are over all `answers`; the file keeps those to the first `keep` prompts (None: all), so that every
    model is shown on the same ones.
    """
    prompts = list(dict.fromkeys(answer["id"] for answer in answers))
    kept = set(prompts if keep is None else prompts[:keep])
    results = Results(
        meta=dict(meta),
        rows=[row.to_json() for row in rows],
        answers=[dict(answer) for answer in answers if answer["id"] in kept],
        depth_by_entropy=depth_by_entropy(answers),
        exit_histogram=exit_histogram(answers),
        paired=paired_with_teacher(answers),
        depth=depth_figures(answers),
        by_task=by_task(answers),
        kl_by_exit=kl_by_exit(answers),
        depth_correlations=depth_correlations(answers),
        **(more or {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(strict_json(results.to_json()), ensure_ascii=False, indent=1, allow_nan=False))


def exit_histogram(answers: Sequence[Answer]) -> dict[str, dict[str, int]]:
    """{"model, exits": {depth: tokens}}, depths in order (as strings, JSON's keys)."""
    histogram: dict[str, dict[str, int]] = {}
    for label, group in by_label(answers).items():
        depths, counts = np.unique([t["depth"] for a in group for t in a["tokens"]], return_counts=True)
        histogram[label] = {str(int(d)): int(c) for d, c in zip(depths, counts, strict=True)}
    return histogram


def depth_by_entropy(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Whether hard tokens go deeper: per "model, exits" the rank correlation of depth and the teacher's entropy.

    {"spearman", "low", "high" (95%, answers resampled), "tokens", "answers", "bins": [{"entropy", "depth", "tokens"}]}.
    Tokens as `paired` has them; models whose depth never varies are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, group in by_label(answers).items():
        columns = paired(group, "entropy")
        if not columns or np.ptp((tokens := np.concatenate(columns))[:, 0]) == 0:
            continue
        estimate = spearman_interval([c[:, 0] for c in columns], [c[:, 1] for c in columns])
        ordered = tokens[np.argsort(tokens[:, 1], kind="stable")]
        parts = [part for part in np.array_split(ordered, BINS) if len(part)]
        found[label] = {
            "spearman": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "tokens": len(tokens),
            "answers": len(columns),
            "bins": [
                {"entropy": float(p[:, 1].mean()), "depth": float(p[:, 0].mean()), "tokens": len(p)} for p in parts
            ],
        }
    return found


def paired_with_teacher(answers: Sequence[Answer]) -> dict[str, dict[str, float | int]]:
    """Exact McNemar test of every "model, exits" against the teacher on the prompts that both answered; and the
    difference in accuracy with the 95% interval over prompts ("difference", "low", "high") and over groups of them,
    which is wider where many prompts share few operands ("group_low", "group_high", "groups")."""
    groups = by_label(answers)
    teacher = next((group for group in groups.values() if group[0]["model"] == REFERENCE), None)
    if teacher is None:
        return {}
    right = {answer["id"]: answer["correct"] for answer in teacher}
    tests: dict[str, dict[str, float | int]] = {}
    for label, group in groups.items():
        shared = [answer for answer in group if answer["id"] in right]
        if group is teacher or not shared:
            continue
        before, after = [right[a["id"]] for a in shared], [a["correct"] for a in shared]
        clusters = [a.get("group") or a["id"] for a in shared]
        test = mcnemar_exact(before, after)
        single = clustered_difference(before, after, [a["id"] for a in shared])
        grouped = clustered_difference(before, after, clusters)
        tests[label] = {
            "n": len(shared),
            "only_teacher": test.only_first,
            "only_model": test.only_second,
            "p_value": test.p_value,
            "difference": single.value,
            "low": single.low,
            "high": single.high,
            "group_low": grouped.low,
            "group_high": grouped.high,
            "groups": len(set(clusters)),
        }
    return tests


def on_wide(rows: Sequence[EvaluationRow], answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """The part "wide" of results.json, of all models' rows and answers on wide operands: {"model, exits": {"row",
    "paired" as `paired_with_teacher` has it (the teacher has none), "by_task" as `by_task` has it}}."""
    tests, tasks = paired_with_teacher(answers), by_task(answers)
    labels = ((f"{row.model}, {row.exits}", row) for row in rows)
    return {
        label: {"row": row.to_json(), "paired": tests.get(label, {}), "by_task": tasks.get(label, {})}
        for label, row in labels
    }


def table(rows: Sequence[EvaluationRow]) -> str:
    """The rows as text in aligned columns; depth as a share of the layers, total depth in layers, KL in nats."""
    heads = ("model", "exits", "accuracy", "n", "mean depth", "total depth", "length", "KL", "tok/s")
    cells = [
        (
            row.model,
            row.exits,
            f"{row.accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]",
            str(row.n),
            f"{row.mean_depth:.3f}",
            f"{row.total_depth:.0f}",
            f"{row.length:.1f}",
            "–" if row.kl is None else f"{row.kl:.4f}",
            "–" if row.tokens_per_s is None else f"{row.tokens_per_s:.0f}",
        )
        for row in rows
    ]
    return TextTable(heads, cells, names=2).text()
