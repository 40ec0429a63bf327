"""Numbers as text, and parts of results.json as tables of text, the same for the terminal and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Column = tuple[str, ...]
"""Head, path of a figure ("a/b": entry["a"]["b"]), its format, and, if it stands beside it, its interval's keys."""
Part = Mapping[str, Mapping[str, Any]]
"""A part of results.json by "model, exits" or model."""

WIDE: tuple[Column, ...] = (
    ("n", "row/n", "{:,}"), ("accuracy", "row/accuracy", "{:.1%}", "low", "high"),
    ("mean depth", "row/mean_depth", "{:.3f}"), ("length", "row/length", "{:.1f}"),
    ("minus teacher", "paired/difference", "{:+.1%}", "group_low", "group_high"), ("lost", "paired/only_teacher", "{}"),
    ("won", "paired/only_model", "{}"), ("groups", "paired/groups", "{}"), ("p", "paired/p_value", "{:.2g}"),
)  # fmt: skip
RESULTS: tuple[Column, ...] = (
    ("accuracy [95 %]", "accuracy", "{:.1%}", "low", "high"), ("n", "n", "{:,.0f}"),
    ("to teacher [95 %]", "paired/difference", "{:+.1%}", "group_low", "group_high"),
    ("p", "paired/p_value", "{:.2g}"), ("mean depth", "mean_depth", "{:.3f}"),
    ("total depth", "total_depth", "{:,.0f}"), ("length", "length", "{:.1f}"), ("KL (nats)", "kl", "{:.3f}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"), ("tokens/pass", "tokens_per_pass", "{:.2f}"),
)  # fmt: skip
CONTROLS: tuple[Column, ...] = (
    ("target depth", "target", "{:.3f}"), ("mean depth", "row/mean_depth", "{:.3f}"),
    ("accuracy", "row/accuracy", "{:.1%}", "low", "high"), ("reference - control", "comparison/difference", "{:+.1%}"),
    ("p", "comparison/p_value", "{:.2g}"),
)  # fmt: skip
PHASES = {
    "sync": "weights sent", "rollout": "rollouts", "verify": "verdicts", "divergences": "exits read",
    "score": "scoring", "update": "update",
}  # fmt: skip
"""A step's phases in their order, by their name in timings.jsonl."""
COSTS: tuple[Column, ...] = (
    ("length", "length", "{:.2f}"), ("mean depth", "mean_depth", "{:.3f}"), ("total depth", "total_depth", "{:.3f}"),
    ("max depth", "max_depth", "{:.3f}"),
)  # fmt: skip
EXTERNALISATION = {
    "accuracy with chain": "accuracy_with",
    "accuracy without": "accuracy_without",
    "chain necessity": "chain_necessity",
    "filler uplift": "filler_uplift",
    "truncation area, same answer": "truncation/area_same_answer",
    "truncation area, accuracy": "truncation/area_accuracy",
    "step necessity": "step_necessity",
    "mistake sensitivity": "mistake_sensitivity",
    "hint monitor g-mean²": "hint_monitor/g_mean2",
    "serial depth, median": "serial_depth/all/quantiles/0.5",
    "serial depth, 0.9": "serial_depth/all/quantiles/0.9",
    "serial depth of answer, mean": "serial_depth/answer/mean",
}


@dataclass(frozen=True)
class TextTable:
    """Table of texts. `names`: number of leading columns with names, aligned left; figures are aligned right."""

    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 1

    def text(self) -> str:
        """The table as text: aligned columns under a ruled head."""
        widths = [max(len(line[i]) for line in (self.heads, *self.rows)) for i in range(len(self.heads))]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if i < self.names else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        return "\n".join(line(cells) for cells in (self.heads, ["-" * width for width in widths], *self.rows))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def or_nan(value: Any) -> float:
    """The number as a float; nan for anything else."""
    return float(value) if is_number(value) else math.nan


