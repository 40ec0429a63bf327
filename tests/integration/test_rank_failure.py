"""A rank that dies or fails in the middle of training: the command ends within a minute and says which in its last
line; where is in the rank's log."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from test_whole_method import command, only, run

from ee_megatron.observe.rundir import latest_checkpoint
from tests.covering import EXTENDED, SLOW
from tests.processes import Command, ee_megatron
from tests.tiny import tiny_hf

pytestmark = EXTENDED

# Long enough that it would not end by itself while the test looks.
LONG = ("calibrate.epochs=2000", "calibrate.checkpoint_every=5")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failure")
    tiny_hf("llama", folder / "model")
    run("traces", folder, "rollout.backend=local")
    return folder


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def abort(pid: int) -> None:
    os.kill(pid, signal.SIGABRT)


def refuse_writing(pid: int) -> None:
    """The next checkpoint of this process meets a file-size limit, as on a full disk; its log has room."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "rank", "says", "logged"),
    [
        (kill, 1, "error: rank 1 of 2: killed by SIGKILL", []),
        pytest.param(
            abort, 1, "error: rank 1 of 2: killed by SIGABRT", ["Current thread", "training/calibrate.py"], marks=SLOW
        ),
        pytest.param(
            refuse_writing,
            0,
            "error: rank 0 of 2: no checkpoint could be written",
            ["failed here:", "checkpoints.save"],
            marks=SLOW,
        ),
    ],
)
def test_the_others_end_within_a_minute(fault, rank, says, logged, traced, tmp_path):
    job = Command(command("calibrate", traced, *LONG, f"calibrate.seed={len(fault.__name__)}"))
    try:
        deadline = time.monotonic() + 120
        while not any((traced / "runs" / "tiny").glob("calibrate-*/checkpoints/step_5/COMPLETE")):
            assert time.monotonic() < deadline and job.poll() is None, job.stderr[-3000:]
            time.sleep(0.05)
        # In the order of their ranks.
        ranks = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        assert len(ranks) == 2
        fault(ranks[rank])
        assert job.wait(timeout=60) != 0
        text = job.stderr
        assert text.splitlines()[-1].startswith(says) and text.count("error") == 1, text[-4000:]
        where = (only(traced, "calibrate") / "ranks" / f"rank-{rank}.log").read_text()
        assert "Traceback" not in text and all(part in where for part in logged), where[-4000:]
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
        # What had been written before is still there to go on from.
        assert latest_checkpoint(only(traced, "calibrate")) is not None
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        directory = only(traced, "calibrate")
        directory.rename(traced / "runs" / f"{fault.__name__}")


@pytest.mark.timeout(300)
def test_gradients_that_stay_infinite_end_the_run_and_leave_the_batch(traced):
    """A learning rate that blows the adapters up: later updates are left out, then the run stops and says why."""
    done = ee_megatron(*command(
        "calibrate", traced, "calibrate.adapter_lr=1e30", "calibrate.epochs=20",
        "calibrate.seed=99",
    ))  # fmt: skip
    assert done.returncode != 0
    assert "5 updates in a row had a gradient that is not finite" in done.stderr, done.stderr[-3000:]
    (batch,) = only(traced, "calibrate").glob("bad_batch_step_*.pt")
    saved = torch.load(batch, weights_only=True)
    assert {"tokens", "exit_depths"} <= saved["batch"].keys() and "divergence" in saved["weights"]
