"""The policy's tensors: names, initial values, and the identity of a version.

With adapters the base stays frozen, so adapters and gates are all that travels from the learner to the rollout pool and
all that a checkpoint has to hold. Under full fine-tuning the policy is every tensor of the base (by its Hugging Face
name) and the gates. Names are layout-free: every body of the model maps them onto its own modules.

    model.layers.{i}.{linear}.lora_A.weight [r, in]     model.layers.{i}.{linear}.lora_B.weight [out, r]
    gates.{depth}.fc1.weight [w·D, D]  .fc1.bias [w·D]  .fc2.weight [1, w·D]  .fc2.bias [1]        w·D: `gate_units`
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .exits import ExitLayout, gate_units
from .families import ModelDims
from .families.hf_directory import read_json
from .tensors import FileTensors, LayeredTensors, digest

POLICY_JSON = "policy.json"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class PolicySpec:
    """Spec of a policy's tensors: adapters or the whole base, and gates.

    exit_depths as in `ExitLayout`; rank 0 means no adapters; `targets` are linear names within a block; the LoRA
    product is scaled by alpha / rank. `full`: full fine-tuning, without adapters (rank 0). `gate_input` is "normalised"
    (the residual stream divided by its root mean square, no gain) or "raw" (the stream itself, as in the paper).
    first_token as in `ExitLayout`.
    """

    num_layers: int
    exit_depths: tuple[int, ...]
    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = ATTENTION + MLP
    gate_width: float = 2
    gate_input: str = "normalised"
    full: bool = False
    first_token: bool = False

    def __post_init__(self) -> None:
        if self.full and self.rank:
            raise ValueError(f"full fine-tuning with adapters of rank {self.rank}: set the rank to 0, or full to False")
        # Files bring anything.
        good = {
            "num_layers": type(self.num_layers) is int and self.num_layers > 0,
            "exit_depths": all(type(depth) is int for depth in self.exit_depths),
            "rank": type(self.rank) is int and self.rank >= 0,
            "alpha": type(self.alpha) in (int, float) and 0 < self.alpha < math.inf,
            "targets": {*map(str, self.targets)} <= {*ATTENTION, *MLP},
            "gate_width": type(self.gate_width) in (int, float) and 0 < self.gate_width < 2**31,
            "gate_input": self.gate_input in ("normalised", "raw"),
            "full": type(self.full) is bool,
            "first_token": type(self.first_token) is bool,
        }
        if wrong := [name for name in good if not good[name]]:
            raise ValueError(f"policy: {wrong[0]}={getattr(self, wrong[0])!r} is none; expected what training writes")
        _ = self.layout

    @property
    def layout(self) -> ExitLayout:
        return ExitLayout(self.num_layers, tuple(self.exit_depths), self.first_token)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0

    def adapter_shapes(self, dims: ModelDims) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        linears = dims.linear_shapes()
        for layer in range(dims.num_layers if self.rank else 0):
            for target in self.targets:
                rows, columns = linears[target]
                shapes[f"model.layers.{layer}.{target}.lora_A.weight"] = (self.rank, columns)
                shapes[f"model.layers.{layer}.{target}.lora_B.weight"] = (rows, self.rank)
        return shapes

    def gate_shapes(self, dims: ModelDims) -> dict[str, tuple[int, ...]]:
        width = gate_units(self.gate_width, dims.hidden)
        shapes: dict[str, tuple[int, ...]] = {}
        for depth in self.exit_depths:
            shapes[f"gates.{depth}.fc1.weight"] = (width, dims.hidden)
            shapes[f"gates.{depth}.fc1.bias"] = (width,)
            shapes[f"gates.{depth}.fc2.weight"] = (1, width)
            shapes[f"gates.{depth}.fc2.bias"] = (1,)
        return shapes

    def tensor_shapes(self, dims: ModelDims) -> dict[str, tuple[int, ...]]:
        base = dims.tensor_shapes() if self.full else {}
        return {**base, **self.adapter_shapes(dims), **self.gate_shapes(dims)}

    def to_json(self) -> dict:
        data = asdict(self)
        if not self.first_token:
            # As files have it that were written before there was a choice.
            del data["first_token"]
        return data

    @staticmethod
    def from_json(data: dict) -> PolicySpec:
        return PolicySpec(**{**data, "exit_depths": tuple(data["exit_depths"]), "targets": tuple(data["targets"])})


def untrained_gates(spec: PolicySpec, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the policy has gates, and all are as `initial_policy` makes them: they answer the same to every input."""
    weights = [f"gates.{depth}.fc2.weight" for depth in spec.exit_depths]
    return bool(weights) and not any(bool(tensors[name].any()) for name in weights)


# Before calibration a gate should stay shut: sigmoid(-4) = 0.018.
INITIAL_GATE_BIAS = -4.0


