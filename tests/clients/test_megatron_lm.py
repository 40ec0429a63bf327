"""Megatron-LM goes on from an import, and what it saves comes back: its own `load_checkpoint` and `save_checkpoint`.

Its source isn't a package. It is looked for where MEGATRON_LM says, else in .venv-peers/Megatron-LM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ee_megatron.checkpoint.store import tensor_sha256
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from tests.tiny import tiny_hf

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(os.environ.get("MEGATRON_LM", ROOT / ".venv-peers" / "Megatron-LM")).resolve()
GET = "git clone --depth 1 --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM .venv-peers/Megatron-LM"
pytestmark = [
    pytest.mark.skipif(
        not (SOURCE / "megatron" / "training" / "checkpointing.py").is_file(),
        reason=f"{SOURCE}: no Megatron-LM there; run: {GET} (or set MEGATRON_LM)",
    ),
    pytest.mark.timeout(1200),
]
# As docs/conversion.md has them. Training further needs data and an optimizer's settings besides.
LOAD = [
    "--use-checkpoint-args", "--ckpt-format", "torch_dist", "--dist-ckpt-strictness", "raise_unexpected",
    "--make-vocab-size-divisible-by", "1", "--no-load-optim", "--no-load-rng",
]  # fmt: skip
# What a GPU has and a CPU doesn't, and a batch, without which the arguments aren't valid.
ON_CPU = [
    "--transformer-impl", "local", "--use-cpu-initialization", "--no-masked-softmax-fusion", "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion", "--no-gradient-accumulation-fusion", "--no-rope-fusion", "--no-persist-layer-norm",
    "--distributed-backend", "gloo", "--no-ckpt-fully-parallel-save",
    "--no-create-attention-mask-in-dataloader",
]  # fmt: skip
BATCH = ["--micro-batch-size", "1", "--global-batch-size", "2", "--seq-length", "64", "--train-iters", "1"]
BATCH += ["--lr", "1e-4", "--save-interval", "10"]
# What Megatron-LM keeps no argument of in a checkpoint.
FLAGS = {"llama": [], "qwen2": [], "qwen3": ["--qk-layernorm"], "smollm3": ["--no-rope-freq", "2"]}
MODELS = {f"{family}-{kind}": (family, kind == "tied") for family in FLAGS for kind in ("tied", "untied")}


def convert(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


def hashes(folder: Path) -> dict[str, str]:
    source = HFDirectory(folder)
    return {name: tensor_sha256(source.tensor(name)) for name in source.names()}


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
def test_megatron_lm_loads_an_import_strictly_and_what_it_saves_comes_back(tmp_path, tensor, pipeline):
    flags = {}
    degrees = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]
    for name, (family, tied) in MODELS.items():
        base = tiny_hf(family, tmp_path / name, tied=tied, layers=4, rms_norm_eps=1e-5)
        out = tmp_path / f"{name}-mc"
        convert("import", "--hf", base, "--out", out, "--exit-depths", "1,2")
        where = ["--load", str(out), "--save", str(tmp_path / f"{name}-saved"), "--no-save-optim"]
        flags[name] = [*where, *LOAD, *FLAGS[family], "--norm-epsilon", "1e-5", *degrees, *ON_CPU, *BATCH]
    tokens = torch.randint(0, 130, (2, 24), generator=torch.Generator().manual_seed(0))
    job = tmp_path / "job.json"
    sizes = {"tensor": tensor, "pipeline": pipeline}
    job.write_text(json.dumps({"models": flags, "tokens": tokens.tolist(), "degrees": sizes}))
    run_ranks(job)
    for name in MODELS:
        base = tmp_path / name
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(tensor * pipeline)]
        said = "".join(found["said"] for found in ranks)
        assert "successfully loaded checkpoint" in ranks[0]["said"]
        assert [found["warned"] for found in ranks] == [[]] * len(ranks)
        assert {found["iteration"] for found in ranks} == {0}
        # Its own words for: no arguments in the checkpoint, parameters that don't fit.
        for complaint in ("WARNING", "could not find", "load_return"):
            assert complaint not in said, said
        assert [found["layers"] for found in ranks] == [4 // pipeline] * len(ranks)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(tokens).logits
        assert (ranks[-1]["logits"][..., :130] - expected).norm() / expected.norm() <= 1e-6
        saved, back = tmp_path / f"{name}-saved", tmp_path / f"{name}-back"
        assert (saved / "latest_checkpointed_iteration.txt").read_text() == "10"
        convert("import", "--megatron", saved, "--config", base, "--out", back)
        convert("export", "--checkpoint", back, "--out", tmp_path / f"{name}-hf", "--gates", "drop")
        assert hashes(tmp_path / f"{name}-hf") == hashes(base)


def run_ranks(job: Path) -> None:
    path = os.pathsep.join(map(str, (SOURCE, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(__file__).with_name("megatron_lm_rank.py")), str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
