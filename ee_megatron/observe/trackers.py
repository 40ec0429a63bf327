"""wandb: where a run's numbers are forwarded to. It is never needed, and may not end a run."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from .rundir import write_atomic

logger = logging.getLogger(__name__)

WANDB_MODES = ("auto", "offline", "online", "disabled")
# What WANDB_MODE may say, older words included.
SPOKEN = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
INIT_TIMEOUT_S, LOCAL_TIMEOUT_S = 30.0, 90.0
"""For a server to take a run; for wandb's own process on this machine, which a busy node starts slowly."""


@dataclass(frozen=True)
class Tracking:
    """What trackers are told of a run. `wandb`: one of WANDB_MODES; `group`: runs that are looked at together;
    `job_type`: what this one does, the stage; `config`: its settings, nested as they are, a column each in wandb."""

    wandb: str = "disabled"
    name: str = ""
    group: str = ""
    job_type: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    def log(self, row: dict[str, Any]) -> Any: ...

    def finish(self) -> Any: ...


def start(run_dir: Path, tracking: Tracking, rows: Sequence[dict[str, Any]]) -> Tracker | None:
    """wandb, where it is wanted and could be started. `rows`: what the run has logged before. Raises ValueError for an
    unknown `tracking.wandb`."""
    if tracking.wandb not in WANDB_MODES:
        raise ValueError(f"tracker.wandb: {tracking.wandb!r} is none of {', '.join(WANDB_MODES)}; choose one of them")
    try:
        return _wandb(run_dir, tracking, rows)
    except Exception as error:
        logger.warning("wandb is not used: %s: %s", type(error).__name__, error)
        return None


def wandb_mode(setting: str, environment: Mapping[str, str]) -> str:
    """online, offline or disabled: the setting or, where that is auto, WANDB_MODE, or else online if there is a key.

    Raises ValueError for a WANDB_MODE that is none of these."""
    if setting != "auto":
        return setting
    asked = environment.get("WANDB_MODE", "").strip().lower()
    if asked and asked not in SPOKEN:
        raise ValueError(f"WANDB_MODE={asked}: expected online, offline or disabled")
    return SPOKEN.get(asked) or ("online" if environment.get("WANDB_API_KEY") else "offline")


def _wandb(run_dir: Path, tracking: Tracking, rows: Sequence[dict[str, Any]]) -> Tracker | None:
    mode = wandb_mode(tracking.wandb, os.environ)
    if mode == "disabled":
        return None
    if mode == "online":
        try:
            return _wandb_run(run_dir, tracking, mode)
        except Exception as error:
            said = " ".join(str(error).split())
            logger.warning("wandb: no run online (%s); it is written offline, `wandb sync` sends it later", said)
            _forget_wandb()
    return _offline(run_dir, tracking, rows)


def _forget_wandb() -> None:
    """End wandb's service, which goes on with the attempt and has its id in use."""
    import wandb

    ending = threading.Thread(target=wandb.teardown, daemon=True)
    ending.start()
    ending.join(LOCAL_TIMEOUT_S)


def _offline(run_dir: Path, tracking: Tracking, rows: Sequence[dict[str, Any]]) -> Tracker:
    """A run that goes on gets a directory with all its steps in place of the one it had: wandb appends to none, and
    several of one run would have to be sent together, their repeated steps with them."""
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

    # The id is kept, so that a resumed run goes on in the same wandb run.
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
    # An own step axis: wandb refuses steps that it has already seen, which a resumed run repeats.
    run.define_metric("*", step_metric="step")
    return run
