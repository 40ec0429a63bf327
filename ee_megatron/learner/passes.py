"""One pass of a batch through the pipeline schedule: what each stage computes, the loss, what is seen on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..exits import gate_log_term
from ..model.gpt import EarlyExitGPT, RankModel
from ..model.layer import ENTROPY, WEIGHT, gate_entropy
from ..parallel.distillation import full_divergence
from ..parallel.vocabulary import Head, lumped_kl
from .batch import ReplayBatch


@dataclass
class Teacher:
    """The reference's head (last stage only) and its hidden states at counted positions [N, D], per micro-batch."""

    head: Head | None
    hidden: list[Tensor]


class Pass:
    """The two callables of one schedule run and what they leave behind, per micro-batch in order."""

    def __init__(
        self,
        model: RankModel,
        head: Head | None,
        kl_direction: str,
        *,
        exits: bool,
        objective: str,
        scale: float,
        train: bool,
        teacher: Teacher | None,
        keep_hidden: list[Tensor] | None,
        hazards_of: tuple[int, ...] = (),
    ):
        self.head, self.exits, self.objective, self.train = head, exits, objective, train
        self.num_layers, self.kl_direction = model.last.config.num_layers, kl_direction
        self.teacher, self.keep_hidden = teacher, keep_hidden
        # Gradients are averaged over data-parallel ranks; the weights are normalised over all of them already.
        self.scale = scale
        self.token_logprobs: list[Tensor] = []
        self.token_entropy: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.exit_logprobs: list[list[Tensor]] = [[] for _ in model]
        self.exit_entropy: list[list[Tensor]] = [[] for _ in model]
        # Gates at these depths leave their hazards, 0 where they were not asked.
        self.hazards_of = hazards_of
        self.hazards: list[list[Tensor]] = [[] for _ in model]

    def forward(self, stage: EarlyExitGPT, batch: ReplayBatch) -> Tensor:
        control = (batch if self.exits else batch.at_full_depth(self.num_layers)).control()
        control[..., WEIGHT : ENTROPY + 1] *= self.scale
        output = stage(batch.tokens, control)
        logprobs = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        entropy = torch.zeros_like(logprobs)
        hazards = logprobs.new_zeros(len(self.hazards_of), *logprobs.shape)
        for depth, logit in stage.take_gates().items() if self.exits else ():
            logit = logit.transpose(0, 1)
            if self.hazards_of:
                hazards[self.hazards_of.index(depth)] = torch.sigmoid(logit) * (batch.asked & (batch.depths >= depth))
            logprobs += gate_log_term(logit, batch.depths, depth)
            entropy += torch.where(batch.depths >= depth, gate_entropy(logit), 0.0)
        chunk = stage.vp_stage or 0
        self.exit_logprobs[chunk].append(torch.where(batch.asked, logprobs, 0.0))
        self.exit_entropy[chunk].append(torch.where(batch.asked, entropy, 0.0))
        self.hazards[chunk].append(hazards)
        return output

    def loss(self, batch: ReplayBatch, output: Tensor) -> Tensor:
        # The last stage returns [S, B, D]; only positions that predict a generated token are read out.
        hidden = output.transpose(0, 1)[batch.counts]
        if self.keep_hidden is not None:
            self.keep_hidden.append(hidden)
        weight = batch.token_weight[batch.counts] * self.scale
        if self.objective == "distill_full":
            loss, found, entropy, kl = self._against_the_reference(batch, hidden, weight)
        else:
            loss, found, entropy, kl = self._by_log_probs(batch, hidden, weight)
            if self.teacher is not None and batch.kl_weight is not None:
                weight = batch.kl_weight[batch.counts] * self.scale
                extra, _, _, kl = self._against_the_reference(batch, hidden, weight)
                loss = loss + extra
        for store, value in ((self.token_logprobs, found), (self.token_entropy, entropy), (self.kl, kl)):
            whole = torch.zeros(batch.tokens.shape, device=output.device)
            whole[batch.counts] = value
            store.append(whole)
        return loss

    def _by_log_probs(self, batch: ReplayBatch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Loss, log p(token), entropy and divergence [N] from log-probabilities at single tokens."""
        assert self.head is not None
        ids = batch.labels()[batch.counts].unsqueeze(-1)
        entropy, kl = torch.zeros_like(weight), torch.zeros_like(weight)
        if self.objective == "distill":
            assert batch.teacher_ids is not None and batch.teacher_logprobs is not None
            teacher = batch.teacher_logprobs[batch.counts]
            ids = torch.cat([batch.teacher_ids[batch.counts], ids], dim=-1)

        def share(log_probs: Tensor, at: slice) -> Tensor:
            if self.objective == "likelihood":
                return -(weight[at] * log_probs[:, -1]).sum()
            divergence = lumped_kl(log_probs[:, :-1], teacher[at], self.kl_direction)
            kl[at] = divergence.detach()
            return (weight[at] * divergence).sum()

        if self.train:
            loss, found = self.head(hidden, ids, share)
        else:
            found, entropy = self.head.log_probs_at(hidden, ids)
            loss = share(found, slice(None))
        return loss, found[:, -1], entropy, kl

    def _against_the_reference(self, batch: ReplayBatch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """The same with the whole vocabulary compared; log p and entropy only where nothing is trained."""
        assert self.head is not None and self.teacher is not None and self.teacher.head is not None
        teacher_hidden = self.teacher.hidden[len(self.token_logprobs)]
        loss, kl = full_divergence(self.head, hidden, self.teacher.head, teacher_hidden, weight, self.kl_direction)
        found = entropy = torch.zeros_like(weight)
        if not self.train:
            at_tokens, entropy = self.head.log_probs_at(hidden, batch.labels()[batch.counts].unsqueeze(-1))
            found = at_tokens[:, 0]
        return loss, found, entropy, kl

    def stacked(self) -> Tensor:
        """This rank's share of every score [5 + M, micro-batches * rows, S], in the order of `Scores`."""
        logprobs, entropy = (
            torch.stack([torch.cat(parts) for parts in chunks]).sum(0)
            for chunks in (self.exit_logprobs, self.exit_entropy)
        )
        last = bool(self.token_logprobs)
        tokens, kl, token_entropy = (
            torch.cat(parts) if last else torch.zeros_like(logprobs)
            for parts in (self.token_logprobs, self.kl, self.token_entropy)
        )
        hazards = torch.stack([torch.cat(parts, dim=1) for parts in self.hazards]).sum(0)
        return torch.cat([torch.stack([tokens, logprobs, kl, token_entropy, entropy]), hazards])
