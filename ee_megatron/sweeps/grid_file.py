"""A grid from a YAML file: the sections of docs/sweeps.md, numbers and words as they are on the command line."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Quote, QuotedString

from .grid import NUMBER, Grid, Value, axis, check_lengths, expand, is_range, parse

SECTIONS = ("settings", "axes", "zip", "exclude", "isoflop")
_HYDRAS_RANGE = re.compile(r"range\(.*\)")
# A point before a digit begins a number.
_PLAIN = re.compile(r"(?:[A-Za-z_/]|\.(?![0-9]))[A-Za-z0-9_./+-]*")
_WORDS = ("true", "false", "null", "nan", "inf", "on", "off", "yes", "no")


class _Loader(yaml.SafeLoader):
    """Numbers and words as YAML 1.2 has them: to 1.1, 1:2:30 is a number of base 60, 1e-5 a word and `on` is true."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False", "tfTF"),
    ("null", r"~|null|Null|", ["~", "n", "N", ""]),
    ("int", r"[-+]?\d+", "-+0123456789"),
    ("float", NUMBER, "-+.0123456789"),
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
    if is_range(values):
        return axis(key, expand(key, values))
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
