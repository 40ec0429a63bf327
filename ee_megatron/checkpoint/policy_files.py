"""Policy checkpoints, and the base model that each belongs to.

A fine-tuned model has the dimensions, names and headers of the model that it was made from, so a base is identified by
its contents; and hashing all of a large model at every start takes minutes. So a few hundred numbers of every tensor
are hashed, at fixed places. Fine-tuning changes some in nearly every matrix. An edit of a single row may go unseen:
this distinguishes models, it doesn't prove that a file is whole.

Only dimensions, Hugging Face names and numbers enter, so how the model is cut into files doesn't count, and a Megatron
import is its source. Nor does the dtype, as far as the numbers allow: a model and its rounded copy are the same base.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import ModelDims, features
from ..families.hf_directory import HFDirectory
from ..policy import POLICY_JSON, PolicySpec, open_policy, read_policy_json, write_policy_json
from ..tensors import FileTensors, LazyTensors, ModelSource, Stream, shape_of, tensor_bytes
from .sources import TunedSource, check_finite
from .store import write_stream

Policy = tuple[PolicySpec, Mapping[str, Tensor]]
BASE = "base"
WIDTH = 512
# What every digest begins with. Any other field of the dimensions follows where it isn't at its default, but for those
# that tensors show by their names and shapes, and the one that changes no mathematics.
_FIRST = ("family", "heads", "kv_heads", "head_dim", "rms_eps", "rope_theta", "rope_scaling")
_SHOWN = ("num_layers", "hidden", "intermediate", "vocab", "tied", "qkv_bias", "out_bias", "mlp_bias", "qk_norm")
_NEUTRAL = ("max_positions",)
_warned: set[str] = set()


@dataclass(frozen=True)
class BaseIdentity:
    """Identity of a base model. path: its directory, for messages alone. The digests are of the sample rounded to
    either dtype: float32, its copy in bfloat16 and that copy in float32 again agree in the one, float32 and its copy in
    float16 in the other."""

    path: str
    bfloat16: str
    float16: str

    def same(self, other: BaseIdentity) -> bool:
        return self.bfloat16 == other.bfloat16 or self.float16 == other.float16

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @staticmethod
    def from_json(data: Any, where: Path) -> BaseIdentity:
        """Read from JSON. Raises ValueError, naming the file `where`, for any other record."""
        fields = BaseIdentity.__dataclass_fields__
        if not isinstance(data, Mapping) or not all(isinstance(data.get(name), str) for name in fields):
            raise ValueError(f"{where}: {BASE!r} is {str(data)[:80]!r}, expected {', '.join(fields)}; it is damaged")
        return BaseIdentity(*(data[name] for name in fields))

    def __str__(self) -> str:
        return f"{self.path} [{self.bfloat16[:12]}]"


def base_identity(base: HFDirectory | ModelSource) -> BaseIdentity:
    """Compute the identity of a base model; reads about two kilobytes of each tensor. A converted Megatron checkpoint
    has it on record: its tensors are compared with the manifest's hashes when they are used."""
    manifest = getattr(base, "manifest", {})
    if BASE in manifest:
        return BaseIdentity.from_json(manifest[BASE], base.path / "manifest.json")
    tensors = FileTensors(base.files) if isinstance(base, HFDirectory) else base
    digests = {dtype: hashlib.sha256(_header(base.dims)) for dtype in (torch.bfloat16, torch.float16)}
    for name, shape in base.dims.tensor_shapes().items():
        sample = _sample(tensors, name, shape).float()
        for dtype, digest in digests.items():
            digest.update(f"{name} {list(shape)}\n".encode())
            digest.update(tensor_bytes(sample.to(dtype)))
    path = f"{base.path}, fully fine-tuned" if isinstance(base, TunedSource) else str(base.path)
    return BaseIdentity(path, *(digest.hexdigest() for digest in digests.values()))


