"""A study's finished evaluations as records: one for each run that measured its model's choice of style."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.identity import identity, stage_dir, stage_order
from ..config.load import read_saved
from ..config.schema import RunConfig
from ..observe.rundir import DONE
from ..sweeps.sweep import read_spent
from .choice import REINFORCED, START, TEACHER, FamilyChoice, Model, read_models
from .shape import Shape, shape_of

NO_EXITS, CAP, FREE, LENGTH = "no exits", "cap", "lambda 0", "length"
# What a study varies, and what the runs are known by, as in their identity; in all else they should be alike.
FACTORS = frozenset(
    {
        "rl.seed", "pretrain.seed", "calibrate.seed", "evaluate.style_choice.models", "task.tokens_per_step",
        "rl.families",
        "rl.fixed_depth", "rl.depth_penalty.cost",
        "rl.depth_penalty.weight", "rl.depth_penalty.length_weight", "pretrain.layers", "pretrain.width",
    }
)  # fmt: skip
OF_SHAPE = frozenset({"model.path", "exits.depths"})
"""What may differ between models of several shapes without a word."""


@dataclass(frozen=True)
class Condition:
    """What RL was done under. kind: no exits, cap (number: depth), lambda 0, a cost of depth or length (number:
    lambda). `also`: what was priced beside that; such a run stands for itself."""

    kind: str
    number: float = 0.0
    also: str = ""

    @property
    def label(self) -> str:
        number = "" if self.kind in (NO_EXITS, FREE) else f" {self.number:g}"
        return f"{self.kind}{number}" + (f" and {self.also}" if self.also else "")

    @property
    def priced(self) -> bool:
        """Whether it is a place on the line of a cost of depth."""
        return self.kind not in (NO_EXITS, CAP, FREE, LENGTH) and not self.also


@dataclass(frozen=True)
class Objective:
    """The settings of `rl` that say what a style is worth."""

    beta: float
    depth_cost: str = "mean"
    lambda_exit: float = 0.0
    cost_length: int = 1
    lambda_length: float = 0.0
    fixed_depth: int = 0
    first_exits: bool = True
    """An answer's first token may leave early like any other."""

    def condition(self, num_layers: int) -> Condition:
        length = f"length {self.lambda_length:g}" if self.lambda_length else ""
        if self.fixed_depth:
            # With all tokens at one depth every answer costs the same, but for its total.
            alike = self.depth_cost == "max" or (self.depth_cost != "total" and self.first_exits)
            depth = "" if alike or not self.lambda_exit else f"{self.depth_cost} {self.lambda_exit:g}"
            also = " and ".join(part for part in (depth, length) if part)
            full = self.fixed_depth == num_layers
            return Condition(NO_EXITS, also=also) if full else Condition(CAP, self.fixed_depth, also)
        if self.lambda_exit:
            return Condition(self.depth_cost, self.lambda_exit, length)
        return Condition(LENGTH, self.lambda_length) if length else Condition(FREE)


@dataclass(frozen=True)
class Record:
    """One run. `families`: those that RL drew problems of; `origin`: the same for runs that RL began alike in but for
    its seed; `differs`: how its objective is not the one that the closed form solves; `seconds`: RL's, if known."""

    path: str
    base: int
    seed: int
    tau: int
    families: tuple[str, ...]
    objective: Objective
    shape: Shape
    models: Mapping[str, Model]
    weights: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""
    differs: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def num_layers(self) -> int:
        return self.shape.layers

    @cached_property
    def condition(self) -> Condition:
        return self.objective.condition(self.num_layers)

    def found(self, family: str) -> FamilyChoice:
        """What the reinforced model does."""
        return self.models[REINFORCED][family]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.shape, self.tau, self.families, self.condition.label, self.base, self.seed


