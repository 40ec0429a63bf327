"""GPUs that are asked for and not there: one line from the command line, before anything is read or made.

torch here is a CPU build and there is no card: what another machine's torch would answer is patched in, and a script
stands in for nvidia-smi.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from ee_megatron import cli
from ee_megatron.config import device as module
from ee_megatron.config.config_paths import find_config_dir, list_groups
from ee_megatron.config.device import asks_for_gpus, pick_device, pick_dtype, require_compiler
from ee_megatron.config.load import load
from ee_megatron.config.schema import RolloutConfig
from ee_megatron.planning.plan import element_bytes
from ee_megatron.rollout.pool.interface import ReplicaSettings
from ee_megatron.rollout.pool.ray_pool import Replica
from tests.processes import ee_megatron
from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
CARDS = "".join(f"GPU {n}: NVIDIA H100 80GB HBM3 (UUID: GPU-{n})\n" for n in range(8))
SLICES = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\n" + "".join(
    f"  MIG 1g.10gb     Device  {n}: (UUID: MIG-{n})\n" for n in range(7)
)
SUMMARY = "| NVIDIA-SMI 470.82.01    Driver Version: 470.82.01    CUDA Version: {}     |"


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """Settings of a stage that has all it needs but GPUs."""
    path = tiny_hf("llama", tmp_path / "model")
    return [f"model.path={path}", f"runs={tmp_path / 'runs'}", "name=x", "teacher=null", "device=cuda"]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU is named and there is no nvidia-smi but a test's own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def smi(folder: Path, listed: str = CARDS, cuda: str = "12.4", script: str = "") -> None:
    """An nvidia-smi on PATH that lists these cards for -L, and a driver otherwise."""
    file = folder / "bin" / "nvidia-smi"
    said = f"if [ \"$1\" = -L ]; then cat <<'END'\n{listed}END\nelse echo '{SUMMARY.format(cuda)}'; fi\n"
    file.write_text(f"#!/bin/sh\n{script or said}")
    file.chmod(0o755)


def torch_of_a_gpu_node(monkeypatch: pytest.MonkeyPatch, cards: int, says: str = "") -> None:
    """torch built for CUDA 12.4 that can use so many cards; with none it `says` why."""

    def init() -> None:
        raise RuntimeError(says)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "init", init)


def refused(captured: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command says besides what it loads, bad input's exit code being shown."""
    assert cli.main(list(arguments)) == 2
    out, err = captured.readouterr()
    said = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert out == "" and len(said) == 1 and said[0].startswith("error: "), err
    return said[0]


def test_cluster_experiments_ask_for_gpus_and_a_cpu_is_asked_for_by_name() -> None:
    names = [name for name in list_groups(find_config_dir())["experiment"] if name.startswith("rl_")]
    assert len(names) >= 4
    for name in names:
        cfg = load([f"experiment={name}"])
        assert cfg.device == "cuda" and asks_for_gpus(cfg)
        assert asks_for_gpus(load([f"experiment={name}", "device=auto"]))
        assert pick_device(load([f"experiment={name}", "device=cpu"]), 8) == "cpu"
    assert not asks_for_gpus(load(["experiment=demo_cpu", "device=auto"]))


@pytest.mark.parametrize("stage", ["traces", "run"])
def test_a_build_for_cpus_is_named_from_a_shell_and_nothing_is_made(stage: str, model: list[str], tmp_path: Path):
    smi(tmp_path)
    done = ee_megatron(stage, *model)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert torch.__version__ in done.stderr and re.search(r"nvidia-smi\D*8\b", done.stderr), done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["", "-1", "NoDevFiles"])
