"""What is in a directory: `convert inspect`, and opening a checkpoint of any kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..policy import PolicySpec
from .base_identity import recorded_base
from .hf_export import adapter_of, merged_weight
from .kinds import gates_of
from .manifest import MANIFEST, Digest, Hasher, read_manifest, tensor_sha256
from .megatron_directory import MegatronDirectory
from .megatron_foreign import refuse_foreign
from .megatron_import import folded
from .megatron_io import WEIGHTS
from .policy_files import no_policy, open_policy, policy_beside, policy_on
from .safetensors_io import read_small
from .sources import HFSource, TensorSource, all_finite, rows_of


class Row(NamedTuple):
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
    base: TensorSource
    spec: PolicySpec
    tensors: Mapping[str, Tensor]

    def effective(self, name: str) -> Iterator[Tensor]:
        """The weight with its adapter merged, rounded as an export rounds it, in blocks of rows."""
        if pair := adapter_of(name, self.tensors):
            weight = self.base.tensor(name)
            merged = merged_weight(weight, (self.tensors[part] for part in pair), self.spec.scale)
            yield from rows_of(merged.to(weight.dtype))
        else:
            yield from self.base.blocks(name)

    def whole(self, name: str) -> Tensor:
        return torch.cat(list(self.effective(name)))

    def gates(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in self.spec.gate_shapes(self.base.dims)}


def open_base(path: str | Path) -> TensorSource:
    """The model that a policy is to run on: a Hugging Face directory or a Megatron checkpoint. Raises as these do."""
    return MegatronDirectory(path) if (Path(path) / WEIGHTS).is_dir() else HFSource(path)


def open_checkpoint(path: Path, hf: str | Path | None = None, base_unchecked: bool = False) -> Checkpoint:
    """A Hugging Face model, an early-exit export, a Megatron checkpoint, or a policy or adapter on the model `hf`.

    Raises FileNotFoundError or ValueError, one line: for a policy that belongs to another model, too, unless
    `base_unchecked`.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    if (path / WEIGHTS).is_dir():
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
    kind = "embed" if plain.spec() else "hf"
    return Checkpoint(kind, path, plain, *(gates_of(plain) or no_policy(plain.dims.num_layers)))


def describe(folder: Path, hashes: bool = True) -> tuple[str, list[Row], dict[str, Any]]:
    """Kind of a directory, its tensors and facts about it.

    `hashes`: read every tensor, compare with the manifest where there is one, and look for numbers that aren't finite;
    else only headers are read and the hashes are those of the manifest. Raises ValueError if the directory is of no
    kind or is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")
    if (folder / "adapter_config.json").is_file():
        return _peft(folder)
    if (folder / "policy.json").is_file() and not (folder / WEIGHTS).is_dir():
        spec, tensors = open_policy(folder)
        facts = {"exit_depths": list(spec.exit_depths), "rank": spec.rank, "alpha": spec.alpha}
        facts["base"] = recorded_base(folder) or "not recorded"
        return "policy", [_row(name, tensors[name], hashes) for name in tensors], facts
    opened = open_checkpoint(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {"tensors": {}}
    shapes = opened.base.dims.tensor_shapes()
    rows: list[Row] = []
    with Hasher() as hasher:
        for name in opened.base.names():
            recorded, finite = manifest["tensors"].get(name, {}).get("sha256", ""), True
            if hashes:
                digest = Digest(hasher)
                for block in opened.base.blocks(name):
                    digest.update(block)
                    finite = finite and all_finite(block)
            sha256 = digest.hexdigest() if hashes else recorded
            _compare(folder, name, manifest, sha256)
            stored = opened.base.parameter(name) if isinstance(opened.base, MegatronDirectory) else name
            rows.append(Row(name, stored, list(shapes[name]), _dtype(opened.base.dtype(name)), sha256, finite))
            opened.base.release()
    for name, tensor in opened.tensors.items():
        rows.append(_row(name, tensor, hashes))
        _compare(folder, name, manifest, rows[-1].sha256)
    facts = {key: manifest[key] for key in ("layout", "adapters", "gates") if key in manifest}
    if opened.spec.exit_depths:
        facts["exit_depths"] = list(opened.spec.exit_depths)
    if isinstance(opened.base, MegatronDirectory) and "layout" not in facts:
        facts["layout"] = {"tensor": opened.base.stored_degree()}
    family = opened.base.dims.family
    kinds = {"megatron": f"megatron {family}", "embed": f"early-exit {family}", "hf": f"hugging face {family}"}
    return kinds[opened.kind], rows, facts


def _compare(folder: Path, name: str, manifest: dict, sha256: str) -> None:
    if sha256 and manifest["tensors"].get(name, {}).get("sha256", sha256) != sha256:
        raise ValueError(f"{folder}: {name} is not what {MANIFEST} says; the directory is damaged, convert it again")


def _peft(folder: Path) -> tuple[str, list[Row], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_small(file)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    facts = {key: manifest[key] for key in ("adapters", "gates", "exit_depths") if key in manifest}
    return "peft adapter", [_row(name, tensor, True) for name, tensor in tensors.items()], facts


def _row(name: str, tensor: Tensor, hashes: bool) -> Row:
    sha256 = tensor_sha256(tensor) if hashes else ""
    return Row(name, name, list(tensor.shape), _dtype(tensor.dtype), sha256, not hashes or all_finite(tensor))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
