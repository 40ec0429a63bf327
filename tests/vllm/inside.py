"""Run by vLLM's own interpreter, prints JSON: inside.py FUNCTION ARGUMENT..."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def wrapped(job: str, wrapper: str) -> list:
    """Tokens and depths of an engine's answers where the model runner wraps its model as a GPU's does. `job`: a pickle
    of the engine's settings, its policy and requests; `wrapper`: a module of vllm.compilation and its class."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    module, name = wrapper.split(".")
    wrap, load_model = getattr(import_module(f"vllm.compilation.{module}"), name), CPUModelRunner.load_model

    def load_and_wrap(self: Any, **options: Any) -> None:
        load_model(self, **options)
        self.model = wrap(self.model, self.vllm_config, CUDAGraphMode.FULL)

    CPUModelRunner.load_model, CPUModelRunner.get_model = load_and_wrap, GPUModelRunner.get_model
    type(current_platform)._global_graph_pool = (0, 0)
    return _answers(job)


def disagreeing(job: str) -> list:
    """The same where every device but the first has gates that hardly ever fire."""

    def plant(worker: Any) -> None:
        for gate in worker._exits_model.gated_layers.gates.values():
            gate.fc2.bias.data -= 100.0 * worker.rank

    return _answers(job, plant)


def waiting(job: str) -> list:
    """The answers, and how often a step's sampling waits for the device at most: a value that the host reads must have
    come by `to_host`, once for all of a step."""
    import torch

    from ee_megatron.rollout.vllm import register

    register()
    from ee_megatron.rollout.vllm import worker

    waits, most, arrived = 0, 0, list[torch.Tensor]()
    sample, to_host, tolist = worker.ExitSampler.forward, worker.to_host, torch.Tensor.tolist

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal waits, most
        waits = 0
        sampled = sample(self, *args, **options)
        most = max(most, waits)
        return sampled

    def brought(*tensors: torch.Tensor) -> list[torch.Tensor]:
        nonlocal waits
        waits += 1
        arrived[:] = to_host(*tensors)
        return arrived

    def read(self: torch.Tensor) -> Any:
        nonlocal waits
        waits += not any(self is one for one in arrived)
        return tolist(self)

    worker.to_host, worker.ExitSampler.forward, torch.Tensor.tolist = brought, counted, read
    found = _answers(job)
    return [found, most]


def _answers(job: str, plant: Callable[[Any], None] | None = None) -> list:
    from safetensors.torch import load

    from ee_megatron.rollout.engine.generation import answer
    from ee_megatron.rollout.vllm import register
    from ee_megatron.rollout.vllm.engine import VllmEngine

    register()
    with open(job, "rb") as file:
        settings, policy, requests = pickle.load(file)
    engine = VllmEngine(settings)
    engine.load(load(policy))
    if plant is not None:
        engine.engine.collective_rpc(plant)
    groups = [group for request in requests for group in answer(engine, engine.tokenizer, request, 1)]
    return [[one.tokens.tolist(), one.exit_depths.tolist()] for group in groups for one in group]


def cache_keys(job: str) -> list:
    """The key of vLLM's cache of what it compiles, for each of the engines' settings in this pickle."""
    from types import SimpleNamespace

    from vllm.v1.engine.llm_engine import LLMEngine

    from ee_megatron.rollout.vllm import register
    from ee_megatron.rollout.vllm.engine import VllmEngine

    def configured(arguments: Any) -> Any:
        config = arguments.create_engine_config()
        return SimpleNamespace(model_config=config.model_config, key=config.compute_hash())

    LLMEngine.from_engine_args = configured
    register()
    with open(job, "rb") as file:
        return [VllmEngine(settings).engine.key for settings in pickle.load(file)]


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
