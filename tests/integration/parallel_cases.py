"""What the ranks compute in the tests of the parallel model."""

from __future__ import annotations

import torch

from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.batch import ReplayBatch
from ee_megatron.learner.learner import Learner
from ee_megatron.parallel import groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.parallel.vocabulary import Head
from ee_megatron.policy import PolicySpec


def make_learner(path, spec: PolicySpec, policy, degrees, stages, **options) -> Learner:
    device = groups.initialise(Degrees(*degrees), timeout_s=120)
    return Learner(HFDirectory(path), spec, policy, Degrees(*degrees), stages, device=device, **options)


def score_and_step(path, spec, policy, degrees, stages, batch: ReplayBatch, options, steps=1, objective="likelihood"):
    """Scores before, scores of the reference pass, then `steps` updates; the whole policy and the gradient norm after."""
    learner = make_learner(path, spec, policy, degrees, stages, **options)
    before, reference = learner.score(batch), learner.score(batch, reference=True)
    norm = 0.0
    for _ in range(steps):
        seen, norm = learner.step(batch, adapter_lr=1e-3, gate_lr=3e-3, objective=objective)
    after = learner.export_policy()
    groups.finish()
    return {"before": before, "reference": reference, "seen": seen, "policy": after, "norm": norm}


def logits(path, spec, policy, degrees, stages, tokens, depths, options):
    """Full logits [B, S, V] under prescribed depths, put together from the vocabulary shards, in double-checked form:
    log-probabilities of every token of the vocabulary at every position."""
    learner = make_learner(path, spec, policy, degrees, stages, micro_batch_size=tokens.size(0), **options)
    kept = {}

    def forward(model, batch):
        return model(batch.tokens, batch.control())

    def loss(batch, output):
        hidden = output.transpose(0, 1).flatten(0, 1)
        head = Head(learner.model.readout_weight(), learner.dims.vocab, not learner.config.sequence_parallel)
        every = torch.arange(learner.dims.vocab).expand(hidden.size(0), -1)
        kept["log_probs"] = head.log_probs_at(hidden, every).view(*batch.tokens.shape, -1)
        return hidden.sum() * 0

    from ee_megatron.parallel.schedule import run_schedule

    zero = torch.zeros(tokens.shape)
    no = torch.zeros(tokens.shape, dtype=torch.bool)
    batch = ReplayBatch(tokens, depths, no, no, zero, zero)
    run_schedule(learner.model, [batch], forward, loss, sequence=tokens.size(1), rows=tokens.size(0), train=False)
    groups.finish()
    return kept.get("log_probs")
