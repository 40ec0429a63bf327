"""The language of sweeps: settings with several values -> grid points, each a plain list of `key=value`.

Commas outside brackets and quotes separate the values of an axis; inside `[ ]`, `{ }` or quotes they belong to one
value. `start:stop:step`, `start:stop:linN` and `start:stop:logN`, unquoted, are ranges with both ends.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException

SEED, BUDGET = "seed", "budget"
SEEDS = ("calibrate.seed", "rl.seed")
"""What `seed` stands for: all that is trained. Problems, teacher and traces stay as they are, and are shared."""
FIXED_ONLY = ("name", "runs", "experiment")
GROUP = "sweep"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER}):({_NUMBER}|log\d+|lin\d+)")
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
    rest what the arithmetic has to take for granted of the data (planning/plan.py)."""

    set: str = "rl.steps"
    prompt_tokens: int = 200
    answer_tokens: int = 0
    mean_depth: float = 0.7


@dataclass
class Grid:
    """`fixed` settings are every point's; a point takes one entry of each factor, the last factor running fastest."""

    fixed: list[str] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    exclude: list[dict[str, list[Any]]] = field(default_factory=list)
    isoflop: IsoFlop = field(default_factory=IsoFlop)

    @property
    def keys(self) -> list[str]:
        return [key for factor in self.factors for key in factor]

    def points(self) -> list[dict[str, Value]]:
        """Raises ValueError for exclusions that match no point, or all of them."""
        choices = [
            [dict(zip(factor, entry, strict=True)) for entry in zip(*factor.values(), strict=True)]
            for factor in self.factors
        ]
        every = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*choices)]
        kept = every
        for rule in self.exclude:
            if not any(matches(point, rule) for point in every):
                raise ValueError(f"exclude {describe(rule)}: matches no point of the grid")
            kept = [point for point in kept if not matches(point, rule)]
        if not kept:
            raise ValueError(f"exclude: nothing is left of {len(every)} points")
        return kept

    def overrides(self, point: Mapping[str, Value]) -> list[str]:
        """The point as settings that `config.load` takes. `budget` is left out: what it buys depends on the model."""
        named = [f"{key}={value.text}" for key, value in point.items() if key != BUDGET]
        return [text for item in [*self.fixed, *named] for text in spelt_out(item)]


def spelt_out(setting: str) -> list[str]:
    """`seed=3` -> the settings that it stands for; others as they are."""
    key, _, value = setting.partition("=")
    return [f"{name}={value}" for name in SEEDS] if key == SEED else [setting]


def matches(point: Mapping[str, Value], rule: Mapping[str, Sequence[Any]]) -> bool:
    return all(any(same(point[key].plain, value) for value in values) for key, values in rule.items())


def same(a: Any, b: Any) -> bool:
    """Equal, but true is not 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


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
        if key in grid.keys or (several and any(other.startswith(f"{key}=") for other in grid.fixed)):
            raise ValueError(f"{key}: given twice; give all its values in one setting, {key}=a,b,c")
        if several or key == BUDGET:
            grid.factors.append({key: axis(key, values)})
        else:
            grid.fixed = [other for other in grid.fixed if not other.startswith(f"{key}=")] + [text]
    return grid


def parse(text: str) -> tuple[str, list[Value], bool]:
    """One setting -> (key, values, whether it is an axis). An axis may have one value only: 1:1:1."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ValueError(
            f"{text}: not a setting; expected key=value or key=a,b,c ({' '.join(str(error).split())})"
        ) from None
    key, found = override.key_or_group, override._value
    if override.is_delete():
        raise ValueError(f"{text}: settings cannot be deleted; give another value instead")
    if isinstance(found, ChoiceSweep) and not found.shuffle:
        return key, [value for element in found.list for value in _expand(key, element)], True
    if override.is_sweep_override():
        raise ValueError(f"{text}: expected values with commas between them, or a range start:stop:step")
    several = isinstance(found, str) and _RANGE.fullmatch(found) is not None
    # What is fixed keeps the user's own words.
    raw = text.split("=", 1)[1]
    return key, _expand(key, found) if several else [Value(raw, override.value())], several