def initial_policy(
    dims: ModelDims, spec: PolicySpec, seed: int, base: Callable[[str], Tensor] | None = None
) -> dict[str, Tensor]:
    """Start values, float32, the same whatever the parallel layout: LoRA A uniform, B zero; gates nearly shut.

    `base` reads a tensor of the pretrained model by name; full fine-tuning starts from it. LoRA: Hu et al. 2021
    (arXiv 2106.09685), A by the Kaiming rule with a = sqrt(5) as in the authors' code.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    if spec.full:
        if base is None:
            raise ValueError("full fine-tuning starts from the pretrained model; pass what reads its tensors")
        tensors = {name: base(name).float() for name in dims.tensor_shapes()}
    for name, shape in {**spec.adapter_shapes(dims), **spec.gate_shapes(dims)}.items():
        if name.endswith(("lora_B.weight", "fc1.bias", "fc2.weight")):
            tensors[name] = torch.zeros(shape)
        elif name.endswith("fc2.bias"):
            tensors[name] = torch.full(shape, INITIAL_GATE_BIAS)
        else:
            bound = 1.0 / math.sqrt(shape[1])
            tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return tensors


def sharpened(policy: Mapping[str, Tensor], centre: float, sharpness: float) -> Mapping[str, Tensor]:
    """The policy with gate logits sharpness * (z - logit(centre)). Exits sampled from calibrated hazards are far worse
    than the same gates under a high threshold; so RL may start at that threshold, in a policy it can still explore."""
    shift = math.log(centre / (1 - centre))
    moved = {name: policy[name] * sharpness for name in policy if name.endswith("fc2.weight")}
    moved |= {name: (policy[name] - shift) * sharpness for name in policy if name.endswith("fc2.bias")}
    return LayeredTensors(moved, policy)


def change_share(name: str, share: float) -> float:
    """What the change of a policy's tensor since its start is multiplied by, where that of the model is by `share`.
    Gates stay; of an adapter B alone is scaled, since the change is B A."""
    return 1.0 if name.startswith("gates.") or ".lora_A." in name else share


def stays_float32(name: str) -> bool:
    """Whether a model of any dtype uses this policy tensor in float32: a gate's do, but for the weight of its first
    product, which is rounded to the model's dtype."""
    return name.startswith("gates.") and not name.endswith("fc1.weight")


def may_travel_in(dtype: torch.dtype, name: str, decoder: torch.dtype) -> bool:
    """Whether a policy tensor may be rounded to `dtype` on its way to a decoder of dtype `decoder`: of a gate only what
    that rounds to `dtype` itself, so that hazards don't change."""
    return not name.startswith("gates.") or (decoder == dtype and not stays_float32(name))


@dataclass
class WeightSet:
    """One version of the policy's tensors, as it travels from the learner to the pool; that may hold them already."""

    version: int
    tensors: Mapping[str, Tensor]
    digest: str = ""

    def __post_init__(self) -> None:
        self.digest = self.digest or digest(self.tensors)


def save_policy(
    directory: Path, spec: PolicySpec, tensors: Mapping[str, Tensor], base: Mapping[str, str] | None = None
) -> None:
    """Write policy.safetensors and policy.json into an existing directory (the caller makes it appear whole). `base`:
    the identity of the model that the policy belongs to (checkpoint/policy_files.py)."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / "policy.safetensors"
    )
    write_policy_json(directory, spec, digest(tensors), base)


def write_policy_json(directory: Path, spec: PolicySpec, sha256: str, base: Mapping[str, str] | None = None) -> None:
    """What a policy's tensors are, their digest, the base model that they belong to."""
    more = {"base": dict(base)} if base else {}
    (directory / POLICY_JSON).write_text(json.dumps({**spec.to_json(), "sha256": sha256, **more}, indent=1))


@dataclass(frozen=True)
class PolicyFile:
    """policy.json: the spec, the digest of the tensors, the record of the base (None: an older file, without one)."""

    spec: PolicySpec
    sha256: str
    base: Mapping[str, str] | None


def read_policy_json(directory: str | Path) -> PolicyFile:
    """What `write_policy_json` wrote. Raises FileNotFoundError or ValueError, naming the file."""
    path = Path(directory) / POLICY_JSON
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no {POLICY_JSON} there; expected a policy checkpoint")
    data = read_json(path)
    try:
        sha256, base = data.pop("sha256"), data.pop("base", None)
        return PolicyFile(PolicySpec.from_json(data), sha256, base)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not what a policy's should be ({error}); the file is damaged") from None


def load_policy(directory: str | Path) -> tuple[PolicySpec, dict[str, Tensor]]:
    """Read what `save_policy` wrote. Raises FileNotFoundError or ValueError (damaged: the digest differs)."""
    spec, tensors = open_policy(directory)
    return spec, {name: tensor.clone() for name, tensor in tensors.items()}


def open_policy(directory: str | Path, *, check: bool = True) -> tuple[PolicySpec, Mapping[str, Tensor]]:
    """As `load_policy`, but the tensors of a full fine-tuning stay in their file (`FileTensors`). Without `check` the
    digest, which has been compared elsewhere, is not computed."""
    known, file = read_policy_json(directory), Path(directory) / "policy.safetensors"
    tensors = FileTensors(file)
    if check and digest(tensors) != known.sha256:
        raise ValueError(f"{file}: contents do not match the digest in {POLICY_JSON}; the file is damaged")
    return known.spec, tensors if known.spec.full else {name: tensor.clone() for name, tensor in tensors.items()}
