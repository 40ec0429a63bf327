"""What an evaluation leaves: results.json with its statistics, answers.jsonl, lens.json, and a table for the terminal.

Keys of the statistics are "model, exits"; every function takes answers of any number of models and rules. Tokens'
statistics leave out an answer's first token, whose depth may be no choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..observe.rundir import write_atomic
from ..report.results import Results, strict_json
from ..report.tables import TextTable
from ..rollout.engine.lens import Lens
from ..rollout.pool.interface import RolloutPool
from ..statistics import (
    Estimate,
    PairedTest,
    bootstrap_interval,
    clustered_difference,
    mcnemar_exact,
    spearman_interval,
    wilson_interval,
)  # fmt: skip
from ..types import Rollout
from .chain import CLASSES, answer_span, token_class
from .evaluate import Answer, EvaluationRow

BINS = 8  # of entropy, each with as many tokens
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
ANSWER = "answer"
GROUPS = ("all", *(name for name in CLASSES if name != "other"), ANSWER)
RESAMPLES = 200
# Problems whose answers are read at every exit; tokens of a readout, positions of a prompt's end, tokens of an answer.
LENS_PROBLEMS = 3
TOP_K, PROMPT_POSITIONS, ANSWER_TOKENS = 3, 32, 48
Measure = Literal["entropy", "surprisal", "kl"]


def write_results(
    path: Path, rows: Sequence[EvaluationRow], answers: Sequence[Answer], meta: Mapping[str, Any],
    keep: int | None = None, more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write results.json at `path`, whole or not at all: the parts of `Results`, those in `more` too; NaN is null. The
    statistics are over all `answers`; the file keeps those to the first `keep` prompts (None: all)."""
    prompts = list(dict.fromkeys(answer["id"] for answer in answers))
    kept = set(prompts if keep is None else prompts[:keep])
    results = Results(
        meta=dict(meta),
        rows=[asdict(row) for row in rows],
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


def by_label(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Answers by their label, "model, exits", in order of appearance."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(f"{answer['model']}, {answer['exits']}", []).append(answer)
    return groups


def exit_histogram(answers: Sequence[Answer]) -> dict[str, dict[str, int]]:
    """{label: {depth: tokens}}, depths in order (as strings, JSON's keys)."""
    histogram: dict[str, dict[str, int]] = {}
    for label, group in by_label(answers).items():
        depths, counts = np.unique([t["depth"] for a in group for t in a["tokens"]], return_counts=True)
        histogram[label] = {str(int(d)): int(c) for d, c in zip(depths, counts, strict=True)}
    return histogram


def depth_figures(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Depth in layers and FLOPs, with 95 % bootstrap intervals over answers.

    - mean: over all tokens; quantiles: depths that occur, over all tokens; total: layers per answer
    - answer: mean over the tokens that write the final answer, and how many answers have such
    - flops: per answer, prompt included; None where they were not counted
    - classes: {class: {"depth", "tokens"}}
    """
    found: dict[str, dict[str, Any]] = {}
    for name, group in by_label(answers).items():
        depths = [_depths(a) for a in group]
        tokens = np.concatenate(depths)
        if not len(tokens):
            continue
        spans = [d[answer_span([t["text"] for t in a["tokens"]])] for a, d in zip(group, depths, strict=True)]
        flops = [f for a in group if (f := a.get("flops")) is not None]
        of_class: dict[str, list[int]] = {kind: [] for kind in CLASSES}
        for token in (t for a in group for t in a["tokens"][1:]):
            of_class[token_class(token["text"])].append(token["depth"])
        found[name] = {
            "mean": _ratio(depths),
            "quantiles": {f"{q:g}": float(np.quantile(tokens, q, method="inverted_cdf")) for q in QUANTILES},
            "total": bootstrap_interval([d.sum() for d in depths])._asdict(),
            "answer": {**_ratio(spans), "answers": sum(len(s) > 0 for s in spans)},
            "flops": bootstrap_interval(flops)._asdict() if flops else None,
            "classes": {kind: {"depth": float(np.mean(d)), "tokens": len(d)} for kind, d in of_class.items() if d},
        }
    return found


def _depths(answer: Answer) -> np.ndarray:
    return np.array([token["depth"] for token in answer["tokens"]], dtype=np.float64)


def _ratio(parts: Sequence[np.ndarray]) -> dict[str, float]:
    """The mean over the tokens of all answers; answers are resampled."""
    sums = np.array([(p.sum(), len(p)) for p in parts if len(p)], dtype=np.float64)
    return bootstrap_interval(sums, lambda s: float(s[:, 0].sum() / s[:, 1].sum()))._asdict()


def by_task(answers: Sequence[Answer]) -> dict[str, dict[str, dict[str, Any]]]:
    """{label: {task: {"n", "accuracy", "low", "high" (Wilson, 95 %), "mean_depth" (layers per token)}}}, where answers
    are to problems of more than one task or family; {} else."""
    tasks = dict.fromkeys(task for answer in answers if (task := answer.get("task")))
    if len(tasks) < 2:
        return {}

    def entry(group: Sequence[Answer]) -> dict[str, Any]:
        right = sum(answer["correct"] for answer in group)
        interval = wilson_interval(right, len(group))._asdict()
        means = {"accuracy": right / len(group), **interval, "mean_depth": _ratio([_depths(a) for a in group])}
        return {"n": len(group), **means}

    return {
        name: {task: entry(part) for task in tasks if (part := [a for a in group if a.get("task") == task])}
        for name, group in by_label(answers).items()
    }


def paired(
    answers: Sequence[Answer], measure: Measure, places: Sequence[Collection[int]] | None = None
) -> list[np.ndarray]:
    """float64 [T, 2] per answer: depth and measure of its tokens, those at its `places` where these are given. Tokens
    without the measure, and answers without any other, are left out."""
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


def depth_by_entropy(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Whether hard tokens go deeper: per label the rank correlation of depth and the teacher's entropy.

    {"spearman", "low", "high" (95%, answers resampled), "tokens", "answers", "bins": [{"entropy", "depth", "tokens"}]}.
    Tokens as `paired` has them; models whose depth never varies are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, group in by_label(answers).items():
        columns = paired(group, "entropy")
        if not columns or np.ptp((tokens := np.concatenate(columns))[:, 0]) == 0:
            continue
        value, low, high = spearman_interval([c[:, 0] for c in columns], [c[:, 1] for c in columns])
        parts = np.array_split(tokens[np.argsort(tokens[:, 1], kind="stable")], BINS)
        means = [(float(p[:, 1].mean()), float(p[:, 0].mean()), len(p)) for p in parts if len(p)]
        bins = [{"entropy": entropy, "depth": depth, "tokens": count} for entropy, depth, count in means]
        counts = {"tokens": len(tokens), "answers": len(columns)}
        found[label] = {"spearman": value, "low": low, "high": high, **counts, "bins": bins}
    return found


def depth_correlations(answers: Sequence[Answer], resamples: int = RESAMPLES) -> dict[str, dict[str, Any]]:
    """Spearman's rank correlation of depth with the teacher's entropy and surprisal, by class of token.

    {label: {"entropy" | "surprisal": {group: {"value", "low", "high", "tokens"}}}}, groups as in `GROUPS`, "answer" the
    final one's tokens of any class. Within a class the correlation can't come from digits being both harder and deeper
    than words. Tokens as `paired` has them; groups whose depth or measure never varies are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, group in by_label(answers).items():
        places = [_places(answer) for answer in group]
        entry: dict[str, dict[str, Any]] = {"entropy": {}, "surprisal": {}}
        for measure, of_group in entry.items():
            for kind in GROUPS:
                columns = paired(group, measure, [each[kind] for each in places])  # type: ignore[arg-type]
                if columns and (np.ptp(tokens := np.concatenate(columns), axis=0) > 0).all():
                    sides = [c[:, 0] for c in columns], [c[:, 1] for c in columns]
                    estimate = spearman_interval(*sides, resamples=resamples)
                    of_group[kind] = {**estimate._asdict(), "tokens": len(tokens)}
        if any(entry.values()):
            found[name] = entry
    return found


def _places(answer: Answer) -> dict[str, set[int]]:
    """The tokens of each group in `GROUPS`."""
    texts = [t["text"] for t in answer["tokens"]]
    every = range(len(texts))
    classes = {name: {t for t in every if token_class(texts[t]) == name} for name in CLASSES}
    return {**classes, "all": set(every), ANSWER: set(every[answer_span(texts)])}


def pair_up(before: Sequence[Answer], after: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """The answers to problems that both answered, in `after`'s order."""
    known = {answer["id"]: answer for answer in before}
    return [(known[answer["id"]], answer) for answer in after if answer["id"] in known]


def paired_test(pairs: Sequence[tuple[Answer, Answer]]) -> tuple[PairedTest, Estimate, list[str]]:
    """Of the second answers' accuracy minus the first ones': McNemar's exact test; the difference with its 95 %
    interval over groups of problems that share operands, which are right or wrong together; each pair's group."""
    first, second = ([bool(answer["correct"]) for answer in side] for side in zip(*pairs, strict=True))
    groups = [after.get("group") or after["id"] for _, after in pairs]
    return mcnemar_exact(first, second), clustered_difference(first, second, groups), groups


def paired_with_teacher(answers: Sequence[Answer]) -> dict[str, dict[str, float | int]]:
    """Every label against the teacher on the prompts that both answered, as `paired_test` has it: the interval over
    groups is "group_low", "group_high", that over single prompts, too narrow where many share few operands, "low",
    "high"."""
    groups = by_label(answers)
    teacher = next((group for group in groups.values() if group[0]["model"] == "teacher"), None)
    tests: dict[str, dict[str, float | int]] = {}
    for label, group in groups.items():
        if teacher is None or group is teacher or not (pairs := pair_up(teacher, group)):
            continue
        test, grouped, clusters = paired_test(pairs)
        right = [[pair[side]["correct"] for pair in pairs] for side in (0, 1)]
        single = clustered_difference(right[0], right[1], [after["id"] for _, after in pairs])
        tests[label] = {
            "n": len(pairs), "only_teacher": test.only_first, "only_model": test.only_second, "p_value": test.p_value,
            "difference": single.value, "low": single.low, "high": single.high,
            "group_low": grouped.low, "group_high": grouped.high, "groups": len(set(clusters)),
        }  # fmt: skip
    return tests


def compared(before: Sequence[Answer], after: Sequence[Answer], num_layers: int) -> dict[str, Any] | None:
    """What changed from one model to the next on the problems that both answered, `after` minus `before`, as
    `paired_test` has it; None if there are none. {"against": label of `before`, "n", "groups", "only_before",
    "only_after", "p_value", "accuracy", "depth" (mean over tokens, share of the layers), "total_depth" (layers per
    answer), "length" (tokens per answer)}, each change as {"value", "low", "high"}."""
    pairs = pair_up(before, after)
    if not pairs:
        return None
    test, accuracy, clusters = paired_test(pairs)
    _, place = np.unique(np.array(clusters, dtype=str), return_inverse=True)
    # Per group: depth and tokens before, after, and how many problems.
    columns = [[sum(t["depth"] for t in a["tokens"]) for a in side] for side in zip(*pairs, strict=True)]
    columns += [[len(a["tokens"]) for a in side] for side in zip(*pairs, strict=True)]
    columns.append([1] * len(pairs))
    sums = np.stack([np.bincount(place, weights=column) for column in columns], axis=1)

    def change(kind: str) -> dict[str, float]:
        def statistic(sample: np.ndarray) -> float:
            depth_before, depth_after, tokens_before, tokens_after, n = sample.sum(0)
            mean_depth = (depth_after / max(tokens_after, 1) - depth_before / max(tokens_before, 1)) / num_layers
            totals = {"total_depth": (depth_after - depth_before) / n, "length": (tokens_after - tokens_before) / n}
            return float((totals | {"depth": mean_depth})[kind])

        return bootstrap_interval(sums, statistic)._asdict()

    changes = {kind: change(kind) for kind in ("depth", "total_depth", "length")}
    return {
        "against": f"{before[0]['model']}, {before[0]['exits']}", "n": len(pairs), "groups": len(set(clusters)),
        "only_before": test.only_first, "only_after": test.only_second, "p_value": test.p_value,
        "accuracy": accuracy._asdict(), **changes,
    }  # fmt: skip


def on_wide(rows: Sequence[EvaluationRow], answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """The part "wide" of results.json, of all models' rows and answers on wide operands: {label: {"row", "paired" as
    `paired_with_teacher` has it (the teacher has none), "by_task" as `by_task` has it}}."""
    tests, tasks = paired_with_teacher(answers), by_task(answers)
    return {
        (label := f"{row.model}, {row.exits}"): {"row": asdict(row), "paired": tests.get(label, {}),
                                                 "by_task": tasks.get(label, {})}
        for row in rows
    }  # fmt: skip


def table(rows: Sequence[EvaluationRow]) -> str:
    """The rows as text in aligned columns; depth as a share of the layers, total depth in layers, KL in nats."""
    heads = ("model", "exits", "accuracy", "n", "mean depth", "total depth", "length", "KL", "tok/s")
    cells = [
        (
            row.model, row.exits, f"{row.accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]", str(row.n),
            f"{row.mean_depth:.3f}", f"{row.total_depth:.0f}", f"{row.length:.1f}",
            "–" if row.kl is None else f"{row.kl:.4f}", "–" if row.tokens_per_s is None else f"{row.tokens_per_s:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    return TextTable(heads, cells, names=2).text()


class Records:
    """The files of one evaluation beside results.json. answers.jsonl: a line per problem with each model's answer at
    the exits that were chosen for it; lens.json: for a few problems what the readout at every exit would write.
    exit_depths [M]; problems: how many the report shows token by token."""

    def __init__(self, exit_depths: Sequence[int], problems: int, decode: Callable[[int], str]):
        self.exit_depths, self.problems, self.decode = exit_depths, problems, decode
        self._lines: dict[str, dict[str, Any]] = {}
        self._read: list[dict[str, Any]] = []

    def add(self, pool: RolloutPool, answers: Sequence[Answer], rollouts: Sequence[Rollout]) -> None:
        """A model's answers [n], made under the weights that the pool holds."""
        for answer in answers:
            named = {key: answer.get(key, "") for key in ("id", "prompt", "reference", "task")}
            line = self._lines.setdefault(answer["id"], named | {"answers": {}})
            line["answers"][f"{answer['model']}, {answer['exits']}"] = {
                "correct": bool(answer["correct"]),
                "pieces": [token["text"] for token in answer["tokens"]],
                "depths": [token["depth"] for token in answer["tokens"]],
            }
        few = [i for i in range(min(LENS_PROBLEMS, self.problems, len(answers))) if rollouts[i].length]
        found = pool.lens([rollouts[i] for i in few], TOP_K, PROMPT_POSITIONS, ANSWER_TOKENS) if few else []
        for i, entry in zip(few, found, strict=True):
            kept = {key: answers[i][key] for key in ("id", "prompt", "model", "exits")}  # type: ignore[literal-required]
            rows = [self._row(entry, r) for r in range(len(entry.following))]
            self._read.append({**kept, "given": entry.given, "tokens": len(answers[i]["tokens"]), "rows": rows})

    def _row(self, entry: Lens, r: int) -> dict[str, Any]:
        def readout(ids: np.ndarray, logprobs: np.ndarray) -> list[list[Any]]:
            return [[self.decode(int(i)), round(float(p), 4)] for i, p in zip(ids, logprobs, strict=True)]

        return {
            "text": self.decode(int(entry.following[r])),
            "taken": int(entry.taken[r]),
            "readouts": [readout(ids, probs) for ids, probs in zip(entry.ids[r], entry.logprobs[r], strict=True)],
            "teacher": readout(entry.teacher_ids[r], entry.teacher_logprobs[r]),
        }

    def write(self, directory: Path) -> None:
        """Both files, each whole or not at all."""
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines.values()]
        write_atomic(directory / "answers.jsonl", "".join(lines))
        found = {"exit_depths": list(self.exit_depths), "answers": self._read}
        write_atomic(directory / "lens.json", json.dumps(found, ensure_ascii=False))
