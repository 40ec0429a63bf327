"""Output directory of a long conversion: made under another name, resumed after a kill, renamed when complete.

<parent>/.<name>.partial/   what is being made; journal.jsonl in it says what for, and which files are finished
<parent>/<name>/            appears when everything is there
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ..interrupts import interruptible

JOURNAL = "journal.jsonl"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Direct writes begin, end and lie in memory at multiples of the disk's block; no disk in use has larger ones.
DISK_BLOCK = 4096
BUFFER_BYTES = 16 << 20
# Between two lines of progress.
INTERVAL_S = 10.0


class OutputFile:
    """A new file written from front to back, past the system's page cache if the file system supports that.

    A model is larger than what the cache would keep of it: pages for it cost the kernel more time than the disk needs,
    and push out what other processes on the machine have there. Errors are OSError, in `write` or at the block's end.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._set_direct(True)
        # Anonymous mappings begin at a page.
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        self._filled = self._flushed = 0

    def tell(self) -> int:
        return self._flushed + self._filled

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            part = view[at : at + BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            at += len(part)
            if self._filled == BUFFER_BYTES:
                self._put(BUFFER_BYTES)
                self._flushed, self._filled = self.tell(), 0
        return at

    def flush(self) -> None:
        """Do nothing: a partly filled buffer is written at the end. `torch.save` calls this."""

    def _set_direct(self, on: bool) -> None:
        flags, direct = fcntl.fcntl(self._handle, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
        with suppress(OSError):
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | direct if on else flags & ~direct)

    def _put(self, count: int) -> None:
        done = refused = 0
        while done < count:
            try:
                done += os.write(self._handle, self._buffer[done:count])
            except OSError as error:
                if error.errno != errno.EINVAL or refused:
                    raise named(error, self.name) from None
                # A file system that opens such files without writing them.
                refused = 1
                self._set_direct(False)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._filled:
                # Padded to a whole block; the padding is truncated afterwards.
                size = self.tell()
                self._put(-(-self._filled // DISK_BLOCK) * DISK_BLOCK)
                os.ftruncate(self._handle, size)
        finally:
            os.close(self._handle)


class Workspace:
    """The unfinished directory. `finished(file)` returns the facts of `finish(file, facts)`, also from earlier runs."""

    def __init__(self, folder: Path, journal: TextIO, done: dict[str, dict], disk: ThreadPoolExecutor):
        self.folder, self._journal, self._done, self._disk = folder, journal, done, disk
        self.flushes: list[Future[None]] = []

    def finished(self, file: str) -> dict[str, Any] | None:
        """Facts about a complete file, or None if it has yet to be made."""
        return self._done.get(file)

    def finish(self, file: str, facts: dict[str, Any]) -> None:
        """Record a complete file. Its bytes go to the disk while the next file is being made."""
        self._done[file] = facts
        path = self.folder / file
        _note(self._journal, {"file": file, "size": path.stat().st_size, "facts": facts})
        self.flushes.append(self._disk.submit(_flush, path))


def _note(journal: TextIO, line: dict[str, Any]) -> None:
    journal.write(json.dumps(line) + "\n")
    journal.flush()


def _flush(path: Path) -> None:
    """The bytes of a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _boot() -> str:
    """Identity of this machine since it was started: what a process has written outlives it, but not the machine."""
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""


def partial_of(out: Path) -> Path:
    """The temporary directory of the output `out`."""
    return out.parent / f".{out.name}.partial"


def refuse_unfinished(folder: Path) -> None:
    """Raises ValueError for the workspace of an unfinished conversion, though all files may be there already: what a
    killed one wrote may be lost when the machine goes down."""
    if (folder / JOURNAL).is_file():
        raise ValueError(
            f"{folder}: an unfinished conversion; expected a finished one; repeat its command with --resume, or remove "
            "the directory"
        )


def check_output(out: Path) -> None:
    """Raises ValueError unless a directory can appear at `out`."""
    if not str(out).isprintable():
        # What is printed of it in the end would fail.
        raise ValueError(f"{str(out)!a}: not a printable name; choose another output directory")
    if out.is_symlink():
        # It could not be replaced by a directory when all the work is done.
        raise ValueError(f"{out} is a symbolic link to {os.readlink(out)}; give the directory itself")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already; remove it or choose another output directory")


def named(error: OSError, place: str) -> OSError:
    """Add a file's name to the error of a failed write, which lacks it: a full disk is one of several."""
    return error if error.filename or error.errno is None else OSError(error.errno, error.strerror, place)


@contextmanager
def workspace(out: Path, job: dict[str, Any], resume: bool = False) -> Iterator[Workspace]:
    """Context with a workspace that becomes `out` if the block succeeds.

    When the block fails its files go, unless `resume` keeps them or the user interrupted; what a killed process
    left is continued under `resume` and cleared away otherwise. `job` (JSON) identifies the conversion: what was begun
    for another job is not continued.

    Raises ValueError: `out` exists and is not an empty directory, another process is making it, or it was begun for
    another job.
    """
    check_output(out)
    folder = partial_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    keep = resume
    with (folder / JOURNAL).open("a+") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, its former owner may have published or removed it.
            os.stat(folder / JOURNAL)
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(f"{out} is being made by another process; wait for it, or choose another output") from None
        try:
            done = _continue(out, folder, journal, job) if resume else {}
            # Several at a time, since the file system commits what waits together.
            with interruptible(), ThreadPoolExecutor(4) as disk:
                if not resume or journal.tell() == 0:
                    journal.truncate(0)
                    _clear(folder, {})
                    _note(journal, {"job": job, "boot": _boot()})
                space = Workspace(folder, journal, done, disk)
                yield space
                for flush in space.flushes:
                    flush.result()
            _publish(folder, out)
        except KeyboardInterrupt:
            keep = True
            raise
        except OSError as error:
            raise named(error, str(folder)) from None
        finally:
            if not keep and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def _continue(out: Path, folder: Path, journal: TextIO, job: dict[str, Any]) -> dict[str, dict]:
    """Files that an earlier run finished; all others are removed."""
    journal.seek(0)
    text = journal.read()
    whole = text[: text.rfind("\n") + 1]
    # What is behind it is the line that was being written when the process ended.
    journal.truncate(len(whole.encode()))
    journal.seek(0, os.SEEK_END)
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines or lines[0].get("boot") != _boot():
        # The machine was restarted, or is another one: which bytes reached the disk is unknown.
        journal.seek(0)
        return {}
    if lines[0].get("job") != json.loads(json.dumps(job)):
        raise ValueError(
            f"{out}: what an earlier run left in {folder.name} was made from another source or with other options; "
            "repeat those, or leave --resume out to start again"
        )
    done = {line["file"]: line["facts"] for line in lines[1:] if _size(folder / line["file"]) == line["size"]}
    _clear(folder, done)
    return done


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _clear(folder: Path, keep: dict[str, dict]) -> None:
    """Remove everything but the journal and the files to keep."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name != JOURNAL and str(path.relative_to(folder)) not in keep:
            path.unlink()


def _publish(folder: Path, out: Path) -> None:
    # Files of some libraries are born private; a model is meant to be shared.
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / JOURNAL).unlink()
    os.replace(folder, out)
    _flush(out.parent)


class Meter:
    """Counts bytes of model weights and prints progress to stderr every ten seconds unless `quiet`."""

    def __init__(self, label: str, total: int, quiet: bool = False):
        self.label, self.total, self.quiet = label, total, quiet
        self.done = self.skipped = 0
        self._start = self._shown = time.monotonic()

    def add(self, count: int) -> None:
        """Count `count` more bytes as processed."""
        self.done += count
        if not self.quiet and time.monotonic() - self._shown > INTERVAL_S:
            self._shown = time.monotonic()
            print(f"{self.label}: {self.line()}", file=sys.stderr, flush=True)

    def skip(self, count: int) -> None:
        """Count bytes that an earlier run processed."""
        self.skipped += count

    def line(self) -> str:
        """Progress text, for example "3.20 of 15.20 GB, 0.61 GB/s"; the rate is that of this run alone."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        done = (self.done + self.skipped) / 1e9
        return f"{done:.2f} of {self.total / 1e9:.2f} GB, {self.done / seconds / 1e9:.2f} GB/s"
