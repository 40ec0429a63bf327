"""What is in a data set's files: results depend on that, a path only says where it was.

The settings name a stage's directory, and the content that the stage was made from is recorded in it. Where another
content was, the stage has another directory (identity.py).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

RECORD = "data.json"
"""In a stage's directory: {"sha256": of the content at task.path}. Stages of older versions have none."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")

_known: dict[tuple[object, ...], str] = {}


def digest(path: str) -> str:
    """SHA-256 of a data set's files, by name and content; of a single file by its content alone. "" if there are none.

    Files are read once per process while their sizes and times stay what they are.
    """
    if not path:
        # Path("") is the working directory, which may hold environments and a million files.
        return ""
    root = Path(path)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        return ""
    stats = [file.stat() for file in files]
    key = (path, *((str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)))
    if key not in _known:
        _known[key] = _read(root, files)
    return _known[key]


def _read(root: Path, files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        whole.update(f"{file.relative_to(root) if file != root else ''}\0{found}\n".encode())
    return whole.hexdigest()


def recorded(stage: Path) -> str:
    """The content that a stage was made from; "" if that is not known."""
    file = stage / RECORD
    return str(json.loads(file.read_text())["sha256"]) if file.is_file() else ""
