"""Whether two checkpoints are the same model: tensor by tensor, and by their logits under random exit patterns."""

from __future__ import annotations

import itertools
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

from ..exits import ExitLayout
from ..families import ModelDims
from ..model.config import megatron_config
from ..model.gpt import EarlyExitGPT, build_stage
from ..model.packed import PackedSequences, make_control
from .describe import Checkpoint
from .export_files.configuration_early_exit import EarlyExitConfig
from .export_files.modeling_early_exit import EarlyExitForCausalLM
from .mapping import whole_entries

TOLERANCE = 1e-4
SEQUENCES, LENGTH = 3, 24


def compare_tensors(a: Checkpoint, b: Checkpoint) -> tuple[list[str], list[str]]:
    """(differences, remarks) of two models' effective weights and gates, block by block.

    Models in two dtypes are the same if the wider, rounded to the narrower, is the narrower.
    """
    if a.base.dims != b.base.dims:
        return [f"dimensions: {a.base.dims} in {a.path}, {b.base.dims} in {b.path}"], []
    wrong: list[str] = []
    rounded = 0
    for name in a.base:
        dtype = min(a.base.dtype(name), b.base.dtype(name), key=lambda kind: kind.itemsize)
        rounded += a.base.dtype(name) != b.base.dtype(name)
        pairs = zip(a.effective(name), b.effective(name), strict=True)
        worst = max(_worst(left.to(dtype), right.to(dtype)) for left, right in pairs)
        if worst:
            wrong.append(f"{name}: differs by up to {worst:.3g}")
    remarks = [f"{rounded} tensors are stored in two dtypes; equal means after rounding"] if rounded else []
    if not a.spec.exit_depths or not b.spec.exit_depths:
        only = [f"gates only in {one.path}" for one in (a, b) if one.spec.exit_depths]
        return wrong, remarks + only
    if a.spec.layout != b.spec.layout or a.spec.gate_input != b.spec.gate_input:
        exits = f"exits: {a.spec.layout} {a.spec.gate_input}, {b.spec.layout} {b.spec.gate_input}"
        return [*wrong, exits], remarks
    left, right = a.gates(), b.gates()
    return wrong + [f"{name}: differs" for name in left if not torch.equal(left[name], right[name])], remarks


def _worst(left: Tensor, right: Tensor) -> float:
    return 0.0 if torch.equal(left, right) else float((left.double() - right.double()).abs().max()) or float("inf")


def compare_logits(a: Checkpoint, b: Checkpoint, seed: int = 0) -> tuple[float, float]:
    """Largest relative differences of the logits in float32, without exits and under random exit patterns.

    Each side runs in its own body: Hugging Face's class, the exported class, or megatron-core.
    """
    dims = a.base.dims
    depths = a.spec.exit_depths or b.spec.exit_depths or ExitLayout.default(dims.num_layers).depths or (1,)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, dims.vocab, (SEQUENCES, LENGTH), generator=generator)
    outcomes = torch.tensor([*depths, dims.num_layers])
    pattern = outcomes[torch.randint(0, len(outcomes), ids.shape, generator=generator)]
    found = []
    for exits in (torch.full_like(ids, dims.num_layers), pattern):
        left, right = logits_of(a, ids, exits), logits_of(b, ids, exits)
        found.append(float((left - right).abs().max() / left.abs().max()))
    return found[0], found[1]


def verify(a: Checkpoint, b: Checkpoint, logits: bool = True) -> tuple[bool, list[str]]:
    """(the same model?, what was found, a line each)."""
    wrong, remarks = compare_tensors(a, b)
    if wrong:
        more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
        return False, [*itertools.islice(wrong, 5), *more, *remarks]
    lines = [f"{len(a.base)} tensors are equal", *remarks]
    if not logits:
        return True, lines
    plain, exits = compare_logits(a, b)
    lines.append(
        f"logits differ by {plain:.1e} (full depth) and {exits:.1e} (random exits), relative; bound {TOLERANCE}"
    )
    return max(plain, exits) <= TOLERANCE, lines


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
