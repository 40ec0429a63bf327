"""Inputs and outputs of each stage, and whether they exist. No torch, so that the command line can check quickly."""

from __future__ import annotations

from pathlib import Path

from ..config import hub
from ..config.cluster import LEARNS as LEARNS
from ..config.derive import draws_weights, model_dir
from ..config.identity import stage_dir, stage_order
from ..config.load import read_saved
from ..config.schema import RunConfig
from ..families.hf_directory import HFDirectory, check_tokenizer
from ..observe.rundir import DONE as DONE
from ..observe.rundir import latest_checkpoint

# As policy.py has it, which imports torch.
POLICY = "policy.json"
FIRST = ("import-checkpoint", "pretrain")
"""Stages that make the model which the others start from; they read no other stage's output."""


def is_done(cfg: RunConfig, stage: str) -> bool:
    return (stage_dir(cfg, stage) / DONE).is_file()


def source_model(cfg: RunConfig) -> Path:
    """The model that the teacher is trained from: model.path, or the imported or pretrained one. Raises
    FileNotFoundError if it is missing."""
    for stage in FIRST:
        if stage in stage_order(cfg):
            return _finished(cfg, stage) / "model"
    return model_dir(cfg)


def base_model(cfg: RunConfig) -> Path:
    """The model that traces, calibration and RL build on. Raises FileNotFoundError if it does not exist yet."""
    return _finished(cfg, "teacher") / "model" if cfg.teacher else source_model(cfg)


def traces(cfg: RunConfig) -> Path:
    return _finished(cfg, "traces") / "dataset"


def calibrated(cfg: RunConfig) -> Path:
    """Policy checkpoint that RL starts from: `init_policy`, or this configuration's own calibration."""
    return (
        policy_at(f"init_policy={cfg.init_policy}", cfg.init_policy) if cfg.init_policy else _trained(cfg, "calibrate")
    )


def control_policy(cfg: RunConfig) -> Path | None:
    """Checkpoint that `evaluate.controls.policy` names. Raises FileNotFoundError if there is none."""
    given = cfg.evaluate.controls.policy if cfg.evaluate.controls else ""
    return policy_at(f"evaluate.controls.policy={given}", given) if given else None


def trained_as(checkpoint: Path) -> str:
    """Label of `checkpoint`'s rl stage for a table: its fixed depth, or its depth penalty."""
    stage = checkpoint.absolute().parents[1]
    try:
        rl = read_saved(stage / "config.yaml").rl if stage.name.startswith("rl-") else None
    except ValueError:  # of another version, or without its stage: its gates can be measured all the same
        rl = None
    if rl is None:
        return "another policy"
    if rl.fixed_depth:
        return f"trained at {rl.fixed_depth} layers"
    return f"lambda = {rl.depth_penalty.weight:g}" + (" at first" if rl.depth_penalty.target else "")


def trained(stage: Path) -> tuple[RunConfig, Path, Path]:
    """The settings, the base model and the newest checkpoint of a calibrate or rl stage, by its directory alone,
    wherever that and this process are now. Raises FileNotFoundError or ValueError for any other directory."""
    cfg = read_saved(stage / "config.yaml")
    checkpoint = latest_checkpoint(stage)
    if checkpoint is None:
        raise FileNotFoundError(f"{stage}: no checkpoint there; give the directory of a calibrate or rl stage")
    run, recorded = stage.resolve().parent, Path(cfg.runs)
    if not (recorded / cfg.name).exists():
        cfg.runs, cfg.name = str(run.parent), run.name
    base = base_model(cfg)
    if not base.exists() and not base.is_absolute() and not recorded.is_absolute():
        # Relative to where the run was started, whence it wrote to `recorded`.
        base = run.parents[len(recorded.parts)] / base
    if not base.exists():
        hub.pin("model.path", cfg.model.path)
    return cfg, base, checkpoint


def model_at(option: str, path: str | Path) -> Path:
    """The directory that an option names, fetched if it is a hub id. Raises FileNotFoundError, or Faults as hub.pin."""
    place = hub.directory(hub.pin(option, str(path)))
    if not path or not place.is_dir():
        raise FileNotFoundError(
            f"{option}={path}: no such directory; expected a run (runs/NAME) or a stage of it, a Hugging Face model or "
            "export, its id on the hub (OWNER/NAME), or a Megatron checkpoint"
        )
    return place


