"""One writer per run directory: a lock file that names its holder and outlives no dead process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

GUARD_DEADLINE_S = 5.0


def process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot (Linux), "" where /proc is absent, None if it is dead.

    Together with the pid it names one process, also after the pid was given to another. A zombie counts as dead.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    return None if fields[0] in "ZX" else fields[19]


class RunLock:
    """Held from `acquire` until `release` or until the process is dead, whichever comes first.

    The holder's host, pid and start time stand in the file; they are read and written under a short flock, so two
    processes that find the same stale lock cannot both take it. A holder on another host cannot be probed: it is
    believed to be alive, unless it was an earlier start of the same Slurm job, which a requeue has ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = ""

    def acquire(self) -> None:
        """Raises RuntimeError, naming the holder, while another live process holds the lock."""
        with self._guarded() as descriptor:
            holder = _read(descriptor)
            if holder and self._alive(holder):
                raise RuntimeError(
                    f"{self.path.parent} is being written by process {holder.get('pid')} on {holder.get('host')}; "
                    f"wait for it or end it, choose another run directory, or delete {self.path.name} if it is dead"
                )
            self._token = uuid.uuid4().hex
            pid = os.getpid()
            record = {"host": socket.gethostname(), "pid": pid, "start": process_start(pid), "token": self._token}
            job, restart = _slurm()
            _write(descriptor, json.dumps({**record, "job": job, "restart": restart}))

    def release(self) -> None:
        """Empties the file if this object still holds it. It is never unlinked: another process may have it open."""
        if not self._token or not self.path.exists():
            return
        with self._guarded() as descriptor:
            if (_read(descriptor) or {}).get("token") == self._token:
                _write(descriptor, "")
        self._token = ""

    @staticmethod
    def _alive(holder: dict) -> bool:
        if holder.get("host") != socket.gethostname():
            job, restart = _slurm()
            return not (job and holder.get("job") == job and holder.get("restart", 0) < restart)
        pid = int(holder.get("pid", -1))
        start = process_start(pid) if pid > 0 else None
        return start is not None and start == holder.get("start") and pid != os.getpid()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + GUARD_DEADLINE_S
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise RuntimeError(
                            f"{self.path}: another process has kept it busy for {GUARD_DEADLINE_S:g} s"
                        ) from None
                    time.sleep(0.02)
            yield descriptor
        finally:
            os.close(descriptor)


def _slurm() -> tuple[str, int]:
    """This process's Slurm job ("" outside one) and how often that job has been requeued."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _read(descriptor: int) -> dict | None:
    """None for an empty file and for one whose writer was killed half-way."""
    try:
        value = json.loads(os.pread(descriptor, 4096, 0) or b"null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)
