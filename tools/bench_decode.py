"""What exits save in decoding, against our own full depth and against transformers' generate, interleaved.

    python tools/bench_decode.py --repeats 3 --json bench_decode.json
    python tools/bench_decode.py --only decode --in-flight 8 32 --threads 1 --clock cpu

Parts (--only picks some):
- decode: speed-up over our own full depth, with exits drawn independently per row and token from the maximum-entropy
  distribution of a given mean depth, and its share of the ceiling: the FLOPs of decoding at full depth over those at
  that depth. A window from the start to the first finished row: no tail.
- hf: our full depth against generate, the same prompts and number of tokens, prefill included

Every repeat runs what is compared in turn; ratios are taken within a repeat, medians [least, most] over repeats. With
other work on the machine, `--threads 1 --clock cpu` (processor seconds of this process) disturbs least.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workloads import answer_all, exits_with_mean, interleaved, ratio, save, spread

from ee_megatron.exit_rules import Off, Prescribed
from ee_megatron.planning.flops import answer_cost, prefill_cost
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.scheduler import Scheduler

NEVER = frozenset({-1})


class Bench:
    """One model, loaded by both sides."""

    def __init__(self, path: Path, options: argparse.Namespace):
        self.options = options
        self.clock: Callable[[], float] = time.process_time if options.clock == "cpu" else time.perf_counter
        dtype = getattr(torch, options.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
        self.exits = tuple(range(5, layers, 5))
        self.decoder = Decoder.from_hf(path, PolicySpec(layers, self.exits, rank=0), dtype, "cpu")
        self.decoder.eos_ids = NEVER
        self.dims = self.decoder.dims
        self.hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.hf.generation_config.eos_token_id = None
        generator, vocab = np.random.default_rng(0), min(self.dims.vocab, 4000)
        self.prompts = generator.integers(0, vocab, (max(options.in_flight), options.prompt)).tolist()
        self.seeds = count()

    def drawn(self, depth: float, seed: int) -> list[int]:
        """Exit depths of an answer, of mean `depth` (share of L); the first token is at full depth."""
        layers = self.dims.num_layers
        drawn = exits_with_mean([*self.exits, layers], depth * layers, self.options.tokens, seed)
        return [layers, *drawn[1:].tolist()]

    def requests(self, rows: int, depth: float) -> Iterator[Request]:
        """One per prompt, named by its place; full depth as policy "off"."""
        seed = next(self.seeds)
        depths = {(f"p{i}", 0): self.drawn(depth, seed * 10007 + i) for i in range(rows)}
        exits = Off() if depth >= 1 else Prescribed(depths)
        for i, prompt in enumerate(self.prompts[:rows]):
            yield Request(prompt, SamplingParams(1.0, self.options.tokens), exits, seed, f"p{i}")

    def window(self, rows: int, depth: float) -> float:
        """Tokens per second from when all rows have started until the first finishes."""
        scheduler = Scheduler(self.decoder, self.tokenizer, rows)
        for request in self.requests(rows, depth):
            scheduler.add(request)
        scheduler.advance()
        made, begun = 0, self.clock()
        while not scheduler.finished_rows:
            made += len(scheduler.advance())
        return made / (self.clock() - begun)

    def ours(self, rows: int) -> float:
        """Seconds for all answers at full depth, prompts included."""
        begun = self.clock()
        scheduler = answer_all(self.decoder, self.tokenizer, self.requests(rows, 1.0), rows)
        assert all(len(row.tokens) == self.options.tokens for row in scheduler.finished_rows.values())
        return self.clock() - begun

    @torch.inference_mode()
    def theirs(self, rows: int) -> float:
        """As `ours`, by transformers."""
        begun, ids = self.clock(), torch.tensor(self.prompts[:rows])
        self.hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=0, max_new_tokens=self.options.tokens,
        )  # fmt: skip
        return self.clock() - begun

    def flops(self, depth: float) -> float:
        """Of an answer's tokens, without its prompt and its gates."""
        depths = self.drawn(depth, 0) if depth < 1 else [self.dims.num_layers] * self.options.tokens
        prompt = self.options.prompt
        return answer_cost(self.dims, self.exits, 0, prompt, depths, needs=()) - prefill_cost(self.dims, prompt)


def decode(bench: Bench) -> Iterator[dict[str, float]]:
    depths = bench.options.depths
    for rows in bench.options.in_flight:
        cases = {depth: partial(bench.window, rows, depth) for depth in depths}
        rates = interleaved(cases, bench.options.repeats)
        for depth in depths:
            gain, low, high = ratio(rates[depth], rates[depths[0]])
            ceiling = bench.flops(depths[0]) / bench.flops(depth)
            yield {
                "in flight": rows, "depth": depth, "tokens/s": spread(rates[depth])[0], "speed-up": gain,
                "ceiling": ceiling, "share": gain / ceiling, "least": low / ceiling, "most": high / ceiling,
            }  # fmt: skip


def against_hf(bench: Bench) -> Iterator[dict[str, float]]:
    for rows in bench.options.in_flight:
        cases = {"ours": partial(bench.ours, rows), "theirs": partial(bench.theirs, rows)}
        seconds = interleaved(cases, bench.options.repeats)
        speeds = {f"{side}, tokens/s": rows * bench.options.tokens / spread(s)[0] for side, s in seconds.items()}
        times, low, high = ratio(seconds["theirs"], seconds["ours"])
        yield {"in flight": rows, **speeds, "ratio": times, "least": low, "most": high}


PARTS = {"decode": decode, "hf": against_hf}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--depths", type=float, nargs="+", default=[1.0, 0.7, 0.5, 0.3], help="the first is the base")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.dtype}, {options.threads} threads, {options.repeats} repeats, {options.clock} seconds")
    bench, found = Bench(options.model, options), dict[str, list[dict[str, float]]]()
    for part in options.only:
        found[part] = list(PARTS[part](bench))
        print(f"\n{part}\n{pd.DataFrame(found[part]).round(3).to_string(index=False)}", flush=True)
    save(options.json, {"settings": vars(options), **found})


if __name__ == "__main__":
    main()
