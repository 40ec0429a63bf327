"""Metrics of a run over its steps: metrics.jsonl, timings.jsonl and a tracker, whose errors never end a run.

Timings are in a file of their own, so that two runs of the same settings and seed have byte-equal metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat, cast

from .rundir import write_atomic

logger = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 60.0
WANDB_MODES = ("auto", "offline", "online", "disabled")
# What WANDB_MODE may say, older words included.
SPOKEN = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
INIT_TIMEOUT_S, LOCAL_TIMEOUT_S = 30.0, 90.0
"""Timeouts of wandb's server, and of its process on this machine, which a busy node starts slowly."""


@dataclass(frozen=True)
class Tracking:
    """A run's description for trackers. `kind`: wandb, trackio or mlflow; `wandb`: one of WANDB_MODES; `group`: runs
    that are compared; `job_type`: the stage; `config`: its settings, nested as they are, a column each in wandb."""

    wandb: str = "disabled"
    name: str = ""
    group: str = ""
    job_type: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "wandb"


def read_metrics(path: Path) -> list[dict]:
    """Read the rows of a metrics.jsonl, each with an integer "step"; null (a value that was not finite) becomes nan.

    A last line without a line end, left by a writer that was killed, is skipped. Raises ValueError for any other line
    that is not a row, FileNotFoundError if there is no file.
    """
    rows: list[dict] = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            row = json.loads(line)
            rows.append({k: math.nan if v is None else v for k, v in row.items()} | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            start = line[:60].decode(errors="replace")
            raise ValueError(
                f'{path}, line {number}: expected a JSON object with "step", found {start!r}; delete that line'
            ) from None
    return rows


class MetricsLog:
    """Writes one JSON line per `log` call and forwards it to a tracker, which is switched off if it fails.

    Args:
        run_dir: metrics.jsonl, timings.jsonl and wandb/ go here.
        tracking: the run's description for the tracker; by default there is none.
        resume_step: lines of later steps are cut, so that a resumed run writes them anew; None keeps every line.

    Raises ValueError for an unknown mode of wandb.
    """

    def __init__(self, run_dir: Path | str, tracking: Tracking | None = None, resume_step: int | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / "metrics.jsonl"
        files = self.path, self.run_dir / "timings.jsonl"
        logged = max((_mend(path, resume_step) for path in files), default=-1)
        self._tracker = _start_tracker(self.run_dir, tracking or Tracking(), _together(*files), logged)
        self._files = [os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644) for path in files]
        self._warned: set[str] = set()

    def log(
        self, step: int, values: Mapping[str, SupportsFloat], timings: Mapping[str, SupportsFloat] | None = None
    ) -> None:
        """Append {"step": step, name: value, …} to metrics.jsonl, the timings to timings.jsonl; a tracker gets both.

        Values that are not finite are written as null and warned of once.
        """
        row: dict[str, Any] = {"step": int(step)}
        for file, part in zip(self._files, (values, timings or {}), strict=True):
            numbers = {k: float(v) for k, v in part.items() if k != "step"}
            for key, value in numbers.items():
                if not math.isfinite(value) and key not in self._warned:
                    self._warned.add(key)
                    logger.warning("metric %s is %s at step %d", key, value, step)
            if part is values or part:
                # One write call: after a kill the file holds whole lines and at most one partial one, the last.
                os.write(file, _line({"step": int(step), **numbers}).encode())
            row |= numbers
        if self._tracker is not None:
            try:
                self._tracker.log(row)
            except Exception as error:
                logger.warning("the tracker is dropped for the rest of the run: %s", error)
                self._tracker = None

    def close(self) -> None:
        """Close the log; waits for a tracker's upload at most FINISH_TIMEOUT_S; wandb's rest stays in its directory."""
        for file in self._files:
            os.close(file)
        tracker, self._files, self._tracker = self._tracker, [], None
        if tracker is not None:
            ending = threading.Thread(target=_finish, args=(tracker,), daemon=True)
            ending.start()
            ending.join(FINISH_TIMEOUT_S)
            if ending.is_alive():
                logger.warning("the tracker did not finish in %g s; `wandb sync` sends wandb's rest", FINISH_TIMEOUT_S)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _mend(path: Path, resume_step: int | None) -> int:
    """Cut a partial last line and the lines after the step that a run resumes from. Returns the last step before."""
    if not path.exists():
        return -1
    rows = read_metrics(path)
    remaining = rows if resume_step is None else [row for row in rows if row["step"] <= resume_step]
    if len(remaining) < len(rows) or not path.read_bytes().endswith(b"\n"):
        write_atomic(path, "".join(_line(row) for row in remaining))
    return max((row["step"] for row in rows), default=-1)


def _together(metrics: Path, timings: Path) -> list[dict[str, Any]]:
    """The rows of both files as wandb received them: one per step, in order."""
    rows: dict[int, dict[str, Any]] = {}
    for path in (metrics, timings):
        for row in read_metrics(path) if path.exists() else []:
            rows.setdefault(row["step"], {"step": row["step"]}).update(row)
    return [rows[step] for step in sorted(rows)]


def _line(row: Mapping[str, Any]) -> str:
    finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class _Trackio:
    """A run of trackio, in TRACKIO_PROJECT. A resumed run continues it: the steps that it repeats are sent already."""

    def __init__(self, run_dir: Path, tracking: Tracking, logged: int) -> None:
        import trackio

        self._logged, project = logged, os.environ.get("TRACKIO_PROJECT", "ee-megatron")
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=project, name=tracking.name, group=tracking.group, config=dict(tracking.config),
                resume="allow", embed=False,
            )  # fmt: skip

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] > self._logged:
            self._run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class _MLflow:
    """As `_Trackio`, a run of mlflow, at MLFLOW_TRACKING_URI or else in the stage's directory."""

    def __init__(self, run_dir: Path, tracking: Tracking, logged: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve() / 'mlflow.db'}"
        self._client, self._logged = MlflowClient(tracking_uri=uri), logged
        identity = run_dir / "mlflow_run_id"
        if not identity.exists():
            named = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ee-megatron")
            found = self._client.get_experiment_by_name(named)
            experiment = found.experiment_id if found else self._client.create_experiment(named)
            tags = {"group": tracking.group, "stage": tracking.job_type}
            made = self._client.create_run(experiment, tags=tags, run_name=tracking.name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in _flat(tracking.config)]
            for first in range(0, len(params), 100):
                self._client.log_batch(made, params=params[first : first + 100])
            write_atomic(identity, made)
        self._id = identity.read_text()

    def log(self, row: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        if row["step"] > self._logged:
            now = int(1000 * time.time())
            metrics = [Metric(key, value, now, row["step"]) for key, value in row.items() if key != "step"]
            self._client.log_batch(self._id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


def _flat(settings: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _finish(tracker: Any) -> None:
    try:
        tracker.finish()
    except Exception as error:
        logger.warning("the tracker did not finish: %s", error)


def _start_tracker(run_dir: Path, tracking: Tracking, rows: Sequence[dict[str, Any]], logged: int) -> Any:
    """A tracker's run, or None if it is off or could not be started. `rows`: what the run has logged before, up to the
    step that it resumes from; `logged`: the last step that it had logged.

    Raises ValueError for an unknown `tracking.wandb`."""
    if tracking.wandb not in WANDB_MODES:
        raise ValueError(f"tracker.wandb: {tracking.wandb!r} is none of {', '.join(WANDB_MODES)}; choose one of them")
    try:
        if tracking.kind != "wandb":
            return {"trackio": _Trackio, "mlflow": _MLflow}[tracking.kind](run_dir, tracking, logged)
        mode = wandb_mode(tracking.wandb, os.environ)
        if mode == "online":
            try:
                return _wandb_run(run_dir, tracking, mode)
            except Exception as error:
                said = " ".join(str(error).split())
                logger.warning("wandb: no run online (%s); it is written offline, `wandb sync` sends it later", said)
                _forget_wandb()
        return None if mode == "disabled" else _offline(run_dir, tracking, rows)
    except Exception as error:
        logger.warning("%s is not used: %s: %s", tracking.kind, type(error).__name__, error)
        return None


def wandb_mode(setting: str, environment: Mapping[str, str]) -> str:
    """The wandb mode, online, offline or disabled: the setting or, if auto, WANDB_MODE, else online if there is a key.

    Raises ValueError for a WANDB_MODE that is none of these."""
    if setting != "auto":
        return setting
    mode = environment.get("WANDB_MODE", "").strip().lower()
    if mode and mode not in SPOKEN:
        raise ValueError(f"WANDB_MODE={mode}: expected online, offline or disabled")
    return SPOKEN.get(mode) or ("online" if environment.get("WANDB_API_KEY") else "offline")


def _forget_wandb() -> None:
    """End wandb's service, which otherwise continues the attempt and holds its id."""
    import wandb

    ending = threading.Thread(target=wandb.teardown, daemon=True)
    ending.start()
    ending.join(LOCAL_TIMEOUT_S)


def _offline(run_dir: Path, tracking: Tracking, rows: Sequence[dict[str, Any]]) -> Any:
    """Start an offline run. A resumed one gets a new directory with all its steps, in place of its old one: wandb can't
    append, and several directories of one run would have to be sent together, with repeated steps."""
    run = _wandb_run(run_dir, tracking, "offline")
    for row in rows:
        run.log(row)
    for earlier in (run_dir / "wandb").glob(f"offline-run-*-{run.id}"):
        if earlier.resolve() != Path(run.settings.sync_dir).resolve():
            shutil.rmtree(earlier, ignore_errors=True)
    return run


def _wandb_run(run_dir: Path, tracking: Tracking, mode: str) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # The id is on disk, so that a resumed run continues the same wandb run.
    identity = run_dir / "wandb" / "run_id"
    identity.parent.mkdir(exist_ok=True)
    if not identity.exists():
        write_atomic(identity, uuid.uuid4().hex[:12])
    patience = INIT_TIMEOUT_S if mode == "online" else LOCAL_TIMEOUT_S
    settings = wandb.Settings(silent=True, console="off", init_timeout=patience, disable_git=True, disable_code=True)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "ee-megatron"), name=tracking.name or None,
        group=tracking.group or None, job_type=tracking.job_type or None, id=identity.read_text().strip(),
        config=dict(tracking.config),
        dir=str(run_dir), mode=cast(Any, mode), resume="allow" if mode == "online" else None, settings=settings,
    )  # fmt: skip
    # A step axis of our own: wandb refuses steps that it has already seen, which a resumed run repeats.
    run.define_metric("*", step_metric="step")
    return run
