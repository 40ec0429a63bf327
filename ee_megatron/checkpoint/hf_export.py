"""Export a base model and a policy as a directory that Hugging Face users can load.

adapters="merge", gates="drop"     an ordinary model of its family
adapters="merge", gates="sidecar"  the same, the gates beside it in gates.safetensors
adapters="merge", gates="embed"    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True) that exits early
adapters="keep",  gates="sidecar"  a PEFT adapter of the base model, the gates beside it
adapters="keep",  gates="drop"     the PEFT adapter alone

Tensors pass through block by block, adapters being merged on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from ..config import hub
from ..exit_rules import Threshold
from ..families import FAMILIES
from ..families.base import rope_parameters
from ..families.hf_directory import HFDirectory, read_json
from ..policy import PolicySpec, open_policy
from ..tensors import Block, FileTensors, Hasher, LayeredTensors, ModelSource, digest, file_stamps, prefetch, row_blocks
from .export_files.configuration_early_exit import check_exit_policy
from .model_card import CARD, UNKNOWN, Provenance, model_card
from .policy_files import check_base, check_policy
from .sources import HFSource, TunedSource, Watch, cast, gate_facts
from .store import SafetensorsWriter, aligned, copy_tokenizer, entry, write_manifest, write_small
from .workspace import Meter, Workspace, workspace

EXPORT_FILES = Path(__file__).parent / "export_files"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPORTED_CODE = tuple(f"{part}_early_exit.py" for part in ("configuration", "layers", "speculation", "modeling"))
SHARD_BYTES = 4 << 30
DEFAULT_EXIT_POLICY = Threshold(0.5).to_json()
COMBINATIONS = {"merge": ("embed", "sidecar", "drop"), "keep": ("sidecar", "drop")}


def export_hf(
    base: ModelSource | HFDirectory | str | Path,
    policy: str | Path | tuple[PolicySpec, Mapping[str, Tensor]],
    out: str | Path,
    adapters: str = "merge",
    gates: str = "auto",
    dtype: str = "auto",
    exit_policy: dict | None = None,
    shard_bytes: int = SHARD_BYTES,
    *,
    base_name: str | None = None,
    resume: bool = False,
    quiet: bool = True,
    origin: Mapping[str, Any] | None = None,
    made: Provenance = UNKNOWN,
) -> Path:
    """Write the export atomically and return its path; never overwrites anything.

    policy: a policy checkpoint directory, or spec and tensors; that of a full fine-tuning is the base, too.
    gates "auto": embed with merged adapters, else sidecar.
    dtype: float32, bfloat16, float16, or auto (each tensor as it is stored in the base); gates stay float32.
    base_name: what a PEFT adapter and the model card call the base, a hub name or a directory; that of `base` unless
        given.
    exit_policy: the default of the embedded model's `generate`, {"kind": "threshold", "value": 0.5} unless given.
    resume: continue an interrupted export; if this one fails, it can be resumed, too. quiet: no lines of progress.
    origin: what the export was made from, as its manifest shall say (JSON). made: for the model card, README.md.

    Raises ValueError or FileNotFoundError: an option or combination that does not exist, a policy that does not fit the
    base or whose directory says that it was made on another, a damaged tensor, an output that exists. OSError: disk
    full.
    """
    if not isinstance(base, ModelSource):
        base = HFSource(base)
        if base.spec is not None:
            raise ValueError(f"{base.path}: is an early-exit export; give the plain model that it was made from")
    if not isinstance(policy, tuple):
        check_base(policy, base, otherwise="pass the result of open_policy to use it anyway")
    spec, tensors = policy if isinstance(policy, tuple) else open_policy(policy)
    out = Path(out)
    gates = ("embed" if adapters == "merge" else "sidecar") if gates == "auto" else gates
    _check_options(spec, adapters, gates, dtype)
    base_name = _peft_base(base, base_name, adapters)
    check_policy(base.dims, spec, tensors)
    exit_policy = exit_policy or DEFAULT_EXIT_POLICY
    check_exit_policy(exit_policy, list(spec.exit_depths), spec.num_layers)
    if spec.full:
        base = TunedSource(base, tensors)
    # That of a full fine-tuning was checked against its digest when it was opened.
    stored = tensors.path if isinstance(tensors, FileTensors) else None
    job = {
        "command": "export",
        "source": base.fingerprint(),
        "spec": spec.to_json(),
        "policy": [str(stored), *file_stamps(stored.parent, stored.name)] if stored else digest(dict(tensors)),
        "options": [adapters, gates, dtype, exit_policy, shard_bytes, base_name],
    }
    total = base.nbytes() if adapters == "merge" else 0
    gate_names = spec.gate_shapes(base.dims)
    with workspace(out, job, resume) as space:
        folder, meter = space.folder, Meter("export", total, quiet)
        if adapters == "merge":
            added = {name: tensors[name].float() for name in gate_names} if gates == "embed" else {}
            entries = _write_merged(base, added, (spec, tensors), dtype, shard_bytes, space, meter)
            _write_config(base, spec, folder, gates, dtype, exit_policy)
            # Names, shapes and lengths as the next reader will see them.
            HFDirectory(folder)
        else:
            entries = _write_peft(base, spec, tensors, dtype, folder, base_name)
        if gates == "sidecar":
            entries |= _write_sidecar(spec, tensors, folder)
        copy_tokenizer(base.tokenizer, folder)
        _name_tokenizer_for_all_versions(folder / "tokenizer_config.json")
        facts: dict[str, Any] = {"adapters": adapters, "gates": gates, "exit_depths": list(spec.exit_depths)}
        facts["speed"] = meter.line()
        kind = gates if adapters == "merge" else adapters
        card = model_card(base, base_name, spec, kind, gates, exit_policy, made)
        (folder / CARD).write_text(card, encoding="utf-8")
        facts["card"] = hashlib.sha256(card.encode()).hexdigest()
        if origin is not None:
            facts["origin"] = dict(origin)
        write_manifest(folder, "hf_export", entries, **facts)
    return out


def _check_options(spec: PolicySpec, adapters: str, gates: str, dtype: str) -> None:
    if adapters not in COMBINATIONS:
        raise ValueError(f"adapters={adapters!r}: expected one of {', '.join(COMBINATIONS)}")
    if gates not in COMBINATIONS[adapters]:
        raise ValueError(f"gates={gates!r} with adapters={adapters!r}: expected one of {COMBINATIONS[adapters]}")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected auto, {', '.join(DTYPES)}")
    if adapters == "keep" and not spec.rank:
        raise ValueError("adapters='keep': the policy has no adapters (rank 0); use adapters='merge'")


def _peft_base(base: ModelSource, name: str | None, adapters: str) -> str | None:
    """What a PEFT adapter is to call its base, so that it is found from any directory; None: a merged model may say
    nothing.

    `_name_or_path` in config.json is ignored: a model that was fine-tuned and saved names its parent there.
    """
    if name is None:
        if adapters == "merge":
            return None
        if isinstance(base, HFSource):
            return hub.repo_of(base.path) or str(base.path.resolve())
        raise ValueError(
            f"{base.path}: holds no model that PEFT can load; say with --base-name what it was imported from, a "
            "name on the hub or a directory"
        )
    if not Path(name).is_dir():
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise ValueError(f"--base-name {name}: neither a directory nor a name on the hub, as in org/model")
        return name
    if HFDirectory(name).dims != base.dims:
        raise ValueError(f"--base-name {name}: has other dimensions than {base.path}")
    return str(Path(name).resolve())


def adapter_of(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Names of the adapter matrices A and B of a base tensor, if it has an adapter."""
    stem = name.removesuffix(".weight")
    pair = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    return pair if stem != name and pair[0] in tensors else None


