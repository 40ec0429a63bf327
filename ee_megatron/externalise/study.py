"""A study's finished evaluations as one data frame, with a row per run and family of problems.

Columns; NaN where a figure was not measured:

    path, models                         the evaluation's directory, and which models it measured
    task                                 name of the task
    shape, layers, width, parameters     of the model; `shape` is a short name of it and of a variant of the task
    base, seed, tau                      seeds of pretraining (of calibration in a study of one model) and of RL;
                                         tokens that a written step takes
    family, hops, trained_on             of the problems; the families that RL drew problems of
    trained, compared                    RL drew problems of this family; and of it alone, where the study has such runs
    condition, kind, number, priced      what RL was charged for (`condition`)
    beta, depth_cost, lambda_exit, cost_length, lambda_length, fixed_depth   settings of RL
    corpus.STYLE                         shares of the styles in the worked answers
    MODEL.free.FIGURE, .free.share.STYLE free answers; MODEL: teacher, start (what RL began with) or reinforced
    MODEL.EXITS.STYLE.FIGURE             the style given; EXITS: forced (own gates), forced_full or fixed.DEPTH
    MODEL.corrupted.correct, .followed   the first step replaced by a wrong one

Depths are shares of the L layers. Figures of the teacher and the start stand in every row of runs that began alike,
whichever of these runs measured them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.derive import read_dims
from ..config.identity import identity, stage_dir
from ..config.load import read_saved
from ..config.schema import RLConfig, RunConfig
from ..families.hf_directory import read_json
from ..objectives.optimum import Shares
from ..observe.rundir import DONE
from ..report.tables import or_nan
from ..statistics import least_squares_line

PADDED, OTHER = "padded", "other"
TERSE, STEPS = "terse", "steps"
"""Styles of tasks/chains.py: all hops inside one token; a token, or a few, for each."""
SKILLED = 0.8
"""Least share of right terse answers for the family's depth to count as that of its hops: a model that can't follow a
chain in its layers runs all of them, however long the chain is, and the line would be flat."""
STYLES = (TERSE, STEPS, PADDED)
TEACHER, START, REINFORCED = MODELS = ("teacher", "start", "reinforced")
FIGURES = ("correct", "mean_depth", "total_depth", "max_depth", "length")  # depths over an answer's tokens
NO_EXITS, CAP, FREE, LENGTH = "no exits", "cap", "lambda 0", "length"
COSTS = ("mean", "total", "max")
SHAPE = ["layers", "width", "parameters", "shape"]
RUN = [*SHAPE, "tau", "trained_on", "condition", "base", "seed"]
"""Columns that tell one run from another, in the order in which runs are listed."""
# What a study varies, by the names in a run's identity; in all other settings its runs should be alike.
FACTORS = [
    "rl.seed", "pretrain.seed", "teacher.seed", "traces.seed", "calibrate.seed", "evaluate.seed", "evaluate.choice",
    "task.name", "task.seed", "exits.first_token",
    "task.tokens_per_step", "rl.families", "rl.fixed_depth", "rl.depth_cost", "rl.lambda_exit", "rl.lambda_length",
    "pretrain.layers", "pretrain.width",
]  # fmt: skip
OF_SHAPE = ["model.path", "exits.depths"]  # may also differ between shapes


def condition(rl: RLConfig, first_exits: bool, num_layers: int) -> dict[str, Any]:
    """Label the penalty of an RL run: `condition` (a label), `kind` and `number` (its first part), `priced` (whether it
    is a penalty on depth alone). first_exits: an answer's first token may exit. A run under two penalties has a label
    of its own, so it is compared with its like only."""
    depth = [(rl.depth_penalty.cost, rl.depth_penalty.weight)] if rl.depth_penalty.weight else []
    length = [(LENGTH, rl.depth_penalty.length_weight)] if rl.depth_penalty.length_weight else []
    if rl.fixed_depth:
        # With every token at one depth all answers cost the same, except in total and where the first can't exit.
        counts = depth and rl.depth_penalty.cost != "max" and (rl.depth_penalty.cost == "total" or not first_exits)
        held = (NO_EXITS, 0.0) if rl.fixed_depth == num_layers else (CAP, rl.fixed_depth)
        depth = [held, *(depth if counts else [])]
    parts = [*depth, *length] or [(FREE, 0.0)]
    label = " and ".join(kind if kind in (NO_EXITS, FREE) else f"{kind} {number:g}" for kind, number in parts)
    priced = len(parts) == 1 and parts[0][0] in COSTS
    return {"condition": label, "kind": parts[0][0], "number": float(parts[0][1]), "priced": priced}


def shape_of(cfg: RunConfig, layers: int) -> dict[str, Any]:
    """`layers` (as measured), `width`, `parameters` (without the embedding; None: not known) and `shape`. Where the
    config.json that the run was made from is gone, the model's path distinguishes shapes."""
    try:
        dims = read_dims(cfg)
    except (FileNotFoundError, ValueError):
        dims = None
    width, parameters, path = (cfg.pretrain and cfg.pretrain.width) or None, None, cfg.model.path
    # What stands there now may be another model.
    if dims is not None and dims.num_layers == layers:
        tensors = dims.tensor_shapes().items()
        parameters = sum(math.prod(size) for name, size in tensors if not re.search("embed_tokens|lm_head", name))
        width, path = dims.hidden, ""
    task = "" if cfg.task.name in ("hops", "sums") else cfg.task.name
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{task}-{layers}x{width or 0}-{parameters or 0}-{path}").strip("-")
    return {"layers": layers, "width": width, "parameters": parameters, "shape": name}


