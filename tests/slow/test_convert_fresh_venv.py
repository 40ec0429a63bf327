"""The exported model where only transformers and torch are installed: a virtual environment of its own, made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout.engine.decoder import Decoder
from tests.tiny import ONE_EACH, tiny_hf

DEMO = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
USER = """
import json, sys
from importlib.metadata import distributions
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

installed = {d.metadata["Name"].lower() for d in distributions()}
worst = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    case = load_file(folder + ".case.safetensors")
    with torch.no_grad():
        logits = model(case["ids"], exit_depths=case["depths"]).logits
    # Random prompts hold the padding token, too; it is meant.
    options = {"max_new_tokens": case["made"].shape[1], "do_sample": False, "eos_token_id": None}
    made = model.generate(case["ids"], attention_mask=torch.ones_like(case["ids"]), **options)
    worst[folder] = [
        float((logits - case["logits"]).abs().max() / case["logits"].abs().max()),
        torch.equal(made[:, case["ids"].shape[1]:], case["made"]),
        torch.equal(model.last_exit_depths, case["exits"]),
    ]
print(json.dumps({"worst": worst, "installed": sorted(installed)}))
"""


@torch.no_grad()
def greedy(decoder: Decoder, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's own greedy text of every row, exiting at the first hazard over one half, and the depths taken."""
    depths = torch.full_like(ids, decoder.layout.num_layers)
    start = ids.shape[1]
    for step in range(count):
        lengths = torch.full((len(ids),), ids.shape[1])
        if step:
            depths = torch.cat([depths, torch.full((len(ids), 1), decoder.layout.num_layers)], dim=1)
            _, residuals = decoder.forward_with_residuals(ids, lengths, depths)
            for index in reversed(range(len(decoder.layout.depths))):
                fires = torch.sigmoid(decoder.gate_logit(index, residuals[index][:, -1])).reshape(-1) > 0.5
                depths[fires, -1] = decoder.layout.depths[index]
        hidden = decoder.forward_parallel(ids, lengths, depths)
        ids = torch.cat([ids, decoder.readout(hidden[:, -1]).argmax(-1, keepdim=True)], dim=1)
    return ids[:, start:], depths[:, start - 1 :]


def make_case(base: Path, out: Path, scale: float) -> None:
    """An embedded export and, beside it, what the decoder says: logits under random exits, greedy text, its depths."""
    source = HFDirectory(base)
    layers = source.dims.num_layers
    spec = PolicySpec(layers, (layers // 3, layers // 2, layers - 1), rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    shapes = spec.tensor_shapes(source.dims)
    tensors = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    export_hf(base, (spec, tensors), out, dtype="float32")
    decoder = Decoder.from_hf(base, spec, torch.float32, "cpu")
    decoder.load_policy(tensors)
    ids = torch.randint(0, min(1000, source.dims.vocab), (3, 17), generator=generator)
    outcomes = torch.tensor(spec.layout.outcomes)
    depths = outcomes[torch.randint(0, len(outcomes), ids.shape, generator=generator)]
    logits = decoder.readout(decoder.forward_parallel(ids, torch.full((3,), 17), depths)).clone()
    made, exits = greedy(decoder, ids, 16)
    assert len(exits[:, 1:].unique()) > 1
    case = {"ids": ids, "depths": depths, "logits": logits, "made": made.contiguous(), "exits": exits.contiguous()}
    save_file(case, f"{out}.case.safetensors")


@pytest.mark.timeout(1200)
def test_export_equals_the_decoder_in_a_fresh_environment(tmp_path: Path) -> None:
    folders = []
    for family, tied in ONE_EACH:
        base = tiny_hf(family, tmp_path / f"{family}-base", tied=tied)
        folders.append(tmp_path / family)
        make_case(base, folders[-1], 0.2)
    if DEMO.is_dir():
        folders.append(tmp_path / "demo")
        make_case(DEMO, folders[-1], 0.02)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    packages = [f"{name}=={version(name)}" for name in ("torch", "transformers")]
    subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", *packages], check=True, timeout=900)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [str(venv / "bin" / "python"), "-I", "-c", USER, *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert not {"ee-megatron", "megatron-core", "deepspeed", "peft"} & set(found["installed"])
    assert len(found["worst"]) == len(folders)
    print(found["worst"])
    for difference, same_text, same_depths in found["worst"].values():
        assert difference <= 1e-4 and same_text and same_depths
