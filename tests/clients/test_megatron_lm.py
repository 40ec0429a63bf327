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

from ee_megatron.checkpoint.convert import main
from ee_megatron.checkpoint.manifest import tensor_sha256
from ee_megatron.families.hf_directory import HFDirectory
from tests.tiny import tiny_hf

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(os.environ.get("MEGATRON_LM", ROOT / ".venv-peers" / "Megatron-LM")).resolve()
GET = "git clone --depth 1 --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM .venv-peers/Megatron-LM"
pytestmark = pytest.mark.skipif(
    not (SOURCE / "megatron" / "training" / "checkpointing.py").is_file(),
    reason=f"{SOURCE}: no Megatron-LM there; run: {GET} (or set MEGATRON_LM)",
)
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
# family -> settings that Megatron-LM's arguments have no place for in the checkpoint, so that they are flags.
MODELS = {
    "llama": (True, []),
    "qwen2": (False, []),
    "qwen3": (False, ["--qk-layernorm"]),
}


def convert(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


def hashes(folder: Path) -> dict[str, str]:
    source = HFDirectory(folder)
    return {name: tensor_sha256(source.tensor(name)) for name in source.names()}


@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_lm_loads_an_import_strictly_and_what_it_saves_comes_back(tmp_path, tensor):
    flags = {}
    for family, (tied, more) in MODELS.items():
        base = tiny_hf(family, tmp_path / family, tied=tied, layers=3, rms_norm_eps=1e-5)
        out = tmp_path / f"{family}-mc"
        convert("import", "--hf", base, "--out", out, "--exit-depths", "1,2", "--rank", 2)
        where = ["--load", str(out), "--save", str(tmp_path / f"{family}-saved"), "--no-save-optim"]
        degrees = ["--tensor-model-parallel-size", str(tensor)]
        flags[family] = [*where, *LOAD, *more, "--norm-epsilon", "1e-5", *degrees, *ON_CPU, *BATCH]
    tokens = torch.randint(0, 130, (2, 24), generator=torch.Generator().manual_seed(0))
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"models": flags, "tokens": tokens.tolist()}))
    run_ranks(job, tensor)
    for family in MODELS:
        base = tmp_path / family
        found = torch.load(tmp_path / f"{family}.pt")
        assert found["iteration"] == 0 and "successfully loaded checkpoint" in found["said"]
        assert found["warned"] == []
        # Its own words for: no arguments in the checkpoint, parameters that don't fit.
        for complaint in ("WARNING", "could not find", "load_return"):
            assert complaint not in found["said"], found["said"]
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(tokens).logits
        assert (found["logits"][..., :130] - expected).norm() / expected.norm() <= 1e-6
        saved, back = tmp_path / f"{family}-saved", tmp_path / f"{family}-back"
        assert (saved / "latest_checkpointed_iteration.txt").read_text() == "10"
        convert("import", "--megatron", saved, "--config", base, "--out", back)
        convert("export", "--checkpoint", back, "--out", tmp_path / f"{family}-hf", "--gates", "drop")
        assert hashes(tmp_path / f"{family}-hf") == hashes(base)


def run_ranks(job: Path, world: int) -> None:
    path = os.pathsep.join(map(str, (SOURCE, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(__file__).with_name("megatron_lm_rank.py")), str(job)]
    logs = [job.with_name(f"rank{rank}.log") for rank in range(world)]
    ranks = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log.open("w"), stderr=-2
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
