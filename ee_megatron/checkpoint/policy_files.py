"""Policy checkpoints for the converter: small ones in memory, fully fine-tuned ones tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..families import ModelDims
from ..policy import PolicySpec, read_policy
from .sources import TensorSource, check_finite

Policy = tuple[PolicySpec, Mapping[str, Tensor]]


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file, read when asked for and not kept."""

    def __init__(self, path: Path):
        self.path = path
        with self._file() as file:
            self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        # Opened for each: a mapped file counts as memory of the process as far as it was read.
        with self._file() as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._shapes[name]

    def _file(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: cannot be read ({error}); the file is missing or damaged") from None


def open_policy(directory: str | Path) -> Policy:
    """As `policy.load_policy`, but the tensors of a full fine-tuning stay in their file. The digest is checked.

    Raises FileNotFoundError or ValueError, one line.
    """
    spec, tensors = read_policy(directory, LazyTensors)
    return spec, tensors if spec.full else dict(tensors)


def check_policy(dims: ModelDims, spec: PolicySpec, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first offender, unless the policy's tensors are exactly those the model needs."""
    if spec.num_layers != dims.num_layers:
        raise ValueError(f"the policy is for {spec.num_layers} layers, the model has {dims.num_layers}")
    expected = spec.tensor_shapes(dims)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"policy tensors: missing {missing[:3]}, unexpected {extra[:3]}; spec and tensors disagree")
    for name, shape in expected.items():
        found = tensors.shape(name) if isinstance(tensors, LazyTensors) else tuple(tensors[name].shape)
        if found != shape:
            raise ValueError(f"policy tensor {name} has shape {list(found)}, the model implies {list(shape)}")
    if not isinstance(tensors, LazyTensors):
        for name, tensor in tensors.items():
            check_finite(f"policy tensor {name}", tensor)


def no_policy(num_layers: int) -> Policy:
    """Of a checkpoint that is a plain model: no adapters, no exits."""
    return PolicySpec(num_layers, (), rank=0), dict[str, Tensor]()


def policy_beside(base: TensorSource) -> Policy:
    """The policy in a Megatron checkpoint; one without is a plain model."""
    return open_policy(base.path) if (base.path / "policy.json").is_file() else no_policy(base.dims.num_layers)
