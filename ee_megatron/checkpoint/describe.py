"""What is in a directory: `convert inspect`, and opening a checkpoint of any kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..policy import PolicySpec, open_policy
from ..tensors import Digest, Hasher, ModelSource, ahead, entries_of, row_blocks
from .hf_export import adapter_of, merged_weight
from .megatron_read import MegatronDirectory, refuse_foreign
from .policy_files import folded, no_policy, policy_beside, policy_on, recorded_base
from .sources import HFSource, all_finite, gates_of, is_megatron
from .store import MANIFEST, read_manifest, read_small


class TensorRow(NamedTuple):
    """A tensor: its name, that in the files, shape, dtype, sha256 ("" if it wasn't read), whether all that was read of
    it is finite."""

    name: str
    stored: str
    shape: list[int]
    dtype: str
    sha256: str
    finite: bool


@dataclass
class Checkpoint:
    """A model of any kind, opened: kind ("hf", "embed" or "megatron"), base tensors, adapters and gates."""

    kind: str
    path: Path
    base: ModelSource
    spec: PolicySpec
    tensors: Mapping[str, Tensor]

    def effective(self, name: str) -> Iterator[Tensor]:
        """The weight with its adapter merged, rounded as an export rounds it, in blocks of rows that depend on its
        shape alone."""
        source: Mapping[str, Tensor] = self.base
        if pair := adapter_of(name, self.tensors):
            weight = self.base.tensor(name)
            merged = merged_weight(weight, (self.tensors[part] for part in pair), self.spec.scale)
            source = {name: merged.to(weight.dtype)}
        return (block.data for block in row_blocks(source, name))

    def whole(self, name: str) -> Tensor:
        return torch.cat(list(self.effective(name)))

    def gates(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in self.spec.gate_shapes(self.base.dims)}


def open_base(path: str | Path) -> ModelSource:
    """The model that a policy is to run on: a Hugging Face directory or a Megatron checkpoint. Raises as these do."""
    return MegatronDirectory(path) if is_megatron(Path(path)) else HFSource(path)


def open_checkpoint(path: Path, hf: str | Path | None = None, base_unchecked: bool = False) -> Checkpoint:
    """A Hugging Face model, an early-exit export, a Megatron checkpoint, or a policy or adapter on the model `hf`.

    Raises FileNotFoundError or ValueError, one line: for a policy that belongs to another model, too, unless
    `base_unchecked`.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    if is_megatron(path):
        base = MegatronDirectory(path)
        return Checkpoint("megatron", path, base, *policy_beside(base, base_unchecked))
    if (path / "policy.json").is_file():
        if hf is None:
            raise ValueError(f"{path} holds a policy without its base model; add --hf BASE")
        whole = open_base(hf)
        source, policy = folded(whole, policy_on(whole, path, base_unchecked))
        return Checkpoint("hf", path, source, *policy)
    refuse_foreign(path)
    plain = HFSource(path)
    policy = gates_of(plain) or no_policy(plain.dims.num_layers)
    return Checkpoint("embed" if plain.spec else "hf", path, plain, *policy)


def describe(folder: Path, hashes: bool = True) -> tuple[str, list[TensorRow], dict[str, Any]]:
    """Kind of a directory, its tensors and facts about it.

    `hashes`: read every tensor, compare with the manifest where there is one, and look for numbers that aren't finite;
    else only headers are read and the hashes are those of the manifest. Raises ValueError if the directory is of no
    kind or is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {"tensors": {}}
    if (folder / "adapter_config.json").is_file():
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= read_small(file)
        facts = {key: manifest[key] for key in ("adapters", "gates", "exit_depths") if key in manifest}
        return "peft adapter", [_row(tensors, name, {}, True) for name in tensors], facts
    if (folder / "policy.json").is_file() and not is_megatron(folder):
        spec, policy = open_policy(folder)
        facts = {"exit_depths": list(spec.exit_depths), "rank": spec.rank, "alpha": spec.alpha}
        facts["base"] = recorded_base(folder) or "not recorded"
        return "policy", [_row(policy, name, {}, hashes) for name in policy], facts
    opened = open_checkpoint(folder)
    recorded = {name: line["sha256"] for name, line in manifest["tensors"].items()}
    rows = [_row(source, name, recorded, hashes) for source in (opened.base, opened.tensors) for name in source]
    for row in rows:
        if row.sha256 != recorded.get(row.name, row.sha256):
            raise ValueError(
                f"{folder}: {row.name} is not what {MANIFEST} says; the directory is damaged, convert it again"
            )
    facts = {key: manifest[key] for key in ("layout", "adapters", "gates") if key in manifest}
    if opened.spec.exit_depths:
        facts["exit_depths"] = list(opened.spec.exit_depths)
    if isinstance(opened.base, MegatronDirectory) and "layout" not in facts:
        facts["layout"] = {"tensor": opened.base.stored_degree()}
    kinds = {"megatron": "megatron", "embed": "early-exit", "hf": "hugging face"}
    return f"{kinds[opened.kind]} {opened.base.dims.family}", rows, facts


def _row(source: Mapping[str, Tensor], name: str, recorded: Mapping[str, str], hashes: bool) -> TensorRow:
    """`recorded`: hashes to show where `hashes` says that nothing is to be read."""
    sha256, finite = recorded.get(name, ""), True
    dtype, shape = entries_of(source)[name]
    if hashes:
        with Hasher() as hasher:
            digest = Digest(hasher)
            for block in ahead(row_blocks(source, name)):
                digest.update(block.data)
                finite = finite and all_finite(block.data)
            sha256 = digest.hexdigest()
    stored = source.parameter(name) if isinstance(source, MegatronDirectory) else name
    return TensorRow(name, stored, list(shape), str(dtype).removeprefix("torch."), sha256, finite)
