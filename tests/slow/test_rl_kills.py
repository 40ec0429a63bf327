"""SIGKILL of a random rank at twenty random moments of an RL run, its checkpoints included: the same command, started
again each time, ends with the undisturbed run's metrics, rollouts and weights, to the byte."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from test_whole_method import command, only, run

from tests.processes import Command
from tests.tiny import tiny_hf

KILLS = 20
RL = ("rl.steps=40", "rl.checkpoint_every=1", "rl.dump_rollouts=true", "rl.minibatches=4")


def rank_process(parent: int, rank: int) -> int:
    """Process id of a rank: `parent` forks them in their order."""
    return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[rank])


def rows(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.mark.timeout(2400)
def test_twenty_kills(tmp_path):
    tiny_hf("llama", tmp_path / "model")
    run("traces", tmp_path)
    run("calibrate", tmp_path)
    run("rl", tmp_path, *RL)
    straight = tmp_path / "straight"
    target = only(tmp_path, "rl")
    target.rename(straight)

    choice = random.Random(0)
    killed = {0: 0, 1: 0}
    during_save = 0
    while sum(killed.values()) < KILLS:
        job = Command(command("rl", tmp_path, *RL))
        before, deadline = rows(target / "metrics.jsonl"), time.monotonic() + 180
        # One step at least has to be won back, or the run would never end.
        while rows(target / "metrics.jsonl") <= before:
            if job.poll() is not None:
                break
            assert time.monotonic() < deadline, "no step within three minutes"
            time.sleep(0.005)
        if job.poll() is not None:
            break
        time.sleep(choice.uniform(0, 0.6))
        rank = choice.randrange(2)
        try:
            os.kill(rank_process(job.pid, rank), signal.SIGKILL)
        except (IndexError, ProcessLookupError, FileNotFoundError):
            break
        killed[rank] += 1
        during_save += any((target / "checkpoints").glob(".*"))
        assert job.wait(timeout=60) != 0
    run("rl", tmp_path, *RL)
    print(f"killed {killed}, of these {during_save} while a checkpoint was being written")
    assert sum(killed.values()) == KILLS, (killed, job.stderr[-2000:])
    assert (target / "DONE").is_file()
    assert (target / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    steps = sorted(p.name for p in (straight / "rollouts").iterdir())
    assert sorted(p.name for p in (target / "rollouts").iterdir()) == steps and len(steps) == 40
    for step in steps:
        for file in ("rollouts.jsonl", "rollouts.safetensors"):
            left, right = (folder / "rollouts" / step / file for folder in (straight, target))
            assert left.read_bytes() == right.read_bytes(), f"{step}/{file}"
    prompts = [
        json.loads(line)["prompt"]["id"]
        for step in sorted(steps, key=lambda name: int(name.split("_")[1]))
        for line in (target / "rollouts" / step / "rollouts.jsonl").read_text().splitlines()[::2]
    ]
    known = len(set(prompts))
    assert all(len(set(prompts[i : i + known])) == known for i in range(0, len(prompts) - known, known))
    left, right = (folder / "checkpoints" / "step_40" / "policy.safetensors" for folder in (straight, target))
    assert left.read_bytes() == right.read_bytes()
