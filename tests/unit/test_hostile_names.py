"""Nothing that settings, site files or a job's answers say is run by a shell: a canary's file never appears."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from ee_megatron import cli
from ee_megatron.config.load import load
from ee_megatron.training.launch import describe_job
from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
ANSWER = {
    "nodes": "1", "learner_nodes": "1", "ranks": "1", "ranks_per_node": "1", "rollout_nodes": "0", "ray_cpus": "1",
    "ray_gpus": "0,1", "start_timeout_s": "180", "directory": "/tmp", "requeue_limit": "3", "done": "yes",
}  # fmt: skip
TOUCH = "touch CANARY"


def shell(folder: Path, script: str, answer: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A job script's functions in a directory of their own, where `srun ... ee-megatron slurm-spec` says `answer`."""
    (folder / "answer").write_text(answer)
    (folder / "bin").mkdir(exist_ok=True)
    for name, says in (("srun", f"cat {folder}/answer"), ("scontrol", "echo node1"), ("ee-megatron", ":")):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{says}\n")
        (folder / "bin" / name).chmod(0o755)
    if not (folder / "slurm").exists():
        (folder / "slurm").symlink_to(ROOT / "slurm")
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "EE_SITE_ENV": str(folder / "site.env")}
    path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", f". slurm/common.sh || exit 2; {script}"], cwd=folder, capture_output=True, text=True,
        timeout=60, env={**os.environ, **given, "PATH": path, **environment}, check=False,
    )  # fmt: skip


def no_canary(folder: Path) -> bool:
    return not list(folder.rglob("*CANARY*")) and not (ROOT / "CANARY").exists()


def lines(**changed: str) -> str:
    return "".join(f"{key}={value}\n" for key, value in {**ANSWER, **changed}.items())


def test_a_job_that_answers_as_it_should_is_read(tmp_path: Path) -> None:
    done = shell(tmp_path, "run_stage rl", f"a module speaks\n{lines()}")
    assert done.returncode == 0 and "/tmp" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        *((lines(**{key: f"a[$({TOUCH})]"}), key) for key in ANSWER if key != "directory"),
        (lines(directory="x\nrollout_nodes=a[$(touch CANARY)]"), "directory"),
        (lines() + f"ranks=b[`{TOUCH}`]\n", "ranks"),
        (lines() + "ranks=2\n", "ranks"),
        (lines(done="no").replace("requeue_limit=3\n", ""), "requeue_limit"),
    ],
)
def test_a_forged_answer_is_refused_and_not_run(answer: str, says: str, tmp_path: Path) -> None:
    done = shell(tmp_path, "run_stage rl", answer)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert no_canary(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("SLURM_JOB_ID", f"a[$({TOUCH})]"), ("SLURM_RESTART_COUNT", f"a[$({TOUCH})]"), ("SLURM_JOB_ID", f"1;{TOUCH}")],
)
def test_numbers_of_the_environment_are_numbers(name: str, value: str, tmp_path: Path) -> None:
    done = shell(tmp_path, "run_stage rl", lines(), **{name: value})
    assert done.returncode == 2 and name in done.stderr and no_canary(tmp_path)


def test_values_of_a_site_file_are_not_run(tmp_path: Path) -> None:
    """The file itself is the site's own shell; what it sets is data."""
    names = ("EE_CONTAINER_IMAGE", "EE_CONTAINER_MOUNTS", "EE_SCRATCH", "EE_INTERFACE", "OMP_NUM_THREADS")
    (tmp_path / "site.env").write_text("".join(f"export {name}='x;{TOUCH};$({TOUCH})`{TOUCH}`'\n" for name in names))
    shell(tmp_path, "run_stage rl", lines())
    shell(tmp_path, "prepare; read_job rl; EE_RAY_TEMP=$EE_SCRATCH; logs=$PWD; start_ray; start_ranks rl", lines())
    assert no_canary(tmp_path)


def test_the_array_script_reads_a_number(tmp_path: Path) -> None:
    environment = {"SLURM_ARRAY_TASK_ID": f"a[$({TOUCH})]", "SLURM_SUBMIT_DIR": str(tmp_path)}
    shell(tmp_path, ":", lines())
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "sweep.sh"), "rl", f"rl.seed=$({TOUCH}),1"], cwd=tmp_path, capture_output=True,
        text=True, timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 2 and "SLURM_ARRAY_TASK_ID" in done.stderr and no_canary(tmp_path)


@pytest.mark.parametrize("words", [["$(touch CANARY)", "1", "", "5"], ["worker", "1", "", f"a[$({TOUCH})]"],
                                   ["worker", f"a[$({TOUCH})]", "", "5"]])  # fmt: skip
def test_rays_script_reads_numbers(words: list[str], tmp_path: Path) -> None:
    shell(tmp_path, ":", lines())
    done = subprocess.run(
        [str(ROOT / "slurm" / "ray_node.sh"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, "EE_RAY_HEAD": f"127.0.0.1:$({TOUCH})"},
    )  # fmt: skip
    assert done.returncode == 2 and "head|worker CPUS GPUS SECONDS" in done.stderr and no_canary(tmp_path)


def test_a_line_end_cannot_get_into_a_jobs_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a setting, and not by the name of the directory that all happens in."""
    model = tiny_hf("llama", tmp_path / "model")
    settings = ["name=x", f"model.path={model}", "teacher=null", "device=cpu", "runs=runs"]
    inside = tmp_path / "x\nrollout_nodes=a[$(touch CANARY)]"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(ValueError, match="directory="):
        describe_job(load(settings), "traces", {})


HOSTILE = ["x;touch CANARY", "$(touch CANARY)", "-x", "x" * 101]


def test_a_sweeps_name_is_a_name_wherever_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fixed = ["sweep", "model.path=none", "rollout=local", "rl.depth_penalty.weight=0,1", "runs=runs"]
    for number, name in enumerate([*HOSTILE, "x\n#SBATCH --wrap=x\ntouch CANARY #"]):
        file = tmp_path / "grid.yaml"
        # JSON is YAML: a line end, too.
        file.write_text(json.dumps({"settings": {"name": name}}))
        executor = ["--executor", ("local", "slurm")[number % 2]]
        for form in ([f"sweep={file}"], [f"--name={name}"]):
            assert cli.main([*fixed, *form, *executor]) == 2
            said = capsys.readouterr().err
            assert said.startswith("error: ") and re.search(r"\bname=", said), said
    assert cli.main([*fixed, "--name=x", "runs=a\u2028b"]) == 2
    assert "runs=a" in capsys.readouterr().err
    assert cli.main([*fixed, "--name=x", "runs='a\u200bb'"]) == 2
    assert "runs='a\\u200bb'" in capsys.readouterr().err
    assert no_canary(tmp_path) and not (tmp_path / "runs").exists()


def test_an_option_of_sbatch_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("comment=x\ntouch CANARY", "a b=1", "=1", "comment", "x\ny=1"):
        assert cli.main(["sweep", "experiment=demo_cpu", "rl.steps=1,2", "--executor", "slurm", "--slurm", option]) == 2
        assert f"--slurm {option!r}" in capsys.readouterr().err