def merged(block: Block, spec: PolicySpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """Merge an adapter into rows of a base weight: W + scale * B A, in float32 whatever the inputs are (Hu et al.
    2021); the block unchanged if there is no adapter."""
    pair = adapter_of(block.name, tensors)
    if pair is None:
        return block.data
    lora_a, lora_b = (tensors[part].float() for part in pair)
    return block.data.float() + spec.scale * (lora_b[block.first : block.first + len(block.data)] @ lora_a)


def _write_merged(
    base: ModelSource,
    gates: Mapping[str, Tensor],
    policy: tuple[PolicySpec, Mapping[str, Tensor]],
    dtype: str,
    shard_bytes: int,
    space: Workspace,
    meter: Meter,
) -> dict[str, dict]:
    """model.safetensors, or numbered files and their index, in the model's order, gates last; returns the manifest's
    entries."""
    content = LayeredTensors(base, gates)
    table = {
        name: (stored if name in gates else DTYPES.get(dtype, stored), shape)
        for name, (stored, shape) in content.entries.items()
    }
    split = split_state_dict_into_shards_factory(
        table, get_storage_size=_bytes_of, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    entries: dict[str, dict] = {}
    for file, names in split.filename_to_tensors.items():
        made = space.finished(file)
        if made is None:
            part = {name: table[name] for name in names}
            made = _write_shard(base, content, policy, space.folder / file, part, meter)
            space.finish(file, made)
        else:
            meter.skip(sum(_bytes_of(table[name]) for name in names))
        entries |= {name: made[name] for name in names}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (space.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return entries


def _bytes_of(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return dtype.itemsize * math.prod(shape)


def _write_shard(
    base: ModelSource,
    content: LayeredTensors,
    policy: tuple[PolicySpec, Mapping[str, Tensor]],
    path: Path,
    table: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    meter: Meter,
) -> dict[str, dict]:
    spec, tensors = policy
    with Hasher() as hasher, SafetensorsWriter(path, table) as writer:
        watches = {}
        for name, (dtype, _) in table.items():
            merge = partial(merged, spec=spec, tensors=tensors) if adapter_of(name, tensors) else None
            watches[name] = Watch(base, name, dtype, hasher, meter, merge)
        for block in prefetch(block for name in aligned(table) for block in row_blocks(content, name)):
            writer.write(watches[block.name].block(block))
        return {
            name: entry(shape, dtype, watches[name].hexdigest(), path.name) for name, (dtype, shape) in table.items()
        }


def _write_config(base: ModelSource, spec: PolicySpec, folder: Path, gates: str, dtype: str, exit_policy: dict) -> None:
    config = dict(base.config) | _for_all_versions(base, dtype)
    if gates == "embed":
        config |= {
            "model_type": "early_exit",
            "base_model_type": base.dims.family,
            "architectures": ["EarlyExitForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_early_exit.EarlyExitConfig",
                "AutoModelForCausalLM": "modeling_early_exit.EarlyExitForCausalLM",
            },
            **gate_facts(spec),
            "exit_policy": exit_policy,
        }
        for file in EXPORTED_CODE:
            shutil.copyfile(EXPORT_FILES / file, folder / file)
    else:
        config["architectures"] = [FAMILIES[base.dims.family].architecture]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _for_all_versions(base: ModelSource, dtype: str) -> dict:
    """What transformers 4 and 5 read under different names, or fill with different defaults, under both names."""
    config, dims = base.config, base.dims
    rope = rope_parameters(config, dims.family)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    fields = {
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "tie_word_embeddings": dims.tied,
    }
    stored = dtype if dtype != "auto" else config.get("dtype") or config.get("torch_dtype")
    return fields | ({"dtype": stored, "torch_dtype": stored} if stored else {})


def _name_tokenizer_for_all_versions(file: Path) -> None:
    """A tokenizer that transformers 5 saved, under the names that transformers 4 has and 5 still reads."""
    if not file.is_file():
        return
    fields = read_json(file)
    if fields.get("tokenizer_class") != "TokenizersBackend":
        return
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _write_peft(
    base: ModelSource,
    spec: PolicySpec,
    tensors: Mapping[str, Tensor],
    dtype: str,
    folder: Path,
    base_name: str | None,
) -> dict[str, dict]:
    content = {
        f"base_model.model.{name}": cast(f"policy tensor {name}", tensors[name], DTYPES.get(dtype, tensors[name].dtype))
        for name in spec.adapter_shapes(base.dims)
    }
    entries = write_small(folder / "adapter_model.safetensors", content)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
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


def _write_sidecar(spec: PolicySpec, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict]:
    """gates.safetensors and gates.json."""
    content = {name: tensors[name].float() for name in tensors if name.startswith("gates.")}
    (folder / "gates.json").write_text(json.dumps(gate_facts(spec), indent=2) + "\n")
    return write_small(folder / "gates.safetensors", content)
