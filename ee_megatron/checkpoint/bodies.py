"""Logits of a checkpoint in the body that it is made for, under prescribed exit depths."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ..model.control import make_control
from ..model.packed import PackedSequences
from .describe import Checkpoint
from .export_files.configuration_early_exit import EarlyExitConfig
from .export_files.modeling_early_exit import EarlyExitForCausalLM
from .megatron_io import build_whole, cuda_optional, single_process, whole_entries

MEMINFO = Path("/proc/meminfo")


@torch.no_grad()
def logits_of(checkpoint: Checkpoint, ids_BT: Tensor, depths_BT: Tensor) -> Tensor:
    """Token ids and exit depths int64 [B, T] (L: no exit) -> logits float32 [B, T, V]. The model is in memory whole.

    Raises ValueError if it does not fit into what is free.
    """
    _check_memory(checkpoint)
    run = {"hf": _transformers, "embed": _exported, "megatron": _megatron}[checkpoint.kind]
    return run(checkpoint, ids_BT, depths_BT)


def _check_memory(checkpoint: Checkpoint) -> None:
    need = 4 * sum(torch.Size(shape).numel() for shape in checkpoint.base.dims.tensor_shapes().values())
    if MEMINFO.is_file():
        free = next(int(line.split()[1]) << 10 for line in MEMINFO.read_text().splitlines() if "MemAvailable" in line)
        if need > free:
            raise ValueError(
                f"{checkpoint.path}: its logits need {need / 1e9:.0f} GB of memory in float32, {free / 1e9:.0f} GB are "
                "free; compare tensors only, with --no-logits"
            )


def _config(checkpoint: Checkpoint) -> Any:
    fields = {key: value for key, value in checkpoint.base.config.items() if key not in ("model_type", "architectures")}
    return CONFIG_MAPPING[checkpoint.base.dims.family](**fields)


def _fill(model: nn.Module, checkpoint: Checkpoint, gates: dict[str, Tensor]) -> None:
    """Every parameter from the checkpoint, exactly (assertion)."""
    parameters = dict(model.named_parameters())
    for name in checkpoint.base.names():
        parameters.pop(name).copy_(checkpoint.whole(name))
        checkpoint.base.release()
    for name, tensor in gates.items():
        parameters.pop(name).copy_(tensor)
    assert not parameters, sorted(parameters)


def _transformers(checkpoint: Checkpoint, ids_BT: Tensor, depths_BT: Tensor) -> Tensor:
    """The family's own class; an exit is its definition: a layer's output counts only where the position goes on."""
    model = AutoModelForCausalLM.from_config(
        _config(checkpoint), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    _fill(model, checkpoint, {})

    def freeze(index: int):
        return lambda _module, inputs, output: torch.where((depths_BT > index)[..., None], output, inputs[0])

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(freeze(index))
    return model(ids_BT, use_cache=False).logits


def _exported(checkpoint: Checkpoint, ids_BT: Tensor, depths_BT: Tensor) -> Tensor:
    """This version's class, not the code that lies in the directory: a check must not run what it checks."""
    config = EarlyExitConfig.from_pretrained(checkpoint.path)
    model = EarlyExitForCausalLM(config).float().eval()
    _fill(model, checkpoint, checkpoint.gates())
    outcomes = torch.tensor([*checkpoint.spec.exit_depths, checkpoint.base.dims.num_layers])
    if bool(torch.isin(depths_BT, outcomes).all()):
        return model(ids_BT, exit_depths=depths_BT, use_cache=False).logits
    raise ValueError(f"{checkpoint.path}: exits at {outcomes.tolist()[:-1]}, the other model at others")


def _megatron(checkpoint: Checkpoint, ids_BT: Tensor, depths_BT: Tensor) -> Tensor:
    dims = checkpoint.base.dims
    with single_process(), cuda_optional():
        model = build_whole(dims, torch.float32).eval()
        parameters = dict(model.named_parameters())
        for item in whole_entries(dims):
            parameters.pop(item.parameter).copy_(item.shard([checkpoint.whole(name) for name in item.names], 1, 0))
            checkpoint.base.release()
        assert not parameters, sorted(parameters)
        packed = PackedSequences.of([ids_BT.size(1)] * len(ids_BT))
        hidden_W1D = model(ids_BT.view(1, -1), make_control(packed, depths_BT.flatten()))
        return (hidden_W1D @ model.readout_weight().T).view(*ids_BT.shape, -1)[..., : dims.vocab].clone()


logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
