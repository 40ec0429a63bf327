"""What exits save in decoding, against our own full depth and against transformers' generate, interleaved.

    python tools/bench_decode.py --repeats 3 --json bench_decode.json
    python tools/bench_decode.py --only decode --in-flight 8 32 --threads 1 --clock cpu

Parts (--only picks some):
- cost: seconds of one layer by the number of rows, and the line a + b · rows through them
- orders: the share of the ceiling that orders of running the stations reach in a simulation with that a / b
- decode: speed-up over our own full depth, with exits drawn independently per row and token from the maximum-entropy
  distribution of a given mean depth, and its share of the ceiling: full cost / cost at that depth in multiply-adds,
  head and skipped layers' keys and values included. Two ways: all rows in flight in one batch, and batches of as many
  rows with `--queue` times as many in flight. A window from the start to the first finished row: no tail.
- hf: our full depth against generate, the same prompts and number of tokens, reading the prompts included
- end-to-end: prompts x samples of uneven lengths (8..96 tokens, fixed per sample) at full depth and at mean depth 0.5,
  against generate in padded batches that end when their last row does; nobody sorts by length. All time counts.

Every repeat runs what is compared in turn; ratios are taken within a repeat, medians [least, most] over repeats. With
other work on the machine, `--threads 1 --clock cpu` (processor seconds of this process) disturbs least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, StoppingCriteria, StoppingCriteriaList
from workloads import answer_all, exits_with_mean

from ee_megatron.exit_rules import Off, Prescribed
from ee_megatron.families import ModelDims
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.engine.request import Request, Row
from ee_megatron.rollout.engine.scheduler import Scheduler, SegmentQueues

PARTS = ("cost", "orders", "decode", "hf", "end-to-end")
NEVER = frozenset({-1})


class Bench:
    """One model, loaded by both sides."""

    def __init__(self, name: str, path: Path, tokenizer_path: Path, options: argparse.Namespace):
        self.name, self.path, self.options = name, path, options
        self.clock: Callable[[], float] = time.process_time if options.clock == "cpu" else time.perf_counter
        dtype = getattr(torch, options.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
        exits = tuple(range(5, layers, 5))
        self.decoder = Decoder.from_hf(path, PolicySpec(layers, exits, rank=0), dtype, "cpu")
        self.decoder.eos_ids = NEVER
        self.dims, self.outcomes = self.decoder.dims, [*exits, layers]
        self.hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.hf.generation_config.eos_token_id = None
        self.generator = np.random.default_rng(0)

    def prompts(self, count: int, low: int, high: int) -> list[list[int]]:
        lengths = self.generator.integers(low, high + 1, count)
        return [self.generator.integers(0, min(self.dims.vocab, 4000), n).tolist() for n in lengths]

    def requests(self, prompts: list[list[int]], lengths: list[int], depth: float, seed: int) -> Iterator[Request]:
        """One per prompt, named by its place; exits of mean `depth` (share of L), full depth as policy "off"."""
        depths = {}
        for i, length in enumerate(lengths):
            drawn = exits_with_mean(self.outcomes, depth * self.dims.num_layers, length, seed * 10007 + i)
            depths[f"p{i}", 0] = [self.dims.num_layers, *drawn[1:]]
        exits = Off() if depth >= 1 else Prescribed(depths)
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            yield Request(prompt, SamplingParams(1.0, length), exits, seed, f"p{i}")

    def window(self, batch: int, in_flight: int, depth: float, seed: int) -> tuple[float, float]:
        """Tokens per second from when all rows have started until the first finishes; their mean depth in layers."""
        tokens, prompt = self.options.tokens, self.prompts(1, self.options.prompt, self.options.prompt)[0]
        scheduler = Scheduler(self.decoder, self.tokenizer, in_flight, batch)
        for request in self.requests([prompt] * in_flight, [tokens] * in_flight, depth, seed):
            scheduler.add(request)
        scheduler.advance()
        count, begun = 0, self.clock()
        while not scheduler.finished:
            count += len(scheduler.advance())
        return count / (self.clock() - begun), scheduler.row_layers / count

    def run(self, prompts: list[list[int]], lengths: list[int], depth: float, in_flight: int, seed: int) -> float:
        """Seconds for all answers, prompts included."""
        begun = self.clock()
        scheduler = answer_all(self.decoder, self.tokenizer, self.requests(prompts, lengths, depth, seed), in_flight)
        assert sum(len(row.tokens) for row in scheduler.finished.values()) == sum(lengths)
        return self.clock() - begun

    @torch.inference_mode()
    def run_hf(self, prompts: list[list[int]], lengths: list[int], batch: int) -> float:
        """Seconds for all answers in padded batches; a batch ends when its longest answer does."""
        begun = self.clock()
        for start in range(0, len(prompts), batch):
            part, wanted = prompts[start : start + batch], torch.tensor(lengths[start : start + batch])
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            self.hf.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                max_new_tokens=int(wanted.max()), stopping_criteria=StoppingCriteriaList([Lengths(width, wanted)]),
            )  # fmt: skip
        return self.clock() - begun


class Lengths(StoppingCriteria):
    """Every row has its own number of new tokens."""

    def __init__(self, width: int, wanted: torch.Tensor):
        self.width, self.wanted = width, wanted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return self.wanted <= input_ids.shape[1] - self.width


def ceiling(dims: ModelDims, mean_depth: float) -> float:
    """Multiply-adds per token at full depth over those at a mean depth (layers): keys and values of every layer, the
    rest of a layer where it runs, the head."""
    linear = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    kv, head = 2 * dims.kv_size * dims.hidden, dims.vocab * dims.hidden
    full = dims.num_layers * linear + head
    return full / (dims.num_layers * kv + mean_depth * (linear - kv) + head)


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


@torch.inference_mode()
def cost(bench: Bench) -> list[dict]:
    """Seconds of one layer of a segment at some 120 cached positions, by rows."""
    decoder, position, counts = bench.decoder, 120, [1, 2, 4, 8, 16, 32, 64, 128]
    cache = KVCache(decoder.dims, max(counts), decoder.dtype, decoder.device)
    cache.hold(range(max(counts)), [position + 1] * max(counts))
    seconds: dict[int, list[float]] = {rows: [] for rows in counts}
    for _ in range(bench.options.repeats * 4):
        for rows in counts:
            hidden = torch.randn(rows, bench.dims.hidden, dtype=decoder.dtype)
            at = decoder.rows(cache, range(rows), [position] * rows)
            begun = bench.clock()
            for segment in range(len(bench.outcomes)):
                decoder.run_segment(segment, hidden.clone(), cache, at)
            seconds[rows].append((bench.clock() - begun) / bench.dims.num_layers)
    times = [median(seconds[rows]) for rows in counts]
    b, a = np.polyfit(counts[2:], times[2:], 1)
    pairs = list(zip(counts, times, strict=True))
    print(f"\n{bench.name}: microseconds per layer  " + "  ".join(f"{r}: {1e6 * t:.0f}" for r, t in pairs))
    print(f"  a + b · rows with a = {1e6 * a:.0f}, b = {1e6 * b:.1f}: reading the weights is worth {a / b:.0f} rows")
    return [{"model": bench.name, "rows": r, "layer_s": t, "a_over_b": a / b} for r, t in pairs]


class Fullest(SegmentQueues):
    """Always the station where most rows wait."""

    def _pick(self) -> int:
        return max(range(len(self.queues)), key=lambda s: len(self.queues[s]))


def head_layers(dims: ModelDims) -> float:
    """The head's weights, in layers."""
    return dims.vocab * dims.hidden / sum(rows * columns for rows, columns in dims.linear_shapes().values())


