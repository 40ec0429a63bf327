"""What the ranks compute in the tests of the parallel model."""

from __future__ import annotations

import weakref
from pathlib import Path
from unittest import mock

import layout_cases
import torch
import torch.distributed as dist
import whole_gather
from megatron.core.pipeline_parallel import schedules
from torch.utils.flop_counter import FlopCounterMode

from ee_megatron.checkpoint import policy_stream
from ee_megatron.learner import engine, passes
from ee_megatron.learner.batch import ReplayBatch
from ee_megatron.learner.learner import Learner
from ee_megatron.learner.passes import run_schedule
from ee_megatron.model.gpt import EarlyExitGPT
from ee_megatron.model.packed import PackedSequences, make_control
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.objectives.weights import Weights
from ee_megatron.policy import PolicySpec, open_policy
from ee_megatron.tensors import ChangedStream
from ee_megatron.training.checkpoints import TrainingStreams, read_training, write_training
from tests.pipeline import Work

# Tensors are cut within rows' groups, and parts of a flat partition within rows.
policy_stream.BUCKET_BYTES = 40_000
_kept: dict[str, Learner] = {}


def make_learner(path, spec: PolicySpec, policy, degrees, options, stages=None) -> None:
    """Build this rank's learner and keep it for later calls. `policy`: tensors, or the checkpoint that holds them."""
    if isinstance(policy, Path):
        policy = open_policy(policy, check=False)[1]
    _kept.pop("learner", None)
    _kept["learner"] = layout_cases.make_learner(path, spec, policy, degrees, stages, **options)


def score(batch: ReplayBatch, **options):
    return _kept["learner"].score(batch, **options)


def hazards(batch: ReplayBatch):
    return _kept["learner"].hazards(batch)


def cost_of_scoring(batch: ReplayBatch) -> int:
    """FLOPs of this rank."""
    with FlopCounterMode(display=False) as counter:
        score(batch)
    return counter.get_total_flops()


def step(batch: ReplayBatch, weights: Weights, times: int = 1, teacher: Teacher | None = None, rates=None):
    """`times` updates on one batch -> (the first update, policy after the last)."""
    learner, first, rates = _kept["learner"], None, rates or {"body": 1e-3, "gates": 3e-3}
    for _ in range(times):
        update = learner.step(batch, weights, teacher, adapter_lr=rates["body"], gate_lr=rates["gates"])
        first = first or update
    return first, policy()


def schedule(batch: ReplayBatch, weights: Weights) -> list[Work]:
    """What this rank does in an update with the exact divergence, in its order: a model's pass over a micro-batch costs
    1 forward and 2 backward."""
    done, calls, models = list[Work](), [0], [0]
    run, forward, backward, model = (
        passes.get_forward_backward_func, schedules.forward_step, schedules.backward_step, EarlyExitGPT.forward
    )  # fmt: skip

    def run_counted():
        calls[0] += 1
        return run()

    def model_counted(*args, **kwargs):
        models[0] += 1
        return model(*args, **kwargs)

    def forward_counted(*args, **kwargs):
        models[0] = 0
        output = forward(*args, **kwargs)
        done.append(Work(calls[0], "forward", models[0]))
        return output

    def backward_counted(*args, **kwargs):
        done.append(Work(calls[0], "backward", 2))
        return backward(*args, **kwargs)

    with (
        mock.patch.object(passes, "get_forward_backward_func", run_counted),
        mock.patch.object(schedules, "forward_step", forward_counted),
        mock.patch.object(schedules, "backward_step", backward_counted),
        mock.patch.object(EarlyExitGPT, "forward", model_counted),
    ):
        step(batch, weights, teacher=Teacher.REFERENCE)
    return done


def log_probs(tokens, depths):
    """Log-probabilities of the whole vocabulary at every position [B, S, V] (None except on the last stage)."""
    learner, kept = _kept["learner"], {}

    def forward(model, batch):
        packed = PackedSequences.of([batch[0].size(1)] * len(batch[0]))
        return model(batch[0].view(1, -1), make_control(packed, batch[1].flatten()))

    def loss(batch, output):
        hidden = output.flatten(0, 1)
        every = torch.arange(learner.dims.vocab).expand(hidden.size(0), -1)
        kept["log_probs"] = learner.head.score(hidden, every)[0].view(*batch[0].shape, -1)
        return hidden.sum() * 0

    run_schedule(learner.model, [(tokens, depths)], forward, loss, slots=tokens.numel(), train=False)
    return kept.get("log_probs")


