"""What the ranks compute in the tests of the parallel model."""

from __future__ import annotations

import layout_cases
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from ee_megatron.learner.batch import ReplayBatch
from ee_megatron.learner.learner import Learner
from ee_megatron.model.control import make_control
from ee_megatron.model.packed import PackedSequences
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.objectives.weights import Weights
from ee_megatron.parallel.schedule import run_schedule
from ee_megatron.policy import PolicySpec

_kept: dict[str, Learner] = {}


def make_learner(path, spec: PolicySpec, policy, degrees, stages, options) -> None:
    """Build this rank's learner and keep it for later calls."""
    _kept.pop("learner", None)
    _kept["learner"] = layout_cases.make_learner(path, spec, policy, degrees, stages, **options)


def score(batch: ReplayBatch, **options):
    return _kept["learner"].score(batch, **options)


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
    return first, learner.export_policy()


def log_probs(tokens, depths):
    """Log-probabilities of the whole vocabulary at every position [B, S, V] (None except on the last stage)."""
    learner, kept = _kept["learner"], {}

    def forward(model, batch):
        packed = PackedSequences.of([batch[0].size(1)] * len(batch[0]))
        return model(batch[0].view(1, -1), make_control(packed, batch[1].flatten()))

    def loss(batch, output):
        hidden = output.flatten(0, 1)
        every = torch.arange(learner.dims.vocab).expand(hidden.size(0), -1)
        kept["log_probs"] = learner.head.log_probs_at(hidden, every)[0].view(*batch[0].shape, -1)
        return hidden.sum() * 0

    run_schedule(learner.model, [(tokens, depths)], forward, loss, slots=tokens.numel(), train=False)
    return kept.get("log_probs")


def read_out(hidden, ids, slope):
    """Log-probabilities [N, k] at ids by the head alone, and the gradients of sum(slope * log p) for hidden states and
    head."""
    head = _kept["learner"].head
    leaf, weight = hidden.clone().requires_grad_(), head.weight
    kept, trained = weight.requires_grad, weight.requires_grad_()
    loss, _ = head(leaf, ids, lambda log_probs, at: (slope[at] * log_probs).sum())
    gradients = torch.autograd.grad(loss, (leaf, trained))
    weight.requires_grad_(kept)
    return head.log_probs_at(hidden, ids)[0], *gradients


def ask_gates(hidden):
    """Logits [M, N] of this rank's gates on streams [N, D]."""
    layers = [layer for stage in _kept["learner"].model for layer in stage.early_exit_layers()]
    with torch.no_grad():
        return torch.stack([layer.gate(hidden) for layer in layers if layer.gate is not None])


def state():
    """-> (policy, optimizer state)."""
    return _kept["learner"].export_policy(), _kept["learner"].export_optimizer()


def resume(optimizer):
    _kept["learner"].load_optimizer(optimizer)


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