def _header(dims: ModelDims) -> bytes:
    # A config that was loaded and saved again may have 8.0 for 8.
    scaling = [(key, float(value) if isinstance(value, int) else value) for key, value in dims.rope_scaling]
    values = [scaling if name == "rope_scaling" else getattr(dims, name) for name in _FIRST]
    more = [name for name in features(dims) if name not in (*_FIRST, *_SHOWN, *_NEUTRAL)]
    return repr([*values, *((name, getattr(dims, name)) for name in more)]).encode()


def _sample(tensors: LazyTensors, name: str, shape: tuple[int, ...]) -> Tensor:
    """Of a matrix the beginnings of two rows, of a vector its beginning."""
    if len(shape) == 1:
        return tensors.part(name, slice(0, 2 * WIDTH))
    rows = (shape[0] // 3, 2 * shape[0] // 3)
    return torch.cat([tensors.part(name, slice(row, row + 1), slice(0, WIDTH)) for row in rows])


def recorded_base(policy: str | Path) -> BaseIdentity | None:
    """Base model recorded in a policy checkpoint; None for checkpoints from before it was recorded."""
    recorded = read_policy_json(policy).base
    return None if recorded is None else BaseIdentity.from_json(recorded, Path(policy) / POLICY_JSON)


def check_base(
    policy: str | Path,
    base: HFDirectory | ModelSource,
    *,
    unchecked: bool = False,
    otherwise: str = "use --base-unchecked to combine them anyway",
) -> None:
    """Raises ValueError, one line, if the policy checkpoint `policy` was made on another model than `base`.

    `unchecked`: skip the check. `otherwise`: advice in the error for combining both anyway. A policy without a record
    is accepted, with a remark on stderr, once.
    """
    if unchecked:
        return
    expected = recorded_base(policy)
    if expected is None:
        if str(policy) not in _warned:
            _warned.add(str(policy))
            print(f"{policy}: doesn't record its base model; {base.path} is not checked", file=sys.stderr)
        return
    identity = base_identity(base)
    if not identity.same(expected):
        raise ValueError(
            f"{policy}: belongs to another base model: found {identity}, expected {expected}; give the model that "
            f"it was made on, or {otherwise}"
        )


def write_policy(directory: Path, spec: PolicySpec, stream: Stream, base: Mapping[str, str] | None = None) -> None:
    """`policy.save_policy` for tensors that arrive in blocks and are not held in memory."""
    sha256 = write_stream(directory / "policy.safetensors", stream)
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
        stored = shape_of(tensors, name)
        if stored != shape:
            raise ValueError(f"policy tensor {name} has shape {list(stored)}, the model implies {list(shape)}")
    if not isinstance(tensors, LazyTensors):
        for name, tensor in tensors.items():
            check_finite(f"policy tensor {name}", tensor)


def no_policy(num_layers: int) -> Policy:
    """The empty policy of a plain model: no adapters, no exits."""
    return PolicySpec(num_layers, (), rank=0), dict[str, Tensor]()


def policy_on(base: ModelSource, directory: str | Path, unchecked: bool = False) -> Policy:
    """`open_policy` for a policy that will run on `base`. Also raises as `check_base`, unless `unchecked`."""
    check_base(directory, base, unchecked=unchecked)
    policy = open_policy(directory)
    try:
        check_policy(base.dims, *policy)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return policy


def policy_beside(base: ModelSource, unchecked: bool = False) -> Policy:
    """Policy in a Megatron checkpoint; empty for a plain model. Raises as `policy_on`."""
    if not (base.path / POLICY_JSON).is_file():
        return no_policy(base.dims.num_layers)
    # Files of one directory are taken to belong together unless a record contradicts.
    return policy_on(base, base.path, unchecked or recorded_base(base.path) is None)


def folded(source: ModelSource, policy: Policy) -> tuple[ModelSource, Policy]:
    """A fully fine-tuned policy as a base of its own and a policy of gates only; any other policy unchanged."""
    spec, tensors = policy
    if not spec.full:
        return source, policy
    check_policy(source.dims, spec, tensors)
    gates = {name: tensors[name] for name in spec.gate_shapes(source.dims)}
    facts = {**spec.to_json(), "full": False}
    return TunedSource(source, tensors), (PolicySpec.from_json(facts), gates)
