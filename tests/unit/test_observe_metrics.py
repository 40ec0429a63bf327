"""metrics.jsonl is always whole, resumes where the checkpoint was, and trackers never get in the way."""

import json
import math
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from ee_megatron.observe import metrics as recording
from ee_megatron.observe.metrics import MetricsLog, Tracking, read_metrics, wandb_mode


def _open(path, resume_step=None, **options):
    return MetricsLog(path, Tracking(**options), resume_step)


def test_each_call_is_one_line_on_disk_at_once(tmp_path):
    with _open(tmp_path) as metrics:
        metrics.log(1, {"loss": 2, "reward": np.float32(0.5)})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0, "reward": 0.5}\n'
        metrics.log(2, {"loss": 1})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_resumed_run_cuts_later_lines_and_a_half_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "x": s}) + "\n" for s in range(1, 8)) + '{"step": 8, "x"')
    with _open(tmp_path, resume_step=5) as metrics:
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
        metrics.log(6, {"x": 60})
    assert [row["x"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 60]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "timings.jsonl"]
    # Without a step to resume from only the half line goes.
    path.write_text('{"step": 9, "x": 1}\n{"st')
    with _open(tmp_path) as metrics:
        metrics.log(10, {"x": 2})
    assert read_metrics(path) == [{"step": 9, "x": 1}, {"step": 10, "x": 2.0}]


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


def test_a_half_last_line_is_passed_over_and_a_damaged_other_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x')
    assert read_metrics(path) == [{"step": 1, "x": 1}]
    path.write_text("")
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2.*'rubbish'"):
        read_metrics(path)


def test_values_that_are_not_finite_stay_valid_json_and_are_warned_of_once(tmp_path, caplog):
    with _open(tmp_path) as metrics:
        for step in (1, 2):
            metrics.log(step, {"loss": math.nan, "kl": math.inf, "x": 1})
    text = (tmp_path / "metrics.jsonl").read_text()
    first = json.loads(text.splitlines()[0], parse_constant=pytest.fail)
    assert first == {"step": 1, "loss": None, "kl": None, "x": 1.0}
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])
    assert sum("metric loss" in m for m in caplog.messages) == 1


LOGS = """
import sys
from ee_megatron.observe.metrics import MetricsLog, Tracking
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tracking = Tracking("auto", "front-rl-1", "front", "rl", {"rl": {"steps": 4, "families": ["sum"]}})
with MetricsLog(folder, tracking, resume_step=first - 1) as metrics:
    for step in range(first, last + 1):
        metrics.log(step, {"loss": step / 2}, {"seconds": step})
"""


def _logged(folder, first: int, last: int, **environment: str) -> float:
    """A run of its own process, silent whatever it does; how long it took."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(folder / "home")}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LOGS, str(folder), str(first), str(last)],
        capture_output=True, text=True, env=given | environment, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return time.monotonic() - begun


def _records(file) -> list:
    """What wandb wrote into a run's file: a header of 7 bytes, then blocks of 32 KiB with pieces of records, each piece
    after its checksum, length (2 bytes) and kind (whole, first, middle, last)."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if position + 7 + length > len(data):
            # Still being written.
            break
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def _settled(file) -> list:
    """A finished run's records. wandb's writer goes on for a moment after `finish`; the run's end comes last."""
    deadline = time.monotonic() + 20
    while not (records := _records(file)) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, [record.WhichOneof("record_type") for record in records]
        time.sleep(0.05)
    return records


def _history(records) -> list[dict]:
    """The values of each logged step."""
    rows = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row
         if not (item.key or item.nested_key[0]).startswith("_")} for row in rows
    ]  # fmt: skip


def test_wandb_gets_settings_as_columns_and_a_resumed_run_stays_one_directory(tmp_path):
    """No key: offline. Steps 1 to 3, killed after the checkpoint of step 2, go on at 3."""
    _logged(tmp_path, 1, 3, WANDB_PROJECT="other")
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    time.sleep(1.1)  # Its name has the second in which it began.
    _logged(tmp_path, 3, 4, WANDB_PROJECT="other")
    (second,) = (tmp_path / "wandb").glob("offline-run-*")
    assert second != first and second.name.split("-")[-1] == (tmp_path / "wandb" / "run_id").read_text()
    (file,) = second.glob("*.wandb")
    records = _settled(file)
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_group, run.job_type) == ("other", "front-rl-1", "front", "rl")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["rl"] == {"steps": 4, "families": ["sum"]}
    assert _history(records) == [{"step": step, "loss": step / 2, "seconds": step} for step in (1, 2, 3, 4)]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_wandbs_own_word_is_obeyed_also_where_there_is_a_key(tmp_path):
    key = {"WANDB_API_KEY": "0" * 40}
    # It would wait for a server that nobody can reach.
    assert _logged(tmp_path / "offline", 1, 1, WANDB_MODE="offline", **key) < recording.INIT_TIMEOUT_S
    assert len(list((tmp_path / "offline" / "wandb").glob("offline-run-*/*.wandb"))) == 1
    _logged(tmp_path / "disabled", 1, 1, WANDB_MODE="disabled", **key)
    assert sorted(p.name for p in (tmp_path / "disabled").iterdir()) == ["metrics.jsonl", "timings.jsonl"]


def test_the_mode_is_the_settings_then_the_environments_then_follows_the_key(tmp_path):
    key = {"WANDB_API_KEY": "k"}
    assert [wandb_mode("auto", e) for e in ({}, key)] == ["offline", "online"]
    for word, mode in [("offline", "offline"), ("dryrun", "offline"), ("Disabled", "disabled"), ("online", "online")]:
        assert wandb_mode("auto", {"WANDB_MODE": word, **key}) == mode
    assert wandb_mode("online", {"WANDB_MODE": "offline"}) == "online"
    with pytest.raises(ValueError, match="WANDB_MODE=of"):
        wandb_mode("auto", {"WANDB_MODE": "of"})
    with pytest.raises(ValueError, match=r"tracker\.wandb.*'of'"):
        _open(tmp_path, wandb="of")


def test_a_run_that_no_server_takes_is_written_offline(tmp_path, monkeypatch, caplog):
    """A port where nobody listens, and little patience."""
    monkeypatch.setattr(recording, "INIT_TIMEOUT_S", 2.0)
    for name, value in {"API_KEY": "0" * 40, "BASE_URL": "http://127.0.0.1:9", "DIR": ""}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with _open(tmp_path, wandb="auto") as metrics:
        metrics.log(1, {"x": 1})
    assert any("wandb" in message and "offline" in message for message in caplog.messages)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert _history(_settled(file)) == [{"step": 1, "x": 1}]


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(tmp_path, caplog):
    # A file stands where wandb wants a directory.
    (tmp_path / "wandb").touch()
    with _open(tmp_path, wandb="offline") as metrics:
        metrics.log(1, {"x": 1})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert any("wandb" in m for m in caplog.messages)