def test_a_variable_that_hides_every_gpu_is_named(name: str, model, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
    said = refused(capsys, "traces", *model, "device=auto", "cluster.gpus_per_node=2")
    assert "device=auto with cluster.gpus_per_node=2" in said and f"CUDA_VISIBLE_DEVICES={name!r}" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("environment", "script", "parts"),
    [
        ({}, "exit 9", ["nvidia-smi", "9"]),
        ({}, "echo 'Failed to initialize NVML'; exit 18", ["nvidia-smi", "Failed to init"]),
        ({}, "exec sleep 60", ["nvidia-smi", "1 s"]),
        ({}, "", ["8 GPU", "No CUDA GPUs are available"]),
        ({"CUDA_VISIBLE_DEVICES": "8"}, "", ["8 GPU", "CUDA_VISIBLE_DEVICES=8"]),
    ],
)
def test_why_torch_finds_no_gpu_is_said(environment, script, parts, model, capsys, monkeypatch, tmp_path) -> None:
    smi(tmp_path, script=script)
    torch_of_a_gpu_node(monkeypatch, 0, "No CUDA GPUs are available. Look elsewhere")
    monkeypatch.setattr(module, "SMI_S", 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = refused(capsys, "traces", *model)
    assert all(part in said for part in [*parts, "device=cuda", "device=cpu"]), said
    assert not (tmp_path / "runs").exists()


def test_a_driver_that_is_older_than_torch_is_named_with_both_versions(model, capsys, monkeypatch, tmp_path) -> None:
    smi(tmp_path, cuda="11.4")
    torch_of_a_gpu_node(monkeypatch, 0, "The NVIDIA driver on your system is too old (found version 11040).")
    said = refused(capsys, "traces", *model)
    assert all(version in said for version in ("470.82.01", "11.4", "12.4")), said
    # Drivers of the same major version run any of its toolkits: nothing to blame there.
    smi(tmp_path, cuda="12.2")
    assert "12.2" not in refused(capsys, "traces", *model)


@pytest.mark.parametrize("command", ["calibrate", "run", "slurm-spec"])
def test_fewer_gpus_than_ranks_are_refused_where_ranks_are_started(command, model, capsys, monkeypatch, tmp_path):
    smi(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    torch_of_a_gpu_node(monkeypatch, 2)
    monkeypatch.setattr("ee_megatron.training.stages.check_inputs", lambda cfg, stage: None)
    words = ["slurm-spec", "calibrate"] if command == "slurm-spec" else [command]
    said = refused(capsys, *words, *model, "parallel.data=4")
    assert re.search(r"\b4\b.*\b2\b.*CUDA_VISIBLE_DEVICES=0,1", said), said
    assert not (tmp_path / "runs").exists()


def test_a_rank_refuses_a_node_with_fewer_gpus_than_ranks_before_it_meets_others(model, capfd, monkeypatch, tmp_path):
    """Node 2 of a job: the launching node was fine."""
    # faulthandler wants a real file for standard error.
    smi(tmp_path)
    torch_of_a_gpu_node(monkeypatch, 1)
    ranks = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "no.where"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ee_megatron.training.stages.check_inputs", lambda cfg, stage: None)
    said = refused(capfd, "calibrate", *model, "parallel.data=16")
    assert re.match(r"error: rank 9 of 16: .*\b8\b.*\b1\b", said), said


@pytest.mark.parametrize("visible", ["", "MIG-1,MIG-2"])
def test_several_ranks_on_mig_slices_are_refused_and_one_is_not(visible, model, capsys, monkeypatch, tmp_path) -> None:
    smi(tmp_path, listed="" if visible else SLICES)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    torch_of_a_gpu_node(monkeypatch, 1)
    monkeypatch.setattr("ee_megatron.training.stages.check_inputs", lambda cfg, stage: None)
    said = refused(capsys, "calibrate", *model, "parallel.data=2")
    assert "MIG" in said
    assert ("CUDA_VISIBLE_DEVICES=MIG-1,MIG-2" if visible else "nvidia-smi -L") in said
    assert pick_device(load(model)) == "cuda"


def test_the_runtimes_count_is_believed_where_the_drivers_is_larger(model, monkeypatch, tmp_path) -> None:
    """Eight cards in MIG mode: the driver lists them, a process can use one slice."""
    smi(tmp_path, listed=SLICES)
    torch_of_a_gpu_node(monkeypatch, 8)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1, raising=False)
    with pytest.raises(ValueError, match="MIG"):
        pick_device(load(model), 8)


@pytest.mark.parametrize("words", [["generate", "--prompt", "x"], ["serve"], ["evaluate"], ["sweep", "rl.seed=1,2"]])
def test_no_command_reads_weights_first(words, model, capsys, monkeypatch, tmp_path: Path) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("ee_megatron.families.hf_directory.HFDirectory.tensor", read)
    monkeypatch.setattr("ee_megatron.training.stages.check_inputs", lambda cfg, stage: None)
    assert torch.__version__ in refused(capsys, words[0], *model, *words[1:])
    assert not (tmp_path / "runs").exists()


def test_actors_without_the_gpus_that_ray_was_to_hand_out_are_refused(model, capsys, monkeypatch) -> None:
    torch_of_a_gpu_node(monkeypatch, 2)
    assert "cluster.gpus_per_node=" in refused(capsys, "slurm-spec", "traces", *model)
    assert cli.main(["slurm-spec", "traces", *model, "cluster.gpus_per_node=2"]) == 0


def test_an_actor_on_a_node_without_gpus_says_so_at_its_first_load(model: list[str]) -> None:
    path = model[0].removeprefix("model.path=")
    replica = Replica(ReplicaSettings(path, None, torch.float32, "cuda", RolloutConfig()))
    with pytest.raises(ValueError, match=r"device=cuda.*torch"):
        replica.load((0, "teacher"), None, 1.0)


def without_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH that has nothing but this test's programs."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.mark.parametrize("command", ["calibrate", "run", "slurm-spec"])
def test_a_gpu_node_without_a_compiler_is_named_before_anything_starts(command, model, capsys, monkeypatch, tmp_path):
    torch_of_a_gpu_node(monkeypatch, 8)
    without_compilers(monkeypatch, tmp_path)
    monkeypatch.setattr("ee_megatron.training.stages.check_inputs", lambda cfg, stage: None)
    words = ["slurm-spec", "calibrate"] if command == "slurm-spec" else [command]
    said = refused(capsys, *words, *model)
    assert "device=cuda" in said and "C compiler" in said and "gcc" in said, said
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in refused(capsys, *words, *model)


def test_a_python_without_its_header_is_named_and_what_only_generates_needs_none(
    model, capsys, monkeypatch, tmp_path: Path
) -> None:
    torch_of_a_gpu_node(monkeypatch, 8)
    monkeypatch.setattr("ee_megatron.training.stages.check_inputs", lambda cfg, stage: None)
    require_compiler(sys.executable, "device=cuda")
    bare = tmp_path / "bin" / "python"
    bare.write_text(f"#!/bin/sh\necho {tmp_path}/include\n")
    bare.chmod(0o755)
    monkeypatch.setattr("ee_megatron.training.preflight.check_vllm", lambda cfg: None)
    vllm = ["rollout=vllm", f"rollout.vllm.python={bare}", "cluster.gpus_per_node=2"]
    said = refused(capsys, "slurm-spec", "traces", *model, *vllm)
    assert "rollout.backend=vllm" in said and f"Python.h in {tmp_path}/include" in said, said
    without_compilers(monkeypatch, tmp_path)
    assert cli.main(["slurm-spec", "traces", *model, "cluster.gpus_per_node=2"]) == 0


def test_gpus_that_are_there_cost_no_look_at_nvidia_smi(model, monkeypatch, tmp_path: Path) -> None:
    smi(tmp_path, script="exec sleep 60")
    torch_of_a_gpu_node(monkeypatch, 4)
    begun = time.monotonic()
    assert pick_device(load(model), 4) == "cuda" and pick_device(load([*model, "device=auto"])) == "cuda"
    assert time.monotonic() - begun < 10
    assert pick_dtype(load(model), "cuda") == torch.bfloat16


def test_a_cpu_is_used_without_a_word_only_where_no_gpu_is_asked_for(model: list[str]) -> None:
    assert pick_device(load([*model, "device=auto"])) == pick_device(load([*model, "device=cpu"]), 9) == "cpu"
    assert pick_dtype(load([*model, "model.dtype=float32"]), "cuda") == torch.float32


@pytest.mark.parametrize("instructions", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_auto_is_bfloat16_on_a_cpu_that_multiplies_it(model: list[str], monkeypatch, instructions: str | None) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions)
    cfg = load([*model, "model.dtype=auto"])
    assert pick_dtype(cfg, "cpu") == (torch.bfloat16 if instructions else torch.float32)
    assert element_bytes(cfg, on_cpu=True) == (2 if instructions else 4)
    assert pick_dtype(cfg, "cuda") == torch.bfloat16 and element_bytes(cfg, on_cpu=False) == 2
