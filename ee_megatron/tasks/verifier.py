"""Verifies answers in processes that can be killed: no answer, however odd, delays a run beyond its deadline.

A process receives a task and then answers, pickled. An answer may have got hold of it, so that what it sends back is
never unpickled: lines of text, KIND NUMBER CONTENT. KIND is ready or failed (0, and why); then for each answer (1, 2,
...) verdict, with the verdict's fields (1100) and its score, if it has one, or error, with the exception's text.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial

from ..types import Prompt
from .base import Task, Verdict

START_TIMEOUT_S = 60.0
# Far more than a verifier needs, far less than a machine has.
DEFAULT_MEMORY_MB = 4096
LONGEST_LINE = 4096
TIMED_OUT = Verdict(correct=False, well_formed=False, answered=False, timed_out=True)
_START = "from ee_megatron.tasks.verifier import main; main()"
_VERDICT = re.compile(r"([01]{4})(?: ([0-9.e-]+))?")
log = logging.getLogger(__name__)


class VerifierPool:
    """Runs `task.verify` in `workers` processes, each answer within `deadline_s` seconds.

    A process that misses the deadline or dies is killed and replaced, and its answer gets a verdict with `timed_out`.
    `timeouts` counts these. A process has `memory_mb` MiB (0: no limit); one that needs more fails or dies, and
    loses its own answer only. `failures` counts answers at which `verify` raised an exception; they are treated
    alike, and the first exception is logged.

    Raises ValueError for bad settings; RuntimeError if a process can't start.
    """

    def __init__(
        self, task: Task, workers: int = 1, deadline_s: float = 5.0, memory_mb: int = DEFAULT_MEMORY_MB
    ) -> None:
        if workers < 1 or deadline_s <= 0:
            raise ValueError(f"workers={workers}, deadline_s={deadline_s}: both must be positive")
        if memory_mb < 0:
            raise ValueError(f"memory_mb={memory_mb}: expected MiB, or 0 for no limit")
        self.timeouts = 0
        self.failures = 0
        self.task_name = task.name
        self._start = partial(_Worker, pickle.dumps(task), deadline_s, memory_mb)
        self._idle = [self._start() for _ in range(workers)]
        self._closed = False

    def verify_many(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """Verify (prompt, answer) pairs; verdicts in their order."""
        if self._closed:
            raise RuntimeError("the verifier pool is closed; make a new one")
        # A thread for each process, so that there is always an idle process for a thread.
        with ThreadPoolExecutor(len(self._idle)) as threads:
            settling = [threads.submit(self._verify, item) for item in items]
            try:
                settled = [future.result() for future in settling]
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        errors = [
            f"{error}, for the answer {text[-80:]!r}"
            for (_, error), (_, text) in zip(settled, items, strict=True)
            if error is not None
        ]
        if errors and self.failures == 0:
            log.warning("a verifier raised %s; such answers count as timed out", errors[0])
        self.failures += len(errors)
        self.timeouts += sum(verdict.timed_out for verdict, _ in settled) - len(errors)
        return [verdict for verdict, _ in settled]

    def _verify(self, item: tuple[Prompt, str]) -> tuple[Verdict, str | None]:
        """A verdict, and the text of the exception that `verify` raised, if it did."""
        worker = self._idle.pop()
        try:
            # A process that something else ended between two answers costs none.
            if worker.ready and worker.process.poll() is not None:
                worker = self._replace(worker)
            if not worker.ready:
                worker.wait_until_ready()
            try:
                return worker.verify(item)
            except (EOFError, OSError, ValueError):
                worker = self._replace(worker)
                return TIMED_OUT, None
        finally:
            self._idle.append(worker)

    def _replace(self, worker: _Worker) -> _Worker:
        worker.stop()
        return self._start()

    def close(self) -> None:
        """End the processes. Can be called twice."""
        self._closed = True
        for worker in self._idle:
            worker.stop()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def try_reward(task: Task, prompt: Prompt) -> None:
    """Raises ValueError, one line, if what `task.scorer` names can't score a reference answer."""
    try:
        with VerifierPool(task) as pool:
            verdict, error = pool._verify((prompt, prompt.answer))
    except RuntimeError as failed:
        verdict, error = TIMED_OUT, str(failed)
    if verdict.timed_out:
        raise ValueError(f"{task.scorer}: no score for a reference answer ({error or 'it took too long'})")


