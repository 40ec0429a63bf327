"""What the ranks compute in the tests of layouts: everything that a layout must not change, in one call."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from whole_gather import gather

from ee_megatron.checkpoint.mapping import load_base, policy_pieces
from ee_megatron.checkpoint.policy_stream import Holder, load_tensors
from ee_megatron.config.derive import stage_sizes
from ee_megatron.config.schema import DeepspeedConfig, ParallelConfig
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner import learner as learner_module
from ee_megatron.learner.batch import ReplayBatch
from ee_megatron.learner.learner import Learner, Pass
from ee_megatron.learner.passes import run_schedule
from ee_megatron.model.config import megatron_config
from ee_megatron.model.gpt import EarlyExitGPT, build_stage
from ee_megatron.model.packed import PackedSequences, make_control
from ee_megatron.objectives.weights import Weights
from ee_megatron.parallel import groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec

_now: list[Degrees] = []


def split(degrees: Degrees) -> torch.device:
    """Cut the same ranks anew, if they aren't cut like that already. The old groups end with their threads; the ranks
    meet in a file, each time another: no port has to be free."""
    if _now[-1:] == [degrees]:
        return torch.device("cpu")
    groups.finish()
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['MEETING']}-{len(_now)}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=120),
    )  # fmt: skip
    _now.append(degrees)
    return groups.initialise(degrees, timeout_s=120)


def make_learner(
    path, spec, policy, degrees, stages=None, *, deepspeed=None, dtype=torch.float32, kl_direction="student_teacher",
    adapter_dropout=0.0, temperature=1.0, **parallel,
) -> Learner:  # fmt: skip
    """This rank's learner, after `split`; `parallel`: further settings of that section."""
    section = ParallelConfig(*degrees, **parallel)
    # Layers per stage, where they are others than an even split's.
    learner_module.stage_sizes = (lambda *_: tuple(stages)) if stages else stage_sizes
    return Learner(
        HFDirectory(path), spec, policy, section, deepspeed or DeepspeedConfig(), device=split(Degrees(*degrees)),
        dtype=dtype, adapter_dropout=adapter_dropout, kl_direction=kl_direction, temperature=temperature,
    )  # fmt: skip


def logits(model: EarlyExitGPT, tokens, depths):
    """Local logits [B, S, V_local] of the last stage, None on others. `depths` None: megatron-core's own layers, one
    sequence at a time."""
    kept = {}

    def forward(stage, rows):
        at, exits = rows
        if depths is None:
            return stage(at, None)
        packed = PackedSequences.of([at.size(1)] * len(at))
        return stage(at.view(1, -1), make_control(packed, exits.flatten()))

    def loss(rows, output):
        found = (output @ model.readout_weight().t()).transpose(0, 1)
        kept.setdefault("logits", []).append(found.reshape(*rows[0].shape, -1))
        return output.sum() * 0

    exits = torch.zeros(tokens.shape) if depths is None else depths
    # Two micro-batches, so that a schedule has something to interleave.
    half = tokens.size(0) // 2
    batches = [(tokens[:half], exits[:half]), (tokens[half:], exits[half:])]
    if depths is None:
        # Without a control the schedule's slots are those of one sequence.
        batches = [(tokens[i : i + 1], exits[i : i + 1]) for i in range(len(tokens))]
    run_schedule(model, batches, forward, loss, slots=batches[0][0].numel(), train=False)
    return torch.cat(kept["logits"]) if kept else None


def plain_model(path, spec: PolicySpec | None, policy, learner: Learner, stages, options) -> EarlyExitGPT:
    """The same layout without gates, and without adapters where the spec has none; no learner around it."""
    config = megatron_config(
        learner.dims, spec, stages, tensor=learner.parallel.tensor,
        sequence_parallel=options.get("sequence_parallel", False), recompute=options.get("recompute", False),
    )  # fmt: skip
    model = build_stage(config)
    load_base(model, HFDirectory(path))
    if spec is not None:
        load_tensors(policy_pieces(model), Holder(), spec.tensor_shapes(learner.dims), policy, "policy")
    return model.eval()


def everything(
    path, spec: PolicySpec, policy, degrees, stages, options, tokens, patterns, batch: ReplayBatch, weights: Weights
):
    """-> per rank: logits of the base and of every pattern, gradients, and two comparisons to the bit."""
    learner = make_learner(path, spec, policy, degrees, stages, tokens_per_micro_batch=2 * tokens.size(1), **options)
    learner.model.eval()
    found = {
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "patterns": [logits(learner.model, tokens, depths) for depths in patterns],
        "gradients": gradients(learner, batch, weights),
    }
    if not spec.full:
        full = torch.full(tokens.shape, spec.num_layers)
        bare = PolicySpec(spec.num_layers, (), rank=spec.rank, alpha=spec.alpha)
        without_gates = plain_model(path, bare, policy, learner, stages, options)
        base = plain_model(path, None, None, learner, stages, options)
        found["never"] = (logits(learner.model, tokens, full), logits(without_gates, tokens, full))
        with learner.model.adapters_off():
            found["base"] = (logits(learner.model, tokens, full), logits(base, tokens, full))
        # megatron-core's own layers.
        found["plain"] = logits(base, tokens, None)
    return found


def gradients_alone(path, spec: PolicySpec, policy, degrees, stages, options, batch: ReplayBatch, weights: Weights):
    """`gradients` of a learner made for them, with several micro-batches."""
    learner = make_learner(path, spec, policy, degrees, stages, tokens_per_micro_batch=36, **options)
    return gradients(learner, batch, weights)


def gradients(learner: Learner, batch: ReplayBatch, weights: Weights):
    """Of the likelihood loss, whole tensors by name, as they are when the optimizer sees them."""
    with learner.updater.accumulate():
        learner._run(batch, Pass("train", weights))
        learner.complete_gradients()
        group = parallel_state.get_data_parallel_group()
        for piece in learner.pieces:
            dist.all_reduce(piece.parameter.grad, group=group)
            piece.parameter.grad /= dist.get_world_size(group)
        found = gather(learner.pieces, lambda parameter: parameter.grad)
    return found
