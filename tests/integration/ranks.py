"""Real gloo ranks, each its own process, that run functions of this folder and bring their results back."""

from __future__ import annotations

import importlib
import os
import selectors
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


class Ranks:
    """`world` processes that stay alive between calls, so that many cases cost one start.

    `call("module:function", **arguments)` runs the function on every rank and returns the list of results by rank; a
    rank that fails or is late fails the test with its output. Leaving the context ends all of them.
    """

    def __init__(self, world: int, tmp: Path):
        self.tmp, self.calls = tmp, 0
        tmp.mkdir(parents=True, exist_ok=True)
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
        self.processes = []
        for rank in range(world):
            with (tmp / f"rank{rank}.log").open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(rank)],
                        env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def call(self, target: str, timeout: float = 240, **arguments):
        self.calls += 1
        folder = self.tmp / f"call{self.calls}"
        folder.mkdir()
        torch.save(arguments, folder / "arguments.pt")
        for process in self.processes:
            process.stdin.write(f"{target} {folder}\n")
            process.stdin.flush()
        waiting, deadline = selectors.DefaultSelector(), time.monotonic() + timeout
        for rank, process in enumerate(self.processes):
            waiting.register(process.stdout, selectors.EVENT_READ, rank)
        while waiting.get_map():
            ready = waiting.select(timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail("late", range(len(self.processes)))
            for key, _ in ready:
                if not key.fileobj.readline():
                    self._fail("failed", [key.data])
                waiting.unregister(key.fileobj)
        return [torch.load(folder / f"result{r}.pt", weights_only=False) for r in range(len(self.processes))]

    def _fail(self, what: str, ranks) -> None:
        logs = "\n".join(f"rank {r}:\n{(self.tmp / f'rank{r}.log').read_text()[-3000:]}" for r in list(ranks)[:2])
        raise AssertionError(f"ranks {list(ranks)} {what}\n{logs}")

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stdin.close()
        deadline = time.monotonic() + 10
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def run_ranks(world: int, target: str, tmp: Path, timeout: float = 240, **arguments):
    """One call on fresh ranks."""
    with Ranks(world, tmp) as ranks:
        return ranks.call(target, timeout, **arguments)


def _serve(rank: str) -> None:
    torch.set_num_threads(1)
    # Acknowledgements have the real stdout to themselves; whatever libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        target, folder = line.split()
        module, function = target.split(":")
        arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
        result = getattr(importlib.import_module(module), function)(**arguments)
        torch.save(result, Path(folder) / f"result{rank}.pt")
        answers.write("done\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