def read_study(directory: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read every finished evaluation below `directory` that measured the choice of style: the data frame described
    above, and remarks on omitted runs and on settings in which the runs differ.

    Raises FileNotFoundError if there is none, ValueError if a file is damaged or if two runs that differ in more than a
    study varies would count as one.
    """
    finished = [path.parent for path in sorted(directory.rglob(f"evaluate-*/{DONE}"))]
    parts = {stage: part for stage in finished if (part := choice_of(stage)) and REINFORCED in part["models"]}
    if not parts:
        raise FileNotFoundError(
            f"{directory}: {len(finished)} finished evaluations (<run>/evaluate-*/{DONE}), none of which measured the "
            "choice of style; name a directory of runs evaluated with evaluate.style_choice.models=reinforced or all"
        )
    configs = [read_saved(stage / "config.yaml") for stage in parts]
    measured = [_measured(stage, cfg, part) for (stage, part), cfg in zip(parts.items(), configs, strict=True)]
    runs = pd.DataFrame([run for run, _ in measured]).astype({"width": "Int64", "parameters": "Int64"})
    runs["path"] = [str(stage.relative_to(directory)) for stage in parts]
    if len({cfg.task.seed for cfg in configs}) > 1:
        # A model trained on other permutations is another base.
        runs["base"] = [f"{cfg.task.seed}/{base}" for cfg, base in zip(configs, runs["base"], strict=True)]
    elif runs["base"].nunique() == 1 and len({cfg.calibrate.seed for cfg in configs}) > 1:
        # Of one model, calibrated several times, calibrations are what there is to average over.
        runs["base"] = [cfg.calibrate.seed for cfg in configs]
    once = _once_each(runs, [json.dumps(identity(cfg, "rl"), sort_keys=True) for cfg in configs])
    left_out = {"measured no choice of style": len(finished) - len(runs), "are of the same runs": len(runs) - len(once)}
    remarks = [f"{n} of {len(finished)} evaluations {why}: left out" for why, n in left_out.items() if n]
    remarks += _unlike(runs, configs)
    for name, count in once.pop("differs").explode().value_counts().items():
        remarks.append(f"{count} of {len(once)} runs have {name}, which is not the objective of the closed form")
    families = pd.concat([measured[i][1].assign(run=i) for i in once.index])
    return _with_start(once.join(families.set_index("run")).reset_index(drop=True)), remarks


def choice_of(stage: Path) -> Mapping[str, Any] | None:
    """Part "choice" of an evaluation's results.json; None if there is none. Raises ValueError if it is damaged."""
    path = stage / "results.json"
    try:
        part = read_json(path).get("choice") if path.exists() else None
        return part if part and part.get("models", {}).keys() else None
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{path}: not the results of an evaluation ({error}); evaluate the run again") from None


def _measured(stage: Path, cfg: RunConfig, part: Mapping[str, Any]) -> tuple[dict[str, Any], pd.DataFrame]:
    """The run's columns, and those of each family that any of its models was measured on."""
    rl, penalty, path = cfg.rl, cfg.rl.depth_penalty, stage / "results.json"
    try:
        models = {name: model["families"] for name, model in part["models"].items()}
        families = list(dict.fromkeys(family for entries in models.values() for family in entries))
        rows = [{name: entries[family] for name, entries in models.items() if family in entries} for family in families]
        figures = pd.json_normalize(rows).astype(float)
        for entries in models[REINFORCED].values():
            _ = entries["forced"], [entries["free"]["share"][style] for style in STYLES], entries["free"]["n"]
        hops = [int(next(iter(row.values()))["hops"]) for row in rows]
        corpus = {f"corpus.{style}": float(w) for style, w in zip(part["styles"], part["weights"], strict=True)}
        num_layers = int(part["num_layers"])
        if not 0 < num_layers <= 10_000:
            raise ValueError(f"num_layers={num_layers}")
        # Early results lack it.
        tau = int(part.get("tokens_per_step", cfg.task.tokens_per_step))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        damage = f"part choice is damaged ({type(error).__name__}: {error}); evaluate the run again"
        raise ValueError(f"{path}: {damage}") from None
    trained = [name.rsplit(".", 1)[-1] for name in rl.families] or list(models[REINFORCED])
    if missing := [family for family in trained if family not in models[REINFORCED]]:
        raise ValueError(
            f"{path}: RL drew problems of {', '.join(missing)}, whose choice was not measured; evaluate the run with "
            "them among task.families"
        )
    # Not right - lambda cost - beta sum log(pi / reference).
    differs = {
        "rl.kl_penalty.kind=reward": rl.kl_penalty.kind == "reward",
        f"rl.depth_penalty.penalize={penalty.penalize}": penalty.penalize != "all"
        and bool(penalty.weight or penalty.length_weight),
        f"rl.credit={rl.credit}": rl.credit != "answer" and bool(penalty.weight),
        "rl.depth_penalty.target": penalty.target is not None,
    }
    run = {
        "task": cfg.task.name, **shape_of(cfg, num_layers),
        "base": cfg.pretrain.seed if cfg.pretrain else 0, "seed": rl.seed, "tau": tau,
        "trained_on": " ".join(trained), "models": " ".join(models), **condition(rl, cfg.exits.first_token, num_layers),
        "beta": rl.kl_penalty.weight, "depth_cost": penalty.cost, "lambda_exit": penalty.weight,
        "cost_length": penalty.cost_tokens, "lambda_length": penalty.length_weight, "fixed_depth": rl.fixed_depth,
        **corpus,
        "differs": [name for name in differs if differs[name]],
        # Equal for runs that began RL with the same policy under the same gates.
        "origin": str((
            stage_dir(cfg, "calibrate").name, cfg.init_policy, rl.gate_centre, rl.gate_sharpness, rl.temperature,
        )),
    }  # fmt: skip
    return run, figures.assign(family=families, hops=hops, trained=[family in trained for family in families])


def _with_start(frame: pd.DataFrame) -> pd.DataFrame:
    """Every column that a table may need; what any run of an origin measured before RL in all of them; `compared`."""
    exits = ("forced", "forced_full", *(f"fixed.{depth}" for depth in range(1, int(frame["layers"].max()) + 1)))
    figures = [
        *(f"free.{name}" for name in ("n", *FIGURES, *(f"share.{style}" for style in (*STYLES, OTHER)))),
        *(f"{e}.{style}.{figure}" for e in exits for style in STYLES for figure in FIGURES),
        "corrupted.correct", "corrupted.followed",
    ]  # fmt: skip
    wanted = [f"{model}.{figure}" for model in MODELS for figure in figures]
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *wanted])))
    before = [column for column in frame if column.startswith((f"{TEACHER}.", f"{START}."))]
    # A run held to one depth measures the start there, not under the start's own gates.
    own = [column for column in before if re.match(rf"{START}\.(free|forced|corrupted)\.", column)]
    frame.loc[frame["fixed_depth"] > 0, own] = math.nan
    known = frame.groupby(["origin", "family"])[before].transform("first")
    frame = pd.concat([frame.drop(columns=before), known], axis=1)
    place = [frame["shape"], frame["tau"], frame["family"]]
    # Runs that also trained on other families are another experiment; they count where there is nothing else.
    alone = frame["trained"] & (frame["trained_on"] == frame["family"])
    compared = frame["trained"] & (alone | ~alone.groupby(place).transform("any"))
    frame = pd.concat([frame, compared.rename("compared")], axis=1)
    return frame[frame["trained"].groupby(place).transform("any")].reset_index(drop=True).copy()


