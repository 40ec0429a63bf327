"""One Slurm for all tests of this folder, and a tiny model with a policy to begin from."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ee_megatron.config.derive import policy_spec, read_dims
from ee_megatron.config.load import load
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.observe.metrics import read_metrics
from ee_megatron.policy import initial_policy, save_policy
from tests.tiny import tiny_hf
from tools import mini_slurm

ROOT = Path(__file__).parents[3]
# The 7B run's script with everything that a CPU needs otherwise; two ranks of one pipeline, as many fake GPUs per node.
TINY = [
    "device=cpu", "model.dtype=float32", "task=arithmetic", "task.validation=6", "task.evaluation=8",
    "parallel.tensor=1", "parallel.data=1", "parallel.tokens_per_micro_batch=128", "exits.depths=[2,3,4]",
    "adapter.rank=4", "traces.problems=16", "calibrate.epochs=1", "calibrate.exit_samples=1", "calibrate.batch_size=8",
    "rl.prompts_per_step=4", "rl.group_size=2", "rl.loss.overlong=verdict", "rl.depth_penalty.target.window=1",
    "rl.loss.drop_equal_groups=false", "rollout.prompt_template=plain", "rollout.max_new_tokens=8",
    "rollout=ray", "rollout.actors=1", "rollout.threads=1", "evaluate.thresholds=[0.5]", "evaluate.answers=3",
    "tracker.wandb=disabled", "cluster.gpus_per_node=2",
]  # fmt: skip
LARGEST_ARRAY = 12
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")


class Site:
    """The cluster as a user has it: settings that every job shares, submission, logs, results."""

    def __init__(self, cluster: mini_slurm.MiniSlurm, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.model = tiny_hf("llama", folder / "model")
        self.start = folder / "start"
        cfg = load(["experiment=rl_7b", *TINY, f"model.path={self.model}"])
        source = HFDirectory(self.model)
        spec = policy_spec(cfg, read_dims(cfg))
        self.start.mkdir()
        save_policy(self.start, spec, initial_policy(source.dims, spec, 0, source.tensor))

    def settings(self, name: str, *extra: str) -> list[str]:
        return [*TINY, f"name={name}", f"model.path={self.model}", f"runs={self.folder / 'runs'}", *extra]

    def rl(self, name: str, *extra: str) -> list[str]:
        """Settings of an RL run from the ready-made policy."""
        return self.settings(name, f"init_policy={self.start}", *extra)

    def planned(self, stage: str, *overrides: str) -> list[str]:
        """The sbatch command that a dry run prints for a stage of the 7B run."""
        done = subprocess.run(
            [sys.executable, "-m", "ee_megatron.cli", stage, "experiment=rl_7b", *overrides, "--dry-run"],
            capture_output=True, text=True, timeout=120, cwd=ROOT, check=True,
        )  # fmt: skip
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("# command: ")]
        return shlex.split(line.removeprefix("# command: "))

    def submit(self, command: list[str], *options: str) -> str:
        """Run an sbatch command with further options -> the job's number. What the job says goes to <number>.log."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "SBATCH_OUTPUT": str(self.folder / "%j.log"),
            "OMP_NUM_THREADS": "1",
            "EE_SITE_ENV": "no site file",
        }
        # Of two of the same options the later one counts.
        script = next(i for i, part in enumerate(command) if part.endswith(".sh"))
        line = [command[0], "--parsable", *command[1:script], *options, *command[script:]]
        return self.cluster.run(*line, cwd=ROOT, environment=environment).stdout.strip()

    def log(self, job: str) -> str:
        file = self.folder / f"{job}.log"
        return file.read_text() if file.is_file() else "(no log)"

    def end(self, job: str, timeout: float) -> dict[str, str]:
        """Wait for a job's end; what Slurm says of it."""
        try:
            found = self.cluster.wait(job, lambda found: found["JobState"] in ENDED, timeout)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.cluster.job(job)}\n{self.everything(job)}") from None
        # Slurm may still be collecting the job's processes.
        mini_slurm.until(lambda: job not in self.queue(), 60, f"job {job} to leave the queue")
        return found

    def queue(self) -> list[str]:
        return self.cluster.run("squeue", "--noheader", "--format=%A").stdout.split()

    def directory(self, name: str, stage: str = "rl") -> Path:
        (found,) = (self.folder / "runs" / name).glob(f"{stage}-*")
        return found

    def rows(self, name: str) -> list[dict]:
        """An RL run's metrics so far."""
        files = list((self.folder / "runs" / name).glob("rl-*/metrics.jsonl"))
        return read_metrics(files[0]) if files else []

    def reach(self, name: str, job: str, step: int, timeout: float = 420) -> None:
        """Wait until an RL run has done so many steps."""

        def done() -> bool:
            state = self.cluster.job(job)["JobState"]
            assert state not in ENDED, f"{state} before step {step}\n{self.everything(job)}"
            return len(self.rows(name)) >= step

        try:
            mini_slurm.until(done, timeout, f"step {step} of {name}", pause=0.3)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.everything(job)}") from None

    def strays(self) -> list[str]:
        """Processes of jobs, with the nodes they are on."""
        daemons = ("slurmctld", "slurmd", "munged", "slurmscriptd")
        found = []
        for _, node, command in self.cluster.processes():
            # A daemon's title may say more than its name: "slurmctld: slurmscriptd".
            if not any(name in command[0] for name in daemons) and "_first" not in command:
                found.append(f"{node}: {' '.join(command)[:150]}")
        return found

    def no_strays(self, timeout: float = 20) -> None:
        """Wait for the end of all processes of jobs."""
        try:
            mini_slurm.until(lambda: not self.strays(), timeout, "the end of all processes of jobs")
        except TimeoutError as error:
            raise AssertionError(f"{error}; left: {self.strays()}") from None

    def everything(self, job: str) -> str:
        """All logs of a job, for a failing test's message."""
        parts = [self.log(job)[-3000:]]
        for file in sorted((self.folder / "runs").glob(f"*/*/slurm/{job}.*/*.log")):
            parts.append(f"--- {file.name}\n{file.read_text()[-2500:]}")
        return "\n".join(parts)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    mini_slurm.install()
    lacking = mini_slurm.missing()
    if lacking:
        pytest.skip(f"no Slurm on this machine: it needs {'; '.join(lacking)}")
    folder = tmp_path_factory.mktemp("slurm")
    with mini_slurm.MiniSlurm(folder / "cluster", nodes=3, gpus=2, largest_array=LARGEST_ARRAY) as cluster:
        yield Site(cluster, folder)


@pytest.fixture(autouse=True)
def tidy(site: Site) -> Iterator[None]:
    """After every test no job and no process of one is left."""
    yield
    site.cluster.run("scancel", "--state=PENDING")
    site.cluster.run("scancel", "--state=RUNNING")
    mini_slurm.until(lambda: not site.queue(), 60, "an empty queue")
    site.no_strays()
