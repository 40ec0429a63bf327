"""Megatron checkpoints (torch_dist): the base model's tensors in megatron-core's distributed format.

    <directory>/weights/        what megatron-core's dist_checkpointing reads; any tensor or pipeline layout can load it
    <directory>/release         the same directory under the name by which Megatron-LM's --load finds it
    <directory>/policy.*        adapters and gates by their layout-free names (policy.py)
    <directory>/config.json     the Hugging Face config; tokenizer files and manifest.json beside it

`save_weights` and `load_weights` run on all ranks of a run together, through megatron-core. The converter reads and
writes the same format in one process, tensor by tensor: megatron_directory.py.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from ..families import ModelDims
from ..model.config import megatron_config
from ..model.gpt import EarlyExitGPT, RankModel, build_stage
from .kinds import WEIGHTS as WEIGHTS
from .mapping import Entry, entries, name_before
from .megatron_settings import common_state
from .torch_dist import TorchDistReader

KIND = "megatron"
DEADLINE = timedelta(minutes=10)


@contextmanager
def single_process() -> Iterator[None]:
    """A world of one rank for the length of the block, unless the process is in a world already.

    Nothing is listened on: the store is in memory. Raises ValueError inside a world of several ranks, where one process
    cannot hold the whole model.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(f"conversion runs in one process, but {dist.get_world_size()} ranks were started; start one")
    joined, split = not dist.is_initialized(), not parallel_state.model_parallel_is_initialized()
    if joined:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=DEADLINE)
    try:
        if split:
            parallel_state.initialize_model_parallel()
        yield
    finally:
        if split and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if joined:
            dist.destroy_process_group()


@contextmanager
def cuda_optional() -> Iterator[None]:
    """Without a GPU megatron-core's reader and writer have nothing to wait for and exchange their flags on the CPU."""
    originals = torch.cuda.synchronize, torch.cuda.current_device
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.synchronize, torch.cuda.current_device = originals


def _sharded(stages: Iterable[EarlyExitGPT], stored: Container[str] | None = None) -> dict[str, Any]:
    """What the stages store; or, given the names in a checkpoint (`stored`), the parameters as they are found there."""
    # Layers are stored one by one, not stacked, so that stages of unequal length can load them.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "non_homogeneous_layers": True}
    states = [stage.sharded_state_dict(metadata=metadata) for stage in stages]
    if stored is not None:
        states = [{n: t for n, t in state.items() if not n.endswith("._extra_state")} for state in states]
        for tensor in (tensor for state in states for tensor in state.values()):
            if tensor.key not in stored:
                tensor.key = name_before(tensor.key)
    return {str(number): state for number, state in enumerate(states)}


def empty_objects(dims: ModelDims) -> list[str]:
    """Objects without content that megatron-core's models ask a checkpoint for: one for every module that might hold
    scales of 8-bit numbers, of its own modules and of Transformer Engine's."""
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    if dims.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    names = [f"decoder.layers.{layer}.{module}" for layer in range(dims.num_layers) for module in modules]
    return [f"{name}._extra_state/shard_0_1" for name in [*names, "decoder.final_layernorm"]]


def _stages(model: EarlyExitGPT | RankModel) -> list[EarlyExitGPT]:
    return [model] if isinstance(model, EarlyExitGPT) else list(model)


def save_weights(model: EarlyExitGPT | RankModel, directory: Path) -> None:
    """Write the base tensors of all ranks (one stage each, or several virtual ones) into an empty directory that
    exists. Collective.

    The calling program needs a `__main__` guard: megatron-core starts helper processes that import it again.
    """
    stages = _stages(model)
    config = stages[0].config
    assert config.dims is not None
    layout = {"tensor": config.tensor_model_parallel_size, "pipeline": config.pipeline_model_parallel_size}
    common = common_state(config.dims, layout, config.params_dtype)
    content = common.pop("content_metadata")
    with cuda_optional():
        dist_checkpointing.save(common | _sharded(stages), str(directory), content_metadata=content)


@torch.no_grad()
def load_weights(model: EarlyExitGPT | RankModel, directory: Path) -> None:
    """Fill this rank's base parameters from `directory`, whatever layout wrote it. Collective.

    Rows of the vocabulary that only pad it to a multiple of the tensor-parallel degree become zero.
    Raises FileNotFoundError if there is no checkpoint.
    """
    if not (directory / "metadata.json").is_file():
        raise FileNotFoundError(f"{directory}: no metadata.json there; expected a torch_dist checkpoint")
    stages = _stages(model)
    for name, parameter in ((n, p) for stage in stages for n, p in stage.named_parameters()):
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            parameter.zero_()
    stored = TorchDistReader(directory).chunks
    with cuda_optional():
        loaded = dist_checkpointing.load(_sharded(stages, stored), str(directory))
    for number, stage in enumerate(stages):
        stage.load_state_dict(loaded[str(number)], strict=False)


def build_whole(dims: ModelDims, dtype: torch.dtype) -> EarlyExitGPT:
    """The base model on the CPU in one piece, its weights unset. Needs `single_process`."""
    return build_stage(megatron_config(dims, None, (dims.num_layers,), dtype=dtype))


def whole_entries(dims: ModelDims) -> list[Entry]:
    """The name map of a model that is one stage."""
    return list(entries(dims, 0, dims.num_layers, embedding=True, head=True))
