"""Numbers of a run over its steps: metrics.jsonl and timings.jsonl always; wandb and TensorBoard where wanted.

Clocks are kept apart, so that two runs of the same settings and seed have the same metrics.jsonl to the byte.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat, cast

from .rundir import write_atomic

logger = logging.getLogger(__name__)

WANDB_MODES = ("auto", "offline", "online", "disabled")
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, each with an integer "step"; null (a value that was not finite) becomes nan.

    A last line without its end, left by a writer that was killed, is passed over. Raises ValueError for any other
    line that is not a row, FileNotFoundError if there is no file.
    """
    rows: list[dict] = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            row = json.loads(line)
            rows.append({k: math.nan if v is None else v for k, v in row.items()} | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            found = line[:60].decode(errors="replace")
            raise ValueError(
                f'{path}, line {number}: expected a JSON object with "step", found {found!r}; delete that line'
            ) from None
    return rows


class Metrics:
    """Writes one JSON line per `log` call and forwards it to the trackers. Trackers that fail are dropped, never fatal.

    Args:
        run_dir: metrics.jsonl, timings.jsonl, wandb/ and tensorboard/ go here.
        wandb_mode: auto (online with WANDB_API_KEY, else offline), offline, online or disabled.
        config: what the trackers show as the run's configuration.
        resume_step: lines of later steps are cut, so that a resumed run writes them anew; None keeps every line.

    Raises ValueError for an unknown mode.
    """

    def __init__(
        self,
        run_dir: Path | str,
        wandb_mode: str = "auto",
        project: str = "ee-megatron",
        name: str = "",
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        resume_step: int | None = None,
    ) -> None:
        if wandb_mode not in WANDB_MODES:
            raise ValueError(f"tracker.wandb: {wandb_mode!r} is none of {', '.join(WANDB_MODES)}; choose one of them")
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / "metrics.jsonl"
        self._files = []
        for path in (self.path, self.run_dir / "timings.jsonl"):
            _mend(path, resume_step)
            self._files.append(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644))
        self._warned: set[str] = set()
        starts: dict[str, Callable[[], Any]] = {}
        if wandb_mode != "disabled":
            starts["wandb"] = lambda: _wandb(self.run_dir, wandb_mode, project, name, dict(config or {}))
        if tensorboard:
            starts["tensorboard"] = lambda: _Board(self.run_dir, resume_step)
        self._trackers: dict[str, Any] = {}
        for tracker, start in starts.items():
            try:
                self._trackers[tracker] = start()
            except Exception as error:
                logger.warning("%s is not used: %s: %s", tracker, type(error).__name__, error)

    def log(
        self, step: int, values: Mapping[str, SupportsFloat], timings: Mapping[str, SupportsFloat] | None = None
    ) -> None:
        """Append {"step": step, name: value, …} to metrics.jsonl, and the timings to timings.jsonl; trackers get both.

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
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(row)
            except Exception as error:
                logger.warning("%s is dropped for the rest of the run: %s", name, error)
                del self._trackers[name]

    def close(self) -> None:
        """Waits for wandb's upload at most FINISH_TIMEOUT_S; what it has not sent by then stays in its directory."""
        for file in self._files:
            os.close(file)
        trackers, self._files, self._trackers = self._trackers, [], {}
        for name, tracker in trackers.items():
            ending = threading.Thread(target=_finish, args=(name, tracker), daemon=True)
            ending.start()
            ending.join(FINISH_TIMEOUT_S)
            if ending.is_alive():
                logger.warning("%s did not finish within %g s; `wandb sync` sends the rest", name, FINISH_TIMEOUT_S)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _mend(path: Path, resume_step: int | None) -> None:
    """Cut a partial last line and the lines after the step that a run resumes from."""
    if not path.exists():
        return
    rows = read_metrics(path)
    kept = rows if resume_step is None else [row for row in rows if row["step"] <= resume_step]
    if len(kept) < len(rows) or not path.read_bytes().endswith(b"\n"):
        write_atomic(path, "".join(_line(row) for row in kept))


def _line(row: Mapping[str, Any]) -> str:
    finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _wandb(run_dir: Path, mode: str, project: str, name: str, config: dict[str, Any]) -> Any:
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # The id is kept, so that a resumed run goes on in the same wandb run.
    identity = run_dir / "wandb" / "run_id"
    identity.parent.mkdir(exist_ok=True)
    if not identity.exists():
        write_atomic(identity, uuid.uuid4().hex[:12])
    settings = wandb.Settings(
        silent=True, console="off", init_timeout=INIT_TIMEOUT_S, disable_git=True, disable_code=True
    )
    run = wandb.init(
        project=project, name=name or None, id=identity.read_text().strip(), config=config, dir=str(run_dir),
        mode=cast(Any, mode), resume="allow" if mode == "online" else None, settings=settings,
    )  # fmt: skip
    # An own step axis: wandb refuses steps that it has already seen, which a resumed run repeats.
    run.define_metric("*", step_metric="step")
    return run


def _finish(name: str, tracker: Any) -> None:
    try:
        tracker.finish()
    except Exception as error:
        logger.warning("%s did not finish: %s", name, error)


class _Board:
    """TensorBoard with the methods of a wandb run."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        self.finish = self._writer.close

    def log(self, row: Mapping[str, Any]) -> None:
        for key in list(row)[1:]:
            self._writer.add_scalar(key, row[key], row["step"])
        self._writer.flush()
