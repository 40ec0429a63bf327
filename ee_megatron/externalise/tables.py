"""The page's tables: controls from before RL and after it, and every run beside its forecast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ..report.numbers import is_number
from ..report.tables import TextTable
from .choice import STYLES, TERSE, FamilyChoice
from .compare import ByBase, before_rl, by_base, over_bases
from .rows import Row
from .study import CAP, NO_EXITS, Condition, Record, Study

Captioned = tuple[str, TextTable]
Look = Callable[[FamilyChoice], float | None]
"""A figure of one model on one family; None where it wasn't measured."""
NOTHING = "–"


def controls(study: Study, tau: int) -> list[Captioned]:
    """Those that there is something to show in."""
    made = [_start(study, tau), _depths(study, tau), _atrophy(study, tau), _corrupted(study, tau)]
    return [(caption, table) for caption, table in made if table.rows]


def runs_table(rows: Sequence[Row]) -> Captioned:
    """Every run and family, what was found beside the forecast."""
    caption = (
        "Every run. Shares of the styles, the closed form's forecast behind the slash; right answers; mean depth, as a "
        "share of the layers; tokens per answer; minutes of RL where they are on record."
    )
    heads = ("condition", "tokens a step", "hops", "base", "seed", *STYLES, "right", "mean depth", "length", "minutes")
    # Of one shape they all are, or each says its own.
    shape = ("layers", "width") if len({(row["layers"], row["width"], row["parameters"]) for row in rows}) > 1 else ()
    found = [
        (
            *(_cell(row[name], "{:.0f}") for name in shape),
            row["condition"], str(row["tau"]), str(row["hops"]), str(row["base"]), str(row["seed"]),
            *(f"{row[f'share_{style}']:.2f} / {_cell(row[f'forecast_{style}'])}" for style in STYLES),
            _cell(row["correct"]), _cell(row["mean_depth"]), _cell(row["length"]),
            _cell(row["seconds_rl"], "{:.1f}", 1 / 60),
        )
        for row in rows
    ]  # fmt: skip
    return caption, TextTable((*shape, *heads), found, names=5 + len(shape))


def _start(study: Study, tau: int) -> Captioned:
    caption = (
        "Before RL, the style given: right answers under the gates' own exits, and the depth of the answer's deepest "
        "token as a share of the layers. Mean over bases, 95 %."
    )
    rows = []
    for family in study.families(tau):
        looks = [_forced(style, figure) for figure in ("correct", "max_depth") for style in STYLES]
        cells = [_mean(before_rl(study, tau, family, study.start, look)) for look in looks]
        rows.append((str(study.hops[family]), *cells))
    heads = ("hops", *(f"{style}: right" for style in STYLES), *(f"{style}: deepest" for style in STYLES))
    return caption, TextTable(heads, _known(rows, 1))


def _depths(study: Study, tau: int) -> Captioned:
    caption = (
        "Before RL, the style given and every token held to one depth: right answers, mean over bases. Terse answers "
        "need more layers the more hops there are, steps hardly any; padding should need what terse answers do."
    )
    depths = range(1, max(r.num_layers for r in study.records) + 1)
    rows = []
    for family in study.families(tau):
        for style in STYLES:
            found = [before_rl(study, tau, family, study.start_anywhere, _held(depth, style)) for depth in depths]
            rows.append((str(study.hops[family]), style, *(_mean(values, interval=False) for values in found)))
    return caption, TextTable(("hops", "style", *(f"depth {d}" for d in depths)), _known(rows, 2), names=2)


def _atrophy(study: Study, tau: int) -> Captioned:
    caption = (
        "Terse answers, the style given: how many are right, which is what RL leaves of a style that is hardly written "
        "any more. Worse under own exits but not at full depth: the exits have changed; at both: the weights have."
    )
    rows = []
    for condition, family, runs in _groups(study, tau):
        held = _held(int(condition.number), TERSE) if condition.kind == CAP else None
        look = study.start_anywhere if held else study.start
        own = before_rl(study, tau, family, look, held or _forced(TERSE, "correct"))
        full = before_rl(study, tau, family, study.start_anywhere, _full(TERSE))
        after = [_after(runs, family, look) for look in (_forced(TERSE, "correct"), _full(TERSE))]
        cells = [full if condition.kind == NO_EXITS else own, after[0], full, after[1]]
        rows.append((condition.label, str(study.hops[family]), *map(_mean, cells)))
    heads = ("condition", "hops", "own exits: before RL", "after", "full depth: before RL", "after")
    return caption, TextTable(heads, _known(rows, 2), names=2)


def _corrupted(study: Study, tau: int) -> Captioned:
    caption = (
        "A wrong first step put into the model's answer: how often it ends right after all, and how often where the "
        "wrong step leads. Where the first is rare, the model uses what it has written. Mean over bases."
    )
    looks = [_wrong("correct"), _wrong("followed")]
    rows = [
        ("before RL", str(study.hops[f]), *(_mean(before_rl(study, tau, f, study.start, look)) for look in looks))
        for f in study.families(tau)
    ]
    for condition, family, runs in _groups(study, tau):
        cells = (_mean(_after(runs, family, look)) for look in looks)
        rows.append((condition.label, str(study.hops[family]), *cells))
    heads = ("condition", "hops", "right after all", "follows the wrong step")
    return caption, TextTable(heads, _known(rows, 2), names=2)


def _groups(study: Study, tau: int) -> Iterator[tuple[Condition, str, list[Record]]]:
    for condition in dict.fromkeys(r.condition for r in study.records if r.tau == tau):
        for family in study.families(tau):
            if runs := study.runs(tau, family, condition):
                yield condition, family, runs


def _after(runs: Sequence[Record], family: str, look: Look) -> dict[int, float]:
    return by_base(runs, lambda run: look(run.found(family)))


def _forced(style: str, figure: str) -> Look:
    return lambda found: getattr(found.forced[style], figure) if style in found.forced else None


def _full(style: str) -> Look:
    return lambda found: found.forced_full[style].correct if style in found.forced_full else None


def _held(depth: int, style: str) -> Look:
    return lambda found: found.fixed[depth][style].correct if style in found.fixed.get(depth, {}) else None


def _wrong(figure: str) -> Look:
    return lambda found: getattr(found.corrupted, figure) if found.corrupted else None


def _mean(values: ByBase, interval: bool = True) -> str:
    value, low, high = over_bases(values)
    around = f" [{low:.2f}, {high:.2f}]" if interval and math.isfinite(low) else ""
    return f"{value:.2f}{around}" if values else NOTHING


def _known(rows: Sequence[tuple[str, ...]], names: int) -> list[tuple[str, ...]]:
    """Rows with any figure in them."""
    return [row for row in rows if any(cell != NOTHING for cell in row[names:])]


def _cell(value: object, form: str = "{:.2f}", scale: float = 1.0) -> str:
    return form.format(value * scale) if is_number(value) else NOTHING
