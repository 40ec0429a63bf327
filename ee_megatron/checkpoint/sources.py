"""Models that a conversion reads, and the checks on every block. Without megatron-core, which is slow to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import FAMILIES, ModelDims
from ..families.hf_directory import HFDirectory, read_header, read_json
from ..policy import PolicySpec
from ..tensors import Block, Digest, FileTensors, Hasher, ModelSource, part_of, row_blocks
from .store import MANIFEST
from .workspace import Meter, refuse_unfinished

# What an early-exit export's config.json has more than its base's.
EMBED_FIELDS = ("base_model_type", "auto_map", "exit_depths", "gate_width", "gate_input", "first_token", "exit_policy")
WEIGHTS = "weights"
"""The folder of a Megatron checkpoint's torch_dist files."""


def is_megatron(path: Path) -> bool:
    """Whether a directory is a Megatron checkpoint of this package."""
    return (path / WEIGHTS).is_dir()


class HFSource(ModelSource):
    """A Hugging Face directory as a source: a plain model, or the base model of an early-exit export.

    Raises as `HFDirectory` does, and ValueError for a shard with a tensor that no part of the model has, or a stored
    head that differs from the embedding that it is tied to.
    """

    def __init__(self, directory: HFDirectory | str | Path):
        opened = directory if isinstance(directory, HFDirectory) else HFDirectory(directory)
        self.path = self.tokenizer = opened.path
        refuse_unfinished(self.path)
        self.dims, self.config = opened.dims, base_config(opened.config, opened.dims)
        # Exits and gates of an early-exit export.
        embedded = opened.config.get("model_type") == "early_exit"
        self.spec: PolicySpec | None = gate_spec(self.dims, opened.config) if embedded else None
        self._files = FileTensors({name: opened.files[name] for name in self.dims.tensor_shapes()})
        self.entries = self._files.entries
        self._refuse_strangers()

    def part(self, name: str, *where: slice) -> Tensor:
        return self._files.part(name, *where)

    def _refuse_strangers(self) -> None:
        known = {*self.dims.tensor_shapes(), *(self.spec.gate_shapes(self.dims) if self.spec else ())}
        for file in sorted(self.path.glob("model*.safetensors")):
            strangers = [n for n in read_header(file) if n not in known and not n.endswith("rotary_emb.inv_freq")]
            if strangers == ["lm_head.weight"] and self.dims.tied:
                if not self._is_embedding(file):
                    raise ValueError(
                        f"{file}: lm_head.weight differs from the embedding, but config.json ties them; "
                        "set tie_word_embeddings to false there"
                    )
            elif strangers:
                raise ValueError(
                    f"{file}: unexpected {strangers[:3]} ({len(strangers)} in all) for model_type "
                    f"{self.dims.family!r}; a conversion would lose them"
                )

    def _is_embedding(self, file: Path) -> bool:
        """Whether the head that is stored in `file` has the embedding's numbers."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        stored = FileTensors({head: file})
        if stored.shape(head) != self.shape(embedding):
            return False
        pairs = zip(row_blocks(stored, head), row_blocks(self, embedding), strict=True)
        return all(torch.equal(one.data, other.data) for one, other in pairs)


class TunedSource(ModelSource):
    """The base model of a full fine-tuning: tensors from the policy, in the dtypes of the model it started from."""

    def __init__(self, base: ModelSource, tensors: Mapping[str, Tensor]):
        self.base, self.path, self.config, self.dims = base, base.path, base.config, base.dims
        self.tokenizer, self.entries = base.tokenizer, base.entries
        self._tensors = tensors

    def part(self, name: str, *where: slice) -> Tensor:
        return cast(f"policy tensor {name}", part_of(self._tensors, name, *where), self.dtype(name))


def gates_of(source: ModelSource) -> tuple[PolicySpec, dict[str, Tensor]] | None:
    """Gates in a Hugging Face directory, embedded in the model or beside it; None for a plain model."""
    if not isinstance(source, HFSource):
        return None
    if source.spec is not None:
        stored = [FileTensors(file) for file in sorted(source.path.glob("model*.safetensors"))]
        return source.spec, {n: file[n].clone() for file in stored for n in file if n.startswith("gates.")}
    sidecar = source.path / "gates.json"
    if not sidecar.is_file():
        return None
    beside = FileTensors(source.path / "gates.safetensors")
    return gate_spec(source.dims, read_json(sidecar)), {name: tensor.clone() for name, tensor in beside.items()}


def gate_spec(dims: ModelDims, facts: Mapping[str, Any]) -> PolicySpec:
    """Spec of a policy of gates alone, from an export's config.json or gates.json."""
    try:
        depths, first = tuple(facts["exit_depths"]), facts.get("first_token", False)
        width, stream = facts["gate_width"], facts["gate_input"]
        return PolicySpec(dims.num_layers, depths, rank=0, gate_width=width, gate_input=stream, first_token=first)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"gates of an export: not what they should be ({error}); export the model again") from None


