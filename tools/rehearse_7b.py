"""The 7B run's three jobs as a cluster would run them, on a Slurm of this machine: only the width is shrunk.

    python tools/rehearse_7b.py --directory /tmp/rehearsal --tokens 4096

Layers, heads, exits, layout (2 x 2 x 2 learner ranks on one node, 8 actors on the other), chat template and the length
of the answers are those of configs/experiment/rl_7b.yaml; the weights are random, and so made that an answer ends by
itself after about half of --tokens. Traces, calibration, RL without a disturbance; then RL with the same settings that
loses an actor in its first step and is sent back into the queue in its second. Its metrics have to be the same to the
last digit, but for those that count actors. Prints what each job took, by phase, and the most memory that all its
processes had at once. Needs root, and Debian's Slurm (tools/mini_slurm.py installs it).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mini_slurm
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
JOB_S = 3600.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# A head has 16 dimensions, where the real one has 128.
HEADS, GROUPS, WIDTH = 28, 4, 16
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
# What depends on who was there, not on what was learned.
HEALTH = ("actors_alive", "actor_restarts")


def write_model(folder: Path, mean_answer: int) -> None:
    """Qwen2 of the 7B's depth and heads, a byte a token. One channel of the stream stays constant, and the end of an
    answer reads that alone: it comes with probability 1 / mean_answer whatever was written."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    wrapped.chat_template = TEMPLATE
    end = wrapped.eos_token_id
    hidden = HEADS * WIDTH
    config = Qwen2Config(
        vocab_size=264, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=28, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=32_768, tie_word_embeddings=False, initializer_range=0.05,
        bos_token_id=None, eos_token_id=end, pad_token_id=wrapped.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        tokens = torch.randint(0, 256, (4, 64))
        stream = model.model(tokens).last_hidden_state
        model.lm_head.weight[end] = 0.0
        others = model.lm_head(stream).exp().sum(-1) - 1
        model.lm_head.weight[end, 0] = ((others / mean_answer).log() / stream[..., 0]).mean()
        # No answer says what has no text.
        model.lm_head.weight[end + 1 :] = 0.0
        model.lm_head.weight[end + 1 :, 0] = -50 / stream[..., 0].mean()
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)


def write_problems(folder: Path) -> None:
    """Word problems in GSM8K's form."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 400), ("test", 32)):
        lines = []
        for _ in range(count):
            a, b = generator.integers(2, 60, 2).tolist()
            question = f"Ann picks {a} apples in the morning and {b} in the afternoon. How many apples does she have?"
            lines.append(json.dumps({"question": question, "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


class Watch:
    """The most memory that the cluster's processes had at once, shared pages counted once each, MiB."""

    def __init__(self, cluster: mini_slurm.MiniSlurm):
        self.cluster, self.peak, self.stop = cluster, 0.0, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.stop.wait(2):
            total = 0.0
            for pid, _, _ in self.cluster.processes():
                try:
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                except OSError:
                    continue
                total += int(text.split("Pss:")[1].split()[0]) / 1024
            self.peak = max(self.peak, total)

    def close(self) -> float:
        self.stop.set()
        self.thread.join()
        return self.peak


