"""A quantised export: its gates stay as they were trained, its exits follow them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.tiny import tiny_hf

PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bitsandbytes" / "bin" / "python"
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

made = {}
ids = torch.arange(40).view(2, 20)
options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
for bits in ("load_in_4bit", "load_in_8bit"):
    for skip in (None, ["lm_head"]):
        config = BitsAndBytesConfig(**{bits: True}, llm_int8_skip_modules=skip, bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, quantization_config=config,
                                                     dtype=torch.bfloat16, device_map="cpu").eval()
        kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}
        gates = {name: str(value.dtype) for name, value in model.named_parameters() if name.startswith("gates.")}
        stored = torch.load(sys.argv[2])
        same = all(torch.equal(value, stored[name]) for name, value in model.named_parameters() if name in stored)
        line = {"kinds": kinds, "gates": gates, "same": same}
        made[f"{bits} {skip}"] = line
        out = model.generate(ids, exit_policy="threshold:0.5", **options)
        line["depths"] = model.last_exit_depths.tolist()
        positions = torch.full((2, out.shape[1] - 1), model.config.num_hidden_layers)
        positions[:, 19:] = model.last_exit_depths
        with torch.no_grad():
            line["again"] = model(out[:, :-1], exit_depths=positions).logits[:, 19:].argmax(-1).tolist()
        line["tokens"] = out[:, 20:].tolist()
print(json.dumps(made))
"""


def test_gates_stay_float32_and_the_rest_is_quantised(tmp_path):
    if not PYTHON.is_file():
        pytest.skip("no environment bitsandbytes; make it with: make .venv-peers/bitsandbytes/.made")
    # Where the processor has bfloat16 instructions it packs 4-bit weights in blocks of 64 columns, and fails on others.
    base = tiny_hf("llama", tmp_path / "base", tied=False, intermediate=128)
    spec = PolicySpec(6, (2, 4), rank=2, alpha=4.0)
    generator = torch.Generator().manual_seed(1)
    shapes = spec.tensor_shapes(HFDirectory(base).dims)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    out = export_hf(base, (spec, tensors), tmp_path / "out")
    torch.save({name: tensor for name, tensor in tensors.items() if name.startswith("gates.")}, tmp_path / "gates.pt")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), "-I", "-c", SCRIPT, str(out), str(tmp_path / "gates.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for how, found in json.loads(done.stdout.strip().splitlines()[-1]).items():
        quantised = "Linear4bit" if "4bit" in how else "Linear8bitLt"
        assert set(found["gates"].values()) == {"torch.float32"} and found["same"], how
        assert found["kinds"]["model.layers.0.mlp.up_proj"] == quantised
        assert found["kinds"]["lm_head"] == "WideLinear"
        assert not any(kind == quantised for name, kind in found["kinds"].items() if name.startswith("gates"))
        assert {depth for row in found["depths"] for depth in row} & {2, 4}
        assert found["tokens"] == found["again"]
