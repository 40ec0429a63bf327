"""Write any model as a Megatron checkpoint, in one process, file by file: `convert import` and `convert reshard`.

    weights/__0_0.distcp    the embedding; __1_0 … __L_0 the layers; __<L+1>_0 the final norm and the head
    weights/objects.distcp, .metadata, common.pt, metadata.json      the rest of megatron-core's torch_dist format
    release                 the same directory under the name by which Megatron-LM's --load finds it
    policy.*                adapters and gates by their layout-free names (policy.py); not in a plain checkpoint
    config.json             the Hugging Face config; tokenizer files beside it
    manifest.json           every tensor under its Hugging Face name: its hash there, the parameter it is part of

Parameters are cut into chunks as the ranks of the intended layout hold them, so that each rank reads only what is its
own. Another layout reads the same files and cuts across the chunks. torch.distributed.checkpoint's FileSystemWriter is
not used: it takes a whole model at once and can't resume from the files that a killed process finished.
"""

from __future__ import annotations

import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..exits import ExitLayout
from ..families import ModelDims
from ..model.config import padded_vocab
from ..policy import save_policy
from ..tensors import BLOCK_BYTES, Block, Hasher, ModelSource, digest, prefetch
from .mapping import Entry, whole_entries
from .megatron_read import FORMAT, KIND, TRACKER, StoredChunk, check_tiling
from .megatron_settings import COMMON, common_state, refuse_lost
from .policy_files import BASE, Policy, base_identity, check_policy, folded
from .sources import WEIGHTS, Watch
from .store import copy_tokenizer, entry, entry_of, write_manifest
from .workspace import Meter, OutputFile, Workspace, workspace

EMPTY_OBJECT = "objects.distcp"
# What torch.save gives the numbers within a chunk; with the chunk at a multiple of it, they are aligned in the file.
ALIGNMENT = 8