class Rehearsal:
    def __init__(self, cluster: mini_slurm.MiniSlurm, options: argparse.Namespace):
        self.cluster, self.folder = cluster, options.directory
        self.settings = [
            "device=cpu", "model.dtype=float32", f"model.path={self.folder / 'model'}", f"runs={self.folder / 'runs'}",
            f"task.path={self.folder / 'problems'}", "task.train=48", "task.validation=8", "task.evaluation=8",
            f"rollout.max_new_tokens={options.tokens}", "rollout.threads=1", "traces.problems=8",
            "calibrate.epochs=1", "calibrate.exit_samples=1", "calibrate.batch_size=4", "rl.steps=3",
            "rl.checkpoint_every=1", f"rl.prompts_per_step={options.prompts}", f"rl.group_size={options.group}",
            "rl.depth_penalty.target.window=1", "tracker.wandb=disabled",
        ]  # fmt: skip

    def run(self, script: str, name: str, *settings: str, meanwhile: Callable[[str], None] | None = None) -> int:
        """A job from its submission to its end; how often it was requeued."""
        watch, begun = Watch(self.cluster), time.monotonic()
        environment = {
            **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "SBATCH_OUTPUT": str(self.folder / "%j.log"), "OMP_NUM_THREADS": "1", "EE_SITE_ENV": "no site file",
        }  # fmt: skip
        command = ["sbatch", "--parsable", script, *self.settings, f"name={name}", *settings]
        job = self.cluster.run(*command, cwd=ROOT, environment=environment).stdout.strip()
        if meanwhile is not None:
            meanwhile(job)
        found = self.cluster.wait(job, lambda found: found["JobState"] in ENDED, JOB_S)
        seconds, peak, restarts = time.monotonic() - begun, watch.close(), int(found["Restarts"])
        print(f"{script} {name}: {found['JobState']}, {seconds:.0f} s, {peak:.0f} MiB, {restarts} restarts", flush=True)
        if found["JobState"] != "COMPLETED":
            raise SystemExit((self.folder / f"{job}.log").read_text()[-3000:])
        mini_slurm.until(lambda: not self.cluster.run("squeue", "--noheader").stdout.strip(), 60, "an empty queue")
        return restarts

    def rows(self, name: str, file: str = "metrics.jsonl") -> list[dict]:
        found = list((self.folder / "runs" / name).glob(f"rl-*/{file}"))
        return [json.loads(line) for line in found[0].read_text().splitlines()] if found else []

    def disturb(self, job: str) -> None:
        """Kill an actor in the middle of its answers; send the job back once a step is done."""

        def answering() -> list[int]:
            return [pid for pid, _, command in self.cluster.processes() if "Replica.call" in " ".join(command)]

        mini_slurm.until(lambda: bool(answering()), JOB_S, "an actor that answers", pause=1)
        time.sleep(3)
        victim = answering()[0]
        os.kill(victim, signal.SIGKILL)
        print(f"killed actor {victim}, which was answering", flush=True)
        mini_slurm.until(lambda: len(self.rows("disturbed")) >= 1, JOB_S, "the first step", pause=1)
        self.cluster.run("scancel", "--signal=USR1", job)
        self.cluster.wait(job, lambda found: found["Restarts"] == "1", JOB_S)
        print("sent back into the queue", flush=True)


def differences(one: list[dict], other: list[dict]) -> list[str]:
    """Metrics that are not the same, by step."""
    return [
        f"step {a['step']}: {key} {a.get(key)} {b.get(key)}"
        for a, b in zip(one, other, strict=True)
        for key in a | b
        if key not in HEALTH and a.get(key) != b.get(key)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="an empty or new directory")
    parser.add_argument("--tokens", type=int, default=4096, help="longest answer")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parser.add_argument("--group", type=int, default=4, help="answers to each")
    options = parser.parse_args()
    options.directory = options.directory.resolve()
    options.directory.mkdir(parents=True, exist_ok=True)
    if any(options.directory.iterdir()):
        parser.error(f"--directory {options.directory} is not empty")
    mini_slurm.install()
    write_model(options.directory / "model", options.tokens // 2)
    write_problems(options.directory / "problems")
    with mini_slurm.MiniSlurm(options.directory / "cluster", nodes=2, gpus=8, cpus=64) as cluster:
        rehearsal = Rehearsal(cluster, options)
        for stage in ("traces", "calibrate", "rl"):
            rehearsal.run(f"slurm/{stage}_7b.sh", "straight")
        (start,) = (options.directory / "runs" / "straight").glob("calibrate-*/checkpoints/step_*")
        restarts = rehearsal.run("slurm/rl_7b.sh", "disturbed", f"init_policy={start}", meanwhile=rehearsal.disturb)
    straight, disturbed = rehearsal.rows("straight"), rehearsal.rows("disturbed")
    timings = rehearsal.rows("straight", "timings.jsonl")
    for key in sorted({key for row in timings for key in row if key.startswith("seconds")}):
        values = [row[key] for row in timings if key in row]
        print(f"{key}: median {statistics.median(values):.1f} s of {len(values)} steps")
    for key in ("length", "tokens", "finished", "mean_depth", "token_mismatch", "exit_mismatch"):
        print(f"{key}: {[row[key] for row in straight]}")
    apart = differences(straight, disturbed)
    print("differences:", apart or "none")
    lost = disturbed[0]["actor_restarts"]
    print(f"actors lost and replaced in the disturbed run's first step: {lost:.0f}")
    if apart or restarts != 1 or lost < 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
