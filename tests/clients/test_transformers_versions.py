"""Exports made by this environment's transformers, read by older and newer ones in environments of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.exit_rules import Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, Request, SamplingParams, Scheduler
from tests.tiny import tiny_hf

PEERS = Path(__file__).parents[2] / ".venv-peers"
LAYERS, DEPTHS, NEW = 6, (2, 4), 10
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 300000.0, "factor": 2.0}
BASES = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tied": False}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "smollm3": ("smollm3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0}}),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
}
# What transformers 4.46 doesn't have at all.
NEWER = {"transformers-4.46": {"qwen3", "smollm3", "olmo2"}}

READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, names = sys.argv[1], sys.argv[2:]
inputs = torch.load(f"{folder}/inputs.pt")
made = {"version": transformers.__version__, "logits": {}, "answers": {}, "modes": {}, "guided": []}
ids, prompts = inputs["ids"], inputs["prompts"]
# An end that never comes: older prompt lookup can't do without one.
greedy = {"max_new_tokens": inputs["new"], "do_sample": False, "eos_token_id": 10**6, "pad_token_id": 129}
MODES = ({"prompt_lookup_num_tokens": 3}, {"use_cache": False}, {"exit_policy": "threshold:0.5"})

def load(name, dtype=torch.float32):
    trusted = name.endswith("embed")
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", torch_dtype=dtype, trust_remote_code=trusted).eval()

for name in names:
    for kind in ("drop", "sidecar", "embed"):
        model = load(f"{name}-{kind}")
        with torch.no_grad():
            made["logits"][f"{name}-{kind}"] = model(ids).logits
    made["stored"] = str(load(f"{name}-half", "auto").dtype)
    made["logits"][f"{name}-prescribed"] = model(ids, exit_depths=inputs["depths"]).logits.detach()

    def answer(prompt, **mode):
        out = model.generate(prompt[None], **mode, **greedy)
        return out[0, prompt.shape[0]:].tolist(), model.last_exit_depths[0].tolist()

    made["answers"][name] = [answer(prompt) for prompt in prompts]
    made["modes"] |= {f"{name} {mode}": answer(prompts[0], **mode) for mode in MODES}
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{name}-drop")
    made["modes"][f"{name} stop string"] = answer(prompts[0], stop_strings=["never comes"], tokenizer=tokenizer)
    made["modes"][f"{name} its own drafts"] = answer(prompts[0], assistant_model=model)
    guided = {"guidance_scale": 2.0, "negative_prompt_ids": prompts[1][None]}
    plain = load(f"{name}-drop").generate(prompts[0][None], **guided, **greedy)[0, prompts[0].shape[0]:].tolist()
    made["guided"].append((answer(prompts[0], exit_policy="off", **guided)[0], plain))
    half = load(f"{name}-embed", torch.bfloat16)
    made["gate"] = (str(half.gates["2"].fc1.weight.dtype), str(half.dtype))
    losses = []
    for again in (False, True):
        model.train().zero_grad()
        if again:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids, num_items_in_batch=100).loss
        loss.backward()
        losses.append((float(loss), float(model.model.layers[1].mlp.up_proj.weight.grad.norm())))
    made["losses"] = losses
made["tokens"] = AutoTokenizer.from_pretrained(f"{folder}/{names[0]}-drop")("abc").input_ids
torch.save(made, f"{folder}/made-{transformers.__version__}.pt")
print(json.dumps(f"{folder}/made-{transformers.__version__}.pt"))
"""


class Made:
    """Every export of every base, what this environment makes of it, and what the decoder answers."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.folder, self.logits, self.answers = folder, dict[str, Tensor](), {}
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(0, 128, (2, 90), generator=generator)
        depths = torch.tensor([*DEPTHS, LAYERS])[torch.randint(0, 3, ids.shape, generator=generator)]
        prompts = [ids[0, :9].clone(), ids[1, :20].clone()]
        torch.save({"ids": ids, "depths": depths, "prompts": prompts, "new": NEW}, folder / "inputs.pt")
        for name, (family, options) in BASES.items():
            base = tiny_hf(family, folder / name, **options)
            spec = PolicySpec(LAYERS, DEPTHS, rank=2, alpha=4.0)
            shapes = spec.tensor_shapes(HFDirectory(base).dims)
            tensors = {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
            for kind in ("drop", "sidecar", "embed"):
                export_hf(base, (spec, tensors), folder / f"{name}-{kind}", gates=kind)
            export_hf(base, (spec, tensors), folder / f"{name}-half", gates="drop", dtype="bfloat16")
            model = AutoModelForCausalLM.from_pretrained(folder / f"{name}-drop", dtype=torch.float32).eval()
            decoder = Decoder.from_hf(base, spec, torch.float32, "cpu")
            decoder.load_policy(tensors)
            decoder.eos_ids = frozenset({10**6})
            with torch.no_grad():
                self.logits[name] = model(ids).logits
                hidden = decoder.forward_parallel(ids, torch.full((2,), ids.shape[1]), depths)
                self.logits[f"{name}-prescribed"] = decoder.readout(hidden)
            tokenizer = AutoTokenizer.from_pretrained(base)
            self.answers[name] = [answer(decoder, tokenizer, prompt.tolist()) for prompt in prompts]


def answer(decoder: Decoder, tokenizer, prompt: list[int]) -> tuple[list[int], list[int]]:
    scheduler = Scheduler(decoder, tokenizer, in_flight=1)
    request = scheduler.add(Request(prompt, SamplingParams(0.0, NEW), Threshold(0.5)))
    while scheduler.busy:
        scheduler.advance()
    made = scheduler.take(request, 0)
    return made.tokens.tolist(), made.exit_depths.tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("exports"))


def read_in(peer: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a peer's environment, which sees neither this checkout nor a network."""
    python = PEERS / peer / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no environment {peer}; make it with: make .venv-peers/{peer}/.made")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": arguments[0] + "/hf-" + peer, "OMP_NUM_THREADS": "1"}
    command = [str(python), "-I", "-c", script, *arguments]
    return subprocess.run(command, cwd=arguments[0], env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("peer", ["transformers-4.46", "transformers-4.57", "transformers-5.0"])
def test_exports_are_the_same_model_in_other_versions(made, peer):
    names = [name for name in BASES if name not in NEWER.get(peer, ())]
    done = read_in(peer, READER, str(made.folder), *names)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(json.loads(done.stdout.strip().splitlines()[-1]))
    assert found["version"].startswith(peer.removeprefix("transformers-"))
    for name in names:
        expected = made.logits[name]
        for kind in ("drop", "sidecar", "embed"):
            assert_close(found["logits"][f"{name}-{kind}"], expected)
        assert_close(found["logits"][f"{name}-prescribed"], made.logits[f"{name}-prescribed"])
        assert found["answers"][name] == made.answers[name]
        assert any(depth < LAYERS for _, depths in made.answers[name] for depth in depths)
    for mode, seen in found["modes"].items():
        assert seen == made.answers[mode.split()[0]][0], mode
    assert all(seen == plain for seen, plain in found["guided"])
    assert found["gate"] == ("torch.float32", "torch.bfloat16") and found["stored"] == "torch.bfloat16"
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-4)
    assert found["tokens"] == [97, 98, 99]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
