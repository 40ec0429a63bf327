"""The language of sweeps: settings with several values -> grid points, each a plain list of `key=value`.

Hydra's grammar reads settings: a comma outside brackets and quotes separates the values of an axis, and range(start,
stop, step) is one, which leaves out its stop. The ranges `start:stop:step`, `start:stop:linN` and `start:stop:logN`,
unquoted, are ours: they hold both ends.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import HydraException

SEED, BUDGET = "seed", "budget"
SEEDS = ("calibrate.seed", "rl.seed")
"""What `seed` stands for: all that is trained. Problems, teacher and traces stay as they are, and are shared."""
FIXED_ONLY = ("name", "runs", "experiment")
GROUP = "sweep"
MOST_POINTS = 10**6
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({NUMBER}):({NUMBER}):({NUMBER}|log\d+|lin\d+)")
_WHOLE = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Value:
    """`text` as it stands behind "=" in a setting; `plain` as a Python value, for tables and comparisons."""

    text: str
    plain: Any


Factor = dict[str, list[Value]]
"""Axes that run together (zipped): all as long as one another. A plain axis is a factor alone."""


ISOFLOP_SETTINGS = ("rl.steps", "calibrate.epochs", "pretrain.steps")


@dataclass
class IsoFlop:
    """How an axis `budget` (FLOPs of a stage's training) becomes a setting: `set` is one of ISOFLOP_SETTINGS, the
    rest what the arithmetic has to take for granted of the data (budget.py)."""

    set: str = "rl.steps"
    prompt_tokens: int = 200
    answer_tokens: int = 0
    mean_depth: float = 0.7

    def put(self, key: str, value: Any) -> None:
        """One field, from a file or, as text, from the command line. Raises ValueError."""
        kinds = {name: type(value) for name, value in asdict(self).items()}
        if key not in kinds:
            raise ValueError(f"isoflop.{key}: no such field; there are {', '.join(kinds)}")
        try:
            setattr(self, key, kinds[key](value))
        except ValueError:
            raise ValueError(f"isoflop.{key}={value}: expected {kinds[key].__name__}") from None
        if self.set not in ISOFLOP_SETTINGS:
            raise ValueError(f"isoflop.set={self.set}: expected one of {', '.join(ISOFLOP_SETTINGS)}")


@dataclass
class Grid:
    """`fixed` settings (by key, whole) are every point's; a point takes one entry of each factor, the last factor
    running fastest. `exclude`: rules, each leaving out the points in which every key has one of its values."""

    fixed: dict[str, str] = field(default_factory=dict)
    factors: list[Factor] = field(default_factory=list)
    exclude: list[dict[str, list[Any]]] = field(default_factory=list)
    isoflop: IsoFlop = field(default_factory=IsoFlop)

    @property
    def keys(self) -> list[str]:
        return [key for factor in self.factors for key in factor]

    def points(self) -> list[dict[str, Value]]:
        """Raises ValueError for exclusions that match no point, or all of them, and for too many points."""
        size = math.prod(len(_entries(factor)) for factor in self.factors)
        if size > MOST_POINTS:
            axes = " x ".join(f"{len(_entries(factor))} ({','.join(factor)})" for factor in self.factors)
            raise ValueError(f"{size} points, {axes}: expected at most {MOST_POINTS}; take fewer values of an axis")
        entries = [[dict(zip(factor, e, strict=True)) for e in _entries(factor)] for factor in self.factors]
        every = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*entries)]
        kept = every
        for rule in self.exclude:
            if not any(matches(point, rule) for point in every):
                raise ValueError(f"exclude {describe(rule)}: matches no point of the grid")
            kept = [point for point in kept if not matches(point, rule)]
        if not kept:
            raise ValueError(f"exclude: nothing is left of {len(every)} points")
        return kept

    def overrides(self, point: Mapping[str, Value]) -> list[str]:
        """The point as settings that `config.load` takes, `seed` spelt out. `budget` is left out: what it buys depends
        on the model."""
        settings = [*self.fixed.values(), *(f"{key}={value.text}" for key, value in point.items() if key != BUDGET)]
        spelt: list[str] = []
        for text in settings:
            key, _, value = text.partition("=")
            spelt += [f"{name}={value}" for name in SEEDS] if key == SEED else [text]
        return spelt


def _entries(factor: Factor) -> list[tuple[Value, ...]]:
    return list(zip(*factor.values(), strict=True))


def matches(point: Mapping[str, Value], rule: Mapping[str, Sequence[Any]]) -> bool:
    return all(any(same(point[key].plain, value) for value in values) for key, values in rule.items())


def same(a: Any, b: Any) -> bool:
    """Equal, but true is not 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _hashable(value: Any) -> Any:
    """Equal exactly where `same` says so, lists and sections entry by entry."""
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple(sorted((str(key), _hashable(item)) for key, item in value.items()))
    return isinstance(value, bool), value


def describe(values: Mapping[str, Any]) -> str:
    """{"a": 1, "b": [2, 3]} -> "a=1 b=2,3"."""
    return " ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in values.items())


# ---- the command line ----


def from_settings(settings: Iterable[str]) -> Grid:
    """`key=value` settings; those of several values are axes. Of two settings of one value the later one counts, as in
    every command. Raises ValueError: not a setting, a bad range, an axis and something else of the same key."""
    grid = Grid()
    for text in settings:
        key, values, several = parse(text)
        if key in grid.keys or (several and key in grid.fixed):
            raise ValueError(f"{key}: given twice; give all its values in one setting, {key}=a,b,c")
        grid.fixed.pop(key, None)
        if several or key == BUDGET:
            grid.factors.append({key: axis(key, values)})
        else:
            grid.fixed[key] = text
    return grid


def parse(text: str) -> tuple[str, list[Value], bool]:
    """One setting -> (key, values, whether it is an axis). An axis may have one value only: 1:1:1."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ValueError(
            f"{text}: not a setting; expected key=value or key=a,b,c ({' '.join(str(error).split())})"
        ) from None
    key, element = override.key_or_group, override._value
    if override.is_delete():
        raise ValueError(f"{text}: settings cannot be deleted; give another value instead")
    if isinstance(element, ChoiceSweep) and any(isinstance(each, RangeSweep) for each in element.list):
        raise ValueError(
            f"{text}: range() among other values; expected it alone, or start:stop:step (with its stop) there"
        )
    if isinstance(element, ChoiceSweep) and not element.shuffle:
        return key, [value for each in element.list for value in expand(key, each)], True
    if isinstance(element, RangeSweep) and not element.shuffle:
        return key, _hydras_range(text, element), True
    if override.is_sweep_override():
        raise ValueError(
            f"{text}: expected values with commas between them, a range start:stop:step, or range(start,stop,step)"
        )
    if is_range(element):
        return key, expand(key, element), True
    # What is fixed keeps the user's own words.
    return key, [Value(text.split("=", 1)[1], override.value())], False


def is_range(element: Any) -> bool:
    """Whether a value is written as a range."""
    # Quoted strings are of a type of their own: never ranges.
    return isinstance(element, str) and _RANGE.fullmatch(element) is not None


def expand(key: str, element: Any) -> list[Value]:
    """A value, or all values of a range."""
    if is_range(element):
        return [Value(repr(number), number) for number in span(key, *element.split(":"))]
    return [Value(Override._get_value_element_as_str(element), Override._convert_value(element))]


def _hydras_range(text: str, element: RangeSweep) -> list[Value]:
    """The values that Hydra's own sweeps take from its range(), the stop left out. Raises ValueError for none."""
    start, stop, step = element.start, element.stop, element.step
    assert start is not None and stop is not None
    if not all(math.isfinite(end) for end in (start, stop, step)):
        raise ValueError(f"{text}: expected finite ends")
    if step == 0 or (stop - start) / step <= 0:
        raise ValueError(f"{text}: no values, since a step of {step} does not lead from {start} towards {stop}")
    _check_count(text, abs((stop - start) / step))
    return [Value(repr(number), number) for number in element.range()]


def span(key: str, start: str, stop: str, step: str) -> list[int] | list[float]:
    """Both ends are in. Ends written as whole numbers give whole numbers (rounded, each once, for log and lin).

    Raises ValueError for a range without values.
    """
    text = f"{key}={start}:{stop}:{step}"
    whole = all(_WHOLE.fullmatch(end) for end in (start, stop))
    if not all(math.isfinite(float(end)) for end in (start, stop)):
        raise ValueError(f"{text}: expected finite ends")
    if step.startswith(("log", "lin")):
        low, high, count = float(start), float(stop), int(step[3:])
        _check_count(text, count)
        if count < 2:
            raise ValueError(f"{text}: expected at least 2 values, found {count}")
        if step.startswith("log") and (low <= 0 or high <= 0):
            raise ValueError(f"{text}: expected ends > 0 for a logarithmic range")
        shares = [i / (count - 1) for i in range(count)]
        logarithmic = step.startswith("log")
        numbers = [low * (high / low) ** s if logarithmic else low + s * (high - low) for s in shares]
        return list(dict.fromkeys(map(round, numbers))) if whole else [float(f"{number:.6g}") for number in numbers]
    # In decimals, as written: a stop that is a whole number of steps away belongs to the range.
    first, last, width = Decimal(start), Decimal(stop), Decimal(step)
    if width == 0 or (last - first) / width < 0:
        raise ValueError(f"{text}: a step of {step} does not lead from {start} to {stop}")
    steps = float(last - first) / float(width) if float(width) else math.inf
    _check_count(text, steps + 1)
    kind = int if whole and _WHOLE.fullmatch(step) else float
    return [kind(first + i * width) for i in range(int((last - first) // width) + 1)]


def _check_count(text: str, count: float) -> None:
    """Raises ValueError for a range of more values than a grid may have points; nothing is built yet."""
    if not count <= MOST_POINTS:
        raise ValueError(f"{text}: {count:g} values; expected at most {MOST_POINTS}")


def axis(key: str, values: list[Value]) -> list[Value]:
    """The values, checked. Raises ValueError."""
    if key in FIXED_ONLY:
        raise ValueError(f"{key}: cannot vary within a sweep; its results go to one directory and make one table")
    if key == BUDGET and not all(type(value.plain) in (int, float) and value.plain > 0 for value in values):
        raise ValueError(f"{key}: expected FLOPs > 0, found {', '.join(value.text for value in values)}")
    return values


def zipped(grid: Grid, keys: Sequence[str]) -> None:
    """Make these axes of the grid run together, at the place of the first. Raises ValueError."""
    alone = {key: factor for factor in grid.factors if len(factor) == 1 for key in factor}
    missing = [key for key in keys if key not in alone]
    if missing or len(keys) < 2 or len(set(keys)) != len(keys):
        lacking = f"; {', '.join(missing)} has no several values here, or is zipped already" if missing else ""
        raise ValueError(f"--zip {','.join(keys)}: expected two or more different axes{lacking}")
    merged = {key: alone[key][key] for key in keys}
    check_lengths(merged)
    kept = [factor for factor in grid.factors if not factor.keys() & set(keys[1:])]
    grid.factors = [merged if keys[0] in factor else factor for factor in kept]


def check_lengths(factor: Factor) -> None:
    """Raises ValueError unless all axes of the factor are as long as one another."""
    if len({len(values) for values in factor.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(values)}" for key, values in factor.items())
        raise ValueError(f"zip: expected as many values of each, found: {lengths}")


def excluded(text: str) -> dict[str, list[Any]]:
    """--exclude "rl.depth_penalty.weight=0 seed=2,3" -> a rule: points in which every key has one of its values."""
    rule = {key: [value.plain for value in values] for key, values, _ in map(parse, text.split())}
    if not rule:
        raise ValueError("--exclude: expected settings, e.g. --exclude 'rl.depth_penalty.weight=0 seed=2,3'")
    return rule


# ---- as a whole ----


def combine(file: Grid, line: Grid) -> Grid:
    """A file's grid with the command line's settings in place of its own of the same keys.

    Raises ValueError for one of the file's zipped axes: the others would have nothing to run with.
    """
    given = {*line.fixed, *line.keys}
    for factor in file.factors:
        taken = given & factor.keys()
        if taken and len(factor) > 1:
            raise ValueError(f"{', '.join(sorted(taken))}: zipped in the file ({', '.join(factor)}); change it there")
    return Grid(
        fixed={key: text for key, text in file.fixed.items() if key not in given} | line.fixed,
        factors=[factor for factor in file.factors if not given & factor.keys()] + line.factors,
        exclude=[*file.exclude, *line.exclude],
        isoflop=file.isoflop,
    )


def check(grid: Grid) -> None:
    """What can be wrong with a grid as a whole. Raises ValueError."""
    for rule in grid.exclude:
        strangers = [key for key in rule if key not in grid.keys]
        if strangers:
            raise ValueError(f"exclude: {', '.join(strangers)} does not vary; axes: {', '.join(grid.keys) or 'none'}")
    for factor in grid.factors:
        seen = set()
        for entry in _entries(factor):
            known = tuple(_hashable(value.plain) for value in entry)
            if known in seen:
                twice = describe({key: value.text for key, value in zip(factor, entry, strict=True)})
                raise ValueError(f"{twice}: given twice")
            seen.add(known)
    varied = {*grid.fixed, *grid.keys}
    doubled = [key for key in SEEDS if key in varied] if SEED in varied else []
    if doubled:
        raise ValueError(f"seed stands for {' and '.join(SEEDS)}; leave out {', '.join(doubled)}, or seed")
    if BUDGET in grid.keys and grid.isoflop.set in varied:
        raise ValueError(f"{grid.isoflop.set}: follows from budget; leave one of them out")
