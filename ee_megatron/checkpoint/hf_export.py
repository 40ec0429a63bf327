"""A base model and a policy -> a directory that Hugging Face users can load.

adapters="merge", gates="drop"     an ordinary model of its family
adapters="merge", gates="sidecar"  the same, the gates beside it in gates.safetensors
adapters="merge", gates="embed"    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True) that exits early
adapters="keep",  gates="sidecar"  a PEFT adapter of the base model, the gates beside it
adapters="keep",  gates="drop"     the PEFT adapter alone

Tensors pass through one at a time and are written shard by shard: memory does not grow with the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..families import FAMILIES, ModelDims
from ..families.hf_directory import HFDirectory
from ..policy import PolicySpec, load_policy
from .export_files.configuration_early_exit import check_exit_policy
from .manifest import Ledger, copy_tokenizer, entry, whole_directory, write_manifest

EXPORT_FILES = Path(__file__).parent / "export_files"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 4 << 30
DEFAULT_EXIT_POLICY = {"kind": "threshold", "value": 0.5}
COMBINATIONS = {"merge": ("embed", "sidecar", "drop"), "keep": ("sidecar", "drop")}


class TensorSource(Protocol):
    """What an export reads a base model from: `HFDirectory`, or a checkpoint that offers the same."""

    path: Path
    config: dict
    dims: ModelDims

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> Tensor: ...


def export_hf(
    base: TensorSource | str | Path,
    policy: str | Path | tuple[PolicySpec, dict[str, Tensor]],
    out: str | Path,
    adapters: str = "merge",
    gates: str = "auto",
    dtype: str = "auto",
    exit_policy: dict | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the export and return its path. It appears whole or not at all, and never over something that exists.

    policy: a policy checkpoint directory, or spec and tensors. gates "auto": embed with merged adapters, else sidecar.
    dtype: float32, bfloat16, float16, or auto (each tensor as it is stored in the base); gates stay float32.
    exit_policy: the default of the embedded model's `generate`, {"kind": "threshold", "value": 0.5} unless given.

    Raises ValueError or FileNotFoundError: an option or combination that does not exist, a policy that does not fit the
    base, a tensor that would be left over or used twice, an output that exists.
    """
    base = HFDirectory(base) if isinstance(base, str | Path) else base
    spec, tensors = policy if isinstance(policy, tuple) else load_policy(policy)
    out = Path(out)
    gates = ("embed" if adapters == "merge" else "sidecar") if gates == "auto" else gates
    _check_options(base, spec, adapters, gates, dtype)
    check_policy(base.dims, spec, tensors)
    exit_policy = exit_policy or DEFAULT_EXIT_POLICY
    check_exit_policy(exit_policy, list(spec.exit_depths), spec.num_layers)
    ledger = Ledger(base=base.names() if adapters == "merge" else (), policy=tensors)
    with whole_directory(out) as folder:
        if adapters == "merge":
            entries = _write_merged(base, spec, tensors, folder, gates, _caster(dtype), ledger, shard_bytes)
            _write_config(base, spec, folder, gates, dtype, exit_policy)
        else:
            entries = _write_peft(base, spec, tensors, folder, _caster(dtype), ledger)
        entries |= _write_sidecar(spec, tensors, folder, gates, ledger)
        ledger.close()
        copied = copy_tokenizer(base.path, folder)
        facts = {"adapters": adapters, "gates": gates, "exit_depths": list(spec.exit_depths), "copied": copied}
        write_manifest(folder, "hf_export", entries, **facts)
    return out


def _check_options(base: TensorSource, spec: PolicySpec, adapters: str, gates: str, dtype: str) -> None:
    if adapters not in COMBINATIONS:
        raise ValueError(f"adapters={adapters!r}: expected one of {', '.join(COMBINATIONS)}")
    if gates not in COMBINATIONS[adapters]:
        raise ValueError(f"gates={gates!r} with adapters={adapters!r}: expected one of {COMBINATIONS[adapters]}")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected auto, {', '.join(DTYPES)}")
    if base.config.get("model_type") == "early_exit":
        raise ValueError(f"{base.path}: is an early-exit export; give the plain model that it was made from")
    if adapters == "keep" and not spec.rank:
        raise ValueError("adapters='keep': the policy has no adapters (rank 0); use adapters='merge'")


