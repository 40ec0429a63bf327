"""Any source of tensors -> Megatron checkpoint directory: the work behind `convert import` and `convert reshard`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..policy import PolicySpec, save_policy
from ..tensors import digest
from .base_identity import BASE, base_identity
from .common_state import write_common
from .manifest import copy_tokenizer, entry_of, write_manifest
from .megatron_directory import CheckpointLayout, write_weights
from .megatron_foreign import TRACKER
from .megatron_io import KIND, WEIGHTS, empty_objects
from .megatron_settings import common_state, refuse_lost
from .meter import Meter
from .policy_files import Policy, check_policy
from .sources import TensorSource, TunedSource, total_bytes
from .torch_dist import write_metadata
from .workspace import workspace


def write_megatron(
    source: TensorSource,
    out: Path,
    policy: Policy,
    layout: CheckpointLayout,
    dtype: torch.dtype | None = None,
    *,
    resume: bool = False,
    quiet: bool = True,
) -> Meter:
    """Write the checkpoint (see megatron_io), whole or not at all; returns the meter with its figures.

    dtype None: each tensor as it is stored. A policy without tensors makes a plain checkpoint, without policy.json. A
    fully fine-tuned policy becomes the base, its gates the policy.
    Raises ValueError or OSError, one line: a model that a Megatron checkpoint can't describe, a policy that does not
    fit, damaged tensors, an output that exists, a full disk.
    """
    refuse_lost(source.dims)
    source, (spec, tensors) = folded(source, policy)
    check_policy(source.dims, spec, tensors)
    base = base_identity(source).to_json()
    job = {
        "command": "megatron",
        "source": source.fingerprint(),
        "spec": spec.to_json(),
        "policy": digest(tensors),
        "layout": layout.to_json(source.dims),
        "dtype": str(dtype),
    }
    with workspace(out, job, resume) as space, Meter("weights", total_bytes(source), quiet) as meter:
        chunks, lines = write_weights(space, source, layout, dtype, meter)
        common = common_state(source.dims, asdict(layout), dtype or source.dtype(source.names()[-1]))
        write_common(space.folder / WEIGHTS, common)
        write_metadata(space.folder / WEIGHTS, chunks, empty_objects(source.dims))
        _lead_megatron_lm(space.folder)
        if tensors:
            save_policy(space.folder, spec, tensors, base)
        for name, value in tensors.items():
            lines[name] = entry_of(value, [f"policy:{name}"], "policy.safetensors")
        (space.folder / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
        copied = copy_tokenizer(source.tokenizer or source.path, space.folder)
        facts = {"exit_depths": list(spec.exit_depths), "layout": layout.to_json(source.dims), "copied": copied}
        write_manifest(space.folder, KIND, lines, **{BASE: base}, **facts)
    return meter


def _lead_megatron_lm(folder: Path) -> None:
    """It looks for its checkpoints in directories of its own naming, and for a file that says which of them counts."""
    (folder / TRACKER).write_text("release\n")
    release = folder / "release"
    # There already in what an earlier run left.
    release.unlink(missing_ok=True)
    release.symlink_to(WEIGHTS, target_is_directory=True)


def folded(source: TensorSource, policy: Policy) -> tuple[TensorSource, Policy]:
    """A fully fine-tuned policy as a base of its own and a policy of gates only; any other as it is."""
    spec, tensors = policy
    if not spec.full:
        return source, policy
    check_policy(source.dims, spec, tensors)
    gates = {name: tensors[name] for name in spec.gate_shapes(source.dims)}
    facts = {**spec.to_json(), "full": False}
    return TunedSource(source, tensors), (PolicySpec.from_json(facts), gates)
