"""The language of sweeps: settings with several values -> grid points, each a plain list of `key=value`.

Hydra's grammar reads settings: a comma outside brackets and quotes separates the values of an axis, and range(start,
stop, step) is one, which leaves out its stop. The ranges `start:stop:step`, `start:stop:linN` and `start:stop:logN`,
unquoted, are ours: they hold both ends.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException

SEED, BUDGET = "seed", "budget"
SEEDS = ("calibrate.seed", "rl.seed")
"""What `seed` stands for: all that is trained. Problems, teacher and traces stay as they are, and are shared."""
FIXED_ONLY = ("name", "runs", "experiment")
GROUP = "sweep"
MOST_POINTS = 10**6
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER}):({_NUMBER}|log\d+|lin\d+)")
_HYDRAS_RANGE = re.compile(r"range\(.*\)")
_WHOLE = re.compile(r"[+-]?\d+")
# A point before a digit begins a number.
_PLAIN = re.compile(r"(?:[A-Za-z_/]|\.(?![0-9]))[A-Za-z0-9_./+-]*")
_WORDS = ("true", "false", "null", "nan", "inf", "on", "off", "yes", "no")


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
        return key, [value for each in element.list for value in _expand(key, each)], True
    if isinstance(element, RangeSweep) and not element.shuffle:
        return key, _hydras_range(text, element), True
    if override.is_sweep_override():
        raise ValueError(
            f"{text}: expected values with commas between them, a range start:stop:step, or range(start,stop,step)"
        )
    if _is_range(element):
        return key, _expand(key, element), True
    # What is fixed keeps the user's own words.
    return key, [Value(text.split("=", 1)[1], override.value())], False


def _is_range(element: Any) -> bool:
    # Quoted strings are of a type of their own: never ranges.
    return isinstance(element, str) and _RANGE.fullmatch(element) is not None


def _expand(key: str, element: Any) -> list[Value]:
    if _is_range(element):
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
    """--exclude "rl.lambda_exit=0 seed=2,3" -> a rule: points in which every key has one of its values."""
    rule = {key: [value.plain for value in values] for key, values, _ in map(parse, text.split())}
    if not rule:
        raise ValueError("--exclude: expected settings, e.g. --exclude 'rl.lambda_exit=0 seed=2,3'")
    return rule


# ---- files ----

SECTIONS = ("settings", "axes", "zip", "exclude", "isoflop")


class _Loader(yaml.SafeLoader):
    """Numbers and words as YAML 1.2 has them: to 1.1, 1:2:30 is a number of base 60, 1e-5 a word and `on` is true."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False", "tfTF"),
    ("null", r"~|null|Null|", ["~", "n", "N", ""]),
    ("int", r"[-+]?\d+", "-+0123456789"),
    ("float", _NUMBER, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def from_file(path: Path) -> Grid:
    """A grid from YAML (docs/sweeps.md). Raises ValueError, naming the file and the part."""
    try:
        return _from_sections(yaml.load(path.read_text(encoding="utf-8"), _Loader))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a grid: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_sections(data: Any) -> Grid:
    if not isinstance(data, dict):
        raise ValueError(f"expected the sections {', '.join(SECTIONS)}, found a {type(data).__name__}")
    for name in data:
        if name not in SECTIONS:
            near = difflib.get_close_matches(str(name), SECTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(SECTIONS)}"
            raise ValueError(f"{name}: no such section{hint}")
    fixed = {key: f"{key}={written(key, value)}" for key, value in _settings(data, "settings").items()}
    axes = [{key: _axis_of(key, values)} for key, values in _settings(data, "axes").items()]
    zipped_axes = [_columns(group) if set(group) == {"keys", "rows"} else group for group in _list(data, "zip")]
    groups = [{key: _axis_of(key, values) for key, values in group.items()} for group in zipped_axes]
    for group in groups:
        check_lengths(group)
    rules = [{k: v if isinstance(v, list) else [v] for k, v in rule.items()} for rule in _list(data, "exclude")]
    grid = Grid(fixed, [*axes, *groups], rules)
    keys = [*grid.fixed, *grid.keys]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: given twice; a setting is fixed, an axis or zipped")
    for key, value in _settings(data, "isoflop").items():
        grid.isoflop.put(key, value)
    return grid


def _settings(data: dict, name: str) -> dict[str, Any]:
    return _checked(data.get(name) or {}, name)


def _list(data: dict, name: str) -> list[dict[str, Any]]:
    items = data.get(name) or []
    if not isinstance(items, list):
        raise ValueError(f"{name}: expected a list of key: value mappings, found a {type(items).__name__}")
    return [_checked(item, name) for item in items]


def _columns(table: dict[str, Any]) -> dict[str, list[Any]]:
    """Zipped axes as a table, {"keys": [K], "rows": lists of K values} -> each key's values."""
    keys, rows = table["keys"], table["rows"]
    if not isinstance(keys, list) or not isinstance(rows, list) or not keys or not rows:
        raise ValueError(f"zip: expected keys: [a, b] and rows: [[1, 2], ...], found {table}")
    wrong = [row for row in rows if not isinstance(row, list) or len(row) != len(keys)]
    if wrong:
        raise ValueError(
            f"zip: expected {len(keys)} values in every row, for {', '.join(map(str, keys))}; found {wrong[0]}"
        )
    return {str(key): [row[i] for row in rows] for i, key in enumerate(keys)}


def _checked(section: Any, name: str) -> dict[str, Any]:
    if not isinstance(section, dict) or (not section and name in ("zip", "exclude")):
        raise ValueError(f"{name}: expected key: value, found {section!r}")
    nested = [key for key, value in section.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{name}: {nested[0]} holds a section; write keys with dots, e.g. {nested[0]}.field: value")
    return {str(key): value for key, value in section.items()}


def _axis_of(key: str, values: Any) -> list[Value]:
    if _is_range(values):
        return axis(key, _expand(key, values))
    if isinstance(values, str) and _HYDRAS_RANGE.fullmatch(values):
        return axis(key, parse(f"{key}={values}")[1])
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key}: expected a list of values or a range start:stop:step, found {values!r}")
    return axis(key, [Value(written(key, value), value) for value in values])


def written(key: str, value: Any) -> str:
    """A value from YAML as a setting's text that means the same."""
    if isinstance(value, list):
        return f"[{','.join(written(key, item) for item in value)}]"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        return value if plain else QuotedString(value, Quote.single).with_quotes()
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    raise ValueError(f"{key}: expected a number, a word, true, false, null or a list, found {value!r}")


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
