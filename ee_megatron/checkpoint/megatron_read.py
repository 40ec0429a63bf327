"""Read Megatron checkpoints (torch_dist) in one process: ours, those of Megatron-LM and of Megatron-Bridge.

    metadata.json    which format this is
    .metadata        per parameter: global shape, dtype, its chunks; per chunk: file, offset, length
    *.distcp         chunks, each as `torch.save` writes a tensor, one after another

The layout is that of torch.distributed.checkpoint. Its FileSystemReader is not used: it executes the pickle in
.metadata, and copies every chunk into fresh memory twice, where a chunk is mapped here.

    <directory>/latest_checkpointed_iteration.txt   of another program: which checkpoint counts, a number or "release"
    <directory>/iter_0000010/, <directory>/release/ the checkpoint; it may be named itself

Others store layers one by one or stacked, [L, ...], and gate and up as one parameter or as two. Their optimizer is left
alone.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from ..families import ModelDims, dims_from_config
from ..families.hf_directory import read_json
from ..tensors import ModelSource, file_stamps, map_file
from .mapping import Run, stored_name, whole_entries
from .megatron_settings import compare_settings, config_of, read_settings, refuse_settings
from .sources import WEIGHTS
from .store import MANIFEST, read_manifest
from .workspace import refuse_unfinished

KIND = "megatron"
FORMAT = "metadata.json"
TRACKER = "latest_checkpointed_iteration.txt"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# The classes that a .metadata file consists of. It is a pickle: anything else in it is refused, not executed.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}
_LAYER = re.compile(r"decoder\.layers\.(?:\d+\.)?")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine|dataloader")


class StoredChunk(NamedTuple):
    """Location of one box of a parameter: its offsets and sizes in the whole, its file, offset and length there."""

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int

    @staticmethod
    def from_json(row: list[Any]) -> StoredChunk:
        """Build from its fields in order, tuples as lists."""
        return StoredChunk._make(tuple(value) if isinstance(value, list) else value for value in row)


def check_tiling(name: str, chunks: Sequence[StoredChunk]) -> None:
    """Raises ValueError unless the boxes lie inside the parameter, do not overlap and leave nothing out."""
    shape, dtype = chunks[0].shape, chunks[0].dtype
    fits = all(
        (c.shape, c.dtype) == (shape, dtype) and len(c.sizes) == len(c.offsets) == len(shape) and 0 not in c.sizes
        for c in chunks
    )
    if fits:
        first = torch.tensor([c.offsets for c in chunks], dtype=torch.long)
        end = first + torch.tensor([c.sizes for c in chunks], dtype=torch.long)
        # Of any two boxes whether they have a number in common; every box does with itself.
        common = ((first[:, None] < end) & (first < end[:, None])).all(-1)
        inside = bool(((first >= 0) & (end <= torch.tensor(shape, dtype=torch.long))).all())
        covered = sum(math.prod(c.sizes) for c in chunks)
        fits = inside and int(common.sum()) == len(chunks) and covered == math.prod(shape)
    if not fits:
        raise ValueError(
            f"{name}: its chunks do not make up a tensor of shape {list(shape)}; the checkpoint is damaged"
        )


class TorchDistReader:
    """A torch_dist directory. Opening it reads the metadata only; tensors are read one chunk at a time.

    `chunks`: those of every parameter, in the order of rows, then columns. named: by which name a chunk is known, and
    as part of which shape (None: not at all); remedy: what to do about a damaged checkpoint.

    Raises FileNotFoundError or ValueError, one line: no checkpoint, another format, metadata that cannot be read or
    does not fit its files.
    """

    def __init__(
        self,
        folder: Path,
        named: Callable[[StoredChunk], StoredChunk | None] = lambda chunk: chunk,
        remedy: str = "convert it again",
    ):
        self.folder, self._remedy = folder, remedy
        if not (folder / FORMAT).is_file():
            raise FileNotFoundError(f"{folder}: no {FORMAT} there; the checkpoint is incomplete, {remedy}")
        backend = read_json(folder / FORMAT).get("sharded_backend")
        if backend != "torch_dist":
            raise ValueError(f"{folder / FORMAT}: format {backend!r}, expected 'torch_dist'; {remedy}")
        self.chunks: dict[str, list[StoredChunk]] = defaultdict(list)
        for chunk in filter(None, map(named, self._read_metadata())):
            self.chunks[chunk.parameter].append(chunk)
        for name, chunks in self.chunks.items():
            check_tiling(name, chunks)
            chunks.sort(key=lambda c: c.offsets)
        self._check_files()

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of the whole parameter. Raises KeyError for an unknown one."""
        return self.chunks[parameter][0].shape

    def dtype(self, parameter: str) -> torch.dtype:
        return getattr(torch, self.chunks[parameter][0].dtype)

    def read(self, parameter: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Read rows begin .. end - 1 of a parameter to the CPU; mapped if one chunk has them all, else concatenated."""
        rows, *rest = self.shape(parameter)
        end = rows if end is None else end
        chunks = [c for c in self.chunks[parameter] if c.offsets[0] < end and begin < c.offsets[0] + c.sizes[0]]
        parts = [self._load(chunk) for chunk in chunks]
        if len(chunks) == 1 and chunks[0].sizes[1:] == tuple(rest):
            return parts[0][begin - chunks[0].offsets[0] : end - chunks[0].offsets[0]]
        whole = torch.empty((end - begin, *rest), dtype=self.dtype(parameter))
        for chunk, part in zip(chunks, parts, strict=True):
            first, last = max(begin, chunk.offsets[0]), min(end, chunk.offsets[0] + chunk.sizes[0])
            columns = [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            inside = slice(first - chunk.offsets[0], last - chunk.offsets[0])
            whole[(slice(first - begin, last - begin), *columns)] = part[inside]
        return whole

    def _load(self, chunk: StoredChunk) -> Tensor:
        """A chunk's tensor, its numbers mapped where they lie in the file."""
        path = self.folder / chunk.file
        try:
            with path.open("rb", buffering=0) as file:
                part: Any = _create_file_view(file, chunk.offset, chunk.length)
                tensor = torch.load(part, map_location="meta", weights_only=True)
                # A layer of a stack of layers is known by its own shape.
                shapes, dtype = (chunk.sizes, (1, *chunk.sizes)), self.dtype(chunk.parameter)
                if not isinstance(tensor, Tensor) or tuple(tensor.shape) not in shapes or tensor.dtype != dtype:
                    raise ValueError(f"{chunk.parameter} is not what .metadata says")
                part.seek(0)
                archive: Any = torch._C.PyTorchFileReader(part)
                numbers = [name for name in archive.get_all_records() if name.startswith("data/")]
                if len(numbers) > 1 or not tensor.is_contiguous():
                    part.seek(0)
                    return torch.load(part, map_location="cpu", weights_only=True).reshape(chunk.sizes)
                offset = archive.get_record_offset(numbers[0]) + dtype.itemsize * int(tensor.storage_offset())
            if offset + tensor.nbytes > chunk.length:
                raise ValueError(f"{chunk.length} bytes for a tensor of {tensor.nbytes}")
            return map_file(path, chunk.offset + offset, dtype, chunk.sizes)
        # The unpickler of damaged bytes raises whatever its operations raise.
        except Exception as error:
            raise ValueError(self._damaged(path.name, error)) from None

    def _read_metadata(self) -> Iterator[StoredChunk]:
        try:
            metadata = _Metadata(io.BytesIO((self.folder / ".metadata").read_bytes())).load()
            tensors = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
            for name, tensor in tensors.items():
                dtype = str(tensor.properties.dtype).removeprefix("torch.")
                for box in tensor.chunks:
                    info = metadata.storage_data[MetadataIndex(name, box.offsets)]
                    place = info.relative_path, info.offset, info.length
                    yield StoredChunk(name, tuple(tensor.size), dtype, tuple(box.offsets), tuple(box.sizes), *place)
        except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, IndexError, OSError) as error:
            raise ValueError(self._damaged(".metadata", error)) from None

    def _check_files(self) -> None:
        for chunk in itertools.chain.from_iterable(self.chunks.values()):
            path, size = self.folder / chunk.file, chunk.offset + chunk.length
            actual = path.stat().st_size if path.is_file() and path.parent == self.folder else None
            if actual is None or actual < size:
                state = "missing" if actual is None else f"{actual} bytes, at least {size} expected"
                raise ValueError(self._damaged(chunk.file, state))

    def _damaged(self, file: str, reason: object) -> str:
        text = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        return f"{self.folder / file}: cannot be read ({text}); the checkpoint is damaged, {self._remedy}"


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class MegatronTensors(ModelSource):
    """The tensors of a Megatron checkpoint. Opening it reads no weights; every read checks the chunk's location.

    reader: parameters by their stored names, one for each layer; manifest: at least {"tensors": {}}. Raises ValueError
    for parameters that are missing, left over or misshapen.
    """

    def __init__(self, path: Path, config: dict, dims: ModelDims, reader: TorchDistReader, manifest: dict):
        self.path, self.config, self.dims, self.reader, self.manifest = path, config, dims, reader, manifest
        self.tokenizer = path
        self.digests = {name: line["sha256"] for name, line in manifest["tensors"].items()}
        shapes, expected = dims.tensor_shapes(), {}
        self._stored: dict[str, tuple[str, tuple[Run, ...]]] = {}
        for item in whole_entries(dims):
            expected[item.stored] = item.shape([shapes[name] for name in item.names])
            self._stored |= {name: (item.stored, runs) for name, runs in item.runs(expected[item.stored][0]).items()}
        self._check_parameters(expected)
        self.entries = {name: (reader.dtype(self.parameter(name)), shape) for name, shape in shapes.items()}

    def parameter(self, name: str) -> str:
        """The stored Megatron parameter that contains a Hugging Face tensor."""
        return self._stored[name][0]

    def part(self, name: str, *where: slice) -> Tensor:
        stored, runs = self._stored[name]
        first, end, _ = (where[0] if where else slice(None)).indices(self.shape(name)[0])
        pieces = []
        for row, at, count in runs:
            low, high = max(row, first), min(row + count, end)
            if low < high:
                pieces.append(self.reader.read(stored, at + low - row, at + high - row))
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return rows[(slice(None), *where[1:])]

    def stored_degree(self) -> int:
        """Number of tensor-parallel ranks that the stored parameters are cut for."""
        return len({c.offsets[1] for c in self.reader.chunks["decoder.layers.0.self_attention.linear_proj.weight"]})

    def _check_parameters(self, expected: dict[str, tuple[int, ...]]) -> None:
        stored = {name for name in self.reader.chunks if not name.endswith("._extra_state")}
        missing, extra = sorted(expected.keys() - stored), sorted(stored - expected.keys())
        if missing or extra:
            raise ValueError(
                f"{self.reader.folder}: missing {missing[:3]}, unexpected {extra[:3]}; expected the parameters of the "
                f"dense {self.dims.family} model that config.json or the checkpoint describes"
            )
        for name, wanted in expected.items():
            stored_shape = self.reader.shape(name)
            padded = name in VOCABULARY and stored_shape[1:] == wanted[1:] and stored_shape[0] >= wanted[0]
            if stored_shape != wanted and not padded:
                raise ValueError(
                    f"{self.reader.folder}: {name} has shape {list(stored_shape)}, config.json implies {list(wanted)}"
                )


