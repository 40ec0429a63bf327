"""metrics.jsonl is always whole, resumes where the checkpoint was, and trackers never get in the way."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from ee_megatron.observe.metrics import Metrics, read_metrics


def _open(path, **options):
    return Metrics(path, **{"wandb_mode": "disabled", **options})


def test_each_call_is_one_line_on_disk_at_once(tmp_path):
    with _open(tmp_path) as metrics:
        metrics.log(1, {"loss": 2, "reward": np.float32(0.5)})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0, "reward": 0.5}\n'
        metrics.log(2, {"loss": 1})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_of_a_killed_process_are_all_there(tmp_path):
    code = f"""
import os, signal
from ee_megatron.observe.metrics import Metrics
metrics = Metrics({str(tmp_path)!r}, "disabled")
for step in range(50):
    metrics.log(step, {{"x": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    assert [row["x"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(50))


def test_a_resumed_run_cuts_later_lines_and_a_half_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "x": s}) + "\n" for s in range(1, 8)) + '{"step": 8, "x"')
    with _open(tmp_path, resume_step=5) as metrics:
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
        metrics.log(6, {"x": 60})
    assert [row["x"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 60]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "timings.jsonl"]


def test_clocks_go_to_a_file_of_their_own_and_are_cut_alike(tmp_path):
    with _open(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"x": step}, {"seconds": 0.5 * step})
        metrics.log(4, {"x": 4})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": s, "x": s} for s in (1, 2, 3, 4)]
    assert read_metrics(tmp_path / "timings.jsonl") == [{"step": s, "seconds": 0.5 * s} for s in (1, 2, 3)]
    with _open(tmp_path, resume_step=2):
        pass
    assert [row["step"] for row in read_metrics(tmp_path / "timings.jsonl")] == [1, 2]


def test_without_a_resume_step_all_whole_lines_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9, "x": 1}\n{"st')
    with _open(tmp_path) as metrics:
        metrics.log(10, {"x": 2})
    assert read_metrics(path) == [{"step": 9, "x": 1}, {"step": 10, "x": 2.0}]


def test_a_half_last_line_is_passed_over_and_a_damaged_other_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x')
    assert read_metrics(path) == [{"step": 1, "x": 1}]
    path.write_text("")
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object with \"step\", found 'rubbish'"):
        read_metrics(path)


def test_values_that_are_not_finite_stay_valid_json_and_are_warned_of_once(tmp_path, caplog):
    with _open(tmp_path) as metrics:
        for step in (1, 2):
            metrics.log(step, {"loss": math.nan, "kl": math.inf, "x": 1})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[0], parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "kl": None,
        "x": 1.0,
    }
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])
    assert sum("metric loss" in m for m in caplog.messages) == 1


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tracker\.wandb: 'of' is none of auto, offline, online, disabled"):
        Metrics(tmp_path, "of")


def test_auto_without_a_key_writes_an_offline_wandb_run_silently(tmp_path):
    code = f"""
from ee_megatron.observe.metrics import Metrics
with Metrics({str(tmp_path)!r}, "auto", "project", "name", {{"a": 1}}) as metrics:
    metrics.log(1, {{"loss": 0.5}})
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1 and b"loss" in files[0].read_bytes()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(tmp_path, caplog):
    # A file stands where wandb and tensorboard want a directory.
    (tmp_path / "wandb").touch()
    (tmp_path / "tensorboard").touch()
    with Metrics(tmp_path, "offline", tensorboard=True) as metrics:
        metrics.log(1, {"x": 1})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert any("wandb is not used" in m for m in caplog.messages)
    assert any("tensorboard is not used" in m for m in caplog.messages)


def test_tensorboard_gets_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _open(tmp_path, tensorboard=True) as metrics:
        metrics.log(3, {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(3, 0.25)]
