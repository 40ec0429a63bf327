"""DeepSpeed around the policy's parameters: ZeRO, clipping and AdamW, in learning-rate groups, and AdamW's state."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..checkpoint.mapping import Piece
from ..checkpoint.policy_stream import Holder
from ..config.schema import DeepspeedConfig
from ..model.gpt import EarlyExitGPT
from ..model.layer import EarlyExitLayer
from ..parallel.cpu_shims import lean_imports
from ..parallel.groups import MegatronUnits

# Learning-rate groups: adapters or the whole base, and the gates.
GROUPS = ("body", "gates")
BETAS = 0.9, 0.95
"""Of AdamW."""
# What is used of DeepSpeed's optimizers, by ZeRO stage, beyond its documentation, and the versions that have
# it. Gradients between backward pass and step, and parts of flat parameters, have no public names before stage 3.
DEEPSPEED = ">=0.19,<0.20"
_FLAT = (
    "averaged_gradients", "params_in_partition", "get_grad_norm_direct", "use_grad_accum_attribute",
    "fill_grad_accum_attribute", "round_robin_bit16_groups", "round_robin_bit16_offsets",
    "single_partition_of_fp32_groups", "real_dp_process_group", "optimizer",
)  # fmt: skip
PRIVATE = {0: (), 1: _FLAT, 2: _FLAT, 3: ("_get_norm_groups", "fp32_partitioned_groups_flat", "optimizer")}


def check_private(optimizer: Any, stage: int) -> None:
    """Raises ValueError for an optimizer of a DeepSpeed that lacks some of `PRIVATE`."""
    if missing := [name for name in PRIVATE[stage] if not hasattr(optimizer, name)]:
        raise ValueError(
            f"the optimizer of this DeepSpeed ({metadata.version('deepspeed')}) has no {', '.join(missing)}, which "
            f"deepspeed.zero_stage={stage} uses; expected deepspeed{DEEPSPEED}: pip install 'deepspeed{DEEPSPEED}'"
        )


def split_groups(pieces: Iterable[Piece]) -> dict[str, list[nn.Parameter]]:
    """Policy parameters -> learning-rate groups. Every rank must have every group, or the norm's collectives would not
    match; a stage without gates (or a policy without adapters) gets one idle element."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    device = torch.device("cpu")
    for piece in pieces:
        parameter, device = piece.parameter, piece.parameter.device
        # DeepSpeed counts in the gradient norm: replicated parameters once, sharded ones on every rank, copies never.
        parameter.tensor_model_parallel = piece.entry.split  # type: ignore[attr-defined]
        parameter.ds_pipe_replicated = piece.copy  # type: ignore[attr-defined]
        groups["gates" if piece.entry.parameter.startswith("gates.") else "body"].append(parameter)
    for group in groups.values():
        if not group:
            group.append(nn.Parameter(torch.zeros(1, device=device)))
    return groups


