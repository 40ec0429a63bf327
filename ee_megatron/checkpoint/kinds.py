"""What a directory brings along, told without megatron-core, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..families.hf_directory import read_json
from ..policy import PolicySpec
from .safetensors_io import read_small
from .sources import HFSource, TensorSource, gate_spec

WEIGHTS = "weights"
"""The folder of a Megatron checkpoint's torch_dist files."""


def is_megatron(path: Path) -> bool:
    return (path / WEIGHTS).is_dir()


def gates_of(source: TensorSource) -> tuple[PolicySpec, dict[str, Tensor]] | None:
    """The gates that a Hugging Face directory brings along, embedded in the model or beside it; None: a plain model."""
    if not isinstance(source, HFSource):
        return None
    spec = source.spec()
    if spec is not None:
        found: dict[str, Tensor] = {}
        for file in sorted(source.path.glob("model*.safetensors")):
            found |= read_small(file, prefix="gates.")
        return spec, found
    sidecar = source.path / "gates.json"
    if not sidecar.is_file():
        return None
    facts = read_json(sidecar)
    return gate_spec(source.dims, facts), read_small(source.path / "gates.safetensors")
