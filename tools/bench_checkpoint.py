"""What a checkpoint under full fine-tuning costs: seconds and memory of saving and loading it, beside cp and sha256sum.

    python tools/bench_checkpoint.py --layers 14                        # half of DeepSeek-R1-Distill-Qwen-7B
    python tools/bench_checkpoint.py --layers 28 --overlay --repeats 1 --no-copy
    python tools/bench_checkpoint.py --layers 4 --width 0.5 --vocab 16384 --tensor 2
    python tools/bench_checkpoint.py --layers 1 --width 0.5 --vocab 8192 --data 2 --zero 1

The model has that model's shapes, with fewer layers or words or narrower if memory or disk asks for it; numbers
are bfloat16 and repeat; nothing is downloaded. Without --zero the policy alone is written and read, by ranks that hold
their parameters and nothing else; with it by real learners, whose AdamW moments and fp32 masters are written and read
too. Each repeat saves, copies the same bytes with cp, hashes them with sha256sum, checks the digest as the leader does
before a run goes on, and loads; nothing of the files is in the page cache when any of them begins. `extra` is the peak
resident memory of a rank meanwhile, above what it had before, summed over the ranks. --old runs the same through an
older tree. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "num_hidden_layers": 28,
    "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000, "hidden_act": "silu",
    "max_position_embeddings": 131072,
}  # fmt: skip
WIDE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SAVE, LOAD, CHECK = "save", "load", "check"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--vocab", type=int, default=SHAPE["vocab_size"])
    parser.add_argument("--width", type=float, default=1.0, help="a share of the streams, heads and MLP units")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=None, help="with optimizer state, under ZeRO")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-copy", action="store_true", help="leave cp out, which needs the same disk space again")
    parser.add_argument(
        "--overlay", action="store_true", help="all parameters in one place of memory, where the model has no room"
    )
    parser.add_argument("--dir", type=Path, default=Path("."), help="where to write; everything is removed again")
    parser.add_argument("--old", type=Path, default=None, help="a tree of an older version, run for comparison")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- one rank ----


class Rank:
    """One rank's part of the model, and how it is saved and loaded."""

    def __init__(self, options: argparse.Namespace, scratch: Path):
        import torch

        from ee_megatron.families import dims_from_config
        from ee_megatron.parallel import groups
        from ee_megatron.parallel.groups import Degrees
        from ee_megatron.policy import PolicySpec

        torch.set_num_threads(1)
        self.options, self.folder = options, scratch / "checkpoint"
        device = groups.initialise(Degrees(options.tensor, options.pipeline, options.data))
        self.config: dict[str, Any] = {**SHAPE, "num_hidden_layers": options.layers, "vocab_size": options.vocab}
        self.config |= {name: int(SHAPE[name] * options.width) for name in WIDE}  # type: ignore[operator]
        self.dims = dims_from_config(self.config)
        stages = options.layers // options.pipeline
        exits = tuple(range(stages, options.layers, stages))
        self.spec = PolicySpec(options.layers, exits, rank=0, full=True)
        self.leads = int(os.environ["RANK"]) == 0
        self.learner: Any = None
        if options.zero is None:
            self.pieces = self._parameters()
        else:
            self._learn(scratch / "model", device)

    def _parameters(self) -> Any:
        import torch

        from ee_megatron.checkpoint.mapping import policy_pieces
        from ee_megatron.model.config import megatron_config
        from ee_megatron.model.gpt import build_model

        stages = self.options.pipeline
        sizes = (self.options.layers // stages,) * stages
        config = megatron_config(self.dims, self.spec, sizes, tensor=self.options.tensor, dtype=torch.bfloat16)
        pieces = policy_pieces(build_model(config))
        if self.options.overlay:
            room = torch.empty(max(piece.parameter.numel() for piece in pieces), dtype=torch.bfloat16)
            for piece in pieces:
                piece.parameter.data = room[: piece.parameter.numel()].view_as(piece.parameter)
        for piece in sorted(pieces, key=lambda piece: -piece.parameter.numel())[: 1 if self.options.overlay else None]:
            fill(piece.parameter.data)
        return pieces

    def _learn(self, model: Path, device: Any) -> None:
        import torch
        import torch.distributed as dist

        from ee_megatron.config.schema import DeepspeedConfig, ParallelConfig
        from ee_megatron.families.hf_directory import HFDirectory
        from ee_megatron.learner import optimizer_state
        from ee_megatron.learner.learner import Learner
        from ee_megatron.policy import initial_policy

        if self.leads:
            write_model(model, self.config, self.dims)
        dist.barrier()
        source = HFDirectory(model)
        stages = self.options.pipeline
        layout = ParallelConfig(
            self.options.tensor, stages, self.options.data, stage_layers=[self.options.layers // stages] * stages
        )
        start = initial_policy(source.dims, self.spec, 0, source.tensor)
        zero = DeepspeedConfig(self.options.zero)
        learner = Learner(source, self.spec, start, layout, zero, device=device, dtype=torch.bfloat16)
        source.close()
        optimizer = learner.updater.engine.optimizer
        if self.options.zero == 0:
            state, tensors = optimizer.state, [piece.parameter for piece in learner.pieces]
        else:
            flats = "fp32_partitioned_groups_flat" if self.options.zero == 3 else "single_partition_of_fp32_groups"
            state, tensors = optimizer.optimizer.state, getattr(optimizer, flats)
        make = getattr(optimizer_state, "state_of", None) or optimizer_state._state_of
        for tensor in tensors:
            made = make(state, tensor, 1)
            for kind in optimizer_state.MOMENTS:
                fill(made[kind])
        self.learner, self.pieces = learner, learner.pieces

    def save(self) -> None:
        if self.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        self._save_as_it_comes()
        if self.leads:
            for file in files(self.folder):
                sync(file)

    def _save_as_it_comes(self) -> None:
        from ee_megatron.checkpoint.policy_files import write_policy
        from ee_megatron.checkpoint.policy_stream import GatherPlan, Holder, TensorStream
        from ee_megatron.tensors import drain
        from ee_megatron.training.checkpoints import TrainingStreams, write_training

        if self.learner is None:
            stream = TensorStream(GatherPlan(self.pieces, Holder(), self.spec.tensor_shapes(self.dims)), Holder())
            write_policy(self.folder, self.spec, stream) if self.leads else drain(stream)
            return
        streams = TrainingStreams(1, self.learner.stream_policy(), self.learner.stream_optimizer())
        write_training(self.folder, self.spec, streams, {}) if self.leads else streams.drain()

    def check(self) -> None:
        from ee_megatron.policy import open_policy
        from ee_megatron.training.checkpoints import damage

        if self.leads and self.learner is None:
            open_policy(self.folder)
        elif self.leads:
            assert damage(self.folder) is None

    def load(self) -> None:
        from ee_megatron.checkpoint.policy_stream import Holder, load_tensors
        from ee_megatron.policy import open_policy
        from ee_megatron.training.checkpoints import read_training

        shapes, policy = self.spec.tensor_shapes(self.dims), open_policy(self.folder, check=False)[1]
        load_tensors(self.pieces, Holder(), shapes, policy, "policy")
        if self.learner is not None:
            self.learner.load_optimizer(read_training(self.folder, check=False)[0])


def fill(tensor: Any) -> None:
    """Numbers that are quickly made, not all alike and not zero: memory that was never written is none."""
    import torch

    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(tensor.numel())).to(tensor.dtype)
    flat = tensor.view(-1)
    for part in flat.split(len(block)):
        part.copy_(block[: len(part)])


def write_model(folder: Path, config: dict[str, Any], dims: Any) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in dims.tensor_shapes().items()}
    for tensor in tensors.values():
        fill(tensor)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def work(options: argparse.Namespace, scratch: Path) -> None:
    """A rank's life: its lines go to a file that the parent reads."""
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    rank = Rank(options, scratch)
    rows: list[dict[str, Any]] = []
    for _ in range(options.repeats):
        rows.append(measured(SAVE, rank.save))
        if rank.leads:
            rows += by_others(rank.folder, scratch / "copy", options.no_copy)
        for name, action in ((CHECK, rank.check), (LOAD, rank.load)):
            if rank.leads:
                forget(rank.folder)
            dist.barrier()
            rows.append(measured(name, action))
    size = sum(file.stat().st_size for file in files(rank.folder))
    (scratch / f"rank{os.environ['RANK']}.json").write_text(json.dumps({"bytes": size, "rows": rows}))
    dist.barrier()