def check_policy(dims: ModelDims, spec: PolicySpec, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError, naming the first offender, unless the policy's tensors are exactly those the model needs."""
    if spec.num_layers != dims.num_layers:
        raise ValueError(f"the policy is for {spec.num_layers} layers, the model has {dims.num_layers}")
    expected = spec.tensor_shapes(dims)
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or extra:
        raise ValueError(f"policy tensors: missing {missing[:3]}, unexpected {extra[:3]}; spec and tensors disagree")
    wrong = [name for name, shape in expected.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        found = list(tensors[wrong[0]].shape)
        raise ValueError(f"policy tensor {wrong[0]} has shape {found}, the model implies {list(expected[wrong[0]])}")


def _caster(dtype: str) -> Callable[[Tensor, torch.dtype], Tensor]:
    """(tensor, dtype it is stored in) -> contiguous tensor in the dtype of the export."""
    return lambda tensor, stored: tensor.to(DTYPES.get(dtype, stored)).contiguous()


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, float32 [out, in] (Hu et al. 2021): in float32 whatever the inputs are."""
    return weight.float() + scale * (lora_b.float() @ lora_a.float())


def _write_merged(
    base: TensorSource,
    spec: PolicySpec,
    tensors: dict[str, Tensor],
    folder: Path,
    gates: str,
    cast: Callable[[Tensor, torch.dtype], Tensor],
    ledger: Ledger,
    shard_bytes: int,
) -> dict[str, dict]:
    def base_tensor(name: str) -> tuple[Tensor, list[str]]:
        weight, keys = base.tensor(name), [f"base:{name}"]
        stem = name.removesuffix(".weight")
        if name == f"{stem}.weight" and f"{stem}.lora_A.weight" in tensors:
            lora = [f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"]
            keys += [f"policy:{part}" for part in lora]
            return cast(
                merged_weight(weight, tensors[lora[0]], tensors[lora[1]], spec.scale), weight.dtype
            ), ledger.take(*keys)
        return cast(weight, weight.dtype), ledger.take(*keys)

    def gate_tensor(name: str) -> tuple[Tensor, list[str]]:
        return tensors[name].float().contiguous(), ledger.take(f"policy:{name}")

    makers: dict[str, Callable[[str], tuple[Tensor, list[str]]]] = dict.fromkeys(base.names(), base_tensor)
    if gates == "embed":
        makers |= dict.fromkeys(spec.gate_shapes(base.dims), gate_tensor)
    sizes = {**base.dims.tensor_shapes(), **spec.gate_shapes(base.dims)}
    # Four bytes per number at most: a shard is never larger than asked for, unless one tensor is.
    shards = _plan_shards(makers, {name: 4 * torch.Size(sizes[name]).numel() for name in makers}, shard_bytes)
    return _write_shards(shards, makers, folder)


def _plan_shards(names: Iterable[str], size: dict[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name in names:
        if shards[-1] and used + size[name] > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size[name]
    return shards


def _write_shards(
    shards: list[list[str]], makers: dict[str, Callable[[str], tuple[Tensor, list[str]]]], folder: Path
) -> dict[str, dict]:
    """model.safetensors, or numbered files and their index; returns the manifest's entries."""
    entries: dict[str, dict] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content: dict[str, Tensor] = {}
        for name in names:
            content[name], sources = makers[name](name)
            entries[name] = entry(content[name], sources, file)
            total += content[name].nbytes
        save_file(content, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: line["file"] for name, line in entries.items()},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return entries


def _write_config(
    base: TensorSource, spec: PolicySpec, folder: Path, gates: str, dtype: str, exit_policy: dict
) -> None:
    config = dict(base.config)
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if gates == "embed":
        config |= {
            "model_type": "early_exit",
            "base_model_type": base.dims.family,
            "architectures": ["EarlyExitForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_early_exit.EarlyExitConfig",
                "AutoModelForCausalLM": "modeling_early_exit.EarlyExitForCausalLM",
            },
            "exit_depths": list(spec.exit_depths),
            "gate_width": spec.gate_width,
            "gate_input": spec.gate_input,
            "exit_policy": exit_policy,
        }
        for file in ("configuration_early_exit.py", "modeling_early_exit.py"):
            shutil.copyfile(EXPORT_FILES / file, folder / file)
    else:
        config["architectures"] = [FAMILIES[base.dims.family].ARCHITECTURE]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_peft(
    base: TensorSource,
    spec: PolicySpec,
    tensors: dict[str, Tensor],
    folder: Path,
    cast: Callable[[Tensor, torch.dtype], Tensor],
    ledger: Ledger,
) -> dict[str, dict]:
    file = "adapter_model.safetensors"
    content: dict[str, Tensor] = {}
    entries: dict[str, dict] = {}
    for name in spec.adapter_shapes(base.dims):
        target = f"base_model.model.{name}"
        content[target] = cast(tensors[name], tensors[name].dtype)
        entries[target] = entry(content[target], ledger.take(f"policy:{name}"), file)
    save_file(content, folder / file, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "target_modules": sorted({target.rsplit(".", 1)[-1] for target in spec.targets}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return entries


def _write_sidecar(
    spec: PolicySpec, tensors: dict[str, Tensor], folder: Path, gates: str, ledger: Ledger
) -> dict[str, dict]:
    """gates.safetensors and gates.json, or nothing (dropped gates count as used, embedded ones were)."""
    names = [name for name in tensors if name.startswith("gates.")]
    if gates == "drop":
        ledger.take(*(f"policy:{name}" for name in names))
    if gates != "sidecar":
        return {}
    content = {name: tensors[name].float().contiguous() for name in names}
    save_file(content, folder / "gates.safetensors", metadata={"format": "pt"})
    facts = {"exit_depths": list(spec.exit_depths), "gate_width": spec.gate_width, "gate_input": spec.gate_input}
    (folder / "gates.json").write_text(json.dumps(facts, indent=2) + "\n")
    return {name: entry(content[name], ledger.take(f"policy:{name}"), "gates.safetensors") for name in names}
