"""The job scripts from submission to results, on a real Slurm of several nodes."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

SECONDS = 240


@pytest.mark.timeout(600)
def test_each_stage_goes_by_the_command_that_a_dry_run_prints(site):
    """Traces, calibration, RL on two nodes, evaluation: each with the script and options that the plan names."""
    # Without rollouts one step ahead, whose log-probabilities are those of older weights.
    settings = site.settings("method", "rl.steps=3", "rl.depth_penalty.weight=0.3", "rl.dump_rollouts=true",
                             "rollout.max_staleness=0")  # fmt: skip
    # The experiment's other splits follow from its stages: rollout node only, learner node only, both.
    for stage, script, nodes in [
        ("traces", "slurm/traces_7b.sh", 1), ("calibrate", "slurm/calibrate_7b.sh", 1), ("rl", "slurm/rl_7b.sh", 2),
        ("evaluate", "slurm/eval.sh", 1),
    ]:  # fmt: skip
        command = site.planned(stage, *settings)
        assert command[0] == "sbatch" and script in command and f"--nodes={nodes}" in command
        job = site.submit(command)
        found = site.end(job, SECONDS)
        assert found["JobState"] == "COMPLETED" and found["NumNodes"] == str(nodes), site.everything(job)
        assert (site.directory("method", stage) / "DONE").is_file()
        assert f"{stage}: finished; results in {site.directory('method', stage)}" in site.log(job)

    directory = site.directory("method")
    assert OmegaConf.load(directory / "config.yaml").rl.depth_penalty.weight == 0.3
    rows = site.rows("method")
    assert [row["step"] for row in rows] == [1, 2, 3]
    # The price starts where it is set, and then follows the accuracy that is to be kept.
    assert rows[0]["lambda"] == 0.3
    for row in rows:
        assert row["logprob_diff"] < 1e-5 and row["actors_alive"] == 1 and row["accuracy_goal"] < 1
    (logs,) = (directory / "slurm").iterdir()
    # The token is gone.
    names = ["rank-0.log", "rank-1.log", "ray-node1.log", "ray-node2.log"]
    assert sorted(file.name for file in logs.iterdir()) == names
    results = json.loads((site.directory("method", "evaluate") / "results.json").read_text())
    assert {row["model"] for row in results["rows"]} == {"teacher", "calibrated", "reinforced"}

    # The same once more starts nothing.
    job = site.submit(site.planned("rl", *settings))
    assert site.end(job, 60)["JobState"] == "COMPLETED" and "finished before" in site.log(job)


# Four of a node's sixteen cores for each of two ranks; Ray, beside them, is to have the eight of the job.
WHOLE = """#!/bin/bash
. slurm/common.sh || exit 2
prepare
srun --ntasks=2 --ntasks-per-node=2 --overlap bash -c 'echo "rank $SLURM_CPUS_PER_TASK"'
"${whole_node[@]}" bash -c 'echo "ray $SLURM_CPUS_ON_NODE of GPUs $CUDA_VISIBLE_DEVICES"'
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "cores", [["--cpus-per-task=4", "--mem=0"], ["--cpus-per-gpu=4"], ["--gpus-per-node=h100:2", "--cpus-per-gpu=4"]]
)
def test_rays_step_has_every_core_of_the_job_on_its_node(cores, site):
    script = site.folder / "whole.sh"
    script.write_text(WHOLE)
    job = site.submit(["sbatch", "--ntasks-per-node=2", "--gpus-per-node=2", *cores, str(script)])
    assert site.end(job, 60)["JobState"] == "COMPLETED", site.everything(job)
    lines = sorted(site.log(job).split("\n"))
    assert "ray 8 of GPUs 0,1" in lines and lines.count("rank 4") == (2 if "--mem=0" in cores else 0), lines


@pytest.mark.timeout(400)
def test_an_array_runs_one_value_per_task(site):
    settings = site.rl(
        "sweep", "parallel.pipeline=1", "rollout=local", "cluster.nodes=1", "cluster.rollout_nodes=0", "rl.steps=1",
        "parallel.recompute=false",
    )  # fmt: skip
    job = site.submit(
        ["sbatch", "--array=0-2", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "slurm/sweep.sh", "rl",
         "rl.depth_penalty.weight=0.25,0.75", "experiment=rl_7b", *settings]
    )  # fmt: skip
    states = [site.end(f"{job}_{task}", SECONDS)["JobState"] for task in range(3)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    found = {row["lambda"] for file in (site.folder / "runs" / "sweep").glob("rl-*/metrics.jsonl")
             for row in map(json.loads, file.read_text().splitlines())}  # fmt: skip
    assert found == {0.25, 0.75}
    assert "there are 2 values; use --array=0-1" in "".join(f.read_text() for f in site.folder.glob("*.log"))


REFUSED = {
    "model": (["--nodes=2", "--gpus-per-node=2"], ["model.path=/nowhere"], "model.path=/nowhere: no config.json there"),
    "GPUs": (["--nodes=2", "--gpus-per-node=1"], [], "this job has 2 node(s) with 1 GPU(s) each, the settings need 2"),
    "nodes": (["--nodes=1", "--gpus-per-node=2"], [], "submit with sbatch --nodes=2 --ntasks-per-node=2"),
    "typo": (["--nodes=2", "--gpus-per-node=2"], ["rl.lamda_exit=1"], "did you mean rl.depth_penalty.weight?"),
    "device": (["--nodes=2", "--gpus-per-node=2"], ["device=cuda"], "device=cuda with cluster.gpus_per_node=2 on node"),
    "layout": (["--nodes=2", "--gpus-per-node=2"], ["parallel.data=2"], "4 ranks, but 1 learner node(s)"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_run_says_so_within_a_minute_and_fails(what, site):
    options, extra, says = REFUSED[what]
    command = ["sbatch", "--ntasks-per-node=2", *options, "slurm/rl_7b.sh"]
    job = site.submit([*command, *site.rl("refused"), *extra])
    found = site.end(job, 60)
    assert found["JobState"] == "FAILED" and found["ExitCode"] == "2:0", site.everything(job)
    lines = [line for line in site.log(job).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0], site.log(job)
    assert not (site.folder / "runs" / "refused").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--partition=nowhere"], "invalid partition"), (["--gpus-per-node=9"], "not available"),
        (["--gpus-per-node=a100:2"], "not available"), (["--gres=gpu:h100:2"], "Invalid GRES"),
    ],
)  # fmt: skip
def test_what_the_cluster_lacks_is_refused_at_submission(options, says, site):
    with pytest.raises(RuntimeError) as caught:
        site.submit(["sbatch", "slurm/rl_7b.sh", *site.rl("refused")], *options)
    assert says in str(caught.value)
    assert site.queue() == []
