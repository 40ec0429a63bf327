"""The grid of a sweep: settings with several values, from the command line or a YAML file, and its points.

Hydra's grammar reads both: a comma outside brackets and quotes separates values (`a=1,2`), and `range(start,stop,step)`
and `choice(...)` are axes too. A YAML file has the sections settings, axes, zip and isoflop (docs/sweeps.md).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..config.config_paths import find_config_dir, list_groups
from ..config.derive import read_dims
from ..config.load import read_yaml
from ..config.schema import RunConfig

SEED, GROUP, BUDGET, ISOFLOP = "seed", "sweep", "budget", "isoflop."
SEEDS = ("calibrate.seed", "rl.seed")
"""What `seed` stands for: all that is trained. Problems, teacher and traces stay as they are, and are shared."""
FIXED_ONLY = ("name", "runs", "experiment")
MOST_POINTS = 10**5


@dataclass(frozen=True)
class Value:
    """A value of a setting. `text` as it stands behind "="; `plain` as a Python value, for tables and comparisons."""

    text: str
    plain: Any


@dataclass
class IsoFlop:
    """Equal compute: `budget`, in FLOPs, is spent on the setting `set`: rl.steps, calibrate.epochs or pretrain.steps.
    The others are the section isoflop, assumptions about the data; answer_tokens 0: rollout.max_new_tokens."""

    budget: float
    set: str = "rl.steps"
    prompt_tokens: int = 200
    answer_tokens: int = 0
    mean_depth: float = 0.7

    def buy(self, cfg: RunConfig) -> int | float:
        """The value of `set` that costs about `budget` FLOPs with the model of `cfg`: RL steps with rollouts, scoring
        and updates; epochs of calibration, updates with what is scored for them; updates at full depth from random
        weights. Raises ValueError for a budget below half a step, or no setting of these."""
        # Late: a grid without a budget does not need this.
        from ..planning import flops
        from ..planning.layout import Layout
        from ..planning.workload import Workload

        dims, answer = read_dims(cfg), self.answer_tokens or cfg.rollout.max_new_tokens
        layout, unit = Layout.of(cfg, dims), 1.0
        exits = layout.spec.layout
        load = Workload.of(self.prompt_tokens, answer, exits.outcomes, self.mean_depth, exits.first_token)
        if self.set == "rl.steps":
            each = sum(flops.phase_flops(layout, load, cfg).values())
        elif self.set == "calibrate.epochs":
            each = flops.calibration_flops(layout, load, cfg)
            unit = cfg.calibrate.batch_size / (cfg.traces.problems * cfg.calibrate.exit_samples)
        elif self.set == "pretrain.steps" and cfg.pretrain is not None:
            each = flops.pretrain_flops(cfg, dims, self.prompt_tokens + answer, cfg.pretrain.batch_size)
        else:
            raise ValueError(
                f"isoflop.set={self.set}: expected rl.steps, calibrate.epochs or, with pretrain=true, pretrain.steps"
            )
        if not 0.5 <= self.budget / each < math.inf:
            raise ValueError(f"budget={self.budget:g}: expected {each:.3g} FLOPs, one step of {self.set}, or more")
        count = max(1, round(self.budget / each))
        return float(f"{count * unit:.9g}") if unit != 1.0 else count


@dataclass
class Grid:
    """A grid of settings. `fixed` settings are every point's. An axis is a list of entries, each a setting or several
    that change together (zip); a point takes one entry of each axis, the last axis running fastest."""

    fixed: dict[str, Value] = field(default_factory=dict)
    axes: list[list[dict[str, Value]]] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        return [key for axis in self.axes for key in axis[0]]

    def add(self, text: str) -> None:
        """Add a setting; of two single values of a key the later one counts. Raises ValueError: not a setting, a key
        that can't be an axis, an axis and another setting of the same key."""
        key, values, several = parse(text)
        if key in self.keys or (several and key in self.fixed):
            raise ValueError(f"{key}: given twice; give all its values in one setting, {key}=a,b,c")
        if several and key in FIXED_ONLY:
            raise ValueError(f"{key}: cannot vary within a sweep; its results go to one directory and make one table")
        if several:
            self.axes.append([{key: value} for value in values])
        else:
            self.fixed.pop(key, None)
            self.fixed[key] = values[0]

    def zip(self, keys: Sequence[str]) -> None:
        """Make these axes vary together, in the place of the first. Raises ValueError."""
        alone = {key: axis for axis in self.axes if len(axis[0]) == 1 for key in axis[0]}
        lengths = {key: len(alone.get(key, ())) for key in keys}
        if len(keys) < 2 or len(lengths) < len(keys) or len(set(lengths.values())) > 1 or 0 in lengths.values():
            described = ", ".join(f"{key} has {length or 'no axis of its own'}" for key, length in lengths.items())
            raise ValueError(f"zip {','.join(keys)}: expected two or more axes of equal length; found: {described}")
        merged = [_merged(entries) for entries in zip(*(alone[key] for key in keys), strict=True)]
        others = [axis for axis in self.axes if not axis[0].keys() & {*keys[1:]}]
        self.axes = [merged if keys[0] in axis[0] else axis for axis in others]

    def points(self) -> list[dict[str, Value]]:
        """All points. Raises ValueError for too many, and for `seed` beside the settings that it stands for."""
        given = {*self.fixed, *self.keys}
        if SEED in given and given & {*SEEDS}:
            raise ValueError(f"seed stands for {' and '.join(SEEDS)}; leave these out, or seed")
        size = math.prod(map(len, self.axes))
        if size > MOST_POINTS:
            raise ValueError(f"{size} points: expected at most {MOST_POINTS}; take fewer values of an axis")
        return [_merged(entries) for entries in itertools.product(*self.axes)]

    def overrides(self, point: dict[str, Value]) -> list[str]:
        """A point as settings that `config.load` takes, `seed` spelt out, without those of a budget."""
        settings = {key: value for key, value in (self.fixed | point).items() if not self._of_budget(key)}
        names = {key: SEEDS if key == SEED else (key,) for key in settings}
        return [f"{name}={value.text}" for key, value in settings.items() for name in names[key]]

    def _of_budget(self, key: str) -> bool:
        """Whether a setting belongs to the grid's budget."""
        return key == BUDGET or (key.startswith(ISOFLOP) and BUDGET in (*self.fixed, *self.keys))

    def budget(self, point: dict[str, Value]) -> IsoFlop | None:
        """A point's budget, if it has one. Raises ValueError for a wrong one, and beside a value of `set`."""
        values = self.fixed | point
        if BUDGET not in values:
            return None
        given = {key.removeprefix(ISOFLOP): value.plain for key, value in values.items() if self._of_budget(key)}
        try:
            budget: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(IsoFlop), given))
        except OmegaConfBaseException as error:
            raise ValueError(f"budget, isoflop: {str(error).splitlines()[0]}") from None
        if budget.set in values:
            raise ValueError(f"{budget.set}: follows from budget; leave one of them out")
        return budget


