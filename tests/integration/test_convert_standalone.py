"""An export works where this package is not installed: in another process and directory, alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.covering import SLOW
from tests.tiny import ONE_EACH, tiny_hf

USER = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ee_megatron":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import ee_megatron
    raise SystemExit("the package is visible; the test proves nothing")
except ModuleNotFoundError:
    pass
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
inputs = tokenizer(["ab", "a longer prompt"], return_tensors="pt", padding=True)
out = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
made = out[:, inputs["input_ids"].shape[1]:]
depths = model.last_exit_depths.tolist()
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True, dtype=torch.float32)
same = torch.equal(again.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None), out)
print(json.dumps({"tokens": made.tolist(), "depths": depths, "layers": model.config.num_hidden_layers, "same": same}))
"""


@pytest.mark.parametrize(
    ("family", "tied"),
    [pytest.param(*case, marks=() if case[0] == "qwen2" else SLOW) for case in ONE_EACH],
)
def test_export_generates_with_early_exits_without_this_package(tmp_path: Path, family: str, tied: bool):
    base = tiny_hf(family, tmp_path / "base", tied=tied)
    spec = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    shapes = spec.tensor_shapes(HFDirectory(base).dims)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    out = export_hf(base, (spec, tensors), tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", USER, str(out), str(elsewhere / "saved")]
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert [len(row) for row in found["tokens"]] == [12, 12]
    assert all(row[0] == found["layers"] for row in found["depths"])
    assert {depth for row in found["depths"] for depth in row[1:]} & {2, 4}
    assert found["same"]