def gate_facts(spec: PolicySpec) -> dict[str, Any]:
    """Facts that `gate_spec` reads."""
    facts = {"exit_depths": list(spec.exit_depths), "gate_width": spec.gate_width, "gate_input": spec.gate_input}
    return {**facts, "first_token": True} if spec.first_token else facts


def base_config(config: dict, dims: ModelDims) -> dict:
    """config.json of the plain model in an early-exit export; of a plain model unchanged."""
    if config.get("model_type") != "early_exit":
        return config
    plain: dict[str, Any] = {name: value for name, value in config.items() if name not in EMBED_FIELDS}
    return plain | {"model_type": dims.family, "architectures": [FAMILIES[dims.family].architecture]}


def all_finite(block: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinite value."""
    if not block.numel() or not block.is_floating_point():
        return True
    low, high = (float(value) for value in block.aminmax())
    return float("-inf") < low <= high < float("inf")


def check_finite(name: str, block: Tensor) -> None:
    """Raises ValueError if a tensor has a NaN or an infinite value."""
    if not all_finite(block):
        raise ValueError(f"{name} holds NaN or infinite numbers; expected finite ones; the model is damaged")


def cast(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a block to another dtype. Raises ValueError if finite numbers don't fit into it."""
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
    """Pipeline of a tensor's blocks: check for finite numbers, hash as read, change by `change`, cast to `dtype` (None:
    the stored one), hash as written. Bytes of `source`, not those of gates beside it, are metered."""

    def __init__(
        self,
        source: ModelSource,
        name: str,
        dtype: torch.dtype | None,
        hasher: Hasher,
        meter: Meter,
        change: Callable[[Block], Tensor] | None = None,
    ):
        self._name, self._change = f"{source.path}: {name}", change
        self._meter = meter if name in source else None
        self.dtype, self._expected = dtype or source.dtype(name), source.digests.get(name)
        self._written = Digest(hasher)
        same = change is None and (name not in source or self.dtype == source.dtype(name))
        self._read = self._written if same else Digest(hasher)

    def block(self, block: Block) -> Tensor:
        """Process the next block for writing. Raises ValueError if it holds NaN or infinite numbers before or after."""
        data = block.data
        check_finite(self._name, data)
        if self._meter is not None:
            self._meter.add(data.nbytes)
        if self._expected and self._read is not self._written:
            self._read.update(data)
        if self._change:
            data = self._change(block)
            check_finite(f"{self._name} with its adapter", data)
        data = cast(self._name, data, self.dtype)
        self._written.update(data)
        return data

    def hexdigest(self) -> str:
        """Hash of the written bytes. Raises ValueError if the bytes read have another hash than the source promised."""
        if self._expected and self._read.hexdigest() != self._expected:
            raise ValueError(f"{self._name} is not what {MANIFEST} says; the checkpoint is damaged, convert it again")
        return self._written.hexdigest()
