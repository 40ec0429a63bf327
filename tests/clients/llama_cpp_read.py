"""Run in llama.cpp's environment: what is in its files, and what it makes of them.

python llama_cpp_read.py JOB OUT: JOB is JSON, {"prompt": token ids, "new": int, "models": {name: [GGUF file, that of a
LoRA or null]}}. OUT gets, by name, every tensor of the last file as it lies there, the greedy tokens, and the five
likeliest ones' log-probabilities at each, all in float32 on one thread.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import torch
import xllamacpp as llama


def tensors(path: str) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        made = torch.from_numpy(tensor.data.copy())
        found[tensor.name] = made.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else made
    return found


def answer(path: str, adapter: str | None, prompt: list[int], new: int) -> dict:
    params = llama.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        lora = llama.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        params.lora_adapters = [lora]
    asked = {"prompt": prompt, "max_tokens": new, "temperature": 0.0, "logprobs": 5, "ignore_eos": True}
    made = llama.Server(params).handle_completions(asked)["choices"][0]["logprobs"]["content"]
    likely = [[(other["id"], other["logprob"]) for other in token["top_logprobs"]] for token in made]
    return {"tokens": [token["id"] for token in made], "likely": likely}


def main(job: str, out: str) -> None:
    asked = json.loads(Path(job).read_text())
    found = {}
    for name, (path, adapter) in asked["models"].items():
        found[name] = answer(path, adapter, asked["prompt"], asked["new"]) | {"tensors": tensors(adapter or path)}
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