@dataclass(frozen=True)
class CheckpointLayout:
    """Parallel layout of a checkpoint. stage_layers: layers per virtual stage, in model order."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    stage_layers: tuple[int, ...] = ()

    @staticmethod
    def plan(
        dims: ModelDims, exits: ExitLayout, tensor: int = 1, pipeline: int = 1, virtual: int = 1
    ) -> CheckpointLayout:
        """Plan stages that end at exits. Raises ValueError for degrees that do not fit the model or its exits."""
        for option, degree in (("--tp", tensor), ("--pp", pipeline), ("--vpp", virtual)):
            if degree < 1:
                raise ValueError(f"{option} {degree}: must be at least 1")
        if virtual > 1 and pipeline == 1:
            raise ValueError(f"--vpp {virtual}: virtual stages need --pp of at least 2")
        for field, size in (
            ("num_attention_heads", dims.heads),
            ("num_key_value_heads", dims.kv_heads),
            ("intermediate_size", dims.intermediate),
        ):
            if size % tensor:
                fits = [n for n in range(1, dims.kv_heads + 1) if not (dims.kv_heads % n or dims.intermediate % n)]
                raise ValueError(f"--tp {tensor}: {field}={size} does not divide by it; choose one of {fits}")
        return CheckpointLayout(tensor, pipeline, virtual, exits.stage_sizes(pipeline * virtual))

    def to_json(self, dims: ModelDims) -> dict:
        return {**asdict(self), "padded_vocab": padded_vocab(dims.vocab, self.tensor)}


def write_megatron(
    source: ModelSource,
    out: Path,
    policy: Policy,
    layout: CheckpointLayout,
    dtype: torch.dtype | None = None,
    *,
    resume: bool = False,
    quiet: bool = True,
) -> Meter:
    """Write the checkpoint atomically; returns the meter with its figures.

    dtype None: each tensor as it is stored. A policy without tensors makes a plain checkpoint, without policy.json. A
    fully fine-tuned policy becomes the base, its gates the policy.
    Raises ValueError or OSError, one line: a model that a Megatron checkpoint can't describe, a policy that does not
    fit, damaged tensors, an output that exists, a full disk.
    """
    refuse_lost(source.dims)
    source, (spec, tensors) = folded(source, policy)
    check_policy(source.dims, spec, tensors)
    base = base_identity(source).to_json()
    job = {
        "command": "megatron",
        "source": source.fingerprint(),
        "spec": spec.to_json(),
        "policy": digest(tensors),
        "layout": layout.to_json(source.dims),
        "dtype": str(dtype),
    }
    meter = Meter("weights", source.nbytes(), quiet)
    with workspace(out, job, resume) as space:
        chunks, lines = _write_weights(space, source, layout, dtype, meter)
        common = common_state(source.dims, asdict(layout), dtype or source.dtype(list(source)[-1]))
        torch.save(common, space.folder / WEIGHTS / COMMON)
        write_metadata(space.folder / WEIGHTS, chunks, _empty_objects(source.dims))
        # Megatron-LM expects its own directory names, and a file that names the current checkpoint.
        (space.folder / TRACKER).write_text("release\n")
        (space.folder / "release").symlink_to(WEIGHTS, target_is_directory=True)
        if tensors:
            save_policy(space.folder, spec, tensors, base)
        for name, value in tensors.items():
            lines[name] = entry_of(value, "policy.safetensors")
        (space.folder / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
        copy_tokenizer(source.tokenizer, space.folder)
        facts = {"exit_depths": list(spec.exit_depths), "layout": layout.to_json(source.dims)}
        write_manifest(space.folder, KIND, lines, **{BASE: base}, **facts)
    return meter


def _write_weights(
    space: Workspace, source: ModelSource, layout: CheckpointLayout, dtype: torch.dtype | None, meter: Meter
) -> tuple[list[StoredChunk], dict[str, dict]]:
    """All weights into the workspace, file by file; finished files are left as they are.

    Returns the chunks and the manifest's lines, one for every tensor of the source. Raises ValueError for a tensor that
    is damaged, not finite or misses its hash.
    """
    files: list[list[Entry]] = [[] for _ in range(source.dims.num_layers + 2)]
    for item in whole_entries(source.dims):
        stored = sorted({str(source.dtype(name)).removeprefix("torch.") for name in item.names})
        if dtype is None and len(stored) > 1:
            raise ValueError(
                f"{source.path}: {', '.join(item.names)} form one parameter but are stored as {stored}; "
                "choose one with --dtype"
            )
        parts = item.parameter.split(".")
        files[int(parts[2]) + 1 if parts[1] == "layers" else 0 if parts[0] == "embedding" else -1].append(item)
    (space.folder / WEIGHTS).mkdir(exist_ok=True)
    chunks: list[StoredChunk] = []
    lines: dict[str, dict] = {}
    with Hasher() as hasher:
        for number, group in enumerate(files):
            name = f"{WEIGHTS}/__{number}_0.distcp"
            facts = space.finished(name)
            if facts is None:
                with ChunkFile(space.folder / WEIGHTS, Path(name).name) as file:
                    made = _write_group(source, group, layout.tensor, dtype, file, hasher, meter)
                facts = {"chunks": file.chunks, "lines": made}
                space.finish(name, facts)
            else:
                meter.skip(sum(source.dtype(n).itemsize * math.prod(source.shape(n)) for n in facts["lines"]))
            chunks += [StoredChunk.from_json(chunk) for chunk in facts["chunks"]]
            lines |= facts["lines"]
    assert lines.keys() == source.keys(), "a tensor that no parameter takes up"
    return chunks, lines


def _write_group(
    source: ModelSource,
    group: Sequence[Entry],
    ranks: int,
    dtype: torch.dtype | None,
    file: ChunkFile,
    hasher: Hasher,
    meter: Meter,
) -> dict[str, dict]:
    """The parameters of one file, each cut for its ranks; returns the manifest's lines of their tensors."""
    watches = {n: (Watch(source, n, dtype, hasher, meter), item.stored) for item in group for n in item.names}
    for item, shape, first, count, read in prefetch(_pieces(source, group, ranks, dtype)):
        parts = [watches[block.name][0].block(block) for block in read]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(rows) < count:
            rows = torch.cat([rows, rows.new_zeros(count - len(rows), *shape[1:])])
        for number, part in enumerate(rows.chunk(ranks, 1) if item.dim == 1 else [rows]):
            columns = [number * part.size(1), *[0] * (len(shape) - 2)] if len(shape) > 1 else []
            file.add(item.stored, shape, (first, *columns), part)
    return {
        name: entry(source.shape(name), watch.dtype, watch.hexdigest(), f"{WEIGHTS}/{file.name}", to)
        for name, (watch, to) in watches.items()
    }


