"""The settings on a command line that give a configuration again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from .config_paths import find_config_dir, list_groups
from .load import load
from .schema import RunConfig

FEW = 6
"""No further experiment is tried once one is left by so few settings."""
WORDS = ("null", "true", "false", "nan", "inf", "infinity")
"""What Hydra reads as something else than text."""
MISSING = object()
"""Equal to no value of a setting."""


def settings_of(cfg: RunConfig) -> list[str] | None:
    """The shortest list found for which `load` gives `cfg`: an experiment and what differs from it. None if there is
    none, because the configuration files are not here or a value can't be written so."""
    wanted = dict(_flat(asdict(cfg)))
    try:
        directory = find_config_dir()
    except FileNotFoundError:
        return None
    # An experiment may leave these to the user.
    given = [f"{key}={_word(wanted[key])}" for key in ("name", "model.path")]
    # That of the run's name first: composing all of them takes seconds.
    experiments = sorted(list_groups(directory).get("experiment", []), key=lambda name: not cfg.name.startswith(name))
    found: list[list[str]] = []
    for start in (*([f"experiment={name}"] for name in experiments), []):
        for settings in (start, [*start, *given]):
            if base := _base(directory, *settings):
                # A section that is None here and on in the experiment is no key of `base`: it is written, too.
                changed = {key: value for key, value in wanted.items() if base.get(key, MISSING) != value}
                found.append([*settings, *(f"{key}={_word(value)}" for key, value in changed.items())])
                break
        if found and min(map(len, found)) <= FEW:
            break
    return next((settings for settings in sorted(found, key=len) if _loaded(directory, *settings) == cfg), None)


def _loaded(directory: Path, *settings: str) -> RunConfig | None:
    try:
        return load([*settings], directory)
    except ValueError:
        return None


@cache
def _base(directory: Path, *settings: str) -> dict[str, Any] | None:
    """By key; a report of many runs asks for the same ones."""
    loaded = _loaded(directory, *settings)
    return None if loaded is None else dict(_flat(asdict(loaded)))


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _word(value: Any) -> str:
    """A value as Hydra's grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if re.fullmatch(r"([A-Za-z/]|\.\.?/)[A-Za-z0-9._/+-]*", value) and value.lower() not in WORDS:
            return value
        # Backslashes count before a quotation mark only, those at the end included.
        escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return repr(value)
