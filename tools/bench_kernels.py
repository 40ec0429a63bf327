"""What the C kernels save in decoding, against their PyTorch forms and these under torch.compile, interleaved.

    python tools/bench_kernels.py --json bench_kernels.json

Variants: `torch` (no kernels: the forms of ops.py and sampling.py), `compile` (the same through inductor, dynamic
shapes), `c`. Two parts (--only picks one):
- rounds: one token for every row in flight, at full depth and with exits drawn from the maximum-entropy distribution of
  mean depth `--depth`. Every variant has a scheduler of its own with the same requests, so all do the same work.
- kernels: one call of each kernel at `--position` cached positions, and what it saves of a round at full depth by the
  calls that such a round makes (write_kv: as many as there are exits).

Every repeat runs all variants in turn, in rotated order; ratios to the best alternative (the lesser median of torch and
compile) are taken within a repeat, median [least, most] over repeats. Processor seconds of this process on one thread;
wall seconds of rounds stand beside them. The first call of every shape is left out and counted as compilation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from bench_decode import NEVER, median, ratios, spread
from torch import Tensor
from transformers import AutoTokenizer
from workloads import exits_with_mean

from ee_megatron.exit_rules import Off, Prescribed
from ee_megatron.families import ModelDims
from ee_megatron.kernels import compiled as kernels
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine import sampling
from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.engine.ops import KernelOps, Ops, Rows, TorchOps
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.scheduler import Scheduler

VARIANTS = ("torch", "compile", "c")
# Rounds per timing: about as long for every number of rows.
ROUNDS = {1: 5, 8: 3, 32: 2, 128: 1}
KERNEL_SECONDS = 0.02
Inverse = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CompiledOps(TorchOps):
    """The PyTorch forms through inductor. Compiled code gets tensors only: guards on objects would cost every call."""

    def __init__(self, dims: ModelDims):
        super().__init__(dims)
        forms = TorchOps(dims)

        def attend(fused, pages, where, span, cos, sin, mask, q_gain, k_gain):
            at = Rows(where, span, cos, sin)
            at._mask = mask
            return forms.attend(fused, Layers([pages]), 0, at, q_gain, k_gain)

        def write_kv(fused, layers, where, cos, sin, k_gain):
            forms.write_kv(fused, Layers(layers), 0, len(layers), Rows(where, 0, cos, sin), k_gain)

        self.add_norm = torch.compile(forms.add_norm, dynamic=True)
        self.silu_mul = torch.compile(forms.silu_mul, dynamic=True)
        self._attend = torch.compile(attend, dynamic=True)
        self._write_kv = torch.compile(write_kv, dynamic=True)

    def attend(self, fused, cache, layer, at, q_gain, k_gain):
        return self._attend(
            fused, cache.layers[layer], at.where, at.span, at.cos, at.sin, at.mask(), q_gain, k_gain
        )  # fmt: skip

    def write_kv(self, fused, cache, first, layers, at, k_gain):
        self._write_kv(fused, cache.layers[first : first + layers], at.where, at.cos, at.sin, k_gain)


@dataclass
class Layers:
    """Some layers of a cache."""

    layers: list[Tensor]


class Bench:
    def __init__(self, options: argparse.Namespace, dtype: torch.dtype):
        self.options, self.dtype = options, dtype
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        num_layers = json.loads((options.model / "config.json").read_text())["num_hidden_layers"]
        spec = PolicySpec(num_layers, tuple(range(5, num_layers, 5)), rank=0)
        self.decoder = Decoder.from_hf(options.model, spec, dtype, "cpu")
        self.decoder.eos_ids = NEVER
        self.dims = self.decoder.dims
        begun = time.perf_counter()
        library = kernels.library(dtype)
        self.library_seconds = time.perf_counter() - begun
        if library is None:
            raise SystemExit("error: the kernels could not be compiled; a C compiler is needed")
        self.ops: dict[str, Ops] = {
            "torch": TorchOps(self.dims), "compile": CompiledOps(self.dims), "c": KernelOps(self.dims, library)
        }  # fmt: skip
        self.inverse: dict[str, Inverse] = {
            "torch": sampling.inverse_cdf,
            "compile": torch.compile(sampling.inverse_cdf, dynamic=True),
            "c": sampling.inverse_cdf,
        }
        self.compile_seconds = 0.0

    @contextmanager
    def using(self, variant: str) -> Iterator[None]:
        library = kernels.library if variant == "c" else lambda dtype: None
        with patch.object(kernels, "library", library), patch.object(sampling, "inverse_cdf", self.inverse[variant]):
            self.decoder.use(self.ops[variant])
            yield

    def first(self, variant: str, work: Callable[[], object]) -> None:
        """Run it once; of `compile` the time counts as compilation."""
        begun = time.perf_counter()
        work()
        if variant == "compile":
            self.compile_seconds += time.perf_counter() - begun

    # ---- rounds ----

    def rounds(self, rows: int, depth: float) -> dict:
        """Processor and wall seconds per round of each variant at a mean depth (share of L; 1: no exits)."""
        options, count = self.options, ROUNDS.get(rows, 1)
        tokens = 4 + (options.repeats + 1) * count
        schedulers = {variant: self._filled(rows, tokens, depth) for variant in VARIANTS}
        seconds: dict[str, dict[str, list[float]]] = {v: {"cpu": [], "wall": []} for v in VARIANTS}
        for variant, scheduler in schedulers.items():
            with self.using(variant):
                scheduler.advance()
                self.first(variant, lambda scheduler=scheduler: self._advance(scheduler, 2 * rows))
        for repeat in range(options.repeats):
            for variant in rotated(repeat):
                with self.using(variant):
                    cpu, wall = time.process_time(), time.perf_counter()
                    made = self._advance(schedulers[variant], count * rows)
                    seconds[variant]["cpu"].append((time.process_time() - cpu) * rows / made)
                    seconds[variant]["wall"].append((time.perf_counter() - wall) * rows / made)
        best = best_alternative({v: seconds[v]["cpu"] for v in VARIANTS})
        entry: dict = {"dtype": str(self.dtype)[6:], "rows": rows, "depth": depth, "best": best}
        for clock in ("cpu", "wall"):
            entry[f"{clock}_ms"] = {v: 1e3 * median(seconds[v][clock]) for v in VARIANTS}
            entry[f"{clock}_ratio"] = summary(ratios(seconds[best][clock], seconds["c"][clock]))
            entry[f"{clock}_torch_ratio"] = summary(ratios(seconds["torch"][clock], seconds["c"][clock]))
            entry[f"{clock}_compile_ratio"] = summary(ratios(seconds["compile"][clock], seconds["c"][clock]))
        return entry

    def _filled(self, rows: int, tokens: int, depth: float) -> Scheduler:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, 4000, (self.options.prompt,), generator=generator).tolist()
        num_layers, outcomes = self.dims.num_layers, list(self.decoder.layout.outcomes)
        depths = {
            (f"p{i}", 0): [num_layers, *exits_with_mean(outcomes, depth * num_layers, tokens, seed=i).tolist()]
            for i in range(rows)
        }
        exits = Off() if depth >= 1 else Prescribed(depths)
        scheduler = Scheduler(self.decoder, self.tokenizer, rows)
        for i in range(rows):
            scheduler.add(Request(prompt, SamplingParams(1.0, tokens), exits, 0, f"p{i}"))
        return scheduler

    @staticmethod
    def _advance(scheduler: Scheduler, tokens: int) -> int:
        made = 0
        while made < tokens:
            made += len(scheduler.advance())
        return made

    # ---- kernels ----

    @torch.inference_mode()
    def kernel(self, name: str, rows: int) -> dict:
        """Processor seconds of one call of each variant."""
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        calls: dict[str, Callable[[], object]] = {}
        for variant in VARIANTS:
            with self.using(variant):
                calls[variant] = self._call(name, variant, rows)
                self.first(variant, calls[variant])
        for repeat in range(self.options.kernel_repeats):
            for variant in rotated(repeat):
                with self.using(variant):
                    count, begun, now = 0, time.process_time(), 0.0
                    while now < KERNEL_SECONDS:
                        calls[variant]()
                        count, now = count + 1, time.process_time() - begun
                    seconds[variant].append(now / count)
        best = best_alternative(seconds)
        saved = self._per_round(name) * (median(seconds[best]) - median(seconds["c"]))
        return {
            "dtype": str(self.dtype)[6:], "kernel": name, "rows": rows, "best": best, "saved_ms": 1e3 * saved,
            "us": {variant: 1e6 * median(seconds[variant]) for variant in VARIANTS},
            "ratio": summary(ratios(seconds[best], seconds["c"])),
        }  # fmt: skip

    def _per_round(self, name: str) -> int:
        num_layers, exits = self.dims.num_layers, len(self.decoder.layout.depths)
        return {"norm": 2 * num_layers, "silu": num_layers, "attend": num_layers, "write_kv": exits, "sample": 1}[name]

    def _call(self, name: str, variant: str, rows: int) -> Callable[[], object]:
        dims, ops, position = self.dims, self.ops[variant], self.options.position
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        if name == "norm":
            hidden, delta, gain = random(rows, dims.hidden), random(rows, dims.hidden), random(dims.hidden)
            delta *= 1e-3
            return lambda: ops.add_norm(hidden, delta, gain)
        if name == "silu":
            gate_up = random(rows, 2 * self.decoder.weights.blocks[0].linears["down"].plain().shape[1])
            return lambda: ops.silu_mul(gate_up)
        if name == "sample":
            logits, uniform = 3 * torch.randn(rows, dims.vocab, generator=generator), torch.rand(rows).double()
            inverse = self.inverse[variant]
            return lambda: inverse(logits, uniform)
        stretch = self.decoder._skipped[-1].layers
        cache = KVCache(dims, rows, self.dtype, self.decoder.device)
        cache.hold(range(rows), [position + 1] * rows)
        for layer in cache.layers:
            layer.normal_()
        at = self.decoder.rows(cache, range(rows), [position] * rows)
        if name == "write_kv":
            fused = random(rows, stretch * 2 * dims.kv_size)
            first = dims.num_layers - stretch
            return lambda: ops.write_kv(fused, cache, first, stretch, at, None)
        fused = random(rows, dims.q_size + 2 * dims.kv_size)
        layers = iter(range(10**9))
        # Another layer each time, as in decoding: one layer's cache would stay in the processor's.
        return lambda: ops.attend(fused, cache, next(layers) % dims.num_layers, at, None, None)


def rotated(repeat: int) -> list[str]:
    turn = repeat % len(VARIANTS)
    return [*VARIANTS[turn:], *VARIANTS[:turn]]


def best_alternative(seconds: dict[str, list[float]]) -> str:
    return min(("torch", "compile"), key=lambda variant: median(seconds[variant]))


def summary(values: list[float]) -> list[float]:
    return [median(values), *spread(values)]


def show(ratio: list[float]) -> str:
    return f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--only", nargs="+", choices=("rounds", "kernels"), default=["rounds", "kernels"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--depth", type=float, default=0.65, help="mean depth with exits, a share of all layers")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a prompt")
    parser.add_argument("--position", type=int, default=128, help="cached positions (kernels)")
    parser.add_argument("--repeats", type=int, default=9, help="timings of rounds")
    parser.add_argument("--kernel-repeats", type=int, default=15, help="timings of single kernels")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    # Every kernel is compiled for 1 and for many rows, with and without its optional arguments.
    torch._dynamo.config.recompile_limit = 64
    table: dict[str, list[dict]] = {"rounds": [], "kernels": [], "compilation": []}
    for name in options.dtypes:
        bench = Bench(options, getattr(torch, name))
        if "rounds" in options.only:
            print(f"\n{name}: milliseconds per round, processor (wall)")
            print(f"{'rows':>4} {'depth':>5} " + " ".join(f"{v:>15}" for v in VARIANTS) + "  best / c, processor; wall")
            for rows in options.rows:
                for depth in (1.0, options.depth):
                    entry = bench.rounds(rows, depth)
                    table["rounds"].append(entry)
                    times = " ".join(f"{entry['cpu_ms'][v]:>7.1f} ({entry['wall_ms'][v]:>5.0f})" for v in VARIANTS)
                    ratio = f"{show(entry['cpu_ratio'])}; {show(entry['wall_ratio'])}"
                    print(f"{rows:>4} {depth:>5.2f} {times}  {ratio}", flush=True)
        if "kernels" in options.only:
            print(f"\n{name}: processor microseconds per call, {options.position} cached positions")
            print(f"{'kernel':>8} {'rows':>4} " + " ".join(f"{v:>9}" for v in VARIANTS) + "  best / c, saved per round")
            for kernel in ("attend", "write_kv", "norm", "silu", "sample"):
                for rows in options.rows:
                    entry = bench.kernel(kernel, rows)
                    table["kernels"].append(entry)
                    times = " ".join(f"{entry['us'][v]:>9.1f}" for v in VARIANTS)
                    print(
                        f"{kernel:>8} {rows:>4} {times}  {show(entry['ratio'])}, {entry['saved_ms']:.2f} ms", flush=True
                    )
        table["compilation"].append({"dtype": name, "compile_s": bench.compile_seconds, "c_s": bench.library_seconds})
        print(f"\n{name}: compilation and first calls {bench.compile_seconds:.0f} s; C {bench.library_seconds:.1f} s")
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options), **table}, indent=1, default=str))


if __name__ == "__main__":
    main()