def _expand(key: str, element: Any) -> list[Value]:
    # Quoted strings are of a type of their own: never ranges.
    if isinstance(element, str) and (match := _RANGE.fullmatch(element)):
        return [Value(repr(number), number) for number in span(key, *match.groups())]
    plain = element.text if isinstance(element, QuotedString) else Override._convert_value(element)
    return [Value(Override._get_value_element_as_str(element), plain)]


def span(key: str, start: str, stop: str, step: str) -> list[int] | list[float]:
    """Both ends are in. Ends written as whole numbers give whole numbers (rounded, each once, for log and lin).

    Raises ValueError for a range without values.
    """
    whole = all(re.fullmatch(r"[+-]?\d+", text) for text in (start, stop))
    low, high, text = float(start), float(stop), f"{key}={start}:{stop}:{step}"
    if step.startswith(("log", "lin")):
        count = int(step[3:])
        if count < 2:
            raise ValueError(f"{text}: expected at least 2 values, found {count}")
        if step.startswith("log") and (low <= 0 or high <= 0):
            raise ValueError(f"{text}: expected ends > 0 for a logarithmic range")
        shares = [i / (count - 1) for i in range(count)]
        if step.startswith("log"):
            numbers = [math.exp(math.log(low) + s * (math.log(high) - math.log(low))) for s in shares]
        else:
            numbers = [low + s * (high - low) for s in shares]
        numbers = [low, *numbers[1:-1], high]
        if whole:
            return list(dict.fromkeys(round(number) for number in numbers))
        return [float(f"{number:.6g}") for number in numbers]
    width = float(step)
    if width == 0 or (high - low) / width < 0:
        raise ValueError(f"{text}: a step of {step} does not lead from {start} to {stop}")
    # A stop that is a whole number of steps away belongs to the range, whatever the rounding.
    count = math.floor((high - low) / width + 1e-9) + 1
    if whole and re.fullmatch(r"[+-]?\d+", step):
        return [int(start) + i * int(step) for i in range(count)]
    return [float(f"{low + i * width:.12g}") for i in range(count)]


def axis(key: str, values: Sequence[Value]) -> list[Value]:
    """The values, checked. Raises ValueError."""
    if key in FIXED_ONLY:
        raise ValueError(f"{key}: cannot vary within a sweep; its results go to one directory and make one table")
    if key == BUDGET and not all(_positive(value.plain) for value in values):
        raise ValueError(f"{key}: expected FLOPs > 0, found {', '.join(value.text for value in values)}")
    return list(values)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def zipped(grid: Grid, keys: Sequence[str]) -> None:
    """Make these axes of the grid run together, at the place of the first. Raises ValueError."""
    factors = [next((f for f in grid.factors if list(f) == [key]), None) for key in keys]
    missing = [key for key, factor in zip(keys, factors, strict=True) if factor is None]
    if missing or len(set(keys)) < 2 or len(set(keys)) != len(keys):
        lacking = f"; {', '.join(missing)} has no several values here, or is zipped already" if missing else ""
        raise ValueError(f"--zip {','.join(keys)}: expected two or more different axes{lacking}")
    found = [factor for factor in factors if factor is not None]
    merged = {key: values for factor in found for key, values in factor.items()}
    grid.factors = [merged if f is found[0] else f for f in grid.factors if not any(f is other for other in found[1:])]
    check_lengths(merged)


