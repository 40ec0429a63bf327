"""Resolves a path to a model: a run, a stage of one, a policy, a model with gates or without, a Megatron checkpoint."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checkpoint.policy_files import check_base, policy_beside
from ..checkpoint.sources import HFSource, gates_of, is_megatron
from ..config import hub
from ..config.identity import stage_dir
from ..config.load import read_saved
from ..config.schema import RunConfig
from ..exit_rules import ExitRule, Off, Threshold, read_rule
from ..families.hf_directory import HFDirectory
from ..observe.rundir import latest_checkpoint
from ..policy import POLICY_JSON, PolicySpec, load_policy
from ..tensors import ModelSource
from ..training import stages

NAMES = {"rl": "reinforced", "calibrate": "calibrated"}
"""Stages that make a policy, the furthest first, and what their policy is called."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model to load: a name for it, its directory (with the tokenizer), adapters and gates on it.

    - checkpoint: the policy's directory; None for a plain model and for gates that the model brings along
    - spec, tensors: the policy, as `load_policy` gives it; None for a model as it is
    - settings: those of the run that trained it, if it is one's
    """

    name: str
    source: HFDirectory | ModelSource
    checkpoint: Path | None = None
    spec: PolicySpec | None = None
    tensors: dict[str, Tensor] | None = None
    settings: RunConfig | None = None

    @property
    def path(self) -> Path:
        """The directory of the model's config.json and tokenizer."""
        return Path(self.source.path)

    @property
    def default_exits(self) -> ExitRule:
        """Exit rule if none is requested: the export's own, else `chosen_exits`; without gates full depth."""
        if self.tensors is None:
            return Off()
        if self.checkpoint is not None:
            return chosen_exits(self.checkpoint)
        said = self.source.config.get("exit_policy")
        return Threshold(0.5) if said is None else read_rule(said)


def resolve(path: str | Path, policy: str | Path | None = None, base_unchecked: bool = False) -> ResolvedModel:
    """Resolve `path` to a model; with `policy`, a policy checkpoint or stage directory, the model at `path` under that
    policy instead of its own gates. docs/api.md lists what a path may be.

    Raises FileNotFoundError or ValueError, one line: nothing there, damaged, or not fitting together, unless
    `base_unchecked` as to whether the policy was made on that model.
    """
    place = stages.model_at("model", path)
    if policy is not None:
        return with_policy("policy", place, stages.policy_at(f"policy {policy}", str(policy)), unchecked=base_unchecked)
    if is_megatron(place) or (place / "config.json").is_file():
        return _model(place, base_unchecked)
    if (place / "adapter_config.json").is_file():
        raise ValueError(f"{path}: a PEFT adapter; name its base model, and as its policy what the adapter was made of")
    stage = stage_of(place)
    if stage is None:
        raise ValueError(f"{path}: a policy without its base model; name the base, and this as its policy")
    return _of_stage(stage, place if (place / POLICY_JSON).is_file() else None, base_unchecked)


def stage_of(place: Path) -> Path | None:
    """The stage that a directory names: a stage itself, the one that a policy checkpoint lies in, or of a run the
    finished one whose policy has come furthest. None: a policy checkpoint outside of any.

    Raises FileNotFoundError for a directory that is none of these.
    """
    if (place / POLICY_JSON).is_file():
        stage = place.absolute().parents[1]
        return stage if (stage / "config.yaml").is_file() else None
    return place if (place / "config.yaml").is_file() else _furthest_stage(place)


def evaluation_of(checkpoint: Path) -> tuple[Path | None, str]:
    """The newest results.json of a policy checkpoint in its run, and the policy's name there; (None, "") if there is
    none, or another checkpoint of its stage was measured."""
    stage = checkpoint.resolve().parents[1]
    if latest_checkpoint(stage) != checkpoint.resolve():
        return None, ""
    for done in sorted(stage.parent.glob(f"evaluate-*/{stages.DONE}"), key=os.path.getmtime, reverse=True):
        with suppress(ValueError):  # of another version
            cfg = read_saved(done.with_name("config.yaml"))
            for made_by, name in NAMES.items():
                if stage_dir(cfg, made_by).name == stage.name:
                    return done.with_name("results.json"), name
    return None, ""