def _pieces(
    source: ModelSource, group: Sequence[Entry], ranks: int, dtype: torch.dtype | None
) -> Iterator[tuple[Entry, tuple[int, ...], int, int, list[Block]]]:
    """Every parameter in ranges of rows that are to be chunks: its entry, its whole shape, the first row, how many, and
    what the tensors contribute, in order. Of the vocabulary never the whole matrix; ranks pad it with zeros."""
    for item in group:
        rows, *columns = item.shape([source.shape(name) for name in item.names])
        runs = sorted((at, row, count, name) for name, held in item.runs(rows).items() for row, at, count in held)
        share = most = rows
        if item.vocab is not None:
            rows = padded_vocab(item.vocab, ranks)
            share = rows // ranks
            row_bytes = (dtype or source.dtype(item.names[0])).itemsize * math.prod(columns)
            most = max(1, BLOCK_BYTES // row_bytes)
        elif item.dim == 0:
            # megatron-core keeps gate and up apart in the file, each cut over the ranks, though a rank joins its two.
            share = rows // (ranks * (len(item.names) if item.groups == 1 else 1))
        for begin in range(0, rows, share):
            for first in range(begin, begin + share, most):
                end = min(first + most, begin + share)
                read = []
                for at, row, count, name in runs:
                    low, high = max(at, first), min(at + count, end)
                    if low < high:
                        begin_row = row + low - at
                        part = source.part(name, slice(begin_row, row + high - at))
                        read.append(Block(name, source.shape(name), begin_row, part))
                yield item, (rows, *columns), first, end - first, read


class ChunkFile:
    """A *.distcp file while it is written; `chunks` lists its content."""

    def __init__(self, folder: Path, name: str):
        self.name, self.chunks = name, list[StoredChunk]()
        self._file = OutputFile(folder / name)

    def add(self, parameter: str, shape: Sequence[int], offsets: Sequence[int], tensor: Tensor) -> None:
        """Append the box of `parameter` (whole shape `shape`) that begins at `offsets`. Raises OSError: disk full."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        begin = self._file.tell()
        # torch.save writes the storage that a tensor looks at; this gives it one that ends where the tensor does.
        flat = torch.from_numpy(tensor.contiguous().flatten().view(torch.uint8).numpy())
        checksums = torch.serialization.get_crc32_options()
        try:
            # No reader of the format looks at them, and they take as long as the sha256 that the manifest has.
            torch.serialization.set_crc32_options(False)
            torch.save(flat.view(tensor.dtype).view(tensor.shape), cast(IO[bytes], self._file))
        except RuntimeError:
            # torch.save replaces the file's error by one about positions.
            raise OSError(f"{self._file.name}: cannot be written; is the disk full?") from None
        finally:
            torch.serialization.set_crc32_options(checksums)
        dtype = str(tensor.dtype).removeprefix("torch.")
        length = self._file.tell() - begin
        sizes = tuple(tensor.shape)
        self.chunks.append(StoredChunk(parameter, tuple(shape), dtype, tuple(offsets), sizes, self.name, begin, length))

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.__exit__(kind, *rest)


def write_metadata(folder: Path, chunks: Sequence[StoredChunk], empty: Iterable[str] = ()) -> None:
    """Finish a checkpoint whose chunks and common.pt are written. Raises ValueError unless they tile every parameter.

    empty: names of empty objects that readers expect: all are one `[None]` in a separate file.
    """
    by_name: dict[str, list[StoredChunk]] = defaultdict(list)
    for chunk in chunks:
        by_name[chunk.parameter].append(chunk)
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, own in by_name.items():
        check_tiling(name, own)
        boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in own]
        properties = TensorProperties(dtype=getattr(torch, own[0].dtype))
        tensors[name] = TensorStorageMetadata(properties, torch.Size(own[0].shape), boxes)
        for number, c in enumerate(own):
            storage[MetadataIndex(name, c.offsets, number)] = _StorageInfo(c.file, c.offset, c.length)
    for name in empty:
        if not (folder / EMPTY_OBJECT).exists():
            # megatron-core stores a list: one object for every rank-local copy of the name.
            torch.save([None], folder / EMPTY_OBJECT)
        tensors[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(EMPTY_OBJECT, 0, (folder / EMPTY_OBJECT).stat().st_size)
    metadata = Metadata(tensors, {}, storage, StorageMeta(), CURRENT_DCP_VERSION)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    facts = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    facts |= {"common_backend": "torch", "common_backend_version": 1}
    # Last: a directory without metadata.json is not a checkpoint.
    (folder / FORMAT).write_text(json.dumps(facts))


def _empty_objects(dims: ModelDims) -> list[str]:
    """Objects without content that megatron-core's models ask a checkpoint for: one for every module that might hold
    scales of 8-bit numbers, of its own modules and of Transformer Engine's."""
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    if dims.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    names = [f"decoder.layers.{layer}.{module}" for layer in range(dims.num_layers) for module in modules]
    return [f"{name}._extra_state/shard_0_1" for name in [*names, "decoder.final_layernorm"]]
