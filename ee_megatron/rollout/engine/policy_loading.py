"""How a decoder takes over a policy's tensors: at once, or in chunks so that a model never has to be held twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...families import ModelDims
from ...policy import PolicySpec
from .linear import WideLinear
from .weights import DecoderWeights


@dataclass
class GateWeights:
    """fc1 [w, D] in the model's dtype; its bias [w], fc2 [1, w] and its bias [1] in float32 whatever that is."""

    fc1: WideLinear
    fc2: Tensor
    fc2_bias: Tensor


class PartialLoad:
    """The policy tensors received so far. Base tensors go straight into the decoder's; adapters and gates are kept."""

    def __init__(self, spec: PolicySpec, dims: ModelDims):
        self.expected = spec.tensor_shapes(dims)
        self.of_base = dims.tensor_shapes() if spec.full else {}
        self.kept: dict[str, Tensor] = {}
        self.seen: set[str] = set()

    def take(self, tensors: dict[str, Tensor], weights: DecoderWeights) -> None:
        """Raises ValueError before anything of the chunk is written: a name unknown or come before, another shape."""
        for name, tensor in tensors.items():
            if name not in self.expected or name in self.seen:
                what = "came twice" if name in self.seen else "is unknown"
                raise ValueError(f"policy tensor {name} {what}; send every tensor of the policy's spec exactly once")
            check_shape(name, tensor, self.expected[name])
        for name, tensor in tensors.items():
            if name in self.of_base:
                weights.write_base(name, tensor)
            else:
                self.kept[name] = tensor.detach().clone()
            self.seen.add(name)

    def check_whole(self) -> None:
        """Raises ValueError if tensors are missing."""
        missing = sorted(self.expected.keys() - self.seen)
        if missing:
            raise ValueError(
                f"policy tensors lack {missing[0]} ({len(missing)} of {len(self.expected)}); send all, then finish"
            )


def gates_from(
    tensors: dict[str, Tensor], depths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[GateWeights]:
    """Copies of the gates at `depths`, in this order, for a model of `dtype`."""

    def read(depth: int, part: str) -> Tensor:
        return tensors[f"gates.{depth}.{part}"].to(device, torch.float32).clone()

    return [
        GateWeights(
            WideLinear(read(d, "fc1.weight").to(dtype), read(d, "fc1.bias")),
            read(d, "fc2.weight"),
            read(d, "fc2.bias"),
        )
        for d in depths
    ]


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError with one line unless names and shapes are exactly the expected ones."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lack {missing[0]}" if missing else f"hold the unknown {extra[0]}"
        count = len(missing) + len(extra)
        raise ValueError(
            f"policy tensors {what} ({count} names differ); load weights made with the same policy settings"
        )
    for name, shape in expected.items():
        check_shape(name, tensors[name], shape)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"policy tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