def number(value: float) -> str:
    """Format with three significant digits; whole from a thousand on."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def cell(value: Any, path: str = "", form: str = "{:.2f}", *interval: str) -> str:
    """Format a figure as its `Column` says, an estimate as "value [low, high]"; a dash if it is missing."""
    parent: Any = {}
    for key in path.split("/") if path else ():
        parent, value = value, value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        parent, value, interval = value, value.get("value"), ("low", "high")
    if not is_number(value):
        return "–"
    ends = [parent.get(key) for key in interval]
    return form.format(value) + (f" [{form}, {form}]".format(*ends) if ends and all(map(is_number, ends)) else "")


def figures_table(
    names: Sequence[str], entries: Iterable[tuple[Sequence[str], Mapping[str, Any]]], columns: Sequence[Column]
) -> TextTable:
    """Table with a row per entry: its names, then the figure of each column."""
    rows = [(*of, *(cell(entry, *column[1:]) for column in columns)) for of, entry in entries]
    return TextTable((*names, *(column[0] for column in columns)), rows, names=len(names))


def results_table(rows: Sequence[Mapping[str, Any]], paired: Part) -> TextTable:
    """Table of the result rows, numbered; the difference to the teacher with its interval over groups of problems."""
    entries = []
    for i, row in enumerate(rows, start=1):
        paired_row = paired.get(f"{row['model']}, {row['exits']}")
        entries.append(((str(i), row["model"], row["exits"]), {**row, "paired": paired_row}))
    drafted = any(row.get("tokens_per_pass") for row in rows)
    return figures_table(("#", "model", "exits"), entries, RESULTS if drafted else RESULTS[:-1])


def phase_table(timings: Mapping[str, float]) -> TextTable:
    """Table of an RL step by phase, from timings.jsonl: seconds; tokens of its answers and FLOPs per second and device;
    MFU, the share of the device's peak. Dashes: not known, or not of this phase."""
    whole = timings["seconds_step"]
    spent = {phase: timings[f"seconds_{phase}"] for phase in PHASES if f"seconds_{phase}" in timings}
    entries = []
    for phase, seconds in {**spent, "rest": max(0.0, whole - sum(spent.values())), "step": whole}.items():
        rates = {key: timings.get(f"{key}/{phase}") for key in ("tokens_per_s_device", "flops_per_s_device", "mfu")}
        flops = rates["flops_per_s_device"]
        figures = {"s": seconds, "share": seconds / whole, **rates, "tflops": None if flops is None else flops / 1e12}
        entries.append(((PHASES.get(phase, phase),), figures))
    columns = (
        ("seconds", "s", "{:.3g}"), ("share", "share", "{:.0%}"),
        ("tokens/s a device", "tokens_per_s_device", "{:,.0f}"), ("TFLOP/s a device", "tflops", "{:.3g}"),
        ("MFU", "mfu", "{:.1%}"),
    )  # fmt: skip
    return figures_table(("phase",), entries, columns)


def controls_table(entries: Iterable[Mapping[str, Any]]) -> TextTable:
    """Table of the policy under test and its controls; (!) where the target depth was not reached."""
    rows = []
    for entry in entries:
        matched = entry["matched_by"]
        hidden = {"depth": (), "itself": ("target", "comparison")}.get(matched, ("target",))
        names = (entry["control"], matched + ("" if entry["within"] else " (!)"))
        rows.append((names, {key: value for key, value in entry.items() if key not in hidden}))
    return figures_table(("control", "matched by"), rows, CONTROLS)


def externalisation_table(models: Part) -> TextTable:
    """Table of value and 95 % interval by figure and model; of the probe its best depth. Dashes: not defined."""
    heads = ("figure", *(f"{model}, {entry['exits']}" for model, entry in models.items()))
    rows = [(name, *(cell(entry, path) for entry in models.values())) for name, path in EXTERNALISATION.items()]
    probes = [entry.get("planning_probe") or [] for entry in models.values()]
    for ahead in sorted({probe["ahead"] for of_model in probes for probe in of_model}):
        uplifts = [[e for p in of_model if p["ahead"] == ahead for e in p["uplift"]] for of_model in probes]
        known = [[e for e in of_model if is_number(e.get("value"))] for of_model in uplifts]
        best = [max(of_model, key=lambda e: e["value"], default=None) for of_model in known]
        rows.append((f"probe uplift at its best depth, {ahead} ahead", *map(cell, best)))
    return TextTable(heads, rows)


def choice_tables(choice: Mapping[str, Any]) -> list[tuple[str, TextTable]]:
    """Tables of style choice, with captions: styles of free answers; the styles one by one, also at other depths;
    answers after a wrong first step. Dashes: not measured; a table without rows: no run measured it."""
    styles, free, forced, wrong, depths = choice["styles"], [], [], [], dict[str, None]()
    for model, of in choice["models"].items():
        for family, figures in of["families"].items():
            free.append(((model, of["exits"], family), figures["free"]))
            if figures["corrupted"]:
                wrong.append(((model, family), figures["corrupted"]))
            fixed = figures.get("fixed") or {}
            depths |= dict.fromkeys(depth for depth in fixed if int(depth) < choice["num_layers"])
            for style in styles:
                held = {depth: (by_style or {}).get(style) for depth, by_style in fixed.items()}
                own = {**figures["forced"][style], "full": figures["forced_full"][style], **held}
                forced.append(((model, family, style), own))
    weights = ", ".join(f"{style} {weight:.0%}" for style, weight in zip(styles, choice["weights"], strict=True))
    right, full = ("right", "correct", "{:.1%}"), ("right at full depth", "full/correct", "{:.1%}")
    shares = [(kind, f"share/{kind}", "{:.1%}") for kind in (*styles, "other")]
    held_to = [(f"at {depth}", f"{depth}/correct", "{:.1%}") for depth in depths]
    leads = (("n", "n", "{}"), right, ("where the step leads", "followed", "{:.1%}"))
    return [
        (f"Styles of {choice['answers_per_family']} sampled answers a family (trained on: {weights}); depths as shares",
         figures_table(("model", "exits", "family"), free, (*shares, right, *COSTS))),
        ("Each style by itself, its opening given: under the model's own exits, at full depth, held to one depth",
         figures_table(("model", "family", "style"), forced, (right, *COSTS, full, *held_to))),
        ("Answers after a first step that was made wrong: right all the same, or where the wrong step leads",
         figures_table(("model", "family"), wrong, leads)),
    ]  # fmt: skip