def simulate(
    stations: SegmentQueues, bench: Bench, in_flight: int, depth: float, worth: float, tokens: int = 6000
) -> float:
    """Cost per token in row-layers: a run of k layers costs k · (worth + rows), the readout likewise; the keys
    and values of skipped layers are left out."""
    dims, last = bench.dims, len(bench.outcomes)
    layers = [*np.diff([0, *bench.outcomes]).tolist(), head_layers(dims)]
    drawn = iter(exits_with_mean(bench.outcomes, depth * dims.num_layers, tokens + in_flight * 2, seed=0))

    def begin() -> None:
        row = Row(0, Request([]), (), (), 0, None)  # type: ignore[arg-type]
        row.segment = bench.outcomes.index(next(drawn))
        stations.put(0, row)

    for _ in range(in_flight):
        begin()
    total, done = 0.0, 0
    while done < tokens:
        station, rows = stations.take()
        total += layers[station] * (worth + len(rows))
        for row in rows:
            if station == last:
                begin()
                done += 1
            else:
                stations.put(last if row.segment == station else station + 1, row)
    return total / done


def orders(bench: Bench) -> list[dict]:
    options, dims, count, table = bench.options, bench.dims, len(bench.outcomes) + 1, []
    worth, head = options.worth, head_layers(bench.dims)
    print(f"\n{bench.name}: simulated share of the ceiling, weights worth {worth:g} rows")
    print(f"{'batch':>6} {'in flight':>9} {'depth':>6} {'lock-step':>10} {'fullest':>8} {'ours':>6}")
    for batch in options.in_flight:
        for in_flight in dict.fromkeys((batch, batch * options.queue)):
            full = simulate(SegmentQueues(count, batch), bench, in_flight, 1.0, worth)
            for depth in options.depths[1:]:
                kinds = (SegmentQueues(count, batch, hold=0.0), Fullest(count, batch), SegmentQueues(count, batch))
                best = (dims.num_layers + head) / (depth * dims.num_layers + head)
                shares = [full / simulate(kind, bench, in_flight, depth, worth) / best for kind in kinds]
                print(f"{batch:>6} {in_flight:>9} {depth:>6.2f} {shares[0]:>10.0%} {shares[1]:>8.0%} {shares[2]:>6.0%}")
                table.append({"model": bench.name, "batch": batch, "in_flight": in_flight, "depth": depth,
                              "lock_step": shares[0], "fullest": shares[1], "ours": shares[2]})  # fmt: skip
    return table


