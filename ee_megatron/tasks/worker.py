"""The verifier process: receives a task, then answers, and sends verdicts back. Started by `VerifierPool` only.

What it receives is pickled. What it sends are lines of text, KIND NUMBER CONTENT: ready or failed, 0, and why; then for
each answer verdict or error, 1, 2, ..., and the verdict's fields (1100) or why.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import pickle
import resource
import signal
import sys
from dataclasses import astuple

# A scorer that evaluates an answer runs what the model wrote. This is no sandbox, but an answer that gets so far
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
    """Arguments: the connection's descriptor, the deadline of one answer in seconds, memory in MiB (0: no limit)."""
    descriptor, deadline_s, memory = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) << 20
    if memory:
        # Memory that the process fills itself, not the libraries that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    # Ctrl-C reaches the whole terminal group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = open(descriptor, "rb")  # noqa: SIM115
    try:
        task = pickle.load(source)
        getattr(task, "warm_up", lambda: None)()
    except Exception as error:
        os.write(descriptor, _line("failed", 0, f"{type(error).__name__}: {error}"))
        return
    os.write(descriptor, _line("ready", 0, ""))
    silence = os.open(os.devnull, os.O_WRONLY)
    sys.addaudithook(_refuse)
    for number in itertools.count(1):
        try:
            prompt, text = pickle.load(source)
        except (EOFError, OSError):
            return
        # If the parent is gone, nobody ends a verifier that hangs: this timer needs no interpreter to do so.
        faulthandler.dump_traceback_later(2 * deadline_s + 10, exit=True, file=silence)
        try:
            reply = _line("verdict", number, "".join("01"[bool(flag)] for flag in astuple(task.verify(prompt, text))))
        except Exception as error:
            reply = _line("error", number, f"{type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()
        try:
            os.write(descriptor, reply)
        except OSError:
            return


def _line(kind: str, number: int, said: str) -> bytes:
    return f"{kind} {number} {' '.join(said.split())[:300]}\n".encode(errors="replace")