def policy_at(setting: str, path: str) -> Path:
    """The checkpoint at `path`, or the newest one of the stage there. Raises FileNotFoundError, naming the setting."""
    given = Path(path)
    checkpoint = given if (given / POLICY).is_file() else latest_checkpoint(given)
    if checkpoint is None:
        raise FileNotFoundError(f"{setting}: no policy checkpoint there; give a stage or checkpoint directory")
    return checkpoint


def reinforced(cfg: RunConfig) -> Path:
    return _trained(cfg, "rl")


def _trained(cfg: RunConfig, stage: str) -> Path:
    checkpoint = latest_checkpoint(_finished(cfg, stage))
    if checkpoint is None:
        raise _missing(cfg, stage)
    return checkpoint


def _finished(cfg: RunConfig, stage: str) -> Path:
    if not is_done(cfg, stage):
        raise _missing(cfg, stage)
    return stage_dir(cfg, stage)


def _missing(cfg: RunConfig, stage: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{stage_dir(cfg, stage)}: stage {stage!r} has not finished with these settings; "
        f"run `ee-megatron {stage}` with the same settings first, or `ee-megatron run` for all stages"
    )


def start_model(cfg: RunConfig, stage: str) -> Path:
    """The model that `stage` starts from. Raises FileNotFoundError, naming the command that helps, if an earlier stage
    has yet to make it."""
    if stage == "pretrain" and draws_weights(cfg):
        return stage_dir(cfg, stage) / "initial"
    return {"import-checkpoint": model_dir, "pretrain": model_dir, "teacher": source_model}.get(stage, base_model)(cfg)


def inputs(cfg: RunConfig, stage: str) -> tuple[Path, ...]:
    """Arguments of `stage`'s function: its start model and the previous stage's output. Raises as `start_model`."""
    made = {"calibrate": traces, "rl": calibrated}
    models = () if stage == "import-checkpoint" else (start_model(cfg, stage),)
    return (*models, made[stage](cfg)) if stage in made else models


def check_inputs(cfg: RunConfig, stage: str) -> None:
    """Raises FileNotFoundError, naming the command that helps, if what `stage` reads is not there."""
    inputs(cfg, stage)
    if stage == "import-checkpoint":
        check_checkpoint(cfg)
    if stage == "evaluate":
        calibrated(cfg)
        control_policy(cfg)


def ready_model(cfg: RunConfig, stage: str) -> Path:
    """The model that `stage` starts from, its weights checked; for `pretrain` random weights are drawn here if needed,
    for `import-checkpoint` it is model.path. Done before ranks start, whose launcher would bury the one line of an
    error in its own report.

    Raises FileNotFoundError or ValueError.
    """
    path = start_model(cfg, stage)
    if stage == "import-checkpoint":
        return path
    if stage == "pretrain" and draws_weights(cfg):
        from .pretrain import draw_model

        return draw_model(cfg, path)
    # Checks by the headers that every shard is complete and matches config.json.
    HFDirectory(path)
    check_bases(cfg, stage, path)
    return path


def check_given(cfg: RunConfig) -> None:
    """Raises FileNotFoundError or ValueError if the model that the user names cannot be started from."""
    if cfg.model.checkpoint:
        if not is_done(cfg, "import-checkpoint"):
            check_checkpoint(cfg)
    elif not draws_weights(cfg) and not hub.pending.get(cfg.model.path):
        HFDirectory(model_dir(cfg))
        check_tokenizer(model_dir(cfg))


def check_checkpoint(cfg: RunConfig) -> None:
    """Raises FileNotFoundError or ValueError if model.checkpoint cannot be imported."""
    # Imported late: torch takes seconds, and most runs don't need it here.
    from .import_checkpoint import open_source

    open_source(cfg)


def check_bases(cfg: RunConfig, stage: str, model_path: Path) -> None:
    """Raises ValueError if a policy that `stage` reads, its own checkpoints among them, belongs to another model than
    the one at `model_path`. A model may have been replaced at its place since."""
    from ..checkpoint.policy_files import check_base

    # All checkpoints of a stage have the same base, so one is enough, complete or not.
    policies = [path.parent for path in sorted(stage_dir(cfg, stage).glob(f"checkpoints/step_*/{POLICY}"))[:1]]
    if stage in ("rl", "evaluate"):
        policies.append(calibrated(cfg))
    if stage == "evaluate":
        policies += [reinforced(cfg)] if is_done(cfg, "rl") else []
        policies += [path for path in [control_policy(cfg)] if path]
    base = HFDirectory(model_path)
    for policy in policies:
        check_base(policy, base, otherwise="train a policy on this one")