def decode(bench: Bench) -> list[dict]:
    options, table = bench.options, []
    print(f"\n{bench.name}: decoding, {options.prompt} + {options.tokens} positions")
    print(f"{'batch':>6} {'in flight':>9} {'depth':>6} {'tok/s':>8} {'speed-up':>9} {'ceiling':>8} {'share':>6}")
    for batch in options.in_flight:
        for in_flight in dict.fromkeys((batch, min(batch * options.queue, options.most))):
            rate: dict[float, list[float]] = {depth: [] for depth in options.depths}
            mean: dict[float, list[float]] = {depth: [] for depth in options.depths}
            for repeat in range(options.repeats):
                for depth in options.depths:
                    speed, layers = bench.window(batch, in_flight, depth, repeat)
                    rate[depth].append(speed)
                    mean[depth].append(layers)
            for depth in options.depths:
                gains = ratios(rate[depth], rate[options.depths[0]])
                gain, (low, high) = median(gains), spread(gains)
                best = ceiling(bench.dims, median(mean[depth])) / ceiling(bench.dims, median(mean[options.depths[0]]))
                print(
                    f"{batch:>6} {in_flight:>9} {depth:>6.2f} {median(rate[depth]):>8.1f} {gain:>8.2f}x {best:>7.2f}x "
                    f"{gain / best:>6.0%} [{low / best:.0%}, {high / best:.0%}]",
                    flush=True,
                )
                table.append(
                    {
                        "model": bench.name, "batch": batch, "in_flight": in_flight, "depth": depth,
                        "mean_depth": median(mean[depth]) / bench.dims.num_layers, "tokens_per_s": median(rate[depth]),
                        "speed_up": gain, "ceiling": best, "share": gain / best,
                        "share_low": low / best, "share_high": high / best,
                    }
                )  # fmt: skip
    return table


