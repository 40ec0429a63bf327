"""Parts of results.json as tables of words, the same for the terminal and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .numbers import estimate, is_number

# Figure -> where it stands in a model's externalisation entry.
EXTERNALISATION: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("accuracy with chain", ("accuracy_with",)),
    ("accuracy without", ("accuracy_without",)),
    ("chain necessity", ("chain_necessity",)),
    ("filler uplift", ("filler_uplift",)),
    ("truncation area, same answer", ("truncation", "area_same_answer")),
    ("truncation area, accuracy", ("truncation", "area_accuracy")),
    ("step necessity", ("step_necessity",)),
    ("mistake sensitivity", ("mistake_sensitivity",)),
    ("hint monitor g-mean²", ("hint_monitor", "g_mean2")),
    ("serial depth, median", ("serial_depth", "all", "quantiles", "0.5")),
    ("serial depth, 0.9", ("serial_depth", "all", "quantiles", "0.9")),
    ("serial depth of answer, mean", ("serial_depth", "answer", "mean")),
)


@dataclass(frozen=True)
class TextTable:
    """Cells in words. `names`: how many leading columns hold names and stand left; figures stand right."""

    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 1

    def text(self) -> str:
        """Aligned columns under a ruled head."""
        widths = [max(len(line[i]) for line in (self.heads, *self.rows)) for i in range(len(self.heads))]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if i < self.names else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        return "\n".join(line(cells) for cells in (self.heads, ["-" * width for width in widths], *self.rows))


PHASES = {
    "sync": "weights sent", "rollout": "rollouts", "verify": "verdicts", "divergences": "exits read",
    "score": "scoring", "update": "update",
}  # fmt: skip
"""A step's phases in their order, by their name in timings.jsonl."""


def phase_table(timings: Mapping[str, float]) -> TextTable:
    """An RL step by phase, by timings.jsonl: seconds; tokens of its answers and FLOPs per second and device;
    MFU, what these are of the device's peak. Dashes: not known, or not of this phase."""

    def figure(name: str, form: str, scale: float = 1.0) -> str:
        return form.format(timings[name] * scale) if name in timings else "–"

    whole = timings["seconds_step"]
    spent = {phase: timings[f"seconds_{phase}"] for phase in PHASES if f"seconds_{phase}" in timings}
    rows = []
    for phase, seconds in spent.items():
        made = (
            figure(f"tokens_per_s_device/{phase}", "{:,.0f}"),
            figure(f"flops_per_s_device/{phase}", "{:.3g}", 1e-12),
            figure(f"mfu/{phase}", "{:.1%}"),
        )
        rows.append((PHASES[phase], f"{seconds:.3g}", f"{seconds / whole:.0%}", *made))
    rest = max(0.0, whole - sum(spent.values()))
    rows += [(name, f"{s:.3g}", f"{s / whole:.0%}", "–", "–", "–") for name, s in (("rest", rest), ("step", whole))]
    return TextTable(("phase", "seconds", "share", "tokens/s a device", "TFLOP/s a device", "MFU"), rows)


def controls_table(entries: Sequence[Mapping[str, Any]]) -> TextTable:
    """The policy under test and its controls; (!) where the depth asked for was not reached."""
    heads = ("control", "matched by", "depth asked", "depth got", "accuracy", "reference - control", "p")
    rows = []
    for entry in entries:
        row, comparison = entry["row"], entry["comparison"]
        itself = entry["matched_by"] == "itself"
        rows.append(
            (
                entry["control"],
                entry["matched_by"] + ("" if entry["within"] else " (!)"),
                f"{entry['target']:.3f}" if entry["matched_by"] == "depth" else "–",
                f"{row['mean_depth']:.3f}",
                f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}]",
                "–" if itself else estimate(comparison["difference"], "{:+.1%}"),
                "–" if itself else f"{comparison['p_value']:.2g}",
            )
        )
    return TextTable(heads, rows, names=2)


