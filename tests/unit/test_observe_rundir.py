"""The run directory: nothing half-written is ever found, one process writes, the newest usable checkpoint is taken."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from ee_megatron.observe import lock
from ee_megatron.observe.lock import RunLock
from ee_megatron.observe.rundir import COMPLETE, RunDirectory, atomic_directory, clean_leftovers, fault, write_atomic


def _until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the child did not get there in time"
        time.sleep(0.01)


PRELUDE = """import os, time
from pathlib import Path
from ee_megatron.observe.rundir import RunDirectory, atomic_directory, write_atomic
ready, target = Path({ready!r}), Path({target!r})
def stop(*_):
    ready.touch()
    time.sleep(60)
"""


@contextlib.contextmanager
def _child(code: str, target: Path) -> Iterator[subprocess.Popen]:
    """A process that has come to `stop()` in the middle of its work on `target`; killed at the end of the block."""
    ready = target.parent.parent / "ready"
    child = subprocess.Popen([sys.executable, "-c", PRELUDE.format(ready=str(ready), target=str(target)) + code])
    try:
        _until(lambda: ready.exists() or child.poll() is not None)
        assert child.poll() is None, "the child ended before it was killed"
        yield child
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(10)


def test_a_writer_killed_inside_a_directory_leaves_no_final_one_and_its_rest_is_cleared(tmp_path):
    final = tmp_path / "run" / "step_1"
    with _child("with atomic_directory(target) as folder:\n    (folder / 'half').touch()\n    stop()", final):
        pass
    assert not final.exists()
    assert len(list(final.parent.iterdir())) == 1
    with atomic_directory(final) as folder:
        (folder / "whole").write_text("whole")
    assert [p.name for p in final.parent.iterdir()] == ["step_1"]
    assert [p.name for p in final.iterdir()] == ["whole"]


def test_a_writer_killed_before_the_rename_leaves_the_old_file_as_it_was(tmp_path):
    target = tmp_path / "run" / "config.yaml"
    target.parent.mkdir()
    write_atomic(target, "old")
    with _child("os.replace = stop\nwrite_atomic(target, 'new')", target):
        pass
    assert target.read_text() == "old"
    clean_leftovers(target.parent)
    assert [p.name for p in target.parent.iterdir()] == ["config.yaml"]


def test_a_killed_replacement_of_a_directory_puts_the_old_one_back(tmp_path):
    final = tmp_path / "run" / "traces"
    final.mkdir(parents=True)
    (final / "old").touch()
    # The second rename would put the new one in place.
    code = """
rename = os.rename
def first(a, b):
    rename(a, b)
    os.rename = stop
os.rename = first
with atomic_directory(target) as folder:
    (folder / "new").touch()
