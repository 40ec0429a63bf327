"""Run by vLLM's own interpreter: how many positions each layer's MLP runs, and the depths of the answers it runs for.

counted.py MODEL '{"layers": n, "exits": [depth], "prompts": [[id]], "depths": [[depth]]}'
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any


def main(path: str, asked: str) -> None:
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
    print(json.dumps({"ran": [ran[number] for number in range(1, layers + 1)], "depths": depths}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
