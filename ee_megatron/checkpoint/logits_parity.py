"""Logits of a checkpoint in the body that it is made for, under prescribed exit depths."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ..families import ModelDims
from ..model.config import megatron_config
from ..model.control import make_control
from ..model.gpt import EarlyExitGPT, build_stage
from ..model.packed import PackedSequences
from .describe import Checkpoint
from .export_files.configuration_early_exit import EarlyExitConfig
from .export_files.modeling_early_exit import EarlyExitForCausalLM
from .mapping import whole_entries

MEMINFO = Path("/proc/meminfo")
DEADLINE = timedelta(minutes=10)


@contextmanager
def single_process() -> Iterator[None]:
    """A world of one rank for the length of the block, unless the process is in a world already; without a GPU what
    megatron-core asks of one is answered by the CPU.

    Nothing is listened on: the store is in memory. Raises ValueError inside a world of several ranks, where one process
    cannot hold the whole model.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(f"conversion runs in one process, but {dist.get_world_size()} ranks were started; start one")
    joined, split = not dist.is_initialized(), not parallel_state.model_parallel_is_initialized()
    if joined:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=DEADLINE)
    device = torch.cuda.current_device
    try:
        if not torch.cuda.is_available():
            torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
        if split:
            parallel_state.initialize_model_parallel()
        yield
    finally:
        torch.cuda.current_device = device
        if split and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if joined:
            dist.destroy_process_group()


def build_whole(dims: ModelDims, dtype: torch.dtype) -> EarlyExitGPT:
    """The base model on the CPU in one piece, its weights unset. Needs `single_process`."""
    return build_stage(megatron_config(dims, None, (dims.num_layers,), dtype=dtype))


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
    for name in checkpoint.base:
        parameters.pop(name).copy_(checkpoint.whole(name))
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
    with single_process():
        model = build_whole(dims, torch.float32).eval()
        parameters = dict(model.named_parameters())
        for item in whole_entries(dims):
            parameters.pop(item.parameter).copy_(item.shard([checkpoint.whole(name) for name in item.names], 1, 0))
        assert not parameters, sorted(parameters)
        packed = PackedSequences.of([ids_BT.size(1)] * len(ids_BT))
        hidden_W1D = model(ids_BT.view(1, -1), make_control(packed, depths_BT.flatten()))
        return (hidden_W1D @ model.readout_weight().T).view(*ids_BT.shape, -1)[..., : dims.vocab].clone()


logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