"""
    with _child(code, final):
        pass
    assert not final.exists()
    clean_leftovers(final.parent)
    assert [p.name for p in final.iterdir()] == ["old"]
    assert [p.name for p in final.parent.iterdir()] == ["traces"]


def test_an_error_inside_leaves_nothing_and_a_success_replaces(tmp_path):
    final = tmp_path / "d"
    with pytest.raises(KeyError), atomic_directory(final) as folder:
        (folder / "x").touch()
        raise KeyError("boom")
    assert list(tmp_path.iterdir()) == []
    for name in ("a", "b"):
        with atomic_directory(final) as folder:
            (folder / name).touch()
    assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_temporaries_of_living_writers_are_left_alone(tmp_path):
    with atomic_directory(tmp_path / "one") as first:
        (first / "x").touch()
        with atomic_directory(tmp_path / "two"):
            pass
        assert (first / "x").exists()
    assert (tmp_path / "one" / "x").exists()


def _checkpoint(run: RunDirectory, step: int) -> Path:
    with run.write_checkpoint(step) as folder:
        (folder / "model.bin").write_bytes(b"x" * 100)
    return run.checkpoint_dir(step)


def test_the_newest_usable_checkpoint_is_found_past_incomplete_and_damaged_ones(tmp_path, caplog):
    with RunDirectory(tmp_path / "run") as run:
        assert run.latest_checkpoint() is None
        good = _checkpoint(run, 9)
        for step in (10, 11, 12, 100):
            _checkpoint(run, step)
        (run.checkpoint_dir(10) / "model.bin").write_bytes(b"x" * 50)
        (run.checkpoint_dir(11) / "model.bin").unlink()
        (run.checkpoint_dir(12) / COMPLETE).write_text("{")
        (run.checkpoint_dir(100) / COMPLETE).unlink()
        with caplog.at_level(logging.WARNING):
            assert run.latest_checkpoint() == good
        assert [step for step in (10, 11, 12, 100) if f"step_{step} is skipped" in caplog.text] == [10, 11, 12, 100]
        assert json.loads((good / COMPLETE).read_text()) == {"model.bin": 100}


def test_keep_last_counts_usable_checkpoints_only(tmp_path):
    with RunDirectory(tmp_path) as run:
        for step in (1, 2, 3, 10):
            _checkpoint(run, step)
        (run.checkpoint_dir(10) / COMPLETE).unlink()
        run.keep_last(2)
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_2", "step_3"]
        assert fault(run.checkpoint_dir(3)) is None
        with pytest.raises(ValueError, match="at least 1"):
            run.keep_last(0)


def test_a_run_held_by_a_living_process_is_refused_and_a_dead_ones_is_taken_over(tmp_path):
    run = tmp_path / "runs" / "one"
    with _child("RunDirectory(target)\nstop()", run) as child, pytest.raises(RuntimeError, match=str(child.pid)):
        RunDirectory(run)
    with RunDirectory(run) as taken:
        assert json.loads((taken.path / ".lock").read_text())["pid"] == os.getpid()
    assert (run / ".lock").read_text() == ""


def test_the_pid_of_a_lock_is_looked_up_in_its_own_namespace_only(tmp_path):
    """A pid that no process has here: dead where it would be seen, and in locks that name no namespace."""
    gone = {"host": os.uname().nodename, "pid": 2**22 + 1, "start": "1", "token": "t"}
    for recorded, dead in (
        ({"pid_namespace": "pid:[1]"}, False),
        ({"pid_namespace": lock.pid_namespace()}, True),
        ({}, True),
    ):
        (tmp_path / ".lock").write_text(json.dumps(gone | recorded))
        if dead:
            RunDirectory(tmp_path).close()
        else:
            with pytest.raises(RuntimeError, match="is being written by"):
                RunDirectory(tmp_path)


def _try(path: Path, barrier, won) -> None:
    barrier.wait(20)
    try:
        RunLock(path).acquire()
        won.release()
    except RuntimeError:
        pass
    # Nobody is dead before all have tried.
    barrier.wait(20)


def test_of_several_that_find_a_dead_ones_lock_one_takes_it(tmp_path):
    fork = multiprocessing.get_context("fork")
    (tmp_path / ".lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "start": "1"}))
    barrier, won = fork.Barrier(4), fork.Semaphore(0)
    children = [fork.Process(target=_try, args=(tmp_path / ".lock", barrier, won)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert won.acquire(timeout=1) and not won.acquire(timeout=0)


def test_a_lock_file_that_somebody_keeps_busy_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "GUARD_DEADLINE_S", 0.1)
    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match=r"\.lock"):
        RunLock(tmp_path / ".lock").acquire()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_flock_a_lock_still_has_one_holder(number, tmp_path, monkeypatch):
    """NFS or Lustre mounted without locks."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(lock, "GUARD_DEADLINE_S", 0.2)
    file = tmp_path / ".lock"
    with RunDirectory(tmp_path):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert file.read_text() == "" and not list(tmp_path.glob(".lock.*"))
    holder = {"host": os.uname().nodename, "pid": os.getppid(), "start": lock.process_start(os.getppid())}
    file.write_text(json.dumps(holder))
    with pytest.raises(RuntimeError, match=f"written by process {os.getppid()}"):
        RunLock(file).acquire()
    # Somebody on another machine was killed in the middle.
    (tmp_path / ".lock.guard").write_text("1\nelsewhere\n")
    with pytest.raises(RuntimeError, match=r"\.lock\.guard"):
        RunLock(file).acquire()