def _merged(entries: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    return {key: value for entry in entries for key, value in entry.items()}


def parse(text: str) -> tuple[str, list[Value], bool]:
    """Parse one setting as (key, values, whether they are several). Raises ValueError."""
    try:
        override = OverridesParser.create().parse_override(text)
        several, key = override.is_sweep_override(), override.key_or_group
        elements = list(itertools.islice(override.sweep_iterator(), MOST_POINTS + 1)) if several else [None]
        if not 0 < len(elements) <= MOST_POINTS:
            raise ValueError(f"{'too many' if elements else 'no'} values; at most {MOST_POINTS}")
        values = [Value(Override._get_value_element_as_str(each), Override._convert_value(each)) for each in elements]
    except (HydraException, ValueError, ArithmeticError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{text}: expected key=value, key=a,b,c or key=range(...) ({said})") from None
    if override.is_delete():
        raise ValueError(f"{text}: settings cannot be deleted; give another value instead")
    # A fixed setting stays in the user's own words.
    return key, values if several else [Value(override.get_value_string(), override.value())], several


def read_grid(settings: Sequence[str], zips: Sequence[str] = ()) -> Grid:
    """Read a grid from a command line's settings, of which `sweep=NAME` stands for a file's grid; `zips`: keys with
    commas between them. Settings replace those of the same key in the file. Raises ValueError, or FileNotFoundError."""
    files = [text for text in settings if text.startswith(f"{GROUP}=")]
    if len(files) > 1:
        raise ValueError(f"{' '.join(files)}: expected one grid file at most")
    own = [text for text in settings if text not in files]
    given = {parse(text)[0] for text in own}
    grid = read_file(_grid_file(files[0].partition("=")[2]), given) if files else Grid()
    for text in own:
        grid.add(text)
    for keys in zips:
        grid.zip([key.strip() for key in keys.split(",")])
    return grid


def _grid_file(name: str) -> Path:
    """configs/sweep/NAME.yaml, or a path that ends in .yaml."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    directory = find_config_dir()
    choices = list_groups(directory).get(GROUP, [])
    if name not in choices:
        raise ValueError(f"{GROUP}={name}: no such grid; expected one of {', '.join(choices)}, or a .yaml file")
    return directory / GROUP / f"{name}.yaml"


@dataclass
class _Table:
    keys: list[str]
    rows: list[list[Any]]


@dataclass
class _Sections:
    settings: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    zip: list[_Table] = field(default_factory=list)
    isoflop: dict[str, Any] = field(default_factory=dict)


def read_file(path: Path, given: Collection[str] = ()) -> Grid:
    """Read a grid from YAML, without the keys in `given`. Raises FileNotFoundError, or ValueError naming the part."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such grid file; name a .yaml file or a grid of configs/{GROUP}")
    grid = Grid()
    try:
        sections: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_Sections), read_yaml(path)))
        fixed = sections.settings | {f"{ISOFLOP}{key}": value for key, value in sections.isoflop.items()}
        texts = {key: f"{key}={_text(key, value)}" for key, value in fixed.items()}
        for key, text in [*texts.items(), *((key, _axis(key, values)) for key, values in sections.axes.items())]:
            if key not in given:
                grid.add(text)
        for table in sections.zip:
            if wrong := [row for row in table.rows if len(row) != len(table.keys)]:
                raise ValueError(f"zip: expected {len(table.keys)} values in every row, found {wrong[0]}")
            if both := [key for key in table.keys if key in given]:
                raise ValueError(f"{both[0]}: zipped in this file ({', '.join(table.keys)}); change it here")
            for index, key in enumerate(table.keys):
                grid.add(_axis(key, [row[index] for row in table.rows]))
            grid.zip(table.keys)
    except (ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return grid


def _axis(key: str, values: Any) -> str:
    """An axis as a setting; `values`: a list, or text as on the command line. Raises ValueError."""
    if isinstance(values, str):
        return f"{key}={values}"
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key}: expected a list of values or text such as range(0,4), found {values!r}")
    return f"{key}=choice({','.join(_text(key, value) for value in values)})"


def _text(key: str, value: Any) -> str:
    """A value from YAML as a setting's text: a string is taken as typed after `key=`."""
    if isinstance(value, dict):
        raise ValueError(f"{key}: holds a section; write keys with dots, e.g. {key}.field: value")
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
