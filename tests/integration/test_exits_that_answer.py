"""RL stages through the command line whose exits answer for themselves, under a price that an accuracy leads, and such
as score nothing first. Two ranks at PP2, rollouts in the leader's process, from a policy that was never calibrated."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from ee_megatron.config.derive import policy_spec
from ee_megatron.config.load import load
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.observe.metrics import read_metrics
from ee_megatron.policy import initial_policy, save_policy
from tests.covering import EXTENDED, SLOW
from tests.processes import Command, ee_megatron
from tests.tiny import tiny_hf

pytestmark = EXTENDED

# The gates of a policy that nobody trained are nearly shut; the centre opens them half.
SETTINGS = [
    "name=tiny", "device=cpu", "model.dtype=float32", "parallel.pipeline=2", "parallel.tokens_per_micro_batch=128",
    "exits.depths=[1,2,3]", "adapter.rank=4", "teacher=null", "task.validation=6", "task.evaluation=8",
    "rl.prompts_per_step=4", "rl.group_size=2", "rl.gate_centre=0.018", "rl.kl_penalty.kind=exact",
    "rollout.max_new_tokens=6",
    "rollout.backend=local", "rollout.threads=1", "tracker.wandb=disabled",
]  # fmt: skip
LED = (
    "rl.steps=5", "rl.checkpoint_every=1", "rl.exit_credit=true", "rl.depth_penalty.penalize=right",
    "rl.kl_penalty.weight=0.2", "rl.depth_penalty.target.margin=5",
    "rl.depth_penalty.target.window=2", "rl.depth_penalty.target.samples=2", "rl.depth_penalty.weight=0.3",
    "rl.depth_penalty.warmup=0.2",
    "rl.exit_credit.divergence=all",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[str]:
    """The command, without `runs` and the settings that a test adds."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_hf("llama", folder / "model", layers=4, hidden=32, intermediate=48)
    settings = [*SETTINGS, f"model.path={model}", f"init_policy={folder / 'start'}"]
    source = HFDirectory(model)
    spec = policy_spec(load(settings), source.dims)
    policy = initial_policy(source.dims, spec, seed=0)
    generator = torch.Generator().manual_seed(0)
    moved = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in policy.items()}
    (folder / "start").mkdir()
    save_policy(folder / "start", spec, moved)
    return ["rl", *settings]


def finish(command: list[str], runs: Path) -> Path:
    """Run the stage to its end -> its directory."""
    done = ee_megatron(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    (stage,) = (runs / "tiny").glob("rl-*")
    return stage


def without_clock(stage: Path) -> list[dict[str, float]]:
    clock = ("seconds", "tokens_per_s", "time")
    rows = read_metrics(stage / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_at_the_price_that_it_had_come_to(made, tmp_path):
    """SIGKILL after two of five steps, the first at a rising price; the reference's accuracy is found out once."""
    straight = finish([*made, *LED, f"runs={tmp_path / 'straight'}"], tmp_path / "straight")
    rows = without_clock(straight)
    reference = json.loads((straight / "reference_by_prompt.json").read_text())
    assert len(reference) == 16 and all(share in (0, 0.5, 1) for share in reference.values())
    assert (rows[0]["lambda"], rows[1]["lambda"]) == (0.15, 0.3) and len({row["lambda"] for row in rows}) == 5
    assert "accuracy_goal" not in rows[0]
    # The file is in the order of the run's prompts, four a step, of the steps compared; the window is two steps.
    theirs = np.array(list(reference.values())).reshape(4, 4).mean(1)
    running = [theirs[0], theirs[:2].mean()]
    running += [(running[-1] + theirs[2]) / 2]
    running += [(running[-1] + theirs[3]) / 2]
    assert [row["accuracy_goal"] for row in rows[1:]] == pytest.approx([mean - 0.05 for mean in running])
    base = 0.3
    for compared, (row, after) in enumerate(itertools.pairwise(rows[1:]), start=1):
        surplus = min(compared / 2, 1) * (row["accuracy_running"] - row["accuracy_goal"])
        base = min(max(base + 0.5 * surplus, 0), 4)
        assert after["lambda"] == pytest.approx(min(max(base + 10 * surplus, 0), 4))
    assert all(row["seconds_divergences"] > 0 for row in read_metrics(straight / "timings.jsonl"))
    # Gates are taught by the divergence where hardly an answer is right.
    assert all(row["kl_exact"] > 0 and row["grad_norm/gates"] > 0 for row in rows)
    assert all(len([key for key in row if key.startswith("exit_share/")]) > 1 for row in rows)

    command = [*made, *LED, f"runs={tmp_path / 'killed'}"]
    job, deadline = Command(command), time.monotonic() + 280
    while not list((tmp_path / "killed").glob("tiny/rl-*/checkpoints/step_2/COMPLETE")):
        assert time.monotonic() < deadline and job.poll() is None, "the run did not reach step 2"
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    (stage,) = (tmp_path / "killed" / "tiny").glob("rl-*")
    assert not (stage / "DONE").is_file()
    written = (stage / "reference_by_prompt.json").stat().st_mtime_ns
    assert finish(command, tmp_path / "killed") == stage
    assert without_clock(stage) == rows
    assert (stage / "reference_by_prompt.json").stat().st_mtime_ns == written


@SLOW
@pytest.mark.timeout(600)
def test_a_step_that_scores_nothing_first_still_shows_how_far_learner_and_pool_are_apart(made, tmp_path):
    settings = (
        "rl.steps=2",
        "rl.skip_scoring=true",
        "rl.loss.importance=null",
        "rl.depth_penalty.credit=answer",
        f"runs={tmp_path}",
    )
    rows = read_metrics(finish([*made, *settings], tmp_path) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["logprob_diff"] < 1e-4 and row["exit_logprob_diff"] < 1e-4
        assert row["kl_to_reference"] == row["kl_exact"] > 0 and row["grad_norm"] > 0
        # What only a pass before the update could tell.
        assert "token_entropy" not in row


COUNTED = """
import sys
from ee_megatron import cli
from ee_megatron.training import reinforce

reinforce.return_freed = lambda: print("memory given back", file=sys.stderr)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.timeout(300)
def test_the_learner_gives_back_what_a_step_has_freed(made, tmp_path):
    """On a CPU, where the pool works next on the same machine; one rank is the command's own process."""
    settings = ("rl.steps=2", "parallel.pipeline=1", f"runs={tmp_path}")
    command = [sys.executable, "-c", COUNTED, *made, *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("memory given back") == 2


@pytest.mark.timeout(300)
def test_a_terminated_stage_beside_ray_ends_as_any_process_does(made, tmp_path):
    """Ray takes TERM for itself, to print the C++ stack and abort. Its processes end with the stage, its
    agents when they next look for their raylet, which may take them a minute."""
    settings = ("parallel.pipeline=1", "rollout.backend=ray", "rollout.actors=1", "rl.steps=500", f"runs={tmp_path}")
    job, deadline = Command([*made, *settings]), time.monotonic() + 200
    while not any(path.stat().st_size for path in tmp_path.glob("tiny/rl-*/metrics.jsonl")):
        assert time.monotonic() < deadline and job.poll() is None, "the run did not reach step 1"
        time.sleep(0.1)
    children = [child for child in psutil.Process(job.pid).children(recursive=True) if "Agent" not in child.name()]
    assert any("Replica" in child.name() for child in children)
    job.send_signal(signal.SIGTERM)
    output = "".join(job.communicate(timeout=60))
    assert job.returncode == -signal.SIGTERM and "SIGTERM" not in output, output[-2000:]
    assert not psutil.wait_procs(children, timeout=30)[1]