@dataclass(frozen=True)
class Study:
    """Records in order. `remarks`: what was left out or isn't alike; `device_seconds`: of all stages whose time is on
    record, `timed` of `stages`. Whatever is averaged over bases is so within one shape: ask `of_shape`."""

    records: Sequence[Record]
    remarks: Sequence[str] = ()
    device_seconds: float = 0.0
    timed: int = 0
    stages: int = 0

    @cached_property
    def shapes(self) -> list[Shape]:
        """Of the runs' models, the fewest layers first."""
        return sorted({r.shape for r in self.records})

    def of_shape(self, shape: Shape) -> Study:
        """Its runs alone."""
        return Study([r for r in self.records if r.shape == shape])

    @cached_property
    def taus(self) -> list[int]:
        return sorted({r.tau for r in self.records})

    @cached_property
    def hops(self) -> dict[str, int]:
        """The families that RL trained on, by their hops."""
        found = {family: r.found(family).hops for r in self.records for family in r.families}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def families(self, tau: int) -> list[str]:
        """Those that RL trained on at so many tokens a step, by their hops."""
        return [f for f in self.hops if any(r.tau == tau and f in r.families for r in self.records)]

    def bases(self, tau: int) -> list[int]:
        return sorted({r.base for r in self.records if r.tau == tau})

    def runs(self, tau: int, family: str, condition: Condition | None = None) -> list[Record]:
        """Runs that trained on the family: on it alone where the study has such, since with others it is another
        experiment."""
        having = [r for r in self.records if r.tau == tau and family in r.families]
        alone = [r for r in having if len(r.families) == 1]
        return [r for r in alone or having if condition in (None, r.condition)]

    def start(self, record: Record, family: str) -> FamilyChoice | None:
        """What the policy that RL began with does under its own gates; None if no run measured it."""
        return self._of_origin(START, record.origin, family, True)

    def start_anywhere(self, record: Record, family: str) -> FamilyChoice | None:
        """The same, measured in any run, for figures that don't depend on its gates: fixed depths, full depth."""
        return self.start(record, family) or self._of_origin(START, record.origin, family, False)

    def teacher(self, record: Record, family: str) -> FamilyChoice | None:
        return self._of_origin(TEACHER, record.origin, family, False)

    def _of_origin(self, model: str, origin: str, family: str, gates: bool) -> FamilyChoice | None:
        found = self._before.get((model, origin, family), [])
        return next((choice for choice, held in found if not (gates and held)), None)

    @cached_property
    def _before(self) -> dict[tuple[str, str, str], list[tuple[FamilyChoice, bool]]]:
        """Model, origin, family -> what was measured of it, and whether at a fixed depth."""
        found: dict[tuple[str, str, str], list[tuple[FamilyChoice, bool]]] = {}
        for r in self.records:
            for model in (TEACHER, START):
                for family, choice in r.models.get(model, {}).items():
                    found.setdefault((model, r.origin, family), []).append((choice, bool(r.objective.fixed_depth)))
        return found


def counted(number: int, thing: str) -> str:
    """ "1 hop", "3 hops"."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def read_study(directory: Path) -> Study:
    """Every finished evaluation below `directory` with a choice of style in it.

    Raises FileNotFoundError or ValueError if there is none, if a file is damaged, or if two runs that differ in more
    than a study varies would count as one.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; name one that holds a study's runs, e.g. runs")
    finished = [path.parent for path in sorted(directory.rglob(f"evaluate-*/{DONE}"))]
    if not finished:
        raise ValueError(f"{directory}: no finished evaluation in it (<run>/evaluate-*/{DONE}); run `evaluate` first")
    parts = {path: part for path in finished if (part := _choice_of(path))}
    if not parts:
        raise ValueError(
            f"{directory}: {len(finished)} finished evaluations, none of which measured the choice of style; "
            "evaluate with evaluate.style_choice.models=reinforced or all"
        )
    configs = {path: read_saved(path / "config.yaml") for path in parts}
    records = [_record(directory, path, configs[path], part) for path, part in parts.items()]
    kept, remarks = _once_each(records, {_name(directory, path): cfg for path, cfg in configs.items()})
    if len(finished) > len(parts):
        unmeasured = f"{len(finished) - len(parts)} of {len(finished)} finished evaluations"
        remarks.append(f"{unmeasured} measured no choice of style: left out")
    remarks += _unlike([(r.shape, cfg) for r, cfg in zip(records, configs.values(), strict=True)]) + _differs(kept)
    stages = {d for path, cfg in configs.items() for d in _stages(path, cfg)}
    times = [spent["device_seconds"] for stage in sorted(stages) if (spent := read_spent(stage))]
    return Study(kept, remarks, sum(times), len(times), len(stages))


def _choice_of(stage: Path) -> Mapping[str, Any] | None:
    """The part, None where it is missing or has no reinforced model."""
    path = stage / "results.json"
    try:
        part = json.loads(path.read_text(encoding="utf-8")).get("choice")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the results of an evaluation ({error}); evaluate the run again") from None
    return part if part and REINFORCED in part.get("models", {}) else None


def _name(directory: Path, path: Path) -> str:
    return str(path.relative_to(directory))