class MegatronDirectory(MegatronTensors):
    """A Megatron checkpoint written by this package.

    Raises FileNotFoundError or ValueError: not such a directory, an unsupported architecture, other parameters than its
    own. A directory that ranks of megatron-core wrote, with a config.json but no manifest, is read as well; it has no
    hashes to check.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        refuse_unfinished(path)
        manifest = read_manifest(path) if (path / MANIFEST).is_file() else {"tensors": {}}
        if manifest.get("kind", KIND) != KIND:
            raise ValueError(f"{path}: {MANIFEST} says {manifest['kind']!r}, expected {KIND!r}")
        config = _read_config(path)
        # Earlier versions stored norms under the names that they have in the model.
        reader = TorchDistReader(path / WEIGHTS, lambda c: c._replace(parameter=stored_name(c.parameter)))
        super().__init__(path, config, dims_from_config(config), reader, manifest)


class ForeignMegatron(MegatronTensors):
    """A checkpoint of Megatron-LM or Megatron-Bridge.

    config: a Hugging Face directory with config.json and tokenizer, or None: dimensions as the checkpoint records them,
    or from a config.json beside it. Raises FileNotFoundError or ValueError, one line: no such checkpoint, another
    format, dimensions that are missing or contradict each other, a parameter that the model doesn't have.
    """

    def __init__(self, path: str | Path, config: str | Path | None = None):
        top = Path(path)
        weights = find_weights(top)
        if (weights.parent / MANIFEST).is_file() and weights.resolve().name == WEIGHTS:
            raise ValueError(f"{top} was made by `convert import`; give it to export or reshard as it is")
        reader = TorchDistReader(weights, _known_as, "save it again")
        settings = read_settings(weights)
        refuse_settings(settings, weights)
        given = Path(config) if config else top
        if config or (top / "config.json").is_file():
            fields = _read_config(given)
            dims = dims_from_config(fields)
            compare_settings(settings, dims, weights, given / "config.json")
        else:
            fields = config_of(settings, {name: reader.shape(name) for name in reader.chunks}, weights)
            dims = dims_from_config(fields)
        if ("output_layer.weight" not in reader.chunks) != dims.tied:
            has = "a" if dims.tied else "no"
            raise ValueError(
                f"{weights}: has {has} output_layer.weight, but {given / 'config.json'} says tie_word_embeddings "
                f"{str(dims.tied).lower()}; give its own --config"
            )
        super().__init__(top, fields, dims, reader, {"tensors": {}})
        self.tokenizer = given

    def fingerprint(self) -> list[list]:
        return [*file_stamps(self.reader.folder, "**/*"), [json.dumps(self.config), 0, 0]]


def find_weights(top: Path) -> Path:
    """Find the directory with metadata.json below a checkpoint directory. Raises FileNotFoundError or ValueError."""
    if not top.is_dir():
        raise FileNotFoundError(f"{top}: no such directory")
    if (top / FORMAT).is_file():
        return top
    tracker = top / TRACKER
    saved = sorted(path for path in top.glob("iter_*") if path.is_dir())
    if tracker.is_file():
        text = tracker.read_text().strip()
        if text != "release" and not text.isdecimal():
            raise ValueError(f"{tracker}: holds {text[:20]!r}, expected the number of an iteration, or release")
        directory = top / ("release" if text == "release" else f"iter_{int(text):07d}")
    elif len(saved) == 1:
        directory = saved[0]
    else:
        reason = f"{len(saved)} iter_* directories, name one of them" if saved else "what was saved is not there"
        raise FileNotFoundError(
            f"{top}: no {FORMAT} and no {TRACKER} there ({reason}); expected what Megatron-LM or Megatron-Bridge saved"
        )
    if not (directory / FORMAT).is_file():
        other = "a checkpoint of another format" if list(directory.glob("mp_rank_*")) else "no checkpoint"
        raise ValueError(f"{directory}: {other} there; expected torch_dist, save it with --ckpt-format torch_dist")
    return directory


def refuse_foreign(folder: Path) -> None:
    """Raises ValueError if a directory, not one of ours, is a checkpoint of Megatron-LM or Megatron-Bridge."""
    tracked = (folder / TRACKER).is_file() or any(folder.glob("iter_*/"))
    if not (folder / WEIGHTS).is_dir() and (tracked or (folder / FORMAT).is_file()):
        raise ValueError(
            f"{folder} was saved by Megatron-LM or Megatron-Bridge; convert import --megatron {folder} first, "
            "and use its output"
        )


def _known_as(chunk: StoredChunk) -> StoredChunk | None:
    """What another program stored, as a parameter of one layer with gate and up in it; None: not of the model."""
    if _OPTIMIZER.match(chunk.parameter):
        return None
    match = _LAYER.match(chunk.parameter)
    stacked = match is not None and match.group() == "decoder.layers."
    name, _, half = chunk.parameter.rpartition("_")
    if ".mlp.linear_fc1." in chunk.parameter and half in ("w", "v"):
        # Two parameters, as halves of one: under the rows that they have in it, after the layer if layers are stacked.
        dim, shape, offsets = int(stacked), list(chunk.shape), list(chunk.offsets)
        offsets[dim] += shape[dim] * (half == "v")
        shape[dim] *= 2
        chunk = chunk._replace(parameter=name, shape=tuple(shape), offsets=tuple(offsets))
    if not stacked:
        return chunk
    if chunk.sizes[0] != 1:
        raise ValueError(f"{chunk.parameter}: {chunk.sizes[0]} layers in one chunk, expected one; save it again")
    name = chunk.parameter.replace("decoder.layers.", f"decoder.layers.{chunk.offsets[0]}.", 1)
    return chunk._replace(parameter=name, shape=chunk.shape[1:], offsets=chunk.offsets[1:], sizes=chunk.sizes[1:])


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json there; expected that of the model's Hugging Face directory")
    return read_json(path)
