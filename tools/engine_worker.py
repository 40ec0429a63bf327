"""One engine of bench_engines.py, in an interpreter of its own: reads jobs from stdin, answers on stdout, a line each.

    engine_worker.py ENGINE MODEL DTYPE ROWS

A job: {"prompts": [[id]], "tokens": n, "depths": [[depth]] or null}; its answer: {"wall": s, "cpu": s, "tokens":
[[id]]}. Every answer has exactly n tokens, chosen greedily; ROWS is the most prompts of a job. The first line is
written once the engine is ready.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any]], list[list[int]]]


def longest(path: str) -> int:
    """Positions that engines are told to make room for: the benchmark's sequences are far shorter."""
    return min(1024, json.loads(Path(path, "config.json").read_text())["max_position_embeddings"])


def own(path: str, dtype: str, rows: int) -> Answer:
    import torch
    from transformers import AutoTokenizer

    from ee_megatron.exit_rules import Off, Prescribed
    from ee_megatron.rollout import Decoder, Request, SamplingParams, Scheduler

    spec, gates = policy(path)
    # At full depth the model has no gates, as elsewhere.
    plain, exiting = (Decoder.from_hf(path, spec, getattr(torch, dtype), "cpu") for _ in range(2))
    exiting.load_policy(gates)
    tokenizer = AutoTokenizer.from_pretrained(path)

    def answer(job: dict[str, Any]) -> list[list[int]]:
        depths = job["depths"]
        scheduler = Scheduler(plain if depths is None else exiting, tokenizer, rows)
        rule = Off() if depths is None else Prescribed({(f"p{i}", 0): row for i, row in enumerate(depths)})
        ids = [
            scheduler.add(Request(prompt, SamplingParams(0.0, job["tokens"]), rule, 0, f"p{i}"))
            for i, prompt in enumerate(job["prompts"])
        ]
        while scheduler.busy:
            scheduler.advance()
        return [scheduler.take(i, 0).tokens.tolist() for i in ids]

    return answer


def policy(path: str) -> tuple[Any, dict[str, Any]]:
    """Exits after every fifth layer, with gates that would open now and then, on the base as it is."""
    import torch

    from ee_megatron.families.hf_directory import HFDirectory
    from ee_megatron.policy import PolicySpec

    source = HFDirectory(path)
    layers = source.dims.num_layers
    spec = PolicySpec(layers, tuple(range(5, layers, 5)), rank=0)
    generator = torch.Generator().manual_seed(0)
    gates = {
        name: torch.randn(shape, generator=generator) * 0.05 for name, shape in spec.tensor_shapes(source.dims).items()
    }
    source.close()
    return spec, gates


def vllm(path: str, dtype: str, rows: int) -> Answer:
    """vLLM's own model, compiled as vLLM does by default."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        path, dtype=dtype, max_model_len=longest(path), max_num_seqs=rows, enable_prefix_caching=False,
        skip_tokenizer_init=True, async_scheduling=False,
    )  # fmt: skip

    def answer(job: dict[str, Any]) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        return [list(result.outputs[0].token_ids) for result in llm.generate(prompts, params, use_tqdm=False)]

    return answer


def masked(path: str, dtype: str, rows: int, **how: bool) -> Answer:
    """vLLM with exits, compiled where `how` doesn't say otherwise."""
    import torch

    from ee_megatron.exit_rules import Off, Prescribed
    from ee_megatron.rollout.engine.request import Request
    from ee_megatron.rollout.engine.sampling import SamplingParams
    from ee_megatron.rollout.vllm.engine import EngineSettings, VllmEngine

    spec, gates = policy(path)
    how = {"compile": True, **how}
    engine = VllmEngine(EngineSettings(path, spec, getattr(torch, dtype), rows=rows, positions=longest(path), **how))
    engine.load(gates)

    def answer(job: dict[str, Any]) -> list[list[int]]:
        depths = job["depths"]
        rule = Off() if depths is None else Prescribed({(f"p{i}", 0): row for i, row in enumerate(depths)})
        ids = [
            engine.add(Request(prompt, SamplingParams(0.0, job["tokens"]), rule, 0, f"p{i}"))
            for i, prompt in enumerate(job["prompts"])
        ]
        while engine.busy:
            engine.advance()
        return [engine.take(i, 0).tokens.tolist() for i in ids]

    return answer


def transformers(path: str, dtype: str, rows: int) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def answer(job: dict[str, Any]) -> list[list[int]]:
        ids = torch.tensor(job["prompts"])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, max_new_tokens=job["tokens"]
        )
        return made[:, ids.shape[1] :].tolist()

    return answer


def openvino(path: str, dtype: str, rows: int) -> Answer:
    """`path`: what `optimum-cli export openvino` has made."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    if dtype != "float32":
        raise SystemExit("OpenVINO GenAI dies in bfloat16 on processors without its instructions for matrices")
    cache = genai.SchedulerConfig()
    cache.max_num_seqs, cache.cache_size = rows, 1
    # No tokenizer: prompts are token ids.
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    pipe = genai.ContinuousBatchingPipeline(path, cache, "CPU", options)

    def answer(job: dict[str, Any]) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = job["tokens"], True, False
        prompts = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in job["prompts"]]
        made = pipe.generate(prompts, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in made]

    return answer


ENGINES = {
    "own": own, "vllm": vllm, "masked": masked, "eager": partial(masked, compile=False),
    "compact": partial(masked, compile=False, compact=True), "transformers": transformers, "openvino": openvino,
}  # fmt: skip


def main() -> None:
    engine, path, dtype, rows = sys.argv[1:5]
    # Engines print what they like; answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in ("torch",) if engine != "openvino" else ():
        __import__(name).set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answer = ENGINES[engine](path, dtype, int(rows))
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        made = answer(job)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert [len(tokens) for tokens in made] == [job["tokens"]] * len(job["prompts"]), [len(t) for t in made]
        print(json.dumps({"wall": wall, "cpu": cpu, "tokens": made}), file=channel, flush=True)


if __name__ == "__main__":
    main()