def _record(directory: Path, path: Path, cfg: RunConfig, part: Mapping[str, Any]) -> Record:
    rl = cfg.rl
    try:
        models = read_models(part)
        weights = dict(zip(part["styles"], part["weights"], strict=True))
        num_layers = int(part["num_layers"])
        # Results from before it was written there are of hops.
        tau = int(part.get("tokens_per_step", cfg.task.tokens_per_step))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'results.json'}: {error}") from None
    families = tuple(name.rsplit(".", 1)[-1] for name in rl.families) or tuple(models[REINFORCED])
    if missing := [family for family in families if family not in models[REINFORCED]]:
        raise ValueError(
            f"{path / 'results.json'}: RL drew problems of {', '.join(missing)}, whose choice was not measured; "
            "evaluate the run with them among task.families"
        )
    return Record(
        path=_name(directory, path),
        base=cfg.pretrain.seed if cfg.pretrain else 0,
        seed=rl.seed,
        tau=tau,
        families=families,
        objective=Objective(
            beta=rl.kl_penalty.weight,
            depth_cost=rl.depth_penalty.cost,
            lambda_exit=rl.depth_penalty.weight,
            cost_length=rl.depth_penalty.cost_tokens,
            lambda_length=rl.depth_penalty.length_weight,
            fixed_depth=rl.fixed_depth,
            first_exits=cfg.exits.first_token,
        ),
        shape=shape_of(cfg, num_layers),
        models=models,
        weights=weights,
        origin=f"{stage_dir(cfg, 'calibrate').name} {cfg.init_policy} {rl.gate_centre} {rl.gate_sharpness} "
        f"{rl.temperature}",
        differs=_not_as_assumed(cfg),
        seconds=read_spent(path.parent / stage_dir(cfg, "rl").name).get("seconds"),
    )


def _not_as_assumed(cfg: RunConfig) -> tuple[str, ...]:
    """Where the objective is another one than right - lambda cost - beta sum log(pi/reference)."""
    rl = cfg.rl
    found = {
        "rl.kl_penalty.sum=false": rl.kl_penalty.kind == "reward" and not rl.kl_penalty.sum,
        f"rl.depth_penalty.penalize={rl.depth_penalty.penalize}": rl.depth_penalty.penalize != "all"
        and bool(rl.depth_penalty.weight or rl.depth_penalty.length_weight),
        f"rl.credit={rl.credit}": rl.credit != "answer" and bool(rl.depth_penalty.weight),
        "rl.depth_penalty.target": rl.depth_penalty.target is not None,
    }
    return tuple(name for name, so in found.items() if so)


def _once_each(records: Sequence[Record], configs: Mapping[str, RunConfig]) -> tuple[list[Record], list[str]]:
    """Of several evaluations of a run the one with most models; in order, with what was left out."""
    kept: dict[tuple[Any, ...], Record] = {}
    again = 0
    for record in records:
        other = kept.setdefault(record.key, record)
        if other is record:
            continue
        if identity(configs[other.path], "rl") != identity(configs[record.path], "rl"):
            raise ValueError(
                f"{other.path} and {record.path}: both are base {record.base}, seed {record.seed}, "
                f"{record.condition.label}, {', '.join(record.families)}, but other settings differ; "
                "name a directory that holds runs of one recipe"
            )
        again += 1
        if len(record.models) > len(other.models):
            kept[record.key] = record
    remarks = [f"{again} further evaluations of the same runs: left out"] if again else []
    return [kept[key] for key in sorted(kept)], remarks


def _unlike(runs: Sequence[tuple[Shape, RunConfig]]) -> list[str]:
    """Settings in which the runs differ though the study doesn't vary them. Longer steps may ask for others; so may
    other shapes, but what is compared between shapes is then compared between recipes too."""
    flat = [(shape, cfg.task.tokens_per_step, dict(_flat(identity(cfg, "evaluate")))) for shape, cfg in runs]
    within: dict[str, set[str]] = {}
    across: dict[str, set[str]] = {}
    for key in dict.fromkeys(key for *_, run in flat for key in run if key not in FACTORS):
        values: dict[int, dict[Shape, set[str]]] = {}
        for shape, tau, run in flat:
            values.setdefault(tau, {}).setdefault(shape, set()).add(run.get(key, "default"))
        for by_shape in values.values():
            for seen in by_shape.values():
                if len(seen) > 1:
                    within.setdefault(key, set()).update(seen)
            seen = set().union(*by_shape.values())
            if len(seen) > 1 and key not in OF_SHAPE:
                across.setdefault(key, set()).update(seen)
    remarks = [f"the runs also differ in {key}: {', '.join(sorted(seen))}" for key, seen in within.items()]
    return remarks + [
        f"models of different shapes also differ in {key}: {', '.join(sorted(seen))}"
        for key, seen in across.items()
        if key not in within
    ]


def _flat(sections: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for section, entries in sections.items():
        for name, value in entries.items() if isinstance(entries, Mapping) else [("", entries)]:
            yield f"{section}.{name}".rstrip("."), str(value)


def _differs(records: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(name for r in records for name in r.differs)
    return [
        f"{sum(name in r.differs for r in records)} of {len(records)} runs have {name}, "
        "which is not the objective that the closed form solves"
        for name in names
    ]


def _stages(path: Path, cfg: RunConfig) -> list[Path]:
    """The run's directories, in the one where its evaluation lies: it may have been moved since."""
    before = [path.parent / stage_dir(cfg, stage).name for stage in stage_order(cfg) if stage != "evaluate"]
    return [*(stage for stage in before if stage.is_dir()), path]
