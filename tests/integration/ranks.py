"""Real gloo ranks, each its own process, that run functions of this folder and bring their results back."""

from __future__ import annotations

import gc
import importlib
import os
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from tests.processes import CONTEXT, start


class Ranks:
    """`world` processes that stay alive between calls, so that many cases cost one start.

    `call("module:function", **arguments)` runs the function on every rank and returns the list of results by rank; a
    rank that fails or is late fails the test with its output. Leaving the context ends all of them.
    """

    def __init__(self, world: int, tmp: Path):
        self.tmp, self.calls = tmp, 0
        tmp.mkdir(parents=True, exist_ok=True)
        self.processes, self.pipes = [], []
        for rank in range(world):
            environment = {
                "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "MEETING": str(tmp / "meeting"), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            ours, theirs = CONTEXT.Pipe()
            process = start(_serve, environment, tmp / f"rank{rank}.log", theirs)
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def __enter__(self) -> Ranks:
        return self

    def call(self, target: str, timeout: float = 240, **arguments):
        self.calls += 1
        folder = self.tmp / f"call{self.calls}"
        folder.mkdir()
        torch.save(arguments, folder / "arguments.pt")
        waiting, deadline = {pipe: rank for rank, pipe in enumerate(self.pipes)}, time.monotonic() + timeout
        for pipe, rank in waiting.items():
            try:
                pipe.send((target, folder))
            except OSError:
                self._fail("ended before", [rank])
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail("late", waiting.values())
            for pipe in ready:
                try:
                    pipe.recv()
                except EOFError:
                    self._fail("failed", [waiting[pipe]])
                waiting.pop(pipe)
        return [torch.load(folder / f"result{r}.pt", weights_only=False) for r in range(len(self.pipes))]

    def _fail(self, what: str, ranks) -> None:
        logs = "\n".join(f"rank {r}:\n{(self.tmp / f'rank{r}.log').read_text()[-3000:]}" for r in list(ranks)[:2])
        raise AssertionError(f"ranks {list(ranks)} {what}\n{logs}")

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        deadline = time.monotonic() + 10
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            process.kill()
            process.join()


def _serve(environment: dict[str, str], log: Path, pipe: Connection) -> None:
    os.environ.update(environment)
    # What the server has imported is never garbage.
    gc.freeze()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    while True:
        try:
            target, folder = pipe.recv()
        except EOFError:
            return
        module, function = target.split(":")
        arguments = torch.load(folder / "arguments.pt", weights_only=False)
        result = getattr(importlib.import_module(module), function)(**arguments)
        torch.save(result, folder / f"result{environment['RANK']}.pt")
        pipe.send("done")