def read_out(hidden, ids, slope):
    """Log-probabilities [N, k] at ids by the head alone, and the gradients of sum(slope * log p) for hidden states and
    head."""
    head = _kept["learner"].head
    leaf, weight = hidden.clone().requires_grad_(), head.weight
    kept, trained = weight.requires_grad, weight.requires_grad_()
    loss, *_ = head(leaf, ids, lambda log_probs, at: (slope[at] * log_probs).sum())
    gradients = torch.autograd.grad(loss, (leaf, trained))
    weight.requires_grad_(kept)
    return head.score(hidden, ids)[0], *gradients


def ask_gates(hidden):
    """Logits [M, N] of this rank's gates on streams [N, D]."""
    layers = _kept["learner"].model.early_exit_layers()
    with torch.no_grad():
        return torch.stack([layer.gate(hidden) for layer in layers if layer.gate is not None])


def policy():
    """Whole tensors, on every rank; what the leader is sent is the same to the bit, and others get nothing."""
    learner = _kept["learner"]
    expected = whole_gather.policy_of(learner)
    assert_sent(learner.export_policy(), expected)
    return expected


def state():
    """-> (policy, optimizer state), on every rank, likewise."""
    learner = _kept["learner"]
    expected, sent = whole_gather.state_of(learner), learner.export_optimizer()
    assert sent.tensors.keys() == expected.tensors.keys()
    for kind, tensors in expected.tensors.items():
        assert_sent(sent.tensors[kind], tensors)
    return policy(), expected


def assert_sent(found, expected) -> None:
    if dist.get_rank():
        assert not found
        return
    assert list(found) == sorted(expected)
    for name, tensor in expected.items():
        same = found[name].shape == tensor.shape and found[name].view(torch.int32).equal(tensor.view(torch.int32))
        assert same, f"{name}: what arrived is not what the ranks hold"


def checkpoint(folder):
    """Write one -> (bytes of a bucket, bytes sent, of the largest message, of blocks alive at once)."""
    learner, sent, refs, alive = _kept["learner"], [], [], []

    def send(buffer, **options):
        sent.append(buffer.nbytes)
        return plain(buffer, **options)

    def watch(block):
        refs.append(weakref.ref(block.data))
        blocks = [ref() for ref in refs]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in blocks if t is not None}
        alive.append(sum(storages.values()))
        return block.data

    plain, streams = dist.send, {"": learner.stream_policy(), **learner.stream_optimizer()}
    watched = {kind: ChangedStream(stream, watch) for kind, stream in streams.items()}
    whole = TrainingStreams(learner.updates, watched.pop(""), watched)
    with mock.patch.object(dist, "send", send):
        if dist.get_rank():
            whole.drain()
        else:
            write_training(folder, learner.spec, whole, {})
    return policy_stream.BUCKET_BYTES, sum(sent), max(sent, default=0), max(alive, default=0)


def resume(optimizer):
    """`optimizer`: a state, or the checkpoint that holds one."""
    if isinstance(optimizer, Path):
        optimizer = read_training(optimizer, check=False)[0]
    _kept["learner"].load_optimizer(optimizer)


def lacking() -> dict[str, str]:
    """What is said of the optimizer without each of the private names that are used of it."""
    updater, said = _kept["learner"].updater, {}
    optimizer, stage = updater.engine.optimizer, updater.settings.zero_stage
    for name in engine.PRIVATE[stage]:
        owner = optimizer if name in vars(optimizer) else type(optimizer)
        # A property's object, not its value.
        value = vars(owner)[name]
        delattr(owner, name)
        try:
            engine.check_private(optimizer, stage)
        except ValueError as error:
            said[name] = str(error)
        setattr(owner, name, value)
    return said


def drift(rank: int | None = None, name: str = "") -> str:
    """What `check_copies` says after the last bit of one element of a tensor has changed on a rank."""
    learner = _kept["learner"]
    for piece in learner.pieces:
        if name in piece.entry.names and dist.get_rank() == rank:
            piece.parameter.data.view(torch.int32).flatten()[-1] ^= 1
    try:
        learner.check_copies()
    except RuntimeError as error:
        return str(error)
    return ""