class _Worker:
    """One verifier process and its connection."""

    def __init__(self, task: bytes, deadline_s: float, memory_mb: int) -> None:
        self.connection, theirs = socket.socketpair()
        self.deadline_s = deadline_s
        self.answers = 0
        self.ready = False
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        # Not multiprocessing's own start: that imports the parent's main module again, and with it torch.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), str(deadline_s), str(memory_mb)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        # If it dies at once, the wait for its readiness reports that.
        with contextlib.suppress(OSError):
            self.connection.settimeout(START_TIMEOUT_S)
            self.connection.sendall(task)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError if the process does not start."""
        try:
            kind, content = self._hear("ready", "failed", time.monotonic() + START_TIMEOUT_S)
        except (EOFError, OSError, ValueError) as error:
            self.stop()
            raise RuntimeError(
                f"a verifier process ended or hung while starting ({type(error).__name__}, exit code "
                f"{self.process.returncode}, {START_TIMEOUT_S:.0f} s allowed); its messages are on standard error"
            ) from None
        if kind == "failed":
            raise RuntimeError(f"a verifier process can't start: {content}")
        self.ready = True

    def verify(self, item: tuple[Prompt, str]) -> tuple[Verdict, str | None]:
        """The verdict on an answer, and the text of the exception that `verify` raised, if it did.

        Raises OSError if the process misses the deadline, EOFError if it died, ValueError if it says anything else.
        """
        until = time.monotonic() + self.deadline_s
        self.answers += 1
        self.connection.settimeout(self.deadline_s)
        self.connection.sendall(pickle.dumps(item))
        kind, content = self._hear("verdict", "error", until)
        if kind == "error":
            return TIMED_OUT, content
        match = _VERDICT.fullmatch(content)
        if match is None:
            raise ValueError(f"{content!r} is not a verdict")
        correct, well_formed, answered, timed_out = (flag == "1" for flag in match[1])
        score = None if match[2] is None else float(match[2])
        return Verdict(correct, well_formed, answered, timed_out, score), None

    def _hear(self, good: str, bad: str, until: float) -> tuple[str, str]:
        """Kind, one of the two that may come now, and content of the next line."""
        line = b""
        while not line.endswith(b"\n"):
            self.connection.settimeout(max(0.001, until - time.monotonic()))
            if not (data := self.connection.recv(LONGEST_LINE)):
                raise EOFError
            line += data
            if len(line) > LONGEST_LINE:
                raise ValueError("more than a line")
        match = re.fullmatch(rf"({good}|{bad}) {self.answers} (.*)\n", line.decode())
        if match is None:
            raise ValueError(f"{line!r} is not an answer")
        return match[1], match[2]

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


# ---- in the process ----

# A scorer that evaluates an answer runs what the model wrote. This is not a sandbox, but an answer that gets so far
# neither writes a file nor starts a program nor opens a connection.
_REFUSED = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.", "socket.",
    "ctypes.dlopen", "urllib.",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook (PEP 578). Raises PermissionError, which imports take for a directory that can't be written to."""
    if event == "open":
        mode, flags = str(arguments[1] or ""), arguments[2]
        if not set(mode) & set("wax+") and not (isinstance(flags, int) and flags & _WRITING):
            return
    elif not event.startswith(_REFUSED):
        return
    raise PermissionError(f"a verifier may not do this: {event}")


def main() -> None:
    """Entry point. Arguments: the connection's descriptor, an answer's deadline in seconds, MiB of memory (0: any)."""
    descriptor, deadline_s, memory = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) << 20
    if memory:
        # Memory that the process fills itself, not the libraries that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    # Ctrl-C reaches the whole terminal group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = open(descriptor, "rb")  # noqa: SIM115
    try:
        task = pickle.load(source)
        task.warm_up()
        if task.reward is not None:
            task.reward.load()
    except BaseException as error:  # A file of the user's may end its process, too.
        os.write(descriptor, _line("failed", 0, f"{type(error).__name__}: {error}"))
        return
    os.write(descriptor, _line("ready", 0, ""))
    silence = os.open(os.devnull, os.O_WRONLY)
    sys.addaudithook(_refuse)
    for number in itertools.count(1):
        try:
            prompt, text = pickle.load(source)
        except (EOFError, OSError):
            # What libraries do at exit is refused here, and they would say so.
            os._exit(0)
        # If the parent is gone, nothing else ends a verifier that hangs: this timer needs no interpreter to do so.
        faulthandler.dump_traceback_later(2 * deadline_s + 10, exit=True, file=silence)
        try:
            *flags, score = astuple(task.judge(prompt, text))
            said = "".join("01"[bool(flag)] for flag in flags) + ("" if score is None else f" {score!r}")
            reply = _line("verdict", number, said)
        except Exception as error:
            reply = _line("error", number, f"{type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()
        try:
            os.write(descriptor, reply)
        except OSError:
            return


def _line(kind: str, number: int, said: str) -> bytes:
    return f"{kind} {number} {' '.join(said.split())[:300]}\n".encode(errors="replace")