class Updater:
    """Gradients that the Megatron schedule left on the parameters -> one AdamW update, the same on every rank.

    `whole`: the module that ZeRO-3 shards and hooks into (it holds all parameters); other stages don't look at it.
    """

    def __init__(self, pieces: list[Piece], settings: DeepspeedConfig, *, on_cpu: bool, whole: nn.Module):
        self.settings, self.pieces = settings, pieces
        self.groups = split_groups(pieces)
        deepspeed = import_deepspeed(on_cpu)
        optimizer = _adamw(self.groups, settings, on_cpu)
        # DeepSpeed owns these parameters alone. The Megatron model holds the same objects and runs outside the engine,
        # so the frozen base may be bfloat16 while adapters stay fp32, and ZeRO never sees the base.
        module: nn.Module = nn.ModuleDict({name: nn.ParameterList(group) for name, group in self.groups.items()})
        if settings.zero_stage == 3:
            # The idle parameters have to be part of what ZeRO-3 looks at.
            whole.register_module("idle", module)
            module = whole
            deepspeed.utils.set_z3_leaf_modules(whole, [EarlyExitLayer])
            for part in whole.modules():
                if isinstance(part, EarlyExitGPT):
                    part.ask_for_input_gradient()
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_config(settings, pieces),
            mpu=MegatronUnits,
            dist_init_required=False,
        )
        check_private(self.engine.optimizer, settings.zero_stage)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Round all backward passes of one update: gradients stay where they are until the block ends, then they are
        averaged over data-parallel ranks."""
        if self.settings.zero_stage:
            with self.engine.coalesce_grad_reduction():
                yield
                if self.settings.zero_stage < 3 and self.engine.optimizer.use_grad_accum_attribute:
                    # ZeRO-1 reduces bfloat16 parameters' gradients in fp32, from where its own backward pass, which
                    # does not run here, would have put them.
                    self.engine.optimizer.fill_grad_accum_attribute()
            return
        yield
        group = parallel_state.get_data_parallel_group()
        for parameters in self.groups.values():
            _reduce_together(parameters, group, mean=True)

    def norms(self) -> dict[str, float]:
        """Norm of each group's gradient before clipping, and "all"; not finite where some element is not."""
        stage, zero = self.settings.zero_stage, self.engine.optimizer
        if stage == 0:
            norms = [self._norm(parameters) for parameters in self.groups.values()]
        elif stage == 3:
            norms = [float(norm) for norm in zero._get_norm_groups()]
        else:
            norms = [
                float(zero.get_grad_norm_direct(zero.averaged_gradients[i], zero.params_in_partition[i]))
                for i in range(len(GROUPS))
            ]
        # DeepSpeed says -1 for a norm that is not finite.
        norms = [norm if norm >= 0 else math.nan for norm in norms]
        return dict(zip(GROUPS, norms, strict=True)) | {"all": math.sqrt(sum(norm**2 for norm in norms))}

    def step(self, rates: dict[str, float]) -> None:
        """One update with a learning rate per group."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        if self.settings.zero_stage == 0 and self.settings.gradient_clipping:
            self._clip()
        self.engine.step()

    def skip(self) -> None:
        """Forget the gradients; the next `accumulate` starts afresh."""
        for parameters in self.groups.values():
            for parameter in parameters:
                parameter.grad = None
                if hasattr(parameter, "grad_accum"):
                    parameter.grad_accum = None

    def _norm(self, parameters: list[nn.Parameter]) -> float:
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        for parameter in parameters:
            if not getattr(parameter, "ds_pipe_replicated", False) and (
                first or getattr(parameter, "tensor_model_parallel", False)
            ):
                total += parameter.grad.double().pow(2).sum()  # type: ignore[union-attr]
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        return float(total.sqrt())

    def _clip(self) -> None:
        factor = min(1.0, self.settings.gradient_clipping / (self.norms()["all"] + 1e-6))
        for parameters in self.groups.values():
            for parameter in parameters:
                parameter.grad.mul_(factor)  # type: ignore[union-attr]


def import_deepspeed(on_cpu: bool) -> Any:
    """The module, marked as on a CPU if it is."""
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with lean_imports():
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer

    if on_cpu:
        # gloo serves these ranks; compiling the shared-memory collectives would cost the first run over a minute.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


def _adamw(groups: dict[str, list[nn.Parameter]], settings: DeepspeedConfig, on_cpu: bool) -> torch.optim.Optimizer:
    """torch's AdamW, its fused form on a GPU; DeepSpeed's CPUAdam takes minutes to compile and is not needed."""
    return torch.optim.AdamW(
        [{"params": parameters, "lr": 0.0, "name": name} for name, parameters in groups.items()],
        betas=BETAS,
        eps=settings.eps,
        weight_decay=0.0,
        fused=not on_cpu,
    )


def _config(settings: DeepspeedConfig, pieces: list[Piece]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    if settings.zero_stage == 3:
        # Vectors (norms, biases) stay whole on every rank: gathering them would cost more than it saves.
        zero["stage3_param_persistence_threshold"] = max((p.parameter.size(-1) for p in pieces), default=1)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Stage 0 is clipped by `Updater`, whose norm knows which parameters are copies.
        "gradient_clipping": settings.gradient_clipping if settings.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _reduce_together(parameters: list[nn.Parameter], group: Any, mean: bool = False) -> None:
    """Sum (or mean) of the gradients, of one dtype, over the ranks of a group in one collective."""
    flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
    dist.all_reduce(flat, group=group)
    if mean:
        flat /= dist.get_world_size(group)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros where the pass left no gradient: on a rank whose share of the batch was padding only, or in a layer that no
    position of it reached. DeepSpeed reduces what has a gradient, and the ranks must agree on what that is."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def sum_replicated_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum over tensor-parallel ranks what each of them has only a part of: parameters that see a part of the sequence
    (`sequence_parallel`) or whose products the ranks share (`sum_over_tensor_ranks`). One collective for all."""
    group = parallel_state.get_tensor_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return
    partial = [
        p
        for p in parameters
        if p.requires_grad and (getattr(p, "sequence_parallel", False) or getattr(p, "sum_over_tensor_ranks", False))
    ]
    for dtype in sorted({p.dtype for p in partial}, key=str):
        _reduce_together([p for p in partial if p.dtype == dtype], group)


