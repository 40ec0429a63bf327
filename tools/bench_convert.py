"""Speed and memory of the converter on a model of Qwen2.5-7B's shape, against cp and sha256sum of the same files.

    python tools/bench_convert.py --work /somewhere/with/50GB [--layers 28] [--repeats 3]

A random bf16 model is written once and kept in --work. Then, interleaved: copy and hash its files; import them; copy
and hash the Megatron checkpoint; export it. The table goes to stdout as Markdown, every run to --work/bench.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "DeepSeek-R1-Distill-Qwen-7B"


def write_model(folder: Path, layers: int, shard_bytes: int = 4 << 30) -> None:
    """Random weights in sharded safetensors, tensor by tensor."""
    sys.path.insert(0, str(ROOT))
    import torch

    from ee_megatron.checkpoint.store import SafetensorsWriter
    from ee_megatron.families import dims_from_config
    from ee_megatron.planning.plan import published_config

    own = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    config = {**published_config(SHAPE), **own}
    shapes = dims_from_config(config).tensor_shapes()
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 22, generator=generator).mul_(0.02).bfloat16()
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(folder / file, {name: (torch.bfloat16, shapes[name]) for name in names}) as writer:
            for name in names:
                weight_map[name] = file
                left = torch.Size(shapes[name]).numel()
                while left:
                    # Another piece of the pool each time, so that no two tensors are equal.
                    start = int(torch.randint(0, len(pool) // 2, (1,), generator=generator))
                    part = pool[start : start + min(left, len(pool) // 2)]
                    writer.write(part)
                    left -= len(part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident GiB) of a command that must succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command}: exit status {status}")
    return time.monotonic() - start, usage.ru_maxrss / (1 << 20)


def copy_and_hash(source: Path, target: Path) -> float:
    seconds, _ = timed(["sh", "-c", f'cp -r "{source}" "{target}" && find "{target}" -type f -exec sha256sum {{}} +'])
    shutil.rmtree(target)
    return seconds


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    hf, megatron, back = (args.work / name for name in ("hf", "megatron", "back"))
    if not hf.is_dir():
        write_model(hf, args.layers)
    tool = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    runs: dict[str, list[tuple[float, float, float]]] = {"import": [], "export": []}
    for _ in range(args.repeats):
        for path in (megatron, back):
            shutil.rmtree(path, ignore_errors=True)
        exported = ["export", "--checkpoint", str(megatron), "--out", str(back), "--gates", "drop", "--quiet"]
        steps = (
            ("import", hf, [*tool, "import", "--hf", str(hf), "--out", str(megatron), "--quiet"]),
            ("export", megatron, [*tool, *exported]),
        )
        for name, source, command in steps:
            cp = copy_and_hash(source, args.work / "copy")
            seconds, peak = timed(command)
            runs[name].append((seconds, cp, peak))
            line = {
                "command": name,
                "gb": size_of(source),
                "seconds": seconds,
                "cp_sha256_seconds": cp,
                "peak_gib": peak,
            }
            with (args.work / "bench.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
    print("| command | GB | seconds | cp + sha256sum, seconds | speed against it | peak memory, GiB |")
    print("|---|---|---|---|---|---|")
    for name, source in (("import", hf), ("export", megatron)):
        took, cp, peak = (statistics.median(column) for column in zip(*runs[name], strict=True))
        ratio = statistics.median(c / t for t, c, _ in runs[name])
        print(f"| {name} | {size_of(source):.1f} | {took:.0f} | {cp:.0f} | {ratio:.0%} | {peak:.2f} |")
    for path in (megatron, back):
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