def measured(name: str, action: Callable[[], None]) -> dict[str, Any]:
    import torch.distributed as dist

    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = status("VmRSS"), time.perf_counter()
    action()
    dist.barrier()
    seconds = time.perf_counter() - begun
    return {"what": name, "seconds": seconds, "extra": status("VmHWM") - before, "held": before}


def by_others(folder: Path, copy: Path, no_copy: bool) -> list[dict[str, Any]]:
    rows = []
    for name, command in (("cp", ["cp", "-r", folder, copy]), ("sha256sum", ["sha256sum", *files(folder)])):
        if name == "cp" and no_copy:
            continue
        forget(folder)
        begun = time.perf_counter()
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        if name == "cp":
            for file in files(copy):
                sync(file)
        rows.append({"what": name, "seconds": time.perf_counter() - begun, "extra": 0, "held": 0})
    shutil.rmtree(copy, ignore_errors=True)
    return rows


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def forget(folder: Path) -> None:
    """Have the system drop a folder's files from its cache."""
    for file in files(folder):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


# ---- all of them ----


def run(options: argparse.Namespace, tree: Path) -> dict[str, Any]:
    """Medians over the repeats; memory is the largest of them."""
    world = options.tensor * options.pipeline * options.data
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint.", dir=options.dir) as folder:
        scratch = Path(folder).resolve()
        processes = []
        port = str(20000 + os.getpid() % 20000)
        for rank in range(world):
            environment = {
                **os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
            }  # fmt: skip
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(scratch)]
            processes.append(subprocess.Popen(command, env=environment, cwd=tree))
        try:
            if any(process.wait() for process in processes):
                raise SystemExit("a rank failed; see above")
        finally:
            for process in processes:
                process.kill()
        found = [json.loads((scratch / f"rank{rank}.json").read_text()) for rank in range(world)]
    rows = {}
    for name in (SAVE, "cp", "sha256sum", CHECK, LOAD):
        every = [[row for row in one["rows"] if row["what"] == name] for one in found]
        if every[0]:
            seconds = [row["seconds"] for row in every[0]]
            ranks = [one for one in every if one]
            extra = max(sum(rows_) for rows_ in zip(*[[row["extra"] for row in one] for one in ranks], strict=True))
            worst = max(row["extra"] for one in ranks for row in one)
            rows[name] = {
                "seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds),
                "extra_mb": extra / 1e6, "worst_rank_mb": worst / 1e6,
            }  # fmt: skip
    return {"gb": found[0]["bytes"] / 1e9, "rows": rows, "held_gb": max(one["rows"][0]["held"] for one in found) / 1e9}


def main() -> None:
    options = parse()
    if options.worker is not None:
        work(options, options.worker)
        return
    trees = {"new": Path(__file__).resolve().parents[1], **({"old": options.old.resolve()} if options.old else {})}
    found = {name: run(options, tree) for name, tree in trees.items()}
    for name, result in found.items():
        print(f"{name}: {result['gb']:.2f} GB written; a rank holds {result['held_gb']:.2f} GB before")
        heads = ("seconds", "least", "most", "GB/s", "extra MB", "of written", "worst rank")
        print(" " * 10 + "".join(f"{head:>11}" for head in heads))
        for what, row in result["rows"].items():
            spans = "".join(f"{row[name]:11.1f}" for name in ("seconds", "least", "most"))
            speed, share = result["gb"] / row["seconds"], row["extra_mb"] / 1e3 / result["gb"]
            print(f"{what:10}{spans}{speed:11.2f}{row['extra_mb']:11.0f}{share:11.2f}{row['worst_rank_mb']:11.0f}")
    print(json.dumps({"settings": {k: str(v) for k, v in vars(options).items()}, **found}))


if __name__ == "__main__":
    main()
