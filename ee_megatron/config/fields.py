"""Fields of the settings: defaults, rules, iteration over them, sections that can be switched off."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from operator import ge, gt, le, lt
from typing import Any, NamedTuple

MANDATORY = "???"
"""Default of a setting that has to be given, as omegaconf writes it."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
LARGEST = 2**63
BOUNDS = {"above": (">", gt), "at_least": (">=", ge), "below": ("<", lt), "at_most": ("<=", le)}
"""Bounds of `Rules` -> their signs."""


@dataclass(frozen=True)
class Rules:
    """Rules beyond a field's type: allowed values, and how it enters the identity of results."""

    choices: Collection[str | int] = ()
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    """Bounds of a number, or of each in a list."""
    kind: str = ""
    """name (becomes part of directories' and jobs' names), path (other spellings of the same are equal), code
    (FILE.py:NAME, beside the choices), text (may hold line ends and other characters that don't print); empty: plain
    text."""
    execution: bool = False
    """Changes how a result is computed, not what it is."""
    added_later: bool = False
    """Added when there were results: its default changes nothing and stays out of the identity."""
    was: str = ""
    """Its older name, which is accepted for one release and still stands in the identity."""
    off: Any = None
    """The older name's value for a section that is off, if that is not the default."""


def setting(default: Any = MANDATORY, **rules: Any) -> Any:
    """Declare a field of a section: its default, a list too, and its `Rules`. Without a default it is mandatory."""
    return field(default_factory=lambda: copy.copy(default), metadata={"rules": Rules(**rules)})


def section(kind: type) -> Any:
    """Declare a field that is a section."""
    return field(default_factory=kind)


def optional(kind: type, was: str = "", *, on: bool = False, bound: bool = True) -> Any:
    """Declare a section that may be switched off (null, false), and is off by default unless `on`; true, or a field of
    it, switches it on. `was`: the older true/false switch; `bound`: its fields' older names don't switch it on."""
    given = {"default_factory": kind} if on else {"default": None}
    return field(**given, metadata={"kind": kind, "was": was, "bound": bound})


def section_of(entry: Any) -> type | None:
    """Dataclass of a field that is a section."""
    kind = entry.metadata.get("kind", entry.default_factory)
    return kind if is_dataclass(kind) and isinstance(kind, type) else None


def settings(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, Rules]]:
    """(dotted key, value, rules) of every field of a section and of the sections in it; None for one that is off."""
    for entry in fields(part):
        value = getattr(part, entry.name)
        if is_dataclass(value):
            yield from settings(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", value, entry.metadata.get("rules", Rules())


class Setting(NamedTuple):
    """A key of the schema. `kind`: the section that it is, None for a value; `inside`: the sections around it that
    may be switched off, `bound`: the innermost is not switched on by the key's older name. Of a section that may be
    switched off: `on` by default or not, `switch`: its older switch, if any."""

    key: str
    kind: type | None
    type: str
    rules: Rules
    default: Any
    inside: tuple[str, ...]
    on: bool | None
    switch: str
    bound: bool

    @property
    def is_switch(self) -> bool:
        """Whether its older name also switched its section on and off."""
        return self.kind is None and (self.default == MANDATORY or self.rules.off is not None) and bool(self.inside)


def all_settings(kind: type, prefix: str = "", inside: tuple[str, ...] = (), bound: bool = False) -> Iterator[Setting]:
    """Iterate over all keys of a section's type, also of sections that are switched off."""
    for entry in fields(kind):
        key, inner = f"{prefix}{entry.name}", section_of(entry)
        on = entry.default is MISSING if "kind" in entry.metadata else None
        default = entry.default if inner or entry.default is not MISSING else entry.default_factory()  # type: ignore
        rules, switch = entry.metadata.get("rules", Rules()), entry.metadata.get("was", "")
        yield Setting(key, inner, str(entry.type), rules, default, inside, on, switch, bound)
        if inner is not None:
            around = (inside, bound) if on is None else ((*inside, key), entry.metadata["bound"])
            yield from all_settings(inner, f"{key}.", *around)


def find(part: Any, key: str) -> Any:
    """Value at a dotted key; None in a section that is off."""
    for name in key.split("."):
        part = getattr(part, name, None)
    return part


def fault(key: str, value: Any, rules: Rules) -> str | None:
    """Fault of a single value, or None."""
    items = value if isinstance(value, list) else [value]
    numbers = [item for item in items if isinstance(item, int | float)]
    shown_as_is = rules.kind in ("text", "name") or all(item.isprintable() for item in items if isinstance(item, str))
    bounds = [(s, h, b) for n, (s, h) in BOUNDS.items() if (b := getattr(rules, n)) is not None]
    for right, expected in (
        (all(isinstance(number, int) or math.isfinite(number) for number in numbers), "a finite number"),
        (all(isinstance(number, float) or abs(number) < LARGEST for number in numbers), "a number below 2^63"),
        (shown_as_is, "text of printable characters"),
        (
            not rules.choices or value in rules.choices or (rules.kind == "code" and code_file(value)),
            f"one of {', '.join(map(str, rules.choices))}{', or FILE.py:NAME' if rules.kind == 'code' else ''}",
        ),
        (
            all(holds(number, bound) for _, holds, bound in bounds for number in numbers),
            f"a number {' and '.join(f'{sign} {bound}' for sign, _, bound in bounds)}",
        ),
    ):
        if not right:
            shown = str(value)
            return f"{key}={shown if shown and shown.isprintable() else repr(shown)}: expected {expected}"
    if rules.kind == "name" and not NAME.fullmatch(value):
        return wrong_name(key, value)
    return None


def code_file(value: str) -> str:
    """The file in FILE.py:NAME; "" of any other value."""
    file, _, name = value.rpartition(":")
    return file if file.endswith(".py") and name else ""


def environment(value: str) -> str:
    """The module of an environment of verifiers, of its id [OWNER/]NAME[@VERSION]; "" of what is no id."""
    module = value.rpartition("/")[2].partition("@")[0].replace("-", "_").lower()
    return module if module.isidentifier() else ""


def wrong_name(what: str, text: str) -> str:
    return (
        f"{what}={text!r}: expected a plain name: letters, digits and . _ - (not first . or -), at most 100; "
        "directories and jobs are called by it"
    )