def chosen_exits(checkpoint: Path) -> Threshold:
    """The threshold that a policy's newest evaluation chose on the validation split; 0.5 if there is none."""
    results, name = evaluation_of(checkpoint)
    meta = json.loads(results.read_text())["meta"] if results else {}
    return Threshold(float(meta.get(f"threshold_{name}", 0.5)))


def resolve_configured(
    cfg: RunConfig, model: str | None = None, policy: str | None = None, base_unchecked: bool = False
) -> ResolvedModel:
    """As `resolve` if a model is named; else the configuration's newest policy, or the one given, on its base.

    Raises as `resolve`.
    """
    if model:
        return resolve(model, policy, base_unchecked)
    name, checkpoint = _newest_policy(cfg)
    if policy:
        name, checkpoint = "policy", stages.policy_at(f"policy {policy}", policy)
    if checkpoint is None:
        return ResolvedModel(name, HFDirectory(stages.source_model(cfg)), settings=cfg)
    return with_policy(name, stages.base_model(cfg), checkpoint, cfg, base_unchecked)


def with_policy(
    name: str, base: Path, checkpoint: Path, settings: RunConfig | None = None, unchecked: bool = False
) -> ResolvedModel:
    """The model at `base`, plain or Megatron, under the policy of a checkpoint; with the settings of its run `name` is
    the whole name. Every policy meets its base here."""
    source = _open(base)
    spec, tensors = load_policy(checkpoint)
    check_base(checkpoint, source, unchecked=unchecked)
    whole = name if settings else f"{_name(base)}-{name}"
    return ResolvedModel(whole, source, checkpoint, spec, tensors, settings)


def _newest_policy(cfg: RunConfig) -> tuple[str, Path | None]:
    """(name, checkpoint) of the furthest stage that has finished; ("base", None) if none has."""
    if stages.is_done(cfg, "rl"):
        return NAMES["rl"], stages.reinforced(cfg)
    if cfg.init_policy or stages.is_done(cfg, "calibrate"):
        return NAMES["calibrate"], stages.calibrated(cfg)
    return "base", None


def _name(path: Path) -> str:
    return hub.repo_of(path) or path.resolve().name


def _open(path: Path) -> HFDirectory | ModelSource:
    if not is_megatron(path):
        return HFDirectory(path)
    # megatron-core takes seconds to import.
    from ..checkpoint.megatron_read import MegatronDirectory

    return MegatronDirectory(path)


def _model(path: Path, unchecked: bool = False) -> ResolvedModel:
    """A model directory with the gates that are in it or beside it."""
    source, name = _open(path), _name(path)
    if isinstance(source, HFDirectory):
        brings = source.config.get("model_type") == "early_exit" or (path / "gates.json").is_file()
        policy = gates_of(HFSource(source)) if brings else None
    else:
        spec, tensors = policy_beside(source, unchecked)
        policy = (spec, dict(tensors)) if spec.exit_depths or tensors else None
    if policy is None:
        return ResolvedModel(f"{name}-base", source)
    return ResolvedModel(f"{name}-gates", source, spec=policy[0], tensors=policy[1])


def _of_stage(stage: Path, checkpoint: Path | None, unchecked: bool) -> ResolvedModel:
    """What a stage of a run has made: a policy on its base, or a model. `checkpoint`: not its newest one."""
    if (stage / "model" / "config.json").is_file():
        return _model(stage / "model")
    settings, base, newest = stages.trained(stage)
    kind = stage.resolve().name.rpartition("-")[0]
    name = f"{stage.resolve().parent.name}-{NAMES.get(kind, 'policy')}"
    return with_policy(name, base, checkpoint or newest, settings, unchecked)


def _furthest_stage(run: Path) -> Path:
    """The finished stage of a run whose policy has come furthest; of several, the one that finished last."""
    for kind in NAMES:
        finished = [path for path in run.glob(f"{kind}-*") if (path / stages.DONE).is_file()]
        if finished:
            return max(finished, key=lambda path: (path / stages.DONE).stat().st_mtime)
    raise FileNotFoundError(
        f"{run}: no model, checkpoint or finished calibrate or rl stage there; expected a run (runs/NAME), a Hugging "
        "Face directory or a Megatron checkpoint"
    )