def check_lengths(factor: Factor) -> None:
    lengths = {key: len(values) for key, values in factor.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise ValueError(f"zip: expected as many values of each, found: {found}")


def excluded(text: str) -> dict[str, list[Any]]:
    """--exclude "rl.lambda_exit=0 seed=2,3" -> a rule: points in which every key has one of its values."""
    rule = {}
    for part in text.split():
        key, values, _ = parse(part)
        rule[key] = [value.plain for value in values]
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
    grid = Grid(fixed=[f"{key}={written(key, value)}" for key, value in _mapping(data, "settings").items()])
    grid.factors = [{key: _axis_of(key, values)} for key, values in _mapping(data, "axes").items()]
    for group in _list(data, "zip"):
        factor = {key: _axis_of(key, values) for key, values in _checked(group, "zip").items()}
        check_lengths(factor)
        grid.factors.append(factor)
    keys = [text.split("=", 1)[0] for text in grid.fixed] + grid.keys
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: given twice; a setting is fixed, an axis or zipped")
    for rule in _list(data, "exclude"):
        rule = _checked(rule, "exclude")
        grid.exclude.append({k: v if isinstance(v, list) else [v] for k, v in rule.items()})
    grid.isoflop = _isoflop(_mapping(data, "isoflop"))
    return grid


def _mapping(data: dict, name: str) -> dict[str, Any]:
    return _checked(data.get(name) or {}, name)


def _list(data: dict, name: str) -> list:
    found = data.get(name) or []
    if not isinstance(found, list):
        raise ValueError(f"{name}: expected a list of key: value mappings, found a {type(found).__name__}")
    return found


def _checked(found: Any, name: str) -> dict[str, Any]:
    if not isinstance(found, dict) or (not found and name in ("zip", "exclude")):
        raise ValueError(f"{name}: expected key: value, found {found!r}")
    nested = [key for key, value in found.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{name}: {nested[0]} holds a section; write keys with dots, e.g. {nested[0]}.field: value")
    return {str(key): value for key, value in found.items()}


def _axis_of(key: str, values: Any) -> list[Value]:
    if isinstance(values, str) and (match := _RANGE.fullmatch(values)):
        return axis(key, [Value(repr(number), number) for number in span(key, *match.groups())])
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key}: expected a list of values or a range start:stop:step, found {values!r}")
    return axis(key, [Value(written(key, value), value) for value in values])


def written(key: str, value: Any) -> str:
    """A value from YAML as a setting's text that means the same."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(written(key, item) for item in value)}]"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
            return value
        # Hydra's quoting: a backslash counts only before a quote or at the end.
        body = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
        return f"'{body}'"
    raise ValueError(f"{key}: expected a number, a word, true, false, null or a list, found {value!r}")


def _isoflop(found: Mapping[str, Any]) -> IsoFlop:
    known = IsoFlop.__dataclass_fields__
    for key in found:
        if key not in known:
            raise ValueError(f"isoflop.{key}: no such field; there are {', '.join(known)}")
    return checked_isoflop(IsoFlop(**found))


def checked_isoflop(isoflop: IsoFlop) -> IsoFlop:
    if isoflop.set not in ISOFLOP_SETTINGS:
        raise ValueError(f"isoflop.set={isoflop.set}: expected one of {', '.join(ISOFLOP_SETTINGS)}")
    return isoflop


def combine(file: Grid, line: Grid) -> Grid:
    """A file's grid with the command line's settings in place of its own of the same keys.

    Raises ValueError for one of the file's zipped axes: the others would have nothing to run with.
    """
    given = {text.split("=", 1)[0] for text in line.fixed} | set(line.keys)
    for factor in file.factors:
        taken = given & set(factor)
        if taken and len(factor) > 1:
            raise ValueError(f"{', '.join(sorted(taken))}: zipped in the file ({', '.join(factor)}); change it there")
    return Grid(
        fixed=[text for text in file.fixed if text.split("=", 1)[0] not in given] + line.fixed,
        factors=[factor for factor in file.factors if not given & set(factor)] + line.factors,
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
        entries = list(zip(*factor.values(), strict=True))
        for i, entry in enumerate(entries):
            if any(all(same(a.plain, b.plain) for a, b in zip(entry, other, strict=True)) for other in entries[:i]):
                twice = describe({key: value.text for key, value in zip(factor, entry, strict=True)})
                raise ValueError(f"{twice}: given twice")
    varied = set(grid.keys) | {text.split("=", 1)[0] for text in grid.fixed}
    doubled = [key for key in SEEDS if key in varied] if SEED in varied else []
    if doubled:
        raise ValueError(f"seed stands for {' and '.join(SEEDS)}; leave out {', '.join(doubled)}, or seed")
    if BUDGET in grid.keys and grid.isoflop.set in varied:
        raise ValueError(f"{grid.isoflop.set}: follows from budget; leave one of them out")
