"""What a conversion reads a model from: tensors by their Hugging Face names, in blocks, wherever they are stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..families import FAMILIES, ModelDims
from ..families.hf_directory import HFDirectory
from ..policy import PolicySpec
from ..tensors import DTYPES, LazyTensors, Shape, part_of
from .manifest import MANIFEST, Digest, Hasher
from .meter import Meter
from .safetensors_io import nbytes, places

BLOCK_BYTES = 64 << 20
AHEAD_BYTES = 512 << 20
# What an early-exit export's config.json has more than its base's.
EMBED_FIELDS = ("base_model_type", "auto_map", "exit_depths", "gate_width", "gate_input", "first_token", "exit_policy")


class TensorSource:
    """A base model."""

    path: Path
    config: dict
    dims: ModelDims
    # Where tokenizer and templates are, if not in `path`.
    tokenizer: Path | None = None

    def names(self) -> list[str]:
        """The tensors' Hugging Face names, in the model's order."""
        return list(self.dims.tensor_shapes())

    def dtype(self, name: str) -> torch.dtype:
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """The whole tensor on the CPU, in the dtype that it is stored in."""
        raise NotImplementedError

    def part(self, name: str, *where: slice) -> Tensor:
        """A part of a tensor, a range per dimension."""
        return self.tensor(name)[where]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor as consecutive blocks of rows."""
        yield from rows_of(self.tensor(name))

    def sha256(self, name: str) -> str | None:
        """What the tensor must hash to, if known."""
        return None

    def release(self) -> None:
        """Let go of memory and mapped files until the next read."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the disk read what comes next."""

    def fingerprint(self) -> list[list]:
        """Name, size and time of change of the directory's files: resumed work must find the same. JSON-able."""
        files = sorted(path for pattern in ("*", "weights/*") for path in self.path.glob(pattern) if path.is_file())
        return [[str(path.relative_to(self.path)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


class HFSource(TensorSource):
    """A Hugging Face directory, plain or an early-exit export, of which this is the base model.

    Raises as `HFDirectory` does, and ValueError for a shard with a tensor that no part of the model has, or a stored
    head that differs from the embedding that it is tied to.
    """

    def __init__(self, directory: HFDirectory | str | Path):
        self.directory = directory if isinstance(directory, HFDirectory) else HFDirectory(directory)
        self.path, self.dims = self.directory.path, self.directory.dims
        self.config = base_config(self.directory.config, self.dims)
        self._refuse_strangers()
        self._places = dict(place for file in self.path.glob("model*.safetensors") for place in places(file))

    def dtype(self, name: str) -> torch.dtype:
        code = self.directory.slice(name).get_dtype()
        if code not in DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {code}; supported: {', '.join(DTYPES)}")
        return DTYPES[code]

    def tensor(self, name: str) -> Tensor:
        return self.directory.tensor(name)

    def part(self, name: str, *where: slice) -> Tensor:
        return self.directory.slice(name)[where]

    def release(self) -> None:
        # A mapped file counts as this process's memory as far as it was read.
        self.directory.close()

    def prefetch(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._places:
                read_ahead(*self._places[name])

    def _refuse_strangers(self) -> None:
        spec = self.spec()
        known = {*self.names(), *(spec.gate_shapes(self.dims) if spec else ())}
        for file in sorted(self.path.glob("model*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                strangers = [n for n in handle.keys() if n not in known and not n.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
                if strangers == ["lm_head.weight"] and self.dims.tied:
                    head = handle.get_slice("lm_head.weight")
                    if not _same_rows(head, self.directory.tensor("model.embed_tokens.weight")):
                        raise ValueError(
                            f"{file}: lm_head.weight differs from the embedding, but config.json ties them; "
                            "set tie_word_embeddings to false there"
                        )
                elif strangers:
                    raise ValueError(
                        f"{file}: unexpected {strangers[:3]} ({len(strangers)} in all) for model_type "
                        f"{self.dims.family!r}; a conversion would lose them"
                    )
        self.release()

    def spec(self) -> PolicySpec | None:
        """Exits and gates of an early-exit export."""
        config = self.directory.config
        return gate_spec(self.dims, config) if config.get("model_type") == "early_exit" else None


class BaseTensors(LazyTensors):
    """The tensors of a Hugging Face directory as a policy has them: in float32."""

    def __init__(self, directory: HFDirectory):
        self._directory, self._read = directory, 0

    def part(self, name: str, *where: slice) -> Tensor:
        found = self._directory.slice(name)[where or slice(None)].to(torch.float32, copy=True)
        # A mapped file counts as memory of the process as far as it was read.
        self._read += found.nbytes
        if self._read > BLOCK_BYTES:
            self._directory.close()
            self._read = 0
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._directory.dims.tensor_shapes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._directory.dims.tensor_shapes())

    def __len__(self) -> int:
        return len(self._directory.dims.tensor_shapes())

    def shape(self, name: str) -> Shape:
        return self._directory.dims.tensor_shapes()[name]


class TunedSource(TensorSource):
    """The base model of a full fine-tuning: tensors from the policy, in the dtypes of the model it started from."""

    def __init__(self, base: TensorSource, tensors: Mapping[str, Tensor]):
        self.base, self.path, self.config, self.dims = base, base.path, base.config, base.dims
        self.tokenizer = base.tokenizer
        self._tensors = tensors

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def tensor(self, name: str) -> Tensor:
        return cast(f"policy tensor {name}", self._tensors[name], self.dtype(name))

    def part(self, name: str, *where: slice) -> Tensor:
        return part_of(self._tensors, name, *where).to(self.dtype(name))

    def blocks(self, name: str) -> Iterator[Tensor]:
        for block in rows_of(self._tensors[name]):
            yield cast(f"policy tensor {name}", block, self.dtype(name))

    def release(self) -> None:
        self.base.release()


def gate_spec(dims: ModelDims, facts: Mapping[str, Any]) -> PolicySpec:
    """A policy of gates alone, from what an export's config.json or gates.json says of them."""
    depths, first = tuple(facts["exit_depths"]), facts.get("first_token", False)
    width, stream = facts["gate_width"], facts["gate_input"]
    return PolicySpec(dims.num_layers, depths, rank=0, gate_width=width, gate_input=stream, first_token=first)


def gate_facts(spec: PolicySpec) -> dict[str, Any]:
    """What `gate_spec` reads."""
    facts = {"exit_depths": list(spec.exit_depths), "gate_width": spec.gate_width, "gate_input": spec.gate_input}
    return {**facts, "first_token": True} if spec.first_token else facts


def base_config(config: dict, dims: ModelDims) -> dict:
    """config.json of the plain model that an early-exit export wraps; a plain one as it is."""
    if config.get("model_type") != "early_exit":
        return config
    plain: dict[str, Any] = {name: value for name, value in config.items() if name not in EMBED_FIELDS}
    return plain | {"model_type": dims.family, "architectures": [FAMILIES[dims.family].ARCHITECTURE]}


def rows_of(tensor: Tensor) -> Iterator[Tensor]:
    """Views of a tensor: consecutive rows of about BLOCK_BYTES."""
    if tensor.nbytes <= BLOCK_BYTES or tensor.dim() == 0:
        yield tensor
    else:
        yield from tensor.split(max(1, BLOCK_BYTES * tensor.shape[0] // tensor.nbytes))


def read_ahead(file: Path, offset: int, length: int) -> None:
    """Ask the system to read a part of a file into its cache, and return at once."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def ahead(source: TensorSource, names: Iterable[str]) -> Iterator[str]:
    """The names, while the disk reads about AHEAD_BYTES beyond the one in hand."""
    shapes, names = source.dims.tensor_shapes(), list(names)
    asked, waiting = 0, 0
    for number, name in enumerate(names):
        while asked < len(names) and (waiting < AHEAD_BYTES or asked <= number):
            if names[asked] in shapes:
                source.prefetch([names[asked]])
                waiting += nbytes(source.dtype(names[asked]), shapes[names[asked]])
            asked += 1
        yield name
        if name in shapes:
            waiting -= nbytes(source.dtype(name), shapes[name])


def reblock(blocks: Iterable[Tensor], sizes: Iterable[int]) -> Iterator[Tensor]:
    """The same rows in other blocks. Every size must be met exactly (assertion)."""
    stream = iter(blocks)
    rest = next(stream)
    for size in sizes:
        waiting = [rest] if len(rest) else []
        while sum(len(block) for block in waiting) < size:
            waiting.append(next(stream))
        joined = rest if not waiting else waiting[0] if len(waiting) == 1 else torch.cat(waiting)
        yield joined[:size]
        rest = joined[size:]
    assert not len(rest) and next(stream, None) is None


def all_finite(block: Tensor) -> bool:
    """Whether no number of it is NaN or infinite."""
    if not block.numel() or not block.is_floating_point():
        return True
    low, high = (float(value) for value in block.aminmax())
    return float("-inf") < low <= high < float("inf")


def check_finite(name: str, block: Tensor) -> None:
    """Raises ValueError if a number is NaN or infinite."""
    if not all_finite(block):
        raise ValueError(f"{name} holds NaN or infinite numbers; expected finite ones; the model is damaged")


def cast(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """The block in another dtype. Raises ValueError if finite numbers don't fit into it."""
    made = block.to(dtype)
    if made is block or not made.numel() or all(end.isfinite() for end in made.aminmax()):
        return made
    lost = made.isinf() & block.isfinite()
    if bool(lost.any()):
        kind, largest = str(dtype).removeprefix("torch."), float(block.abs().max())
        raise ValueError(
            f"{name}: {int(lost.sum())} of {block.numel()} numbers, up to {largest:.4g}, don't fit into {kind}, which "
            f"ends at {torch.finfo(dtype).max:.4g}; choose bfloat16 or float32 with --dtype"
        )
    return made


class Watch:
    """What every block of a base tensor goes through: finite, hashed as it is read, changed by `change`, cast to
    `dtype` (None: as it is stored), hashed as it is written."""

    def __init__(
        self,
        source: TensorSource,
        name: str,
        dtype: torch.dtype | None,
        hasher: Hasher,
        meter: Meter,
        change: Callable[[Tensor], Tensor] | None = None,
    ):
        self._source, self._name, self._meter, self._change = source, name, meter, change
        self.dtype, self._expected = dtype or source.dtype(name), source.sha256(name)
        self._written = Digest(hasher)
        same = change is None and self.dtype == source.dtype(name)
        self._read = self._written if same else Digest(hasher)

    def block(self, block: Tensor) -> Tensor:
        """The next block as it is to be written. Raises ValueError if it holds NaN or infinite numbers, or will."""
        name = f"{self._source.path}: {self._name}"
        check_finite(name, block)
        self._meter.add(block.nbytes)
        if self._expected and self._read is not self._written:
            self._read.update(block)
        if self._change:
            block = self._change(block)
            check_finite(f"{name} with its adapter", block)
        block = cast(name, block, self.dtype)
        self._written.update(block)
        return block

    def hexdigest(self) -> str:
        """Hash of what was written. Raises ValueError if what was read has another than the source promised."""
        if self._expected and self._read.hexdigest() != self._expected:
            raise ValueError(
                f"{self._source.path}: {self._name} is not what {MANIFEST} says; the checkpoint is damaged, "
                "convert it again"
            )
        return self._written.hexdigest()


def total_bytes(source: TensorSource) -> int:
    """Bytes of all tensors of a model, in the dtypes that they are stored in."""
    shapes = source.dims.tensor_shapes()
    return sum(nbytes(source.dtype(name), shapes[name]) for name in source.names())


def _same_rows(head: Any, embedding: Tensor) -> bool:
    if list(head.get_shape()) != list(embedding.shape):
        return False
    begin = 0
    for block in rows_of(embedding):
        if not torch.equal(head[begin : begin + len(block)], block):
            return False
        begin += len(block)
    return True
