"""nnsight, nnterp and TransformerLens on an export with exits: what they trace, patch and generate against the plain
export at full depth, and under an exit policy."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.reference import random_policy
from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
SPEC = PolicySpec(4, (1, 3), rank=2, alpha=4.0)
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

exiting, plain = [
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    for folder in sys.argv[1:3]
]
tokenizer, text = AutoTokenizer.from_pretrained(sys.argv[2]), "hello world"
ids = tokenizer(text, return_tensors="pt").input_ids
greedy = {"max_new_tokens": 5, "do_sample": False}
shallow = exiting.generate(ids, exit_policy="fixed:1", **greedy)
assert exiting.last_exit_depths.tolist() == [[4, 1, 1, 1, 1]]
full = plain.generate(ids, **greedy)
assert not torch.equal(shallow, full)
seen = {}
"""
NNSIGHT = """
from nnsight import TransformersModel

traced = []
for model in (exiting, plain):
    lm = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    with lm.trace(text):
        attention = lm.model.layers[1].self_attn.output[0].save()
        stream = lm.model.layers[1].output.save()
        lm.model.layers[2].output = lm.model.layers[2].output + 1.0
        logits = lm.output.logits.save()
    traced.append((attention, stream, logits))
seen["trace"] = max(float((a - b).abs().max()) for a, b in zip(*traced))
seen["patched"] = float((traced[0][2] - plain(ids).logits).abs().max()) > 0.1
lm = TransformersModel(exiting, tokenizer=tokenizer, task="text-generation")
for name, policy, expected in (("off", "off", full), ("fixed", "fixed:1", shallow)):
    with lm.generate(text, exit_policy=policy, **greedy) as tracer:
        made = tracer.result.save()
    seen[name] = torch.equal(made, expected)
"""
NNTERP = """
from nnterp import StandardizedTransformer

traced = []
for model in (exiting, plain):
    lm = StandardizedTransformer(model, tokenizer=tokenizer)
    with lm.trace(text):
        attention = lm.attentions_output[1].save()
        stream = lm.layers_output[1].save()
        lm.layers_output[2] = lm.layers_output[2] + 1.0
        logits = lm.logits.save()
    traced.append((attention, stream, logits))
seen["trace"] = max(float((a - b).abs().max()) for a, b in zip(*traced))
seen["patched"] = float((traced[0][2] - plain(ids).logits).abs().max()) > 0.1
lm = StandardizedTransformer(exiting, tokenizer=tokenizer)
for name, policy, expected in (("off", "off", full), ("fixed", "fixed:1", shallow)):
    with lm.generate(text, exit_policy=policy, **greedy) as tracer:
        made = lm.generator.output.save()
    seen[name] = torch.equal(made, expected)
"""
LENS = """
exec(sys.argv[3])
bridges = [
    TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)
    for folder, model in zip(sys.argv[1:3], (exiting, plain))
]
def plus(value, hook):
    return value + 1.0

# Of its own attention, which it puts in place of the plain model's, TransformerLens has more to show.
(logits, cache), (expected, theirs) = [bridge.run_with_cache(ids) for bridge in bridges]
names = [name for name in theirs if name.endswith(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"))]
assert len(names) == 20
patched = [bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_out", plus)]) for bridge in bridges]
pairs = [(logits, expected), patched, *((cache[name], theirs[name]) for name in names)]
seen["trace"] = max(float((a - b).abs().max()) for a, b in pairs)
seen["patched"] = float((patched[0] - logits).abs().max()) > 0.1
for name, policy, expected in (("off", "off", full), ("fixed", "fixed:1", shallow)):
    seen[name] = torch.equal(bridges[0].original_model.generate(ids, exit_policy=policy, **greedy), expected)
"""


def adapter_of_the_docs() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "interpretability.md").read_text(), re.S)
    return next(block for block in blocks if "transformer_lens" in block)


@pytest.mark.parametrize(
    ("tool", "script"), [("nnsight", NNSIGHT), ("nnterp", NNTERP), ("transformer-lens", LENS)], ids=lambda v: v[:16]
)
@pytest.mark.timeout(600)
def test_traces_patches_and_generates_as_the_plain_export(tmp_path: Path, tool: str, script: str) -> None:
    python = ROOT / ".venv-peers" / tool / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no {tool} here; run: make .venv-peers/{tool}/.made")
    base = tiny_hf("qwen3", tmp_path / "base", layers=4, hidden=32)
    policy = (SPEC, random_policy(HFDirectory(base).dims, SPEC, seed=1, size=0.2))
    folders = [export_hf(base, policy, tmp_path / gates, gates=gates) for gates in ("embed", "drop")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    # A file, since nnsight reads the source of what it traces.
    file = tmp_path / "script.py"
    file.write_text(LOAD + script + "print(json.dumps(seen))\n")
    command = [str(python), str(file), *map(str, folders), adapter_of_the_docs()]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen.pop("trace") <= 2e-5
    assert seen == {"patched": True, "off": True, "fixed": True}
