"""Run by vLLM's own interpreter: greedy answers of its own model, with the log-probability of every token.

stock.py MODEL PROMPTS.json
"""

from __future__ import annotations

import json
import os
import sys


def main(path: str, prompts: str) -> None:
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
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3])
