"""What an `embed` export costs and saves beside the plain class that transformers has for the same model, interleaved.

    python tools/bench_embed.py --model models/SmolLM2-135M-Instruct --repeats 5 --json bench_embed.json

Greedy text of the same prompts and lengths, by `generate` of both: the plain class, the export without exits
(`exit_policy="off"`), and the export with exits drawn independently per token, from the maximum-entropy distribution of
a mean depth. Every repeat runs all of them in turn; speeds are ratios to the plain class within a repeat, median
[least, most] over repeats. One thread. `--clock cpu` (processor seconds of this process, the default) is disturbed
least by other work.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from workloads import spread

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.planning.workload import tilted
from ee_megatron.policy import PolicySpec


def export(model: Path, out: Path, dtype: str) -> PolicySpec:
    """The model with gates that answer the same to every input, an exit after every fifth layer."""
    dims = HFDirectory(model).dims
    spec = PolicySpec(dims.num_layers, tuple(range(5, dims.num_layers, 5)), rank=0)
    tensors = {name: torch.zeros(shape) for name, shape in spec.tensor_shapes(dims).items()}
    export_hf(model, (spec, tensors), out, gates="embed", dtype=dtype)
    return spec


def set_mean_depth(model: PreTrainedModel, spec: PolicySpec, depth: float) -> None:
    """Gates whose draws have this mean depth (layers)."""
    left = 1.0
    for exit_depth, share in zip(spec.exit_depths, tilted(spec.layout.outcomes, depth), strict=False):
        hazard = min(max(share / left, 1e-6), 1 - 1e-6)
        model.gates[str(exit_depth)].fc2.bias.data.fill_(math.log(hazard / (1 - hazard)))
        left -= share


@torch.inference_mode()
def seconds(model: PreTrainedModel, ids: Tensor, options: argparse.Namespace, **mode: str) -> float:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    begun = clock()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=options.tokens, pad_token_id=0, **mode
    )
    assert out.shape[1] == ids.shape[1] + options.tokens
    return clock() - begun


def compare(plain: PreTrainedModel, exits: PreTrainedModel, spec: PolicySpec, batch: int, options) -> list[dict]:
    """A line for full depth and one for each mean depth."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, 4000, (batch, options.prompt), generator=generator)
    depths = [None, *options.depths]
    ratios: list[list[float]] = [[] for _ in depths]
    found: list[list[float]] = [[] for _ in depths]
    for repeat in range(options.repeats + 1):
        base = seconds(plain, ids, options)
        for place, depth in enumerate(depths):
            if depth is not None:
                set_mean_depth(exits, spec, depth * spec.num_layers)
            torch.manual_seed(repeat)
            taken = seconds(exits, ids, options, exit_policy="off" if depth is None else "sample")
            # The first repeat warms up.
            if repeat:
                ratios[place].append(base / taken)
                found[place].append(float(exits.last_exit_depths.double().mean()) if depth else spec.num_layers)
    lines = []
    for depth, speeds, layers in zip(depths, ratios, found, strict=True):
        middle, least, most = spread(speeds)
        mean = sum(layers) / len(layers)
        kind = "no exits" if depth is None else "exits"
        print(
            f"batch {batch:2}  {kind:<8}  depth {mean:4.1f}/{spec.num_layers}  {middle:.2f} x [{least:.2f}, {most:.2f}]"
        )
        lines.append({"batch": batch, "exits": depth is not None, "depth": mean, "speeds": speeds})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    parser.add_argument(
        "--depths", type=float, nargs="+", default=[0.75, 0.35], help="mean depths, shares of all layers"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        spec = export(options.model, out, options.dtype)
        dtype = getattr(torch, options.dtype)
        plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        exits = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, trust_remote_code=True).eval()
        for model in (plain, exits):
            model.generation_config.eos_token_id = None
        print(f"{options.model.name}, {options.dtype}, transformers {transformers.__version__}, one thread")
        lines = [line for batch in options.batch for line in compare(plain, exits, spec, batch, options)]
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
