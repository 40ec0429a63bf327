"""The embedded engine against vLLM, vLLM with exits, transformers and OpenVINO on a CPU, interleaved.

    make vllm; python tools/bench_engines.py --json bench_engines.json
    python tools/bench_engines.py --engines own vllm masked --dtype bfloat16 --in-flight 128

Greedy answers of exactly --tokens tokens to as many distinct prompts as are in flight, reading the prompts included.
Engines that exit do it with depths drawn from the maximum-entropy distribution of mean --depth, exits after every fifth
layer, and have gates then; vLLM with exits has them always: compiled (masked), the same eagerly (eager), and where they
save (compact). Every engine is a process of its own that holds its model
(tools/engine_worker.py); they take turns, in rotated order, so that a drift of the machine's speed touches all. One
thread each. Ratios are taken within a repeat, of wall and of processor seconds; medians [least, most] over repeats. The
first job of every size is left out.

OpenVINO needs an environment and an export of its own:
    python -m venv .venv-peers; .venv-peers/bin/pip install openvino-genai 'optimum-intel[openvino]'
    .venv-peers/bin/optimum-cli export openvino -m MODEL --task text-generation-with-past --weight-format fp32 OUT
    python tools/bench_engines.py --openvino-python .venv-peers/bin/python --openvino-model OUT
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from workloads import exits_with_mean

WORKER = Path(__file__).with_name("engine_worker.py")
VLLM = ("vllm", "masked", "eager", "compact")
ENGINES = ("own", *VLLM, "transformers", "openvino")
# Engines that exit, with and without exits.
EXITING = ("own", "masked", "eager", "compact")
START_S, JOB_S = 600, 600
# An id that is never generated: answers have one length, whatever the model would do.
LAST_TOKEN = "eos_token_id"


class Engine:
    """A worker process; `ask` waits for its answer."""

    def __init__(self, name: str, python: str, path: Path, dtype: str, rows: int, log: Path):
        self.name = name
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(WORKER.parents[1]),
        }  # fmt: skip
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, str(WORKER), name, str(path), dtype, str(rows)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def read(self, limit: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            line = ""
        if not line:
            tail = " ".join(self.log.read_text().split("\n")[-6:])
            raise RuntimeError(f"engine {self.name} gave no answer within {limit:.0f} s, or died: {tail[-600:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.read(JOB_S)

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass(frozen=True)
class Variant:
    """An engine, with exits or at full depth."""

    engine: str
    exits: bool

    def name(self, depth: float) -> str:
        return f"{self.engine} {f'{depth:g}'.lstrip('0')}" if self.exits else self.engine


def prepare(model: Path, scratch: Path) -> Path:
    """The model's directory once more, without an end-of-sequence token that could come up."""
    path = scratch / "model"
    path.mkdir()
    for file in model.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (path / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, LAST_TOKEN: config["vocab_size"] - 1}))
    return path


def jobs(options: argparse.Namespace, vocab: int, layers: int, rows: int, repeat: int) -> dict[bool, dict[str, Any]]:
    """The same prompts with exits (True) and without."""
    generator = np.random.default_rng(repeat)
    prompts = generator.integers(0, min(vocab, 4000), (rows, options.prompt)).tolist()
    outcomes = [*range(5, layers, 5), layers]
    depths = exits_with_mean(outcomes, options.depth * layers, (rows, options.tokens), repeat)
    depths[:, 0] = layers
    job = {"prompts": prompts, "tokens": options.tokens, "depths": None}
    return {False: job, True: {**job, "depths": depths.tolist()}}


def measure(options: argparse.Namespace, model: Path, dtype: str, scratch: Path) -> list[dict[str, Any]]:
    config = json.loads((model / "config.json").read_text())
    pythons = {**dict.fromkeys(VLLM, options.vllm_python), "openvino": options.openvino_python}
    named = [name for name in options.engines if name != "openvino" or (dtype == "float32" and options.openvino_model)]
    engines: dict[str, Engine] = {}
    table: list[dict[str, Any]] = []
    try:
        for name in named:
            path = options.openvino_model if name == "openvino" else model
            python, rows = str(pythons.get(name, sys.executable)), max(options.in_flight)
            engines[name] = Engine(name, python, path, dtype, rows, scratch / f"{name}-{dtype}.log")
            # One after the other: some load or compile with all they have.
            engines[name].read(START_S)
        variants = [Variant(name, False) for name in named]
        variants += [Variant(name, True) for name in named if name in EXITING]
        for rows in options.in_flight:
            table += compare(options, config, engines, variants, dtype, rows)
    finally:
        for engine in engines.values():
            engine.close()
    return table


def compare(
    options: argparse.Namespace, config: dict[str, Any], engines: dict[str, Engine], variants: list[Variant],
    dtype: str, rows: int,
) -> list[dict[str, Any]]:  # fmt: skip
    seconds: dict[str, dict[Variant, list[float]]] = {"wall": {}, "cpu": {}}
    same: dict[Variant, list[float]] = {}
    for repeat in range(-1, options.repeats):
        work = jobs(options, config["vocab_size"], config["num_hidden_layers"], rows, repeat + 1)
        turn = repeat % len(variants)
        answers = {v: engines[v.engine].ask(work[v.exits]) for v in variants[turn:] + variants[:turn]}
        if repeat < 0:
            continue
        for variant, answer in answers.items():
            for clock, taken in seconds.items():
                taken.setdefault(variant, []).append(answer[clock])
            mine = answers[Variant("own", variant.exits)]["tokens"] if "own" in engines else answer["tokens"]
            same.setdefault(variant, []).append(np.mean(np.array(mine) == np.array(answer["tokens"])))
    reference = Variant("own", False) if "own" in engines else variants[0]
    print(f"\n{dtype}, {rows} in flight, {options.prompt} + {options.tokens} positions")
    print(f"{'engine':<14} {'tok/s':>8} {'to ' + reference.engine + ', wall':>20} {'tok/cpu s':>10} "
          f"{'to ' + reference.engine + ', cpu':>20} {'same':>6}")  # fmt: skip
    found = []
    for variant in variants:
        row: dict[str, Any] = {"dtype": dtype, "in_flight": rows, "engine": variant.engine,
                               "depth": options.depth if variant.exits else 1.0}  # fmt: skip
        line = f"{variant.name(options.depth):<14}"
        for clock, taken in seconds.items():
            ratios = [a / b for a, b in zip(taken[reference], taken[variant], strict=True)]
            rate = rows * options.tokens / statistics.median(taken[variant])
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            row |= {f"tokens_per_{clock}_s": rate, f"ratio_{clock}": middle, f"ratio_{clock}_low": low,
                    f"ratio_{clock}_high": high}  # fmt: skip
            line += f" {rate:>{8 if clock == 'wall' else 10}.1f} {f'{middle:.2f}x [{low:.2f}, {high:.2f}]':>20}"
        row["same_tokens"] = statistics.mean(same[variant])
        print(f"{line} {row['same_tokens']:>6.1%}", flush=True)
        found.append(row)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    usual = [name for name in ENGINES if name not in ("eager", "compact")]
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=usual)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=float, default=0.65, help="mean depth of answers with exits, share of layers")
    parser.add_argument("--prompt", type=int, default=24, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--openvino-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--openvino-model", type=Path, help="the export; without it OpenVINO is left out")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare(options.model, Path(scratch))
        for dtype in options.dtype:
            table += measure(options, model, dtype, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options), "engines": table}, indent=1, default=str))


if __name__ == "__main__":
    main()