def _once_each(runs: pd.DataFrame, recipes: Sequence[str]) -> pd.DataFrame:
    """Of several evaluations of a run the one with most models, in order. ValueError if their recipes differ."""
    for _, same in runs.assign(recipe=recipes).groupby(RUN, sort=False, dropna=False):
        if same["recipe"].nunique() > 1:
            one, other = same.drop_duplicates("recipe").head(2).to_dict("records")
            raise ValueError(
                f"{one['path']} and {other['path']}: both are base {one['base']}, seed {one['seed']}, "
                f"{one['condition']}, {one['trained_on']}, but other settings differ; "
                "name a directory that holds runs of one recipe"
            )
    fullest = runs.assign(fewer=-runs["models"].str.count(" ")).sort_values("fewer", kind="stable")
    return fullest.drop(columns="fewer").drop_duplicates(RUN).sort_values(RUN)


def _unlike(runs: pd.DataFrame, configs: Sequence[RunConfig]) -> list[str]:
    """Settings that differ though the study doesn't vary them. Longer steps may need others (a longer answer, say)."""
    flat = pd.json_normalize([identity(cfg, "evaluate") for cfg in configs], max_level=1).fillna("default").map(str)
    flat = flat.drop(columns=FACTORS, errors="ignore")
    within = flat.groupby([runs["shape"], runs["tau"]]).nunique().gt(1).any()
    across = flat.groupby(runs["tau"]).nunique().gt(1).any() & ~flat.columns.isin(OF_SHAPE)
    return [
        f"the runs also differ in {key}: {', '.join(sorted(set(flat[key])))}" for key in flat.columns[within | across]
    ]


def depth_of_hops(terse: Iterable[tuple[int, float, float]]) -> tuple[float, float]:
    """Layers per hop, and those that an answer of none would take: the least-squares line through (hops, share of right
    answers, layers of the deepest token) of terse answers, those that pass SKILLED. NaN where they are fewer than
    two."""
    skilled = [(hops, layers) for hops, right, layers in terse if right >= SKILLED]
    return least_squares_line([hops for hops, _ in skilled], [layers for _, layers in skilled])


def shares_of(written: Shares, styles: Iterable[str]) -> dict[str, float]:
    """The styles' shares among answers in any style; NaN without such answers."""
    shares = {style: or_nan(written.get(style)) for style in styles}
    total = sum(shares.values())
    return {style: share / total if total else math.nan for style, share in shares.items()}
