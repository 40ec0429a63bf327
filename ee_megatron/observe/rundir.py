"""The directory of a run. Files and checkpoints appear atomically, and one process writes at a time.

config.yaml  metrics.jsonl  log.txt  checkpoints/step_N/ (…, COMPLETE)  .lock  DONE; ../latest/STAGE links to it
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from .lock import RunLock, process_start

logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
DONE = "DONE"
"""Name of the file that marks a finished stage; written last."""
_STEP = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old)-(?P<host>.+)-(?P<pid>\d+)-\d+")
_serial = itertools.count()


def check_folder(setting: str, path: str | Path) -> None:
    """Raises ValueError if no directory can be made at `path`, or none written to that is there."""
    there = next(part for part in (Path(path).absolute(), *Path(path).absolute().parents) if part.exists())
    if not there.is_dir():
        raise ValueError(f"{setting}={path}: {there} is not a directory; name one that can be made")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{setting}={path}: {there} may not be written to; name another directory, or change its permissions"
        )


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) atomically: `path` has all of it or its old content, also after a crash."""
    temporary = _sibling(path, "new")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `final` when the block ends, and vanishes if it raises.

    An existing `final` is replaced. Leftovers of writers that were killed are cleared first. Several processes may
    write into the yielded directory; the one that holds the block must outwait them.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(final.parent)
    temporary = _sibling(final, "new")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        old = _sibling(final, "old") if final.exists() else None
        if old:
            os.rename(final, old)
        try:
            os.rename(temporary, final)
        except OSError:
            if old:
                os.rename(old, final)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(final.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def clean_leftovers(directory: Path) -> None:
    """Remove temporaries of this host's dead processes; restore directories that a killed writer had moved away."""
    for entry in list(directory.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if not match or match["host"] != socket.gethostname() or process_start(int(match["pid"])) is not None:
            continue
        final = directory / match["name"]
        if match["kind"] == "old" and not final.exists():
            os.rename(entry, final)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def seal(directory: Path) -> None:
    """Write COMPLETE: a JSON object of every file's relative name and size in bytes. It is written last."""
    sizes = {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / COMPLETE
    }
    write_atomic(directory / COMPLETE, json.dumps(sizes, indent=1))


def fault(directory: Path) -> str | None:
    """Why a checkpoint can't be used, or None. An empty COMPLETE covers everything; a list, names and sizes.

    Contents are not hashed: a checkpoint of a large model takes minutes to read, and its loader checks it anyway.
    """
    marker = directory / COMPLETE
    if not marker.is_file():
        return f"no {COMPLETE} file"
    try:
        sizes = json.loads(marker.read_text() or "{}")
        for name, size in sizes.items():
            actual = (directory / name).stat().st_size if (directory / name).is_file() else None
            if actual != size:
                return f"{name} has {actual} bytes, {size} were written" if actual is not None else f"{name} is missing"
    except (ValueError, AttributeError):
        return f"{COMPLETE} is damaged"
    return None


def latest_checkpoint(run: Path, examine: Callable[[Path], str | None] | None = None) -> Path | None:
    """The newest usable checkpoint of a run, even while another process has it open; unusable ones are skipped with a
    warning. `examine` checks more than names and sizes: it returns why a checkpoint can't be used, or None.
    """
    for _, directory in _checkpoints(run):
        reason = fault(directory) or (examine(directory) if examine else None)
        if reason is None:
            return directory
        logger.warning("checkpoint %s is skipped: %s", directory, reason)
    return None


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Newest first."""
    folder = run / "checkpoints"
    entries = list(folder.iterdir()) if folder.is_dir() else []
    steps = [(int(match[1]), e) for e in entries if e.is_dir() and (match := _STEP.fullmatch(e.name))]
    return sorted(steps, reverse=True)


class RunDirectory:
    """A run's directory, locked for this process, with the package's log messages in log.txt until it is closed.

    Only the rank that writes (rank 0) should open one. Raises RuntimeError if another live process has it open.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.path / ".lock")
        self._lock.acquire()
        clean_leftovers(self.path)
        self._handler = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger("ee_megatron")
        if root.level == logging.NOTSET:
            root.setLevel(logging.INFO)
        root.addHandler(self._handler)

    def write_atomic(self, path: Path | str, data: bytes | str) -> Path:
        """`write_atomic` at a path relative to the run (or absolute); makes its parents. Returns the whole path."""
        target = self.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, data)
        return target

    def finish(self, stage: str, text: str) -> None:
        """Write DONE and make <run>/latest/<stage> a link to this directory, relative, so that runs can be moved."""
        self.write_atomic(DONE, text)
        link = self.path.absolute().parent / "latest" / stage
        temporary = _sibling(link, "new")
        try:
            link.parent.mkdir(exist_ok=True)
            temporary.symlink_to(Path("..", self.path.name))
            os.replace(temporary, link)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("no link %s to the stage that has finished: %s", link, error)

    def checkpoint_dir(self, step: int) -> Path:
        """Path of a step's checkpoint, which `write_checkpoint` makes."""
        return self.path / "checkpoints" / f"step_{step}"

    @contextlib.contextmanager
    def write_checkpoint(self, step: int) -> Iterator[Path]:
        """`atomic_directory` for a checkpoint, sealed at the end of the block."""
        with atomic_directory(self.checkpoint_dir(step)) as temporary:
            yield temporary
            seal(temporary)

    def latest_checkpoint(self, examine: Callable[[Path], str | None] | None = None) -> Path | None:
        """`latest_checkpoint` of this run."""
        return latest_checkpoint(self.path, examine)

    def keep_last(self, count: int) -> None:
        """Delete all checkpoints older than the `count` newest usable ones. Raises ValueError if count < 1."""
        if count < 1:
            raise ValueError(f"keep_last: {count} checkpoints would leave none to resume from; keep at least 1")
        usable = 0
        for _, directory in _checkpoints(self.path):
            if usable >= count:
                # Renamed first, so that a half-deleted one never looks like a checkpoint.
                doomed = _sibling(directory, "new")
                os.rename(directory, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            elif fault(directory) is None:
                usable += 1

    def close(self) -> None:
        logging.getLogger("ee_megatron").removeHandler(self._handler)
        self._handler.close()
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{socket.gethostname()}-{os.getpid()}-{next(_serial)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
