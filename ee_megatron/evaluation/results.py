"""Write an evaluation's files: results.json with its statistics, answers.jsonl; and a table as text.

Keys of the statistics are labels, "model, exits"; every function takes answers of any number of models and rules.
docs/evaluation.md says what each figure is. Intervals are 95 % bootstraps over answers unless another is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..observe.rundir import write_atomic
from ..report.results import Results, strict_json
from ..report.tables import TextTable
from ..statistics import (
    Estimate,
    PairedTest,
    bootstrap_interval,
    clustered_difference,
    sign_flip_test,
    spearman_interval,
    wilson_interval,
)  # fmt: skip
from .chain import CLASSES, answer_span, token_class
from .evaluate import AnswerRecord, EvaluationRow

BINS = 8  # of entropy, each with as many tokens
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
RESAMPLES = 200


def write_results(
    path: Path, rows: Sequence[EvaluationRow], answers: Sequence[AnswerRecord], meta: Mapping[str, Any],
    keep: int | None = None, more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write results.json at `path` atomically: the parts of `Results` and those in `more`; NaN is null. The statistics
    are over all `answers`; the file stores those to the first `keep` prompts (None: all)."""
    prompts = list(dict.fromkeys(answer["id"] for answer in answers))
    stored = set(prompts if keep is None else prompts[:keep])
    tokens = tokens_of(answers)
    results = Results(
        meta=dict(meta),
        rows=[asdict(row) for row in rows],
        answers=[dict(answer) for answer in answers if answer["id"] in stored],
        depth_by_entropy=depth_by_entropy(tokens),
        exit_histogram=exit_histogram(tokens),
        paired=paired_with_teacher(answers),
        depth=depth_figures(answers, tokens),
        by_task=by_task(answers),
        kl_by_exit=kl_by_exit(tokens),
        depth_correlations=depth_correlations(tokens),
        **(more or {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(strict_json(results.to_json()), ensure_ascii=False, indent=1, allow_nan=False))


# ---- tokens ----


def label_of(answer: AnswerRecord) -> str:
    return f"{answer['model']}, {answer['exits']}"


def tokens_of(answers: Sequence[AnswerRecord]) -> pd.DataFrame:
    """Data frame of all answers' tokens: label; answer, its index in `answers`; t, its position there; depth; entropy,
    surprisal and kl in nats, NaN if not measured; kind, its class; final, whether it writes the final answer."""
    rows = []
    for i, answer in enumerate(answers):
        texts, label = [token["text"] for token in answer["tokens"]], label_of(answer)
        final = range(len(texts))[answer_span(texts)]
        for t, token in enumerate(answer["tokens"]):
            measured = (token.get("entropy"), token.get("surprisal"), token.get("kl"))
            rows.append((label, i, t, token["depth"], *measured, token_class(token["text"]), t in final))
    names = ["label", "answer", "t", "depth", "entropy", "surprisal", "kl", "kind", "final"]
    return pd.DataFrame(rows, columns=names).astype(dict.fromkeys(("entropy", "surprisal", "kl"), float))


def chosen(tokens: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Tokens that have the measure, without answers' first tokens, whose depth may not be a choice."""
    return tokens[(tokens["t"] > 0) & tokens[measure].notna()]


def token_mean(tokens: pd.DataFrame, column: str) -> dict[str, float]:
    """Mean over the tokens of all answers."""
    sums = tokens.groupby("answer")[column].agg(["sum", "count"]).to_numpy(np.float64)
    return bootstrap_interval(sums, lambda sample: float(sample[:, 0].sum() / sample[:, 1].sum()))._asdict()


def depth_entropy_spearman(tokens: pd.DataFrame, measure: str, resamples: int = 300) -> Estimate:
    parts = [part for _, part in tokens.groupby("answer")]
    depths, values = ([part[column].to_numpy() for part in parts] for column in ("depth", measure))
    return spearman_interval(depths, values, resamples)


def exit_histogram(tokens: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Number of tokens per exit depth, {label: {depth: tokens}}, depths in order (as strings, JSON's keys)."""
    return {
        label: {str(depth): int(n) for depth, n in part["depth"].value_counts().sort_index().items()}
        for label, part in tokens.groupby("label", sort=False)
    }


def depth_figures(answers: Sequence[AnswerRecord], tokens: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Depth in layers, by kind of token, and FLOPs of `tokens_of` these answers.

    - mean: over all tokens; quantiles: depths that occur, over all tokens; total: layers per answer
    - answer: mean over the tokens that write the final answer, and how many answers have such
    - flops: per answer, prompt included; None where they were not counted
    - classes: {class: {"depth", "tokens"}}
    """
    by_label: dict[str, dict[str, Any]] = {}
    for label, part in tokens.groupby("label", sort=False):
        mine = [i for i, answer in enumerate(answers) if label_of(answer) == label]
        totals = part.groupby("answer")["depth"].sum().reindex(mine, fill_value=0)
        flops = [f for i in mine if (f := answers[i].get("flops")) is not None]
        final = part[part["final"]]
        kinds = part[part["t"] > 0].groupby("kind")["depth"]
        by_label[label] = {
            "mean": token_mean(part, "depth"),
            "quantiles": {f"{q:g}": float(np.quantile(part["depth"], q, method="inverted_cdf")) for q in QUANTILES},
            "total": bootstrap_interval(totals.to_numpy())._asdict(),
            "answer": {**token_mean(final, "depth"), "answers": final["answer"].nunique()},
            "flops": bootstrap_interval(flops)._asdict() if flops else None,
            "classes": {
                kind: {"depth": float(depths.mean()), "tokens": len(depths)}
                for kind, depths in sorted(kinds, key=lambda entry: CLASSES.index(entry[0]))
            },
        }
    return by_label


def kl_by_exit(tokens: pd.DataFrame) -> dict[str, dict[str, dict[str, float | int]]]:
    """Mean KL(teacher at full depth ‖ model) of the tokens that exited at each depth, nats: {label: {depth: {"kl",
    "low", "high", "tokens"}}}; first tokens are left out."""
    by_label: dict[str, dict[str, dict[str, float | int]]] = {}
    for (label, depth), part in chosen(tokens, "kl").groupby(["label", "depth"]):
        mean = token_mean(part, "kl")
        entry = {"kl": mean["value"], "low": mean["low"], "high": mean["high"], "tokens": len(part)}
        by_label.setdefault(label, {})[str(depth)] = entry
    return by_label


def depth_by_entropy(tokens: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Rank correlation of depth and the teacher's entropy per label: whether hard tokens exit deeper.

    {"spearman", "low", "high", "tokens", "answers", "bins": [{"entropy", "depth", "tokens"}]}; first tokens are left
    out, and models whose depth never varies.
    """
    by_label: dict[str, dict[str, Any]] = {}
    for label, part in chosen(tokens, "entropy").groupby("label", sort=False):
        if part["depth"].nunique() < 2:
            continue
        value, low, high = depth_entropy_spearman(part, "entropy")
        ordered = part.sort_values("entropy", kind="stable")[["entropy", "depth"]]
        bins = [ordered.iloc[places] for places in np.array_split(np.arange(len(ordered)), BINS) if len(places)]
        by_label[label] = {
            "spearman": value, "low": low, "high": high, "tokens": len(part), "answers": part["answer"].nunique(),
            "bins": [{**each.mean().to_dict(), "tokens": len(each)} for each in bins],
        }  # fmt: skip
    return by_label


def depth_correlations(tokens: pd.DataFrame, resamples: int = RESAMPLES) -> dict[str, dict[str, Any]]:
    """Spearman's rank correlation of depth with the teacher's entropy and surprisal, by class of token.

    {label: {"entropy" | "surprisal": {group: {"value", "low", "high", "tokens"}}}}; groups: all, classes, and answer,
    the final one's tokens of any class. Within a class the correlation can't come from digits being both harder and
    deeper than words. First tokens are left out, and groups whose depth or measure never varies.
    """
    by_label: dict[str, dict[str, Any]] = {}
    for label, part in tokens.groupby("label", sort=False):
        entry: dict[str, dict[str, Any]] = {}
        for measure in ("entropy", "surprisal"):
            own = chosen(part, measure)
            groups = {"all": own, **{kind: own[own["kind"] == kind] for kind in CLASSES if kind != "other"}}
            entry[measure] = {
                name: {**depth_entropy_spearman(group, measure, resamples)._asdict(), "tokens": len(group)}
                for name, group in {**groups, "answer": own[own["final"]]}.items()
                if (group[["depth", measure]].nunique() > 1).all()
            }
        if any(entry.values()):
            by_label[label] = entry
    return by_label


# ---- answers ----


def by_task(answers: Sequence[AnswerRecord]) -> dict[str, dict[str, dict[str, Any]]]:
    """Results by task or family, {label: {task: {"n", "accuracy", "low", "high" (Wilson), "mean_depth" (layers per
    token)}}}; {} if all problems are of one."""
    tasks = dict.fromkeys(task for answer in answers if (task := answer.get("task")))
    by_label: dict[str, dict[str, dict[str, Any]]] = {}
    for label in dict.fromkeys(map(label_of, answers)) if len(tasks) > 1 else ():
        for task in tasks:
            part = [a for a in answers if label_of(a) == label and a.get("task") == task]
            if part:
                right = sum(answer["correct"] for answer in part)
                by_label.setdefault(label, {})[task] = {
                    "n": len(part), "accuracy": right / len(part), **wilson_interval(right, len(part))._asdict(),
                    "mean_depth": token_mean(tokens_of(part), "depth"),
                }  # fmt: skip
    return by_label


def pairs_of(before: Sequence[AnswerRecord], after: Sequence[AnswerRecord]) -> pd.DataFrame:
    """Data frame of the problems that both answered, in `after`'s order: id; group, of problems that share operands;
    for "before" and "after" whether it is right, its depth (the sum over tokens) and its tokens."""
    known = {answer["id"]: answer for answer in before}
    both = [answer for answer in after if answer["id"] in known]
    pairs = pd.DataFrame({"id": [a["id"] for a in both], "group": [a.get("group") or a["id"] for a in both]})
    for side, answers in (("before", [known[a["id"]] for a in both]), ("after", both)):
        pairs[f"right_{side}"] = [bool(a["correct"]) for a in answers]
        pairs[f"depth_{side}"] = [sum(t["depth"] for t in a["tokens"]) for a in answers]
        pairs[f"tokens_{side}"] = [len(a["tokens"]) for a in answers]
    return pairs


def paired_test(pairs: pd.DataFrame, clusters: str = "group") -> tuple[PairedTest, Estimate]:
    """Test the second answers' accuracy minus the first ones': a sign-flip test, and the difference with its interval,
    both over groups of problems, which are right or wrong together."""
    sides = pairs["right_before"].tolist(), pairs["right_after"].tolist(), pairs[clusters].tolist()
    return sign_flip_test(*sides), clustered_difference(*sides)


def paired_with_teacher(answers: Sequence[AnswerRecord]) -> dict[str, dict[str, float | int]]:
    """Compare every label with the teacher on the prompts that both answered, by `paired_test`: the interval over
    groups is "group_low", "group_high", that over single prompts, too narrow where many share few operands, "low",
    "high"."""
    teacher = [answer for answer in answers if answer["model"] == "teacher"]
    teacher = [answer for answer in teacher if label_of(answer) == label_of(teacher[0])]
    tests: dict[str, dict[str, float | int]] = {}
    for label in dict.fromkeys(map(label_of, answers)):
        pairs = pairs_of(teacher, [answer for answer in answers if label_of(answer) == label])
        if len(pairs) and label != label_of(teacher[0]):
            (test, grouped), (_, single) = paired_test(pairs), paired_test(pairs, "id")
            tests[label] = {
                "n": len(pairs), "only_teacher": test.only_first, "only_model": test.only_second,
                "p_value": test.p_value, "difference": single.value, "low": single.low, "high": single.high,
                "group_low": grouped.low, "group_high": grouped.high, "groups": pairs["group"].nunique(),
            }  # fmt: skip
    return tests


def compared(before: Sequence[AnswerRecord], after: Sequence[AnswerRecord], num_layers: int) -> dict[str, Any] | None:
    """What changed from one model to the next on the problems that both answered, `after` minus `before`, as
    `paired_test` has it; None if there are none. {"model", "against": labels of `after` and `before`, "n", "groups",
    "only_before", "only_after", "p_value", "accuracy", "depth" (mean over tokens, share of the layers), "total_depth"
    (layers per answer), "length" (tokens per answer)}, each change as {"value", "low", "high"}."""
    pairs = pairs_of(before, after)
    if not len(pairs):
        return None
    test, accuracy = paired_test(pairs)
    columns = ["depth_before", "depth_after", "tokens_before", "tokens_after", "problems"]
    sums = pairs.assign(problems=1).groupby("group")[columns].sum().to_numpy(np.float64)

    def change(statistic: Callable[[float, float, float, float, float], float]) -> dict[str, float]:
        return bootstrap_interval(sums, lambda sample: float(statistic(*sample.sum(0))))._asdict()

    return {
        "model": label_of(after[0]), "against": label_of(before[0]), "n": len(pairs), "groups": len(sums),
        "only_before": test.only_first, "only_after": test.only_second, "p_value": test.p_value,
        "accuracy": accuracy._asdict(),
        "depth": change(lambda d0, d1, t0, t1, n: (d1 / max(t1, 1) - d0 / max(t0, 1)) / num_layers),
        "total_depth": change(lambda d0, d1, t0, t1, n: (d1 - d0) / n),
        "length": change(lambda d0, d1, t0, t1, n: (t1 - t0) / n),
    }  # fmt: skip


def on_wide(rows: Sequence[EvaluationRow], answers: Sequence[AnswerRecord]) -> dict[str, dict[str, Any]]:
    """The part "wide" of results.json, from all models' rows and answers on wide operands: {label: {"row", "paired" as
    in `paired_with_teacher` (not for the teacher), "by_task" as in `by_task`}}."""
    tests, tasks = paired_with_teacher(answers), by_task(answers)
    return {
        (label := f"{row.model}, {row.exits}"): {"row": asdict(row), "paired": tests.get(label, {}),
                                                 "by_task": tasks.get(label, {})}
        for row in rows
    }  # fmt: skip


def table(rows: Sequence[EvaluationRow]) -> str:
    """The rows as aligned text; depth as a share of the layers, total depth in layers, KL in nats."""
    drafted = any(row.tokens_per_pass for row in rows)
    heads = ("model", "exits", "accuracy", "n", "mean depth", "total depth", "length", "KL", "tok/s", "tok/pass")
    cells = [
        (
            row.model, row.exits, f"{row.accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]", str(row.n),
            f"{row.mean_depth:.3f}", f"{row.total_depth:.0f}", f"{row.length:.1f}",
            "–" if row.kl is None else f"{row.kl:.4f}", "–" if row.tokens_per_s is None else f"{row.tokens_per_s:.0f}",
            "–" if row.tokens_per_pass is None else f"{row.tokens_per_pass:.2f}",
        )[: len(heads) if drafted else -1]
        for row in rows
    ]  # fmt: skip
    return TextTable(heads if drafted else heads[:-1], cells, names=2).text()


class Records:
    """answers.jsonl: a line per problem with each model's answer at the exits that were chosen for it."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[str, Any]] = {}

    def add(self, answers: Sequence[AnswerRecord]) -> None:
        """Add a model's answers [n]."""
        for answer in answers:
            named = {key: answer.get(key, "") for key in ("id", "prompt", "reference", "task")}
            line = self._lines.setdefault(answer["id"], named | {"answers": {}})
            line["answers"][f"{answer['model']}, {answer['exits']}"] = {
                "correct": bool(answer["correct"]),
                "pieces": [token["text"] for token in answer["tokens"]],
                "depths": [token["depth"] for token in answer["tokens"]],
            }

    def write(self, directory: Path) -> None:
        """Write the file atomically."""
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines.values()]
        write_atomic(directory / "answers.jsonl", "".join(lines))
