"""trackio and mlflow: what a run logs, stops and resumes with arrives there once, as their own programs read it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "trackers" / "bin" / "python"
LOGS = """
import sys
from ee_megatron.observe.metrics import MetricsLog, Tracking
folder, kind, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tracking = Tracking("auto", "front-rl-1", "front", "rl", {"rl": {"steps": 4, "families": ["sum"]}}, kind)
with MetricsLog(folder, tracking, resume_step=first - 1) as metrics:
    for step in range(first, last + 1):
        metrics.log(step, {"loss": step / 2}, {"seconds": step})
"""
TRACKIO = """
import json, trackio
(run,) = trackio.Api().runs("ee-megatron")
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("ee-megatron", run.name)
print(json.dumps([run.name, run.config["rl"], rows], default=str))
"""
MLFLOW = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri="sqlite:///" + sys.argv[1] + "/mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("ee-megatron").experiment_id])
values = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
history = {key: [[m.step, m.value] for m in of_key] for key, of_key in values.items()}
print(json.dumps([run.info.run_name, run.info.status, run.data.params, run.data.tags["group"], history]))
"""

pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment; run: make .venv-peers/trackers/.made"),
    pytest.mark.timeout(600),
]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("TRACKIO", "MLFLOW"))}
    environment = outside | {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(PYTHON), "-c", *command], capture_output=True, text=True, env=environment, timeout=200, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done


def log_and_resume(folder: Path, kind: str) -> None:
    # The second process repeats step 3, with the same figures, and goes on.
    for first, last in ((0, 3), (3, 5)):
        done = run(folder, LOGS, str(folder), kind, str(first), str(last))
        assert "is not used" not in done.stderr, done.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6


def test_mlflow(tmp_path: Path):
    log_and_resume(tmp_path, "mlflow")
    name, status, settings, group, history = json.loads(run(tmp_path, MLFLOW, str(tmp_path)).stdout)
    assert (name, status, group) == ("front-rl-1", "FINISHED", "front")
    assert settings["rl.steps"] == "4"
    assert history["loss"] == [[step, step / 2] for step in range(6)] and len(history["seconds"]) == 6


def test_trackio(tmp_path: Path):
    log_and_resume(tmp_path, "trackio")
    name, settings, rows = json.loads(run(tmp_path, TRACKIO).stdout.splitlines()[-1])
    assert name == "front-rl-1" and settings["steps"] == 4
    assert [(row["step"], row["loss"], row["seconds"]) for row in rows] == [(s, s / 2, s) for s in range(6)]


def test_a_tracker_that_is_not_installed_is_named_and_the_run_goes_on(tmp_path: Path):
    blocked = "import sys; sys.modules['trackio'] = None\n" + LOGS
    done = run(tmp_path, blocked, str(tmp_path), "trackio", "0", "2")
    assert "trackio is not used: ModuleNotFoundError" in done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