def sum_tied_gradients(pieces: Iterable[Piece]) -> None:
    """Sum over the first and the last stage: each holds the gradient of its own copy of tied embeddings."""
    group = parallel_state.get_embedding_group(check_initialized=False)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1 or group is None:
        return
    for piece in pieces:
        if getattr(piece.parameter, "shared_embedding", False):
            dist.all_reduce(piece.parameter.grad, group=group)


# ---- AdamW's state by tensor name, whatever ZeRO stage and layout hold it ----

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class OptimizerState:
    """updates: how many steps the moments have seen; tensors: kind -> name -> whole tensor, fp32 on the CPU. Kinds:
    `MOMENTS`, and "master", the fp32 values behind parameters of a narrower dtype."""

    updates: int
    tensors: Mapping[str, Mapping[str, Tensor]]


def kinds(updater: Updater) -> list[str]:
    """What there is to keep. ZeRO-0 has no masters."""
    narrow = any(piece.parameter.dtype != torch.float32 for piece in updater.pieces)
    return [*MOMENTS, *(["master"] if narrow and updater.settings.zero_stage else [])]


def holder_of(updater: Updater, kind: str) -> Holder:
    """This rank's part of a kind of state; of the values under ZeRO-3, where no rank holds a whole parameter, for kind
    "value"."""
    stage = updater.settings.zero_stage
    if stage == 0:
        return WholeState(updater.engine.optimizer, kind)
    return (ShardedState if stage == 3 else FlatState)(updater.engine.optimizer, kind)


class StateHolder(Holder):
    """One kind of AdamW's state, as an optimizer of DeepSpeed holds it."""

    def __init__(self, optimizer: Any, kind: str):
        self._optimizer, self._kind = optimizer, kind

    def dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return torch.float32


class WholeState(StateHolder):
    """ZeRO-0: every data-parallel rank has the state of whole parameters."""

    def read(self, parameter: nn.Parameter, begin: int, end: int) -> Tensor:
        state = self._optimizer.state[parameter].get(self._kind)
        return torch.zeros(end - begin) if state is None else state.reshape(-1)[begin:end].float()

    def write(self, parameter: nn.Parameter, begin: int, values: Tensor) -> None:
        target = state_of(self._optimizer.state, parameter)[self._kind]
        target.view(-1)[begin : begin + len(values)].copy_(values)


