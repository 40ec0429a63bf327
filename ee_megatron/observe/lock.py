"""One writer per run directory: a lock file that names its holder and outlives no dead process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

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

    The holder's host, pid and start time stand in the file; they are read and written under filelock's flock, so two
    processes that find the same stale lock cannot both take it. The flock itself is not what holds the lock: forked
    children inherit it and would keep a dead parent's run, and a file server keeps that of a node that died. A holder
    on another host cannot be probed: it is believed to be alive, unless it was an earlier start of the same Slurm job,
    which a requeue has ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = ""

    def acquire(self) -> None:
        """Raises RuntimeError, naming the holder, while another live process holds the lock."""
        with self._guarded():
            holder = self._holder()
            if holder and _alive(holder):
                raise RuntimeError(
                    f"{self.path.parent} is being written by process {holder.get('pid')} on {holder.get('host')}; "
                    f"wait for it or end it, choose another run directory, or delete {self.path.name} if it is dead"
                )
            self._token = uuid.uuid4().hex
            pid = os.getpid()
            record = {"host": socket.gethostname(), "pid": pid, "start": process_start(pid), "token": self._token}
            job, restart = _slurm()
            self.path.write_text(json.dumps({**record, "job": job, "restart": restart}))

    def release(self) -> None:
        """Empties the file if this object still holds it. It is never unlinked: another process may have it open."""
        if not self._token or not self.path.exists():
            return
        with self._guarded():
            if self._holder().get("token") == self._token:
                self.path.write_text("")
        self._token = ""

    def _holder(self) -> dict:
        """Empty for an empty file and for one whose writer was killed half-way."""
        try:
            value = json.loads(self.path.read_text() or "{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        # Preserved: filelock neither unlinks the file nor writes into it where the file system has no flock.
        guard = FileLock(self.path, GUARD_DEADLINE_S, mode=0o644, poll_interval=0.02, preserve_lock_file=True)
        try:
            guard.acquire()
        except Timeout:
            raise RuntimeError(f"{self.path}: another process has kept it busy for {GUARD_DEADLINE_S:g} s") from None
        try:
            yield
        finally:
            guard.release()


def _alive(holder: dict) -> bool:
    if holder.get("host") != socket.gethostname():
        job, restart = _slurm()
        return not (job and holder.get("job") == job and holder.get("restart", 0) < restart)
    pid = int(holder.get("pid", -1))
    start = process_start(pid) if pid > 0 else None
    return start is not None and start == holder.get("start") and pid != os.getpid()


def _slurm() -> tuple[str, int]:
    """This process's Slurm job ("" outside one) and how often that job has been requeued."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
