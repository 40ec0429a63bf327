"""One writer per run directory: a lock file that names its holder and expires when that process dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

GUARD_DEADLINE_S = 5.0
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of flock on a file system that lacks it."""
ASK_S = 20.0
"""How long Slurm's controller may take to answer."""
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING", "STAGE_OUT")


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


def pid_namespace() -> str:
    """Id of this process's PID namespace ("" where /proc is absent); a container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class RunLock:
    """A lock, held from `acquire` until `release` or until the process dies, whichever comes first.

    The holder's host, pid and start time stand in the file; they are read and written under filelock's flock, so two
    processes that find the same stale lock cannot both take it. The flock itself is not what holds the lock: forked
    children inherit it and would keep a dead parent's run, and a file server keeps that of a node that died. A holder
    on another host, or in another PID namespace (a container's), cannot be probed: it counts as alive, unless it was an
    earlier start of the same Slurm job, which a requeue has ended, or Slurm reports that its job has ended (only for
    this user's locks: others' jobs may be hidden).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = ""

    def acquire(self) -> None:
        """Take the lock. Raises RuntimeError, naming the holder, while another live process holds it."""
        with self._guarded():
            holder = self._holder()
            if _alive(holder, self.path.stat().st_uid == os.getuid()):
                where = f"{holder.get('host')}{' (in another container)' if _hidden(holder) else ''}"
                raise RuntimeError(
                    f"{self.path.parent} is being written by process {holder.get('pid')} on {where}; "
                    f"wait for it or end it, choose another run directory, or delete {self.path.name} if it is dead"
                )
            self._token = uuid.uuid4().hex
            pid = os.getpid()
            record = {"host": socket.gethostname(), "pid": pid, "start": process_start(pid), "token": self._token}
            self.path.write_text(json.dumps({**record, **_own_job(), "pid_namespace": pid_namespace()}))

    def is_held(self) -> bool:
        """Whether another live process holds the lock, as far as this host can know. Changes nothing."""
        try:
            return _alive(self._holder(), self.path.stat().st_uid == os.getuid())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Empty the file if this object still holds the lock; never unlink it: another process may have it open."""
        if not self._token or not self.path.exists():
            return
        with self._guarded():
            if self._holder().get("token") == self._token:
                self.path.write_text("")
        self._token = ""

    def _holder(self) -> dict:
        """The holder's record; empty for an empty file and for one whose writer was killed half-way."""
        try:
            value = json.loads(self.path.read_text() or "{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Where the file system has no flock (NFS or Lustre mounted without), by a file beside the lock that only one
        process can create. It exists for a moment only; a process killed then on another machine leaves it."""
        # Preserved: filelock neither unlinks the file nor writes into it.
        flock = FileLock(self.path, GUARD_DEADLINE_S, mode=0o644, poll_interval=0.02, preserve_lock_file=True)
        marker = SoftFileLock(f"{self.path}.guard", GUARD_DEADLINE_S, poll_interval=0.02)
        guard: BaseFileLock
        for guard in (flock, marker):
            try:
                guard.acquire()
                break
            except Timeout:
                raise RuntimeError(
                    f"{guard.lock_file}: kept busy for {GUARD_DEADLINE_S:g} s; delete it if no process is at work in "
                    "this directory"
                ) from None
            except OSError as error:
                if guard is marker or error.errno not in NO_FLOCK:
                    raise
        try:
            yield
        finally:
            guard.release()


def _hidden(holder: dict) -> bool:
    """Whether the holder's pid is of another PID namespace; older locks record none."""
    return holder.get("pid_namespace", pid_namespace()) != pid_namespace()


def _alive(holder: dict, ours: bool) -> bool:
    """Whether the holder may be alive. `ours`: this user wrote the file."""
    if not holder:
        return False
    if holder.get("host") != socket.gethostname() or _hidden(holder):
        here = _own_job()
        if here["job"] and holder.get("job") == here["job"] and holder.get("restart", 0) < here["restart"]:
            return False
        return not (ours and _has_ended(holder))
    pid = int(holder.get("pid", -1))
    start = process_start(pid) if pid > 0 else None
    return start is not None and start == holder.get("start") and pid != os.getpid()


def _own_job() -> dict[str, Any]:
    """This start of a Slurm job, for lock files: number ("" for none), how often it was requeued, cluster."""
    e = os.environ
    return {
        "job": e.get("SLURM_JOB_ID", ""),
        "restart": int(e.get("SLURM_RESTART_COUNT") or 0),
        "cluster": e.get("SLURM_CLUSTER_NAME", ""),
    }


def _has_ended(holder: dict) -> bool:
    """Whether Slurm reports that the holder's start of its job has ended. False if unknown: no job or cluster recorded,
    no Slurm here or another cluster's, no answer."""
    number, cluster = holder.get("job"), holder.get("cluster")
    if not (number and cluster) or cluster != (_own_job()["cluster"] or _cluster_here()):
        return False
    code, said = _scontrol("show", "job", "--oneliner", str(number))
    if code:
        return "Invalid job id" in said
    state, restarts = re.search(r"\bJobState=(\w+)", said), re.search(r"\bRestarts=(\d+)", said)
    if state is None or restarts is None:
        return False
    return state[1] not in AT_WORK or int(restarts[1]) > holder.get("restart", 0)


def _cluster_here() -> str:
    match = re.search(r"^ClusterName\s*=\s*(\S+)", _scontrol("show", "config")[1], re.MULTILINE)
    return match[1] if match else ""


def _scontrol(*arguments: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, timeout=ASK_S, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return 1, ""
    return done.returncode, done.stdout + done.stderr