class FlatState(StateHolder):
    """ZeRO-1 and 2: a learning-rate group's parameters lie one behind the other, and each data-parallel rank has the
    state of an equal part of that."""

    replicated = False

    def __init__(self, optimizer: Any, kind: str):
        super().__init__(optimizer, kind)
        self._places: dict[int, tuple[int, int]] = {}
        for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
            for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
                self._places[id(parameter)] = group, offset

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """The group's part that is here, and which of its elements the parameter's first one would be."""
        group, offset = self._places[id(parameter)]
        flat = self._optimizer.single_partition_of_fp32_groups[group]
        return flat, offset - flat.numel() * dist.get_rank(self._optimizer.real_dp_process_group[group])

    def span(self, parameter: nn.Parameter) -> tuple[int, int]:
        flat, at = self._place(parameter)
        begin = max(0, -at)
        return begin, max(begin, min(parameter.numel(), flat.numel() - at))

    def read(self, parameter: nn.Parameter, begin: int, end: int) -> Tensor:
        flat, at = self._place(parameter)
        state = flat if self._kind == "master" else self._optimizer.optimizer.state[flat].get(self._kind)
        return torch.zeros(end - begin) if state is None else state.detach()[at + begin : at + end]

    def write(self, parameter: nn.Parameter, begin: int, values: Tensor) -> None:
        flat, at = self._place(parameter)
        master = self._kind == "master"
        target = flat.data if master else state_of(self._optimizer.optimizer.state, flat)[self._kind]
        target[at + begin : at + begin + len(values)].copy_(values)


class ShardedState(StateHolder):
    """ZeRO-3: each data-parallel rank has an equal part of every parameter's state; the last one's is padded. The kind
    "value" is the master as the parameter's dtype has it."""

    replicated = False

    def _part(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed import utils

        if self._kind in ("master", "value"):
            return utils.safe_get_local_fp32_param(parameter).detach()
        return utils.safe_get_local_optimizer_state(parameter, self._kind).detach()

    def _first(self, parameter: Any) -> tuple[int, int]:
        """The first element that is here, and how many are."""
        count = parameter.partition_numel()
        return count * dist.get_rank(parameter.ds_process_group), count

    def span(self, parameter: Any) -> tuple[int, int]:
        first, count = self._first(parameter)
        begin = min(first, parameter.ds_numel)
        return begin, min(first + count, parameter.ds_numel)

    def dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return parameter.dtype if self._kind == "value" else torch.float32

    def read(self, parameter: nn.Parameter, begin: int, end: int) -> Tensor:
        first, _ = self._first(parameter)
        return self._part(parameter)[begin - first : end - first].to(self.dtype(parameter))

    def write(self, parameter: nn.Parameter, begin: int, values: Tensor) -> None:
        from deepspeed import utils

        begin -= self._first(parameter)[0]
        whole = self._part(parameter)
        whole[begin : begin + len(values)].copy_(values)
        if self._kind in ("master", "value"):
            utils.safe_set_local_fp32_param(parameter, whole)
        else:
            utils.safe_set_local_optimizer_state(parameter, whole, self._kind)


def prepare(updater: Updater, updates: int) -> None:
    """AdamW's state, made where it isn't there, at `updates` steps."""
    stage, optimizer = updater.settings.zero_stage, updater.engine.optimizer
    if stage == 0:
        for piece in updater.pieces:
            state_of(optimizer.state, piece.parameter, updates)
        return
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        state_of(optimizer.optimizer.state, flat, updates)


def state_of(state: Any, parameter: Tensor, updates: int | None = None) -> dict[str, Tensor]:
    """AdamW's state of one tensor, made if it isn't there; at `updates` steps, if they are given."""
    entry = state[parameter]
    for kind in MOMENTS:
        if kind not in entry:
            entry[kind] = torch.zeros_like(parameter, dtype=torch.float32)
    if updates is not None:
        # torch's fused AdamW, which every optimizer on a GPU is, asks for it there.
        entry["step"] = torch.tensor(float(updates), device=parameter.device)
    return entry
