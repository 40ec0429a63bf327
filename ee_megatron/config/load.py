"""Load command-line settings as a `RunConfig`: Hydra composes the chosen files, the settings override them, and the
result is checked against the schema key by key and merged into it, wherever a value is from."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from . import hub
from .aliases import MAY_BE_OFF, RENAMED, Given, assign_all, modern, modernise
from .config_paths import find_config_dir, list_groups
from .derive import draws_weights
from .errors import lines_of, refuse
from .schema import KEYS, RunConfig

KNOWN = {k.key: None if k.kind else k.type for k in KEYS}
"""Every dotted key of the schema -> the name of its type, None for a section."""
SPOKEN = {"rl.lambda": "rl.depth_penalty.weight", "rl.lr": "rl.adapter_lr", "rl.learning_rate": "rl.adapter_lr"}
"""Common other names of settings, for suggestions."""
SCHEMA = OmegaConf.structured(RunConfig)
"""Built once: that takes as long as merging, which copies it."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """The result of loading settings. `faults`: one line for each that cannot be read; `without`: their keys; `cfg`:
    the configuration without them, None if there is none."""

    cfg: RunConfig | None
    faults: list[str]
    without: frozenset[str] = frozenset()


def load(overrides: list[str], config_dir: Path | None = None) -> RunConfig:
    """Compose `configs/config.yaml`, the chosen group files and `key=value` settings, later ones winning.

    `config_dir` falls back to the environment variable EE_CONFIG_DIR, then to the package's own.
    Raises Faults (a ValueError: unknown keys or choices, wrong types, missing values; a line for each) or
    FileNotFoundError (no configs).
    """
    result = attempt(overrides, config_dir)
    refuse(result.faults)
    assert result.cfg is not None
    return result.cfg


def attempt(overrides: list[str], config_dir: Path | None = None) -> Attempt:
    """Load as `load`, but continue after errors, so that all are reported. Raises FileNotFoundError (no configs)."""
    directory = find_config_dir(config_dir)
    groups = list_groups(directory)
    chosen, given = list[str](), list[Given]()
    faults, without = list[str](), set[str]()
    for text in overrides:
        try:
            choice, settings = _read(_parsed(text), groups)
        except ValueError as error:
            faults.append(str(error))
            without.add(text.split("=", 1)[0].lstrip("+~"))
        else:
            chosen += choice
            given += settings
    if without & groups.keys():
        # Too much depends on a group's choice to continue without it.
        return Attempt(None, faults)
    try:
        composed = _compose(directory, [text for text in chosen if text != "experiment=null"])
        faults += modernise(composed, warns=True)
        assign_all(composed, given, warns=True)
        _check_keys(composed)
        cfg = _merged(composed, groups, faults, without)
    except ValueError as error:
        return Attempt(None, [*faults, *lines_of(error)])
    return Attempt(cfg, faults, frozenset(without))


def pin_ids(cfg: RunConfig, overrides: list[str], *, whole: bool) -> dict[str, str]:
    """Give the hub ids among the settings their commits (hub.pin), in `cfg` and in `overrides`; `whole`: fetch weights
    and rows, too. Returns the faults by setting, whose value is then "unknown"."""
    faults: dict[str, str] = {}
    weights = not draws_weights(cfg) and not cfg.model.checkpoint
    for key, part, kind in (("model.path", cfg.model, "model"), ("task.path", cfg.task, "dataset")):
        given = part.path
        if key == "task.path" and cfg.task.name == "verifiers":
            continue
        try:
            part.path = hub.pin(key, given, kind, whole and not faults and (weights or kind != "model"))
        except ValueError as error:
            part.path, faults[key] = "unknown", str(error)
        if given != part.path:
            overrides[:] = [*(text for text in overrides if not text.startswith(f"{key}=")), f"{key}={part.path}"]
    return faults


def _merged(
    composed: dict[str, Any], groups: Mapping[str, list[str]], faults: list[str], without: set[str]
) -> RunConfig | None:
    """The composed settings under the schema. Values of a wrong type are left out and added to `faults`."""
    while True:
        try:
            merged = OmegaConf.merge(SCHEMA, composed)
            OmegaConf.resolve(merged)
            break
        except OmegaConfBaseException as error:
            faults.append(_explain(error))
            key = str(error.full_key or "").split("[")[0]
            *path, name = key.split(".")
            section: Any = functools.reduce(lambda node, part: node.get(part) or {}, path, composed)
            if key in without or name not in section:
                return None
            without.add(key)
            del section[name]
    missing = sorted(cast("set[str]", OmegaConf.missing_keys(merged)) - without)
    if missing:
        experiments = ", ".join(groups.get("experiment", [])) or "none found"
        raise ValueError(
            f"{', '.join(missing)}: not set; give {' '.join(f'{key}=...' for key in missing)} "
            f"or a whole run by experiment=... ({experiments})"
        )
    for key in without & {"name", "model.path"}:
        OmegaConf.update(merged, key, "unknown")
    return cast(RunConfig, OmegaConf.to_object(merged))


def read_yaml(path: Path) -> Any:
    """A YAML file as OmegaConf has it. Raises ValueError for aliases, a few of which make a text that fills the memory,
    and for what is nested too deep; YAMLError, OmegaConfBaseException, OSError."""
    text, loader = path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with contextlib.suppress(YAMLError):  # OmegaConf says where.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
                raise ValueError("an alias (*name), expected values written out")
        return OmegaConf.create(text)
    except RecursionError:
        raise ValueError("nested too deep, expected settings") from None


def read_saved(path: Path) -> RunConfig:
    """Read a configuration that a stage saved. Missing fields get their defaults.

    Raises ValueError if the file is not a configuration, or has settings that this version lacks.
    """
    try:
        loaded = read_yaml(path)
        if not isinstance(loaded, DictConfig):
            raise ValueError("a list, expected settings")
        saved = cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))
        refuse(modernise(saved, warns=False))
        _check_keys(saved)
        return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(SCHEMA, saved)))
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a run's configuration ({_one_line(error)}); name another run") from None


def _parsed(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ValueError(f"{text}: not a setting; expected key=value, e.g. rl.steps=5 ({_one_line(error)})") from None
    if override.is_delete():
        raise ValueError(f"{text}: settings cannot be deleted; give another value instead")
    if override.is_sweep_override():
        raise ValueError(
            f"{text}: several values for one run; give one value, a list as key=[a,b], or use `ee-megatron sweep`"
        )
    return override


def _read(override: Override, groups: Mapping[str, list[str]]) -> tuple[list[str], list[Given]]:
    """A group's choice for Hydra, or a setting under today's names. Raises ValueError for unknown ones."""
    key, value = override.key_or_group, override.value()
    if key in groups and (key == "experiment" or not isinstance(value, dict)):
        text = str(override.input_line).split("=", 1)[1]
        if value is not None and text not in groups[key]:
            raise ValueError(f"{key}={text}: no such choice; there are {', '.join(groups[key])}")
        return [f"{key}={text}"], []
    settings = modern(key, value, warns=True)
    for name, _, _ in settings:
        if name not in KNOWN:
            raise ValueError(_unknown(name, [*KNOWN, *groups]))
    return [], settings


def _compose(directory: Path, overrides: list[str]) -> dict[str, Any]:
    try:
        with initialize_config_dir(str(directory), version_base="1.3"):
            config = compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{directory}: {_one_line(error)}") from None
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


def _check_keys(config: Mapping[str, Any]) -> None:
    wrong = list[str]()
    for key, value in _walk(config, ""):
        if key not in KNOWN:
            wrong.append(_unknown(key, KNOWN))
        elif KNOWN[key] is None and not (isinstance(value, dict) or (value is None and key in MAY_BE_OFF)):
            field = next(name for name in KNOWN if name.startswith(f"{key}."))
            wrong.append(f"{key}={value}: {key} is a section; set one of its fields, e.g. {field}=...")
    refuse(wrong)


def _walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        yield key, value
        if isinstance(value, dict) and not KNOWN.get(key):
            yield from _walk(value, f"{key}.")


def _unknown(key: str, known: Iterable[str]) -> str:
    # Older names are searched, too: a mistyped one stands for today's setting.
    now = SPOKEN | {older: k.key for older, k in RENAMED.items()} | {name: name for name in known}
    names, last = list(now), key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
    near += [name for name in names if name.rsplit(".", 1)[-1] == last]
    near += difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"{key}: no such setting; did you mean {now[near[0]]}?"
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
    return f"{key}: no such setting; the nearest is {now[nearest]}, `--dry-run` prints them all"


def _explain(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or "")
    expected = KNOWN.get(key.split("[")[0])
    wanted = f"; expected {expected}" if expected else ""
    return f"{key or 'settings'}: {str(error.msg or error).splitlines()[0]}{wanted}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- the other way: the command-line settings that reproduce a configuration ----

FEW = 6
"""The search ends at an experiment from which at most so many settings differ."""
WORDS = ("null", "true", "false", "nan", "inf", "infinity")
"""Words that Hydra doesn't read as text."""
MISSING = object()
"""Equal to no value of a setting."""


