"""Policy checkpoints for the converter: small ones in memory, fully fine-tuned ones tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..families import ModelDims
from ..policy import POLICY_JSON, PolicySpec, read_policy, write_policy_json
from ..tensors import Block, FileTensors, LazyTensors, Stream, drain, shape_of
from .base_identity import check_base, recorded_base
from .safetensors_io import write_through
from .sources import TensorSource, check_finite

Policy = tuple[PolicySpec, Mapping[str, Tensor]]


def open_policy(directory: str | Path, *, check: bool = True) -> Policy:
    """As `policy.load_policy`, but the tensors of a full fine-tuning stay in their file. Without `check` the digest,
    which somebody has looked at, is not computed.

    Raises FileNotFoundError or ValueError, one line.
    """
    spec, tensors = read_policy(directory, FileTensors, check)
    return spec, tensors if spec.full else dict(tensors)


def write_policy(directory: Path, spec: PolicySpec, stream: Stream, base: Mapping[str, str] | None = None) -> None:
    """As `policy.save_policy`, for tensors that come in blocks and are not held."""
    drain(policy_written(directory, spec, stream, base))


def policy_written(
    directory: Path, spec: PolicySpec, stream: Stream, base: Mapping[str, str] | None = None
) -> Iterator[Block]:
    """The stream, written as `write_policy` does while it passes."""
    sha256 = yield from write_through(directory / "policy.safetensors", stream)
    write_policy_json(directory, spec, sha256, base)


def check_policy(dims: ModelDims, spec: PolicySpec, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first offender, unless the policy's tensors are exactly those the model needs."""
    if spec.num_layers != dims.num_layers:
        raise ValueError(f"the policy is for {spec.num_layers} layers, the model has {dims.num_layers}")
    expected = spec.tensor_shapes(dims)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"policy tensors: missing {missing[:3]}, unexpected {extra[:3]}; spec and tensors disagree")
    for name, shape in expected.items():
        found = shape_of(tensors, name)
        if found != shape:
            raise ValueError(f"policy tensor {name} has shape {list(found)}, the model implies {list(shape)}")
    if not isinstance(tensors, LazyTensors):
        for name, tensor in tensors.items():
            check_finite(f"policy tensor {name}", tensor)


def no_policy(num_layers: int) -> Policy:
    """Of a checkpoint that is a plain model: no adapters, no exits."""
    return PolicySpec(num_layers, (), rank=0), dict[str, Tensor]()


def policy_on(base: TensorSource, directory: str | Path, unchecked: bool = False) -> Policy:
    """`open_policy` for a policy that is to run on `base`. Raises as `check_base`, too, unless `unchecked`."""
    check_base(directory, base, unchecked=unchecked)
    return open_policy(directory)


def policy_beside(base: TensorSource, unchecked: bool = False) -> Policy:
    """The policy in a Megatron checkpoint; one without is a plain model. Raises as `policy_on`."""
    if not (base.path / POLICY_JSON).is_file():
        return no_policy(base.dims.num_layers)
    # What lies in one directory was put together; only a record can say that it was not.
    return policy_on(base, base.path, unchecked or recorded_base(base.path) is None)
