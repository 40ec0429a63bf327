"""What each stage reads and writes, and whether it is there. No torch: the command line asks before anything starts."""

from __future__ import annotations

from pathlib import Path

from ..config.cluster import LEARNS as LEARNS
from ..config.identity import stage_dir
from ..config.load import read_saved
from ..config.schema import RunConfig
from ..observe.rundir import DONE as DONE
from ..observe.rundir import latest_checkpoint


def is_done(cfg: RunConfig, stage: str) -> bool:
    return (stage_dir(cfg, stage) / DONE).is_file()


def source_model(cfg: RunConfig) -> Path:
    """What the teacher is made of: model.path, or the pretrained model. Raises FileNotFoundError if that is missing."""
    if not cfg.pretrain.enabled:
        return Path(cfg.model.path)
    if not is_done(cfg, "pretrain"):
        raise FileNotFoundError(_missing(cfg, "pretrain"))
    return stage_dir(cfg, "pretrain") / "model"


def base_model(cfg: RunConfig) -> Path:
    """The model that traces, calibration and RL build on. Raises FileNotFoundError if it is not made yet."""
    if not cfg.teacher.enabled:
        return source_model(cfg)
    if not is_done(cfg, "teacher"):
        raise FileNotFoundError(_missing(cfg, "teacher"))
    return stage_dir(cfg, "teacher") / "model"


def traces(cfg: RunConfig) -> Path:
    if not is_done(cfg, "traces"):
        raise FileNotFoundError(_missing(cfg, "traces"))
    return stage_dir(cfg, "traces") / "dataset"


def calibrated(cfg: RunConfig) -> Path:
    """The policy checkpoint that RL starts from: `start`, or this configuration's own calibration."""
    return _given("start", cfg.start) if cfg.start else _finished(cfg, "calibrate")


def control_policy(cfg: RunConfig) -> Path | None:
    """The checkpoint that `evaluate.control_policy` names. Raises FileNotFoundError if none is there."""
    given = cfg.evaluate.control_policy
    return _given("evaluate.control_policy", given) if given else None


def trained(stage: Path) -> tuple[RunConfig, Path, Path]:
    """The settings, the base model and the newest checkpoint of a calibrate or rl stage, by its directory alone. Raises
    FileNotFoundError or ValueError for a directory that is none."""
    cfg = read_saved(stage / "config.yaml")
    checkpoint = latest_checkpoint(stage)
    if checkpoint is None:
        raise FileNotFoundError(f"{stage}: no checkpoint there; give the directory of a calibrate or rl stage")
    return cfg, base_model(cfg), checkpoint


def _given(key: str, text: str) -> Path:
    """A checkpoint, or the newest one of a stage."""
    given = Path(text)
    found = given if (given / "policy.json").is_file() else latest_checkpoint(given)
    if found is None:
        raise FileNotFoundError(f"{key}={text}: no policy checkpoint there; give a stage or checkpoint directory")
    return found


def reinforced(cfg: RunConfig) -> Path:
    return _finished(cfg, "rl")


def _finished(cfg: RunConfig, stage: str) -> Path:
    found = latest_checkpoint(stage_dir(cfg, stage)) if is_done(cfg, stage) else None
    if found is None:
        raise FileNotFoundError(_missing(cfg, stage))
    return found


def _missing(cfg: RunConfig, stage: str) -> str:
    return (
        f"{stage_dir(cfg, stage)}: stage {stage!r} has not finished with these settings; "
        f"run `ee-megatron {stage}` with the same settings first, or `ee-megatron run` for all stages"
    )


def check_inputs(cfg: RunConfig, stage: str) -> None:
    """Raises FileNotFoundError, naming the command that helps, if what `stage` reads is not there."""
    if stage == "teacher":
        source_model(cfg)
    elif stage != "pretrain":
        base_model(cfg)
    if stage == "calibrate":
        traces(cfg)
    if stage in ("rl", "evaluate"):
        calibrated(cfg)
    if stage == "evaluate":
        control_policy(cfg)


def ready_model(cfg: RunConfig, stage: str) -> Path:
    """The model that `stage` starts from, its weights checked; that of `pretrain` is drawn here if it has to be. Done
    before ranks start, whose launcher would bury the one line of an error in its own report.

    Raises FileNotFoundError or ValueError.
    """
    if stage == "pretrain":
        from .scratch import draw_model

        return draw_model(cfg, stage_dir(cfg, stage) / "initial")
    path = source_model(cfg) if stage == "teacher" else base_model(cfg)
    check_weights(path)
    return path


def check_given(cfg: RunConfig) -> None:
    """Raises FileNotFoundError or ValueError if the model that the user names cannot be started from."""
    if not cfg.pretrain.enabled:
        check_weights(Path(cfg.model.path))


def check_weights(model_path: Path) -> None:
    """Every shard there, whole and as config.json says, by their headers. Raises FileNotFoundError or ValueError."""
    from ..families.hf_directory import HFDirectory

    HFDirectory(model_path)