def settings_of(cfg: RunConfig) -> list[str] | None:
    """Shortest list of settings for which `load` returns `cfg`: an experiment and the differences from it. None if
    there is none: the configuration files are missing, or a value can't be written on a command line."""
    wanted = dict(_flat(dataclasses.asdict(cfg)))
    try:
        directory = find_config_dir()
    except FileNotFoundError:
        return None
    # An experiment may leave these to the user.
    given = [f"{key}={_word(wanted[key])}" for key in ("name", "model.path")]
    # The experiment with the run's name comes first: composing all of them takes seconds.
    experiments = sorted(list_groups(directory).get("experiment", []), key=lambda name: not cfg.name.startswith(name))
    candidates: list[list[str]] = []
    for start in (*([f"experiment={name}"] for name in experiments), []):
        for settings in (start, [*start, *given]):
            if base := _base(directory, *settings):
                # A section that is None here and on in the experiment is not a key of `base`: it is written, too.
                changed = {key: value for key, value in wanted.items() if base.get(key, MISSING) != value}
                candidates.append([*settings, *(f"{key}={_word(value)}" for key, value in changed.items())])
                break
        if candidates and min(map(len, candidates)) <= FEW:
            break
    return next((settings for settings in sorted(candidates, key=len) if _loaded(directory, *settings) == cfg), None)


def _loaded(directory: Path, *settings: str) -> RunConfig | None:
    try:
        return load([*settings], directory)
    except ValueError:
        return None


@functools.cache
def _base(directory: Path, *settings: str) -> dict[str, Any] | None:
    """Values by key; cached, because the runs of a report share them."""
    loaded = _loaded(directory, *settings)
    return None if loaded is None else dict(_flat(dataclasses.asdict(loaded)))


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and not KNOWN.get(key):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


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
        escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), value)
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_word(each)}' for name, each in value.items())}}}"
    return repr(value)