def externalisation_table(models: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Value and 95 % interval per figure and model; the probe's best depth for each distance. Dashes: not defined."""
    heads = ("figure", *(f"{model}, {found['exits']}" for model, found in models.items()))
    rows = [(name, *(estimate(_at(found, path)) for found in models.values())) for name, path in EXTERNALISATION]
    probes = {model: found.get("planning_probe") or [] for model, found in models.items()}
    for ahead in sorted({entry["ahead"] for found in probes.values() for entry in found}):
        name = f"probe uplift at its best depth, {ahead} ahead"
        rows.append((name, *(estimate(_best(found, ahead)) for found in probes.values())))
    return TextTable(heads, rows)


def choice_tables(choice: Mapping[str, Any]) -> list[tuple[str, TextTable]]:
    """Caption and table each: the styles of free answers, the styles one by one, and answers after a wrong step."""
    weights = ", ".join(f"{s} {w:.0%}" for s, w in zip(choice["styles"], choice["weights"], strict=True))
    free = (
        f"Which style the model answers in where it may choose: shares of {choice['answers_per_family']} sampled "
        f"answers per family. Worked answers that were trained on: {weights}. Length in tokens, depths as shares of "
        f"the {choice['num_layers']} layers; total: summed over an answer"
    )
    forced = (
        "Each style by itself, its opening given: what it costs and how often it is right under the model's own exits, "
        "with the same weights at full depth, and with every token held to one depth"
    )
    wrong = (
        "A written-out answer whose first step is made wrong: how often the answer is right all the same, and how "
        "often it is where the wrong step leads"
    )
    return [(free, free_table(choice)), (forced, forced_table(choice)), (wrong, corrupted_table(choice))]


def free_table(choice: Mapping[str, Any]) -> TextTable:
    """Shares of the styles, accuracy, length and depths of free answers, per model and family."""
    kinds = (*choice["styles"], "other")
    heads = ("model", "exits", "family", *kinds, "right", "length", "mean depth", "total depth", "max depth")
    rows = []
    for model, family, found in _by_family(choice):
        free = found["free"]
        shares = (_figure(free["share"], kind, "{:.1%}") for kind in kinds)
        exits = choice["models"][model]["exits"]
        rows.append((model, exits, family, *shares, _figure(free, "correct", "{:.1%}"), *_costs(free)))
    return TextTable(heads, rows, names=3)


def forced_table(choice: Mapping[str, Any]) -> TextTable:
    """Accuracy, length and depths of answers in a given style, and its accuracy at other depths. Dashes: not asked."""
    fixed = _keys(found.get("fixed") or {} for _, _, found in _by_family(choice))
    depths = [depth for depth in fixed if int(depth) < choice["num_layers"]]
    own_exits = ("right", "length", "mean depth", "total depth", "max depth")
    heads = ("model", "family", "style", *own_exits, "right at full depth", *(f"at {depth}" for depth in depths))
    rows = []
    for model, family, found in _by_family(choice):
        for style in choice["styles"]:
            own, held = found["forced"][style], found.get("fixed") or {}
            others = [found["forced_full"][style], *((held.get(depth) or {}).get(style) for depth in depths)]
            right = (_figure(figures, "correct", "{:.1%}") for figures in (own, *others))
            rows.append((model, family, style, next(right), *_costs(own), *right))
    return TextTable(heads, rows, names=3)


def corrupted_table(choice: Mapping[str, Any]) -> TextTable:
    rows = [
        (model, family, str(wrong["n"]), *(_figure(wrong, key, "{:.1%}") for key in ("correct", "followed")))
        for model, family, found in _by_family(choice)
        if (wrong := found["corrupted"])
    ]
    return TextTable(("model", "family", "n", "right", "where the step leads"), rows, names=2)


def task_table(tasks: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Accuracy with its interval, and mean depth in layers: a row per task and "model, exits", so that many tasks make
    the table longer, not wider."""
    rows = []
    for name in _keys(tasks.values()):
        for label, entry in tasks.items():
            if found := entry.get(name):
                accuracy, depth = estimate({**found, "value": found["accuracy"]}, "{:.1%}"), found["mean_depth"]
                rows.append((name, label, f"{found['n']:,}", accuracy, f"{depth['value']:.1f}"))
    return TextTable(("task", "model, exits", "n", "accuracy", "depth"), rows, names=2)


def wide_table(wide: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Accuracy and mean depth (share of the layers) on wide operands, and the difference to the teacher with its
    interval over groups of problems: a row per "model, exits"."""
    rows = []
    for label, found in wide.items():
        row, test = found["row"], found.get("paired") or {}
        change = {"value": test.get("difference"), "low": test.get("group_low"), "high": test.get("group_high")}
        rows.append(
            (
                label,
                f"{row['n']:,}",
                estimate({**row, "value": row["accuracy"]}, "{:.1%}"),
                f"{row['mean_depth']:.3f}",
                f"{row['length']:.1f}",
                estimate(change, "{:+.1%}"),
                *(str(test.get(key, "–")) for key in ("only_teacher", "only_model", "groups")),
                _figure(test, "p_value", "{:.2g}"),
            )
        )
    heads = ("on wide operands", "n", "accuracy", "mean depth", "length", "minus teacher", "lost", "won", "groups", "p")
    return TextTable(heads, rows)


def depth_table(depth: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Depth in layers by what a token is, per "model, exits"."""
    classes = _keys(entry.get("classes") or {} for entry in depth.values())
    heads = ("model, exits", "all tokens", "median", "0.9", "final answer", *classes, "GFLOPs per answer")
    rows = []
    for label, entry in depth.items():
        flops, by_class = entry.get("flops"), entry.get("classes") or {}
        rows.append(
            (
                label,
                estimate(entry["mean"], "{:.1f}"),
                *(f"{entry['quantiles'][q]:g}" if q in entry["quantiles"] else "–" for q in ("0.5", "0.9")),
                estimate(entry.get("answer"), "{:.1f}"),
                *(f"{by_class[name]['depth']:.1f}" if by_class.get(name) else "–" for name in classes),
                estimate({key: (value or math.nan) / 1e9 for key, value in flops.items()}, "{:.2f}") if flops else "–",
            )
        )
    return TextTable(heads, rows)


def correlation_table(correlations: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Spearman's rank correlation of depth with the teacher's entropy and the token's surprisal, by kind of token."""
    groups = _keys(found for entry in correlations.values() for found in entry.values())
    heads = ("model, exits", "depth with", *groups)
    rows = [
        (label, measure, *(estimate((entry.get(measure) or {}).get(group)) for group in groups))
        for label, entry in correlations.items()
        for measure in ("entropy", "surprisal")
        if entry.get(measure)
    ]
    return TextTable(heads, rows, names=2)


def _keys(parts: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys in the order in which they first occur."""
    return list(dict.fromkeys(key for part in parts for key in part))


def _by_family(choice: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(model, family, what was found) in order."""
    return [(m, family, found) for m, of in choice["models"].items() for family, found in of["families"].items()]


def _costs(found: Mapping[str, Any]) -> list[str]:
    return [_figure(found, "length", "{:.2f}")] + [
        _figure(found, f"{kind}_depth", "{:.3f}") for kind in ("mean", "total", "max")
    ]


def _figure(found: Mapping[str, Any] | None, key: str, form: str) -> str:
    return form.format(found[key]) if found and is_number(found.get(key)) else "–"


def _at(found: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any] | None:
    value: Any = found
    for key in path:
        value = value.get(key) if value is not None else None
    return value  # type: ignore[no-any-return]


def _best(probes: Sequence[Mapping[str, Any]], ahead: int) -> Mapping[str, Any] | None:
    uplifts = [e for probe in probes if probe["ahead"] == ahead for e in probe["uplift"] if is_number(e.get("value"))]
    return max(uplifts, key=lambda e: e["value"], default=None)