SAYS = {
    "JobId=77 JobState=RUNNING Restarts=1 Reason=None": False,
    "JobId=77 JobState=COMPLETING Restarts=1": False,
    "JobId=77 JobState=CANCELLED Restarts=1": True,
    "JobId=77 JobState=PENDING Restarts=1": True,
    "JobId=77 JobState=RUNNING Restarts=2": True,
    "slurm_load_jobs error: Invalid job id specified": True,
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)": False,
}


@pytest.mark.parametrize("said", SAYS)
def test_a_holder_of_another_node_is_dead_once_slurm_says_so(said, tmp_path, monkeypatch):
    fails = "error" in said
    config, show = 'echo "ClusterName = here"', f'echo "{said}" {">&2; exit 1" if fails else ""}'
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\nif [ "$2" = config ]; then {config}; else {show}; fi\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)
    holder = {"host": "elsewhere", "pid": 1, "start": "1", "token": "t", "job": "77", "restart": 1}
    # Another cluster's jobs have numbers too, and older locks name no cluster.
    for cluster, dead in (("there", False), ("", False), ("here", SAYS[said])):
        (tmp_path / ".lock").write_text(json.dumps({**holder, "cluster": cluster}))
        if dead:
            RunDirectory(tmp_path).close()
        else:
            with pytest.raises(RuntimeError, match="elsewhere"):
                RunDirectory(tmp_path)


def test_a_reused_pid_and_a_half_written_lock_are_stale_but_another_host_is_not(tmp_path, monkeypatch):
    file = tmp_path / ".lock"
    here = os.uname().nodename
    file.write_text(json.dumps({"host": here, "pid": os.getppid(), "start": "1", "token": "t"}))
    RunDirectory(tmp_path).close()
    file.write_text('{"host": "x", "pi')
    RunDirectory(tmp_path).close()
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "1", "token": "t", "job": "77", "restart": 1}))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(RuntimeError, match="elsewhere"):
        RunDirectory(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(RuntimeError, match="elsewhere"):
        RunDirectory(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    RunDirectory(tmp_path).close()


def test_the_packages_log_goes_to_the_runs_file_until_it_is_closed(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.write_atomic("config.yaml", "a: 1\n")
        logging.getLogger("ee_megatron.training").info("kept %d", 1)
    logging.getLogger("ee_megatron.training").info("not kept")
    text = (tmp_path / "log.txt").read_text()
    assert "INFO ee_megatron.training: kept 1" in text and "not kept" not in text
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_latest_links_to_the_stage_that_finished_last_wherever_the_run_is_moved(tmp_path, caplog):
    def finish(name: str) -> None:
        with RunDirectory(tmp_path / "run" / name) as directory:
            directory.write_atomic("results.json", name)
            directory.finish("evaluate", "\n")
        assert (tmp_path / "run" / name / "DONE").is_file()

    for name in ("evaluate-1", "evaluate-2", "evaluate-1"):
        finish(name)
        assert (tmp_path / "run" / "latest" / "evaluate" / "results.json").read_text() == name
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest" / "evaluate" / "results.json").read_text() == "evaluate-1"
    assert [path.name for path in (tmp_path / "moved" / "latest").iterdir()] == ["evaluate"] and not caplog.records


def test_a_file_system_without_links_costs_a_warning(tmp_path, caplog, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with RunDirectory(tmp_path / "run" / "rl-1") as directory, caplog.at_level(logging.WARNING):
        directory.finish("rl", "\n")
    assert (tmp_path / "run" / "rl-1" / "DONE").is_file() and len(caplog.records) == 1
    assert "latest/rl" in caplog.text and not list((tmp_path / "run" / "latest").iterdir())
