"""Megatron checkpoints in one process: written from any source of tensors, read back under Hugging Face names.

    weights/__0_0.distcp       the embedding; __1_0 … __L_0 the layers; __<L+1>_0 the final norm and the head
    manifest.json              every tensor under its Hugging Face name: its hash there, the parameter it is part of

Parameters are cut into chunks as the ranks of the intended layout hold them, so that each rank reads only what is its
own. Another layout reads the same files and cuts across the chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..exits import ExitLayout
from ..families import ModelDims, dims_from_config
from ..families.hf_directory import read_json
from ..model.config import padded_vocab
from .manifest import MANIFEST, Hasher, Ledger, entry, read_manifest
from .mapping import Entry, stored_name
from .megatron_io import KIND, WEIGHTS, whole_entries
from .meter import Meter
from .safetensors_io import nbytes
from .sources import BLOCK_BYTES, TensorSource, Watch, read_ahead, reblock, rows_of
from .torch_dist import ChunkFile, StoredChunk, TorchDistReader
from .workspace import Workspace

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
GATE_UP = "mlp.linear_fc1."


@dataclass(frozen=True)
class CheckpointLayout:
    """The parallel layout that a checkpoint is cut for. stage_layers: layers per virtual stage, in model order."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    stage_layers: tuple[int, ...] = ()

    @staticmethod
    def plan(
        dims: ModelDims, exits: ExitLayout, tensor: int = 1, pipeline: int = 1, virtual: int = 1
    ) -> CheckpointLayout:
        """Stages with boundaries at exits. Raises ValueError for degrees that do not fit the model or its exits."""
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


def write_weights(
    space: Workspace, source: TensorSource, layout: CheckpointLayout, dtype: torch.dtype | None, meter: Meter
) -> tuple[list[StoredChunk], dict[str, dict]]:
    """All weights of `source` into the workspace, file by file; finished files are left as they are.

    dtype None: each tensor as it is stored. Returns the chunks and the manifest's lines, in which every tensor of the
    source occurs once (ValueError otherwise, as for a tensor that is damaged, not finite or misses its hash).
    """
    (space.folder / WEIGHTS).mkdir(exist_ok=True)
    ledger = Ledger(base=source.names())
    chunks: list[StoredChunk] = []
    lines: dict[str, dict] = {}
    with Hasher() as hasher:
        files = _files(source.dims)
        for number, group in enumerate(files):
            for soon in files[number + 1 : number + 2]:
                source.prefetch(name for item in soon for name in item.names)
            name = f"{WEIGHTS}/__{number}_0.distcp"
            facts = space.finished(name)
            if facts is None:
                with ChunkFile(space.folder / WEIGHTS, Path(name).name) as file:
                    writer = _Writer(source, layout.tensor, dtype, file, hasher, meter)
                    for item in group:
                        writer.write(item)
                    lines_of = writer.lines()
                facts = {"chunks": [asdict(chunk) for chunk in file.chunks], "lines": lines_of}
                source.release()
                space.finish(name, facts)
            else:
                meter.skip(sum(nbytes(source.dtype(name), line["shape"]) for name, line in facts["lines"].items()))
            chunks += [StoredChunk.from_json(chunk) for chunk in facts["chunks"]]
            ledger.take(*(f"base:{tensor}" for tensor in facts["lines"]))
            lines |= facts["lines"]
    ledger.close()
    return chunks, lines


def _files(dims: ModelDims) -> list[list[Entry]]:
    files: list[list[Entry]] = [[] for _ in range(dims.num_layers + 2)]
    for item in whole_entries(dims):
        parts = item.parameter.split(".")
        files[int(parts[2]) + 1 if parts[1] == "layers" else 0 if parts[0] == "embedding" else -1].append(item)
    return files


