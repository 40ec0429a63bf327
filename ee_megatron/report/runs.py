"""Reports of runs that are named by a configuration or by directories: which stages are theirs, how they differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.identity import STAGES, identity, stage_dir, stage_order
from ..config.load import read_saved
from ..config.schema import RunConfig
from .inputs import LABEL_LENGTH, ReportRun, settings_label
from .page import write_report

# What pandas has for a setting that a run lacks.
MISSING = "nan"


def report_path(cfg: RunConfig) -> Path:
    """Where `report_run` writes."""
    return Path(cfg.runs) / cfg.name / "report.html"


def report_run(cfg: RunConfig, coming: Sequence[str] = ()) -> Path:
    """report.html of one configuration, from whatever stages there are. `coming`: stages that will finish yet, with
    which there may be none. Raises ValueError if there is none else."""
    found = _stages_of(cfg, Path(cfg.runs) / cfg.name)
    if not found and not coming:
        raise ValueError(
            f"{Path(cfg.runs) / cfg.name}: no stage has run with these settings; start with `ee-megatron run`"
        )
    return write_report([ReportRun(found, config=cfg, coming=coming)], report_path(cfg))


def report_directories(named: Sequence[Path], out: Path | None = None) -> Path:
    """One report of all runs that the directories hold; `out` is by default report.html in the deepest directory that
    holds them all.

    A directory is a stage's, which stands for the run that made it, or holds such directories: then every run in it
    that was evaluated, or, if none was, every one at its last stage. Raises ValueError or FileNotFoundError.
    """
    ends = list(dict.fromkeys(end for path in named for end in _ends(path)))
    configs = [read_saved(end / "config.yaml") for end in ends]
    found = [_stages_of(cfg, end.parent) | {_stage_of(end): end} for cfg, end in zip(configs, ends, strict=True)]
    if out is None:
        common = Path(os.path.commonpath([end.parent.resolve() for end in ends]))
        out = common / "report.html"
    if len(found) == 1:
        return write_report([ReportRun(found[0], config=configs[0])], out)
    settings = _differing(configs)
    labels = [settings_label(each) for each in settings]
    if len(set(labels)) < len(labels):
        labels = [f"{end.parent.name}/{end.name}" for end in ends]
    elif max(map(len, labels)) > LABEL_LENGTH:
        # The table of settings says what they stand for.
        labels = [f"run {i + 1}" for i in range(len(labels))]
    return write_report([ReportRun(*each) for each in zip(found, labels, settings, configs, strict=True)], out)


def _ends(path: Path) -> list[Path]:
    """The last stage's directories of the runs that `path` names."""
    if _stage_of(path) and (path / "config.yaml").is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; name a run's directory or one of its stages'")
    for stage in reversed(STAGES):
        found = sorted(p.parent for p in path.glob(f"{stage}-*/config.yaml"))
        if found:
            return found
    raise ValueError(
        f"{path}: no stage's directory in it (expected evaluate-… or another stage with its config.yaml); "
        "name a run's directory, runs/<name>, or one of its stages'"
    )


def _stage_of(path: Path) -> str:
    name = path.name.rsplit("-", 1)[0]
    return name if name in STAGES else ""


def _stages_of(cfg: RunConfig, directory: Path) -> dict[str, Path]:
    """Those that exist, looked for in `directory`: a run's directory may have been moved since."""
    named = {stage: directory / stage_dir(cfg, stage).name for stage in stage_order(cfg)}
    return {stage: path for stage, path in named.items() if path.is_dir()}


def _differing(configs: Sequence[RunConfig]) -> list[dict[str, str]]:
    """Per run the settings that count and in which not all are alike, by their last part where that is unambiguous."""
    import pandas as pd

    frame = pd.json_normalize([identity(cfg, "evaluate") for cfg in configs]).map(_word)
    frame = frame.loc[:, frame.nunique() > 1]
    # A sweep's `seed` sets them all; said once.
    seeds = [key for key in frame if key.endswith(".seed")]
    if (frame[seeds].nunique(axis=1) <= 1).all():
        frame = frame.drop(columns=seeds[1:])
    lasts = [key.rsplit(".", 1)[-1] for key in frame]
    frame.columns = [key if lasts.count(last) > 1 else last for key, last in zip(frame, lasts, strict=True)]
    return [{key: word for key, word in row.items() if word != MISSING} for row in frame.to_dict("records")]


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(_word, value)) if isinstance(value, list) else str(value)
