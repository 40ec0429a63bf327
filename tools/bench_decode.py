"""What exits save in decoding, against our own full depth and against transformers' generate, interleaved.

    python tools/bench_decode.py --repeats 3 --json bench_decode.json
    python tools/bench_decode.py --only decode --in-flight 8 32 --threads 1 --clock cpu

Parts (--only picks some):
- decode: speed-up over our own full depth, with exits drawn independently per row and token from the maximum-entropy
  distribution of a given mean depth, and its share of the ceiling: full cost / cost at that depth in multiply-adds,
  head and skipped layers' keys and values included. Two ways: all rows in flight in one batch, and batches of as many
  rows with `--queue` times as many in flight. A window from the start to the first finished row: no tail.
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
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workloads import answer_all, exits_with_mean, interleaved, ratio, save, spread

from ee_megatron.exit_rules import Off, Prescribed
from ee_megatron.families import ModelDims
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.scheduler import Scheduler

PARTS = ("decode", "hf")
NEVER = frozenset({-1})


class Bench:
    """One model, loaded by both sides."""

    def __init__(self, path: Path, options: argparse.Namespace):
        self.options = options
        self.clock: Callable[[], float] = time.process_time if options.clock == "cpu" else time.perf_counter
        dtype = getattr(torch, options.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
        exits = tuple(range(5, layers, 5))
        self.decoder = Decoder.from_hf(path, PolicySpec(layers, exits, rank=0), dtype, "cpu")
        self.decoder.eos_ids = NEVER
        self.dims, self.outcomes = self.decoder.dims, [*exits, layers]
        self.hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.hf.generation_config.eos_token_id = None
        self.generator, self.seeds = np.random.default_rng(0), count()

    def prompts(self, count: int) -> list[list[int]]:
        vocab = min(self.dims.vocab, 4000)
        return [self.generator.integers(0, vocab, self.options.prompt).tolist() for _ in range(count)]

    def requests(self, prompts: list[list[int]], lengths: list[int], depth: float) -> Iterator[Request]:
        """One per prompt, named by its place; exits of mean `depth` (share of L), full depth as policy "off"."""
        depths, seed = {}, next(self.seeds)
        for i, length in enumerate(lengths):
            drawn = exits_with_mean(self.outcomes, depth * self.dims.num_layers, length, seed * 10007 + i)
            depths[f"p{i}", 0] = [self.dims.num_layers, *drawn[1:]]
        exits = Off() if depth >= 1 else Prescribed(depths)
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            yield Request(prompt, SamplingParams(1.0, length), exits, seed, f"p{i}")

    def window(self, batch: int, in_flight: int, depth: float) -> tuple[float, float]:
        """Tokens per second from when all rows have started until the first finishes; their mean depth in layers."""
        tokens, prompt = self.options.tokens, self.prompts(1)[0]
        scheduler = Scheduler(self.decoder, self.tokenizer, in_flight, batch)
        for request in self.requests([prompt] * in_flight, [tokens] * in_flight, depth):
            scheduler.add(request)
        scheduler.advance()
        made, begun = 0, self.clock()
        while not scheduler.finished:
            made += len(scheduler.advance())
        return made / (self.clock() - begun), scheduler.row_layers / made

    def run(self, prompts: list[list[int]], lengths: list[int], depth: float, in_flight: int) -> float:
        """Seconds for all answers, prompts included."""
        begun = self.clock()
        scheduler = answer_all(self.decoder, self.tokenizer, self.requests(prompts, lengths, depth), in_flight)
        assert sum(len(row.tokens) for row in scheduler.finished.values()) == sum(lengths)
        return self.clock() - begun

    @torch.inference_mode()
    def run_hf(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds for all answers, prompts of one length included."""
        begun, ids = self.clock(), torch.tensor(prompts)
        self.hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=0, max_new_tokens=tokens,
        )  # fmt: skip
        return self.clock() - begun


def ceiling(dims: ModelDims, mean_depth: float) -> float:
    """Multiply-adds per token at full depth over those at a mean depth (layers): keys and values of every layer, the
    rest of a layer where it runs, the head."""
    linear = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    kv, head = 2 * dims.kv_size * dims.hidden, dims.vocab * dims.hidden
    full = dims.num_layers * linear + head
    return full / (dims.num_layers * kv + mean_depth * (linear - kv) + head)


def decode(bench: Bench) -> list[dict]:
    options, table = bench.options, []
    print(f"\ndecoding, {options.prompt} + {options.tokens} positions")
    print(f"{'batch':>6} {'in flight':>9} {'depth':>6} {'tok/s':>8} {'speed-up':>9} {'ceiling':>8} {'share':>6}")
    for batch in options.in_flight:
        for in_flight in dict.fromkeys((batch, min(batch * options.queue, options.most))):
            cases = {depth: partial(bench.window, batch, in_flight, depth) for depth in options.depths}
            seen = interleaved(cases, options.repeats)
            rate, mean = ({d: [one[i] for one in found] for d, found in seen.items()} for i in (0, 1))
            base = options.depths[0]
            for depth in options.depths:
                gain, low, high = ratio(rate[depth], rate[base])
                best = ceiling(bench.dims, spread(mean[depth])[0]) / ceiling(bench.dims, spread(mean[base])[0])
                speed = spread(rate[depth])[0]
                print(
                    f"{batch:>6} {in_flight:>9} {depth:>6.2f} {speed:>8.1f} {gain:>8.2f}x {best:>7.2f}x "
                    f"{gain / best:>6.0%} [{low / best:.0%}, {high / best:.0%}]",
                    flush=True,
                )
                table.append({
                    "batch": batch, "in_flight": in_flight, "depth": depth, "tokens_per_s": speed, "speed_up": gain,
                    "mean_depth": spread(mean[depth])[0] / bench.dims.num_layers, "ceiling": best,
                    "share": gain / best, "share_low": low / best, "share_high": high / best,
                })  # fmt: skip
    return table


def against_hf(bench: Bench) -> list[dict]:
    options, table = bench.options, []
    print(f"\nfull depth against transformers' generate, {options.prompt} + {options.tokens} positions")
    print(f"{'batch':>6} {'ours tok/s':>11} {'hf tok/s':>9} {'ratio':>6}")
    for batch in options.in_flight:
        lengths, prompts = [options.tokens] * batch, bench.prompts(batch)
        cases = {
            "ours": partial(bench.run, prompts, lengths, 1.0, batch),
            "hf": partial(bench.run_hf, prompts, options.tokens),
        }
        seconds = interleaved(cases, options.repeats)
        speed = {side: sum(lengths) / spread(taken)[0] for side, taken in seconds.items()}
        times, low, high = ratio(seconds["hf"], seconds["ours"])
        print(
            f"{batch:>6} {speed['ours']:>11.1f} {speed['hf']:>9.1f} {times:>5.2f}x [{low:.2f}, {high:.2f}]", flush=True
        )
        table.append({"batch": batch, **speed, "ratio": times, "ratio_low": low, "ratio_high": high})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--queue", type=int, default=4, help="rows in flight per row of a batch, second way")
    parser.add_argument("--most", type=int, default=256, help="no more rows in flight than this")
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
    bench = Bench(options.model, options)
    found = {part: {"decode": decode, "hf": against_hf}[part](bench) for part in options.only}
    save(options.json, {"settings": vars(options), **found})


if __name__ == "__main__":
    main()
