"""Processes of tests, forked off one that has imported everything and has one thread: imports are paid once for all.

What a test starts here is the command line as a user starts it, only sooner: an environment, a working directory, a
process group and standard streams of its own, signals at their defaults. Its ranks are forked off it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PATHS = [ROOT, *(ROOT / "tests" / part for part in ("", "integration", "device"))]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "tests.preloaded", "torch._dynamo", "parallel_cases", "layout_cases", "plan_cases"]
)
SERVER = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(map(str, PATHS))}


def start(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A process that runs `target`, a function of a module."""
    process = CONTEXT.Process(target=target, args=arguments)
    # The first start is the server's.
    with mock.patch.dict(os.environ, SERVER):
        process.start()
    return process


class Command:
    """`ee-megatron` with these arguments, as subprocess.Popen has it; what it prints is read back from files."""

    def __init__(self, arguments: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
        self.args = [str(argument) for argument in arguments]
        self._streams = [tempfile.TemporaryFile("w+b") for _ in range(2)]  # noqa: SIM115
        paths = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in self._streams]
        environment = {**os.environ, **SERVER, **(env or {})}
        self._process = start(_run, self.args, str(cwd), environment, paths)
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has said on stdout and stderr, once it has ended."""
        self.wait(timeout)
        return self.stdout, self.stderr

    @property
    def stdout(self) -> str:
        return self._read(0)

    @property
    def stderr(self) -> str:
        return self._read(1)

    def _read(self, number: int) -> str:
        self._streams[number].seek(0)
        return self._streams[number].read().decode(errors="replace")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ee_megatron(
    *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """The command to its end, or killed with all that it started at the timeout."""
    command = Command(arguments, cwd, env)
    try:
        out, err = command.communicate(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(command.pid, signal.SIGKILL)
        raise AssertionError(f"{command.args} is late:\n{command.stdout[-3000:]}\n{command.stderr[-3000:]}") from None
    assert command.returncode is not None
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)


def _run(arguments: list[str], cwd: str, environment: Mapping[str, str], streams: list[str]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["ee-megatron", *arguments]
    gc.freeze()
    from ee_megatron import cli

    sys.exit(cli.main(arguments))
