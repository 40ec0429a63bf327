"""Files of a conversion: safetensors written block by block, the manifest, copies of the tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..families.hf_directory import read_json
from ..tensors import DTYPES, Digest, Entries, Hasher, Stream, tensor_bytes
from .workspace import OutputFile

MANIFEST = "manifest.json"
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
CODES = {dtype: code for code, dtype in DTYPES.items()}


def aligned(entries: Entries) -> list[str]:
    """Names in file order: wide numbers first, so that each tensor begins at a multiple of its item size."""
    return sorted(entries, key=lambda name: -entries[name][0].itemsize)


class SafetensorsWriter:
    """Writes one safetensors file. Tensors come in the order of `aligned(entries)`, each in any number of blocks, so
    that no file and no tensor has to be in memory whole.

    `metadata`: what the header says beside the tensors; transformers requires the format. Raises ValueError for a
    dtype that is not supported.
    """

    def __init__(
        self, path: Path, entries: Entries, metadata: Mapping[str, str] | None = MappingProxyType({"format": "pt"})
    ):
        header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in aligned(entries):
            dtype, shape = entries[name]
            if dtype not in CODES:
                raise ValueError(f"{name}: dtype {dtype} is not supported; supported: {', '.join(CODES.values())}")
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        # A 64-bit little-endian length, that many bytes of JSON, then the tensors' bytes without gaps.
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._end = 8 + len(text) + end
        self._file = OutputFile(path)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, block: Tensor) -> None:
        self._file.write(tensor_bytes(block))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        assert kind or self._file.tell() == self._end, (self._file.name, self._file.tell(), self._end)
        self._file.__exit__(kind, *rest)


def write_stream(path: Path, stream: Stream) -> str:
    """Write a stream of float32 tensors to a file; returns the digest.

    One block is hashed while the next comes: blocks are large, and a leader has little room beside its model. The file
    has the bytes that safetensors' own `save_file` gives it. Raises ValueError for another dtype.
    """
    entries = {name: (torch.float32, shape) for name, shape in sorted(stream.table.items())}
    with SafetensorsWriter(path, entries, metadata=None) as writer, Hasher(0) as hasher:
        digest = Digest(hasher)
        for block in digest.passing(stream):
            if block.data.dtype != torch.float32:
                raise ValueError(f"{block.name}: dtype {block.data.dtype}, a checkpoint holds float32")
            writer.write(block.data)
        return digest.hexdigest()


def write_small(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict]:
    """Write tensors from memory to a file; returns their lines of the manifest."""
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, entries) as writer:
        for name in aligned(entries):
            writer.write(tensors[name])
    return {name: entry_of(tensor, path.name) for name, tensor in tensors.items()}


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor_bytes(tensor.cpu())).hexdigest()


def entry(shape: Sequence[int], dtype: torch.dtype, sha256: str, file: str, stored_as: str | None = None) -> dict:
    """Manifest line of a tensor: shape, dtype, sha256, its file, and `stored_as`, its name there if that differs."""
    line = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "sha256": sha256, "file": file}
    return line if stored_as is None else {**line, "stored_as": stored_as}


def entry_of(tensor: Tensor, file: str) -> dict:
    """`entry` of a tensor in memory."""
    return entry(tensor.shape, tensor.dtype, tensor_sha256(tensor), file)


def write_manifest(directory: Path, kind: str, tensors: dict[str, dict], **facts: object) -> None:
    """Write manifest.json: the kind of directory, facts about it, and `entry` per tensor name."""
    total = hashlib.sha256("".join(f"{name} {tensors[name]['sha256']}\n" for name in sorted(tensors)).encode())
    content = {"kind": kind, **facts, "sha256": total.hexdigest(), "tensors": tensors}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1))


def read_manifest(directory: Path) -> dict:
    """Read the manifest of a directory. Raises FileNotFoundError or ValueError."""
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no {MANIFEST} there; expected a directory that the converter wrote")
    manifest = read_json(path)
    lines = manifest.get("tensors")
    digests = [isinstance(x, dict) and x.get("sha256") for x in lines.values()] if isinstance(lines, dict) else [None]
    if not all(isinstance(digest, str) for digest in digests):
        raise ValueError(f"{path}: no tensors with their sha256 in it; the file is damaged, convert again")
    return manifest


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates and generation config, if they exist."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "chat_templates").is_dir():
        shutil.copytree(source / "chat_templates", target / "chat_templates")
