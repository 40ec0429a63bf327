"""What the ranks compute in the tests of the parallel model."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ee_megatron.checkpoint.policy_shards import load_policy_tensors
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.batch import ReplayBatch
from ee_megatron.learner.learner import Learner
from ee_megatron.parallel import groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.parallel.schedule import run_schedule
from ee_megatron.parallel.vocabulary import Head
from ee_megatron.policy import PolicySpec

_kept: dict[str, Learner] = {}


def make_learner(path, spec: PolicySpec, policy, degrees, stages, options) -> None:
    """Build this rank's learner and keep it for later calls."""
    device = groups.initialise(Degrees(*degrees), timeout_s=120)
    _kept["learner"] = Learner(HFDirectory(path), spec, policy, Degrees(*degrees), stages, device=device, **options)


def score(batch: ReplayBatch, reference: bool = False):
    return _kept["learner"].score(batch, reference=reference)


def step(batch: ReplayBatch, times: int = 1, objective: str = "likelihood"):
    """`times` updates on one batch -> (scores and gradient norm of the first, policy after the last)."""
    learner, first = _kept["learner"], None
    for _ in range(times):
        seen = learner.step(batch, adapter_lr=1e-3, gate_lr=3e-3, objective=objective)
        first = first or seen
    return first[0], first[1], learner.export_policy()


def log_probs(tokens, depths):
    """Log-probabilities of the whole vocabulary at every position [B, S, V] (None except on the last stage)."""
    learner, kept = _kept["learner"], {}

    def forward(model, batch):
        return model(batch.tokens, batch.control())

    def loss(batch, output):
        hidden = output.transpose(0, 1).flatten(0, 1)
        head = Head(learner.model.last.readout_weight(), learner.dims.vocab, not learner.config.sequence_parallel)
        every = torch.arange(learner.dims.vocab).expand(hidden.size(0), -1)
        kept["log_probs"] = head.log_probs_at(hidden, every).view(*batch.tokens.shape, -1)
        return hidden.sum() * 0

    batch = blank(tokens, depths)
    run_schedule(learner.model, [batch], forward, loss, sequence=tokens.size(1), rows=tokens.size(0), train=False)
    return kept.get("log_probs")


def blank(tokens, depths) -> ReplayBatch:
    zero, no = torch.zeros(tokens.shape), torch.zeros(tokens.shape, dtype=torch.bool)
    return ReplayBatch(tokens, depths, no, no, zero, zero)


def save_then_resume(directory, batch: ReplayBatch, more: int):
    """Save, update `more` times; then load what was saved into the same learner and update as often again.

    Returns both final policies."""
    learner = _kept["learner"]
    saved = learner.export_policy()
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    learner.save(directory)
    straight = step(batch, more)[2]
    load_policy_tensors(learner.pieces, saved)
    learner.load(directory)
    again = step(batch, more)[2]
    moved = max(float((straight[name] - saved[name]).abs().max()) for name in saved)
    return {"straight": straight, "again": again, "moved": moved}
