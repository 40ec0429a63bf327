"""Run by vLLM's own interpreter, prints JSON: inside.py FUNCTION ARGUMENT..."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any


def counted(path: str, asked: str) -> dict:
    """How many positions each layer's MLP runs, and the depths of the answers it runs for. `asked`: JSON of layers,
    exits, and prompts [[id]] with prescribed depths [[depth]]."""
    import torch

    from ee_megatron.exit_rules import Prescribed
    from ee_megatron.policy import PolicySpec
    from ee_megatron.rollout.engine.request import Request
    from ee_megatron.rollout.engine.sampling import SamplingParams
    from ee_megatron.rollout.vllm import register
    from ee_megatron.rollout.vllm.engine import EngineSettings, VllmEngine

    job = json.loads(asked)
    register()
    layers = job["layers"]
    spec = PolicySpec(layers, tuple(job["exits"]), rank=0)
    engine = VllmEngine(EngineSettings(path, spec, torch.float32, compact=True, others=(("max_model_len", 256),)))
    engine.load(None)
    ran: Counter[int] = Counter()

    def watch(worker: Any) -> None:
        for number, layer in enumerate(worker.model_runner.model.model.layers, start=1):
            layer.mlp.register_forward_pre_hook(lambda _, given, number=number: ran.update({number: len(given[0])}))

    engine.engine.collective_rpc(watch)
    rule = Prescribed({(f"p{i}", 0): depths for i, depths in enumerate(job["depths"])})
    rows = [
        engine.add(Request(prompt, SamplingParams(1.0, len(depths)), rule, 0, f"p{i}"))
        for i, (prompt, depths) in enumerate(zip(job["prompts"], job["depths"], strict=True))
    ]
    while engine.busy:
        engine.advance()
    depths = [engine.take(row, 0).exit_depths.tolist() for row in rows]
    return {"ran": [ran[number] for number in range(1, layers + 1)], "depths": depths}


def stock(path: str, prompts: str) -> list:
    """Greedy answers of vLLM's own model, with the log-probability of every token."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams

    from ee_megatron.rollout.engine.sampling import greedy

    with open(prompts) as file:
        asked = json.load(file)
    llm = LLM(
        path, dtype="float32", enforce_eager=not asked["compile"], max_model_len=256,
        max_num_seqs=asked["rows"], max_logprobs=-1, enable_prefix_caching=False, skip_tokenizer_init=True,
        logprobs_mode="raw_logits", async_scheduling=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False, logprobs=-1)
    found = []
    for result in llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], params, use_tqdm=False):
        answer = result.outputs[0]
        logits = torch.tensor([[at[i].logprob for i in range(len(at))] for at in answer.logprobs])
        tokens, logprobs = greedy(logits)
        assert tokens.tolist() == list(answer.token_ids)
        found.append({"tokens": tokens.tolist(), "logprobs": logprobs.tolist()})
    return found


def settings(cases: str) -> list:
    """Exit policy and model that each export is served with, or what vLLM says against it: [[PATH, {argument: value},
    {environment: value}], ...]"""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    version = vllm.__version__
    found: list = []
    for path, arguments, environment in json.loads(cases):
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
        os.environ.update(environment)
        vllm.__version__ = environment.get("VERSION", version)
        try:
            config = EngineArgs(model=path, **arguments).create_engine_config()
            found.append([config.model_config.hf_config.exit_policy, config.model_config.architecture])
        except Exception as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
