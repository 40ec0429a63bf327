"""Run a function on real gloo ranks, each its own process, and bring its results back."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world: int, target: str, tmp: Path, timeout: float = 240, **arguments):
    """`target` is "module:function" with the module in tests/integration; called as function(**arguments) on every
    rank. Returns the list of return values by rank. A rank that fails fails the test with its output."""
    tmp.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, tmp / "arguments.pt")
    base = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "integration")]),
    }
    processes = []
    for rank in range(world):
        log = (tmp / f"rank{rank}.log").open("w")
        env = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, target, str(tmp), str(rank)]
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes):
            if any(p.poll() for p in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        failed = [r for r, p in enumerate(processes) if p.poll() != 0]
        if failed:
            logs = "\n".join(f"rank {r}:\n{(tmp / f'rank{r}.log').read_text()[-3000:]}" for r in failed[:2])
            raise AssertionError(f"ranks {failed} failed or ran out of time\n{logs}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [torch.load(tmp / f"result{r}.pt", weights_only=False) for r in range(world)]


if __name__ == "__main__":
    target, directory, rank = sys.argv[1:]
    torch.set_num_threads(1)
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(**torch.load(Path(directory) / "arguments.pt", weights_only=False))
    torch.save(result, Path(directory) / f"result{rank}.pt")