def against_hf(bench: Bench) -> list[dict]:
    options, table = bench.options, []
    print(f"\n{bench.name}: full depth against transformers' generate, {options.prompt} + {options.tokens} positions")
    print(f"{'batch':>6} {'ours tok/s':>11} {'hf tok/s':>9} {'ratio':>6}")
    for batch in options.in_flight:
        lengths, ours, theirs = [options.tokens] * batch, [], []
        prompts = bench.prompts(batch, options.prompt, options.prompt)
        for repeat in range(options.repeats):
            ours.append(bench.run(prompts, lengths, 1.0, batch, repeat))
            theirs.append(bench.run_hf(prompts, lengths, batch))
        found, count = ratios(theirs, ours), sum(lengths)
        ratio, (low, high) = median(found), spread(found)
        print(
            f"{batch:>6} {count / median(ours):>11.1f} {count / median(theirs):>9.1f} {ratio:>5.2f}x "
            f"[{low:.2f}, {high:.2f}]",
            flush=True,
        )
        table.append(
            {"model": bench.name, "batch": batch, "ours": count / median(ours), "hf": count / median(theirs),
             "ratio": ratio, "ratio_low": low, "ratio_high": high}
        )  # fmt: skip
    return table


def end_to_end(bench: Bench) -> list[dict]:
    options = bench.options
    prompts = [p for p in bench.prompts(options.prompts, 30, 120) for _ in range(options.samples)]
    lengths = bench.generator.integers(8, 97, len(prompts)).tolist()
    seconds: dict[str, list[float]] = {"hf": [], "full depth": [], "mean depth 0.5": []}
    for repeat in range(options.repeats):
        seconds["full depth"].append(bench.run(prompts, lengths, 1.0, options.end_in_flight, repeat))
        seconds["mean depth 0.5"].append(bench.run(prompts, lengths, 0.5, options.end_in_flight, repeat))
        seconds["hf"].append(bench.run_hf(prompts, lengths, options.hf_batch))
    print(
        f"\n{bench.name}: {options.prompts} prompts x {options.samples} samples of 8..96 tokens, "
        f"{options.end_in_flight} in flight; generate in batches of {options.hf_batch}"
    )
    table = []
    for name, taken in seconds.items():
        found = ratios(seconds["hf"], taken)
        ratio, (low, high) = median(found), spread(found)
        print(
            f"{name:>15} {median(taken):>8.1f} s {sum(lengths) / median(taken):>8.1f} tok/s {ratio:>6.2f}x "
            f"[{low:.2f}, {high:.2f}]"
        )
        table.append(
            {"model": bench.name, "what": name, "seconds": median(taken), "ratio_to_hf": ratio, "ratio_low": low,
             "ratio_high": high}
        )  # fmt: skip
    return table


def random_qwen2(path: Path) -> Path:
    """A Qwen2 of 24 layers whose head is 3% of its weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, hidden_size=512, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=1408, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--models", nargs="+", choices=("demo", "qwen2"), default=["demo", "qwen2"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--queue", type=int, default=4, help="rows in flight per row of a batch, second way")
    parser.add_argument("--most", type=int, default=256, help="no more rows in flight than this")
    parser.add_argument("--depths", type=float, nargs="+", default=[1.0, 0.7, 0.5, 0.3], help="the first is the base")
    parser.add_argument("--worth", type=float, default=25, help="a / b, in rows (orders)")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a prompt (decode, hf)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens (decode, hf)")
    parser.add_argument("--prompts", type=int, default=64, help="prompts (end-to-end)")
    parser.add_argument("--samples", type=int, default=4, help="samples of each prompt (end-to-end)")
    parser.add_argument("--end-in-flight", type=int, default=128)
    parser.add_argument("--hf-batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    parts = {"cost": cost, "orders": orders, "decode": decode, "hf": against_hf, "end-to-end": end_to_end}
    results: dict[str, list[dict]] = {part: [] for part in options.only}
    print(f"{options.dtype}, {options.threads} threads, {options.repeats} repeats, {options.clock} seconds")
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            path = options.model if name == "demo" else random_qwen2(Path(scratch, "qwen2"))
            bench = Bench(name, path, options.model, options)
            for part in options.only:
                results[part].extend(parts[part](bench))
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options), **results}, indent=1, default=str))


if __name__ == "__main__":
    main()