class _Writer:
    """Parameters of one file."""

    def __init__(
        self,
        source: TensorSource,
        ranks: int,
        dtype: torch.dtype | None,
        file: ChunkFile,
        hasher: Hasher,
        meter: Meter,
    ):
        self._source, self._ranks, self._dtype = source, ranks, dtype
        self._file, self._hasher, self._meter = file, hasher, meter
        self._watches: dict[str, tuple[Watch, str]] = {}

    def write(self, item: Entry) -> None:
        if item.parameter in VOCABULARY:
            self._vocabulary(item)
        else:
            for shape, offsets, local in _cut(item, self._read(item), self._ranks):
                self._file.add(item.stored, shape, offsets, local)

    def lines(self) -> dict[str, dict]:
        """The manifest's lines of what was written. Raises ValueError if a tensor was not what its source promised."""
        shapes, file = self._source.dims.tensor_shapes(), f"{WEIGHTS}/{self._file.name}"
        return {
            name: entry(shapes[name], watch.dtype, watch.hexdigest(), [f"base:{name}"], file, parameter)
            for name, (watch, parameter) in self._watches.items()
        }

    def _watch(self, name: str, item: Entry) -> Watch:
        watch = Watch(self._source, name, self._dtype, self._hasher, self._meter)
        self._watches[name] = watch, item.stored
        return watch

    def _read(self, item: Entry) -> list[Tensor]:
        tensors = [self._watch(name, item).block(self._source.tensor(name)) for name in item.names]
        if len({tensor.dtype for tensor in tensors}) > 1:
            stored = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
            raise ValueError(
                f"{self._source.path}: {', '.join(item.names)} form one parameter but are stored as {stored}; "
                "choose one with --dtype"
            )
        return tensors

    def _vocabulary(self, item: Entry) -> None:
        """Row blocks, zeros behind the last token up to a multiple of the ranks; never the whole matrix."""
        dims, ranks, name = self._source.dims, self._ranks, item.names[0]
        watch = self._watch(name, item)
        dtype = self._dtype or self._source.dtype(name)
        rows = padded_vocab(dims.vocab, ranks)
        step = max(1, BLOCK_BYTES // (dims.hidden * dtype.itemsize))
        share = rows // ranks
        cuts = [
            (rank * share + begin, min(step, share - begin)) for rank in range(ranks) for begin in range(0, share, step)
        ]
        real = [max(0, min(count, dims.vocab - begin)) for begin, count in cuts]
        blocks = reblock((watch.block(block) for block in self._source.blocks(name)), real)
        for (begin, count), have in zip(cuts, real, strict=True):
            block = next(blocks)
            if have < count:
                block = torch.cat([block, block.new_zeros(count - have, dims.hidden)])
            self._file.add(item.stored, (rows, dims.hidden), (begin, 0), block)
        assert next(blocks, None) is None


def _cut(item: Entry, tensors: list[Tensor], ranks: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """A parameter's chunks, one for each rank that holds a part: whole shape, offsets, the part."""
    if GATE_UP in item.parameter:
        # megatron-core keeps gate and up apart in the file, each cut over the ranks, though a rank joins its two.
        rows = tensors[0].shape[0]
        for number, tensor in enumerate(tensors):
            for rank, part in enumerate(tensor.chunk(ranks)):
                begin = number * rows + rank * len(part)
                yield (2 * rows, *tensor.shape[1:]), (begin, *(0,) * (tensor.dim() - 1)), part
        return
    shape = global_shape(item, [tensor.shape for tensor in tensors])
    for rank in range(ranks):
        local = item.shard(tensors, ranks, rank)
        cut = [dim for dim, size in enumerate(shape) if local.shape[dim] != size]
        yield shape, tuple(rank * local.shape[dim] if dim in cut else 0 for dim in range(len(shape))), local
        if not cut:
            return


def global_shape(item: Entry, shapes: list[torch.Size] | list[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a whole parameter from those of its Hugging Face tensors."""
    return tuple(item.shard([torch.empty(shape, device="meta") for shape in shapes], 1, 0).shape)


class MegatronTensors(TensorSource):
    """The tensors of a Megatron checkpoint. Opening it reads no weights; every read is checked for its place.

    reader: parameters by their stored names, one for each layer; manifest: at least {"tensors": {}}. Raises ValueError
    for parameters that are missing, left over or misshapen.
    """

    def __init__(self, path: Path, config: dict, dims: ModelDims, reader: TorchDistReader, manifest: dict):
        self.path, self.config, self.dims, self.reader, self.manifest = path, config, dims, reader, manifest
        self._entry = {name: item for item in whole_entries(self.dims) for name in item.names}
        self._check_parameters()
        self._parts: dict[str, Tensor] = {}

    def parameter(self, name: str) -> str:
        """The Megatron parameter that a Hugging Face tensor is (part of), as it is stored."""
        return self._entry[name].stored

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(self.parameter(name))

    def tensor(self, name: str) -> Tensor:
        """The tensor as Hugging Face stores it, on the CPU."""
        item = self._entry[name]
        if len(item.names) == 1:
            whole = self.reader.read(item.stored)
            return whole[: self.dims.vocab] if item.parameter in VOCABULARY else whole
        if GATE_UP in item.parameter:
            return self.reader.read(item.stored, item.names.index(name), len(item.names))
        if name not in self._parts:
            # Parts of one layer wait for their turn; what an earlier layer left is not needed any more.
            layer = name.rsplit(".", 3)[0]
            self._parts = {other: part for other, part in self._parts.items() if other.startswith(f"{layer}.")}
            self._parts |= dict(zip(item.names, item.join([self.reader.read(item.stored)]), strict=True))
        return self._parts.pop(name).contiguous()

    def blocks(self, name: str) -> Iterator[Tensor]:
        item = self._entry[name]
        if item.parameter not in VOCABULARY:
            yield from super().blocks(name)
            return
        left = self.dims.vocab
        for block in self.reader.blocks(item.stored):
            # Rows behind the vocabulary only pad it for the ranks.
            for part in rows_of(block[:left]):
                left -= len(part)
                yield part

    def sha256(self, name: str) -> str | None:
        return self.manifest["tensors"].get(name, {}).get("sha256")

    def release(self) -> None:
        self._parts.clear()

    def prefetch(self, names: Iterable[str]) -> None:
        for name in names:
            for chunk in self.reader.chunks[self.parameter(name)]:
                read_ahead(self.reader.folder / chunk.file, chunk.offset, chunk.length)

    def stored_degree(self) -> int:
        """Over how many tensor-parallel ranks the parameters are cut in the files."""
        return len({c.offsets[1] for c in self.reader.chunks["decoder.layers.0.self_attention.linear_proj.weight"]})

    def _check_parameters(self) -> None:
        stored = {name for name in self.reader.chunks if not name.endswith("._extra_state")}
        expected = {item.stored: item for item in self._entry.values()}
        missing, extra = sorted(expected.keys() - stored), sorted(stored - expected.keys())
        if missing or extra:
            raise ValueError(
                f"{self.reader.folder}: missing {missing[:3]}, unexpected {extra[:3]}; config.json and weights disagree"
            )
        shapes = self.dims.tensor_shapes()
        for name, item in expected.items():
            found, wanted = self.reader.shape(name), global_shape(item, [shapes[part] for part in item.names])
            padded = name in VOCABULARY and found[1:] == wanted[1:] and found[0] >= wanted[0]
            if found != wanted and not padded:
                raise ValueError(
                    f"{self.reader.folder}: {name} has shape {list(found)}, config.json implies {list(wanted)}"
                )


class MegatronDirectory(MegatronTensors):
    """A Megatron checkpoint of ours.

    Raises FileNotFoundError or ValueError: not such a directory, an unsupported architecture, other parameters than its
    own, chunks that are not those of the recorded layout. A directory that ranks wrote (`save_weights`) and that has a
    config.json but no manifest is read as well; it has no hashes to check.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        manifest = read_manifest(path) if (path / MANIFEST).is_file() else {"tensors": {}}
        if manifest.get("kind", KIND) != KIND:
            raise ValueError(f"{path}: {MANIFEST} says {manifest['kind']!r}, expected {KIND!r}")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: no config.json there; expected that of the Hugging Face model")
        config: dict = read_json(path / "config.json")
        reader = TorchDistReader(path / WEIGHTS, _named_as_now)
        super().__init__(path, config, dims_from_config(config), reader, manifest)
        self._check_layout()

    def _check_layout(self) -> None:
        layout = self.manifest.get("layout")
        if layout is None:
            return
        rows = self.reader.shape(VOCABULARY[0])[0]
        vocabulary = layout.get("padded_vocab", rows)
        if (layout["tensor"], vocabulary) != (self.stored_degree(), rows):
            raise ValueError(
                f"{self.path}: {MANIFEST} says tensor-parallel degree {layout['tensor']} and {vocabulary} "
                f"rows of vocabulary, the weights are cut for {self.stored_degree()} and have {rows}; convert it again"
            )


def _named_as_now(chunk: StoredChunk) -> StoredChunk:
    """Earlier versions stored norms under the names that they have in the model."""
    return replace(chunk, parameter=stored_name(chunk.parameter))
