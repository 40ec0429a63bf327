"""Bookkeeping of a conversion: every tensor is used exactly once, and what was written can be checked afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..families.hf_directory import read_json

MANIFEST = "manifest.json"
IN_FLIGHT = 160 << 20
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Ledger:
    """Which tensors a conversion has still to use. A tensor is named "<source>:<name>"."""

    def __init__(self, **sources: Iterable[str]):
        self._known = {f"{source}:{name}" for source, names in sources.items() for name in names}
        self._left = set(self._known)

    def take(self, *keys: str) -> list[str]:
        """Mark tensors as used and return their names. Raises ValueError for one that is unknown or was used before."""
        for key in keys:
            if key not in self._left:
                reason = "was used twice" if key in self._known else "does not exist"
                raise ValueError(f"conversion: tensor {key} {reason}; the name map is wrong")
            self._left.remove(key)
        return list(keys)

    def close(self) -> None:
        """Raises ValueError, naming the first few, if a tensor was left unused."""
        if self._left:
            names = sorted(self._left)
            raise ValueError(f"conversion: {len(names)} tensors were not used: {names[:3]}; nothing was written")


class Hasher:
    """sha256 on a thread of its own, so that blocks are hashed while others are read and written.

    What waits is bounded by IN_FLIGHT bytes (or is one block), so memory does not grow.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, update: Callable[[memoryview], None], data: memoryview) -> Future[None]:
        """Hash in the background; waits while more than IN_FLIGHT bytes would wait."""
        while self._waiting and sum(size for _, size in self._waiting) + data.nbytes > IN_FLIGHT:
            self._waiting.popleft()[0].result()
        future = self._pool.submit(update, data)
        self._waiting.append((future, data.nbytes))
        return future


class Digest:
    """sha256 of a tensor that comes in blocks: that of its bytes in row-major order."""

    def __init__(self, hasher: Hasher):
        self._hasher, self._sha = hasher, hashlib.sha256()
        self._last: Future[None] | None = None

    def update(self, block: Tensor) -> None:
        """Take the next block in order; it must not change before `hexdigest`."""
        self._last = self._hasher.submit(self._sha.update, tensor_bytes(block))

    def hexdigest(self) -> str:
        """Waits for the blocks so far."""
        if self._last is not None:
            self._last.result()
        return self._sha.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes in row-major order."""
    return hashlib.sha256(tensor_bytes(tensor.cpu())).hexdigest()


def entry(
    shape: Sequence[int], dtype: torch.dtype, sha256: str, sources: list[str], file: str, stored_as: str | None = None
) -> dict:
    """One line of the manifest: shape, dtype, sha256, the tensors it came from, the file it is in.

    `stored_as` is its name there, where that is another.
    """
    line = {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": sha256,
        "source": sources,
        "file": file,
    }
    return line if stored_as is None else {**line, "stored_as": stored_as}


def entry_of(tensor: Tensor, sources: list[str], file: str) -> dict:
    """`entry` for a tensor that is in memory."""
    return entry(tensor.shape, tensor.dtype, tensor_sha256(tensor), sources, file)


def write_manifest(directory: Path, kind: str, tensors: dict[str, dict], **facts: object) -> None:
    """manifest.json: what kind of directory this is, facts about it, and `entry` per tensor name."""
    total = hashlib.sha256("".join(f"{name} {tensors[name]['sha256']}\n" for name in sorted(tensors)).encode())
    content = {"kind": kind, **facts, "sha256": total.hexdigest(), "tensors": tensors}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1))


def read_manifest(directory: Path) -> dict:
    """The manifest of a directory. Raises FileNotFoundError or ValueError."""
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no {MANIFEST} there; expected a directory that the converter wrote")
    return read_json(path)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat templates and generation config, those that exist; returns the copied names."""
    copied = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    if (source / "chat_templates").is_dir():
        shutil.copytree(source / "chat_templates", target / "chat_templates")
        copied.append("chat_templates")
    return copied