def _by_label(part: Part, columns: Sequence[Column], name: str = "model, exits") -> TextTable:
    return figures_table((name,), [((label,), entry) for label, entry in part.items()], columns)


def wide_table(wide: Part) -> TextTable:
    """Table of accuracy and depth on wide operands, and the difference to the teacher over groups of problems."""
    return _by_label(wide, WIDE, "on wide operands")


def task_table(tasks: Part) -> TextTable:
    """Table of accuracy with its interval, and mean depth in layers: a row per task and "model, exits"."""
    entries = [
        ((task, label), entry[task])
        for task in _keys(tasks.values())
        for label, entry in tasks.items()
        if task in entry
    ]
    accuracy, depth = ("accuracy", "accuracy", "{:.1%}", "low", "high"), ("depth", "mean_depth/value", "{:.1f}")
    return figures_table(("task", "model, exits"), entries, (("n", "n", "{:,}"), accuracy, depth))


def depth_table(depth: Part) -> TextTable:
    """Table of depth in layers by kind of token, and FLOPs per answer, per "model, exits"."""
    classes = _keys(entry.get("classes") or {} for entry in depth.values())
    columns = [("all tokens", "mean", "{:.1f}"), ("median", "quantiles/0.5", "{:g}"), ("0.9", "quantiles/0.9", "{:g}")]
    columns += [("final answer", "answer", "{:.1f}"), *((name, f"classes/{name}/depth", "{:.1f}") for name in classes)]
    return _by_label(depth, [*columns, ("FLOPs per answer", "flops", "{:.3g}")])


def correlation_table(correlations: Part) -> TextTable:
    """Table of Spearman's rank correlation of depth with teacher's entropy and token's surprisal, by kind of token."""
    groups = _keys(value for entry in correlations.values() for value in entry.values())
    entries = [((label, of), value) for label, entry in correlations.items() for of, value in entry.items() if value]
    return figures_table(("model, exits", "depth with"), entries, [(group, group, "{:.2f}") for group in groups])


def gates_table(gates: Part) -> TextTable:
    """Table of the gates' expected calibration error and mean error against the target hazard; then by exit."""
    by_exit = {m: {**figures, **{str(e["depth"]): e for e in figures.get("exits", [])}} for m, figures in gates.items()}
    columns = [("ECE", "ece", "{:.3f}"), ("mean error", "mean_error", "{:.3f}"), ("decisions", "asked", "{:,}")]
    depths = sorted({int(e["depth"]) for figures in gates.values() for e in figures.get("exits", [])})
    return _by_label(by_exit, [*columns, *((f"ECE at {depth}", f"{depth}/ece", "{:.3f}") for depth in depths)], "model")


def _keys(parts: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys in the order in which they first occur."""
    return list(dict.fromkeys(key for part in parts for key in part))


# Section of the page, part of results.json, its table and caption.
BY_MODEL: tuple[tuple[str, str, Callable[[Part], TextTable], str], ...] = (
    ("tasks", "by_task", task_table, "Accuracy (Wilson) and mean depth in layers, by task or family"),
    ("tasks", "wide", wide_table,
     "Problems on wide operands, depth as a share of the layers; difference to the teacher over groups of problems "
     "that share operands; problems that only the teacher (lost) or only this model (won) has right; McNemar's p"),
    ("exits", "gates", gates_table,
     "All decisions of gates: expected calibration error (10 bins), mean error against the target hazard"),
    ("depth", "depth", depth_table,
     "Layers per token: mean over answers, quantiles; then by kind of token, an answer's first left out"),
    ("depth", "depth_correlations", correlation_table,
     "Spearman's rank correlation of a token's depth with the teacher's entropy and with the token's surprisal"),
    ("externalisation", "externalisation", externalisation_table,
     "How much of the reasoning is written down; docs/evaluation.md has what each figure shows"),
)  # fmt: skip
