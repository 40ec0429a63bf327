"""Log-probabilities and losses over a vocabulary that is sharded across tensor-parallel ranks, in chunks.

Logits exist for a few positions at a time only. A loss is differentiated chunk by chunk while its logits are there: no
chunk is computed twice, and what stays is the gradient of the hidden states. Hidden states [N, D] come after the final
norm; the head's local rows are [V_local, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from ..objectives.divergences import Direction
from ..products import product
from .readout_chunk import chunk_positions

# (log-probabilities [n, k] of a chunk, where it lies in [N]) -> the chunk's share of the loss, a scalar.
ChunkLoss = Callable[[Tensor, slice], Tensor]


class Head(nn.Module):
    """The readout on the last pipeline stage.

    weight [V_local, D], the model's own parameter; `vocab` is the true vocabulary (rows beyond it are padding and get
    probability 0). `replicated_input`: the hidden states are the same on all tensor-parallel ranks and their gradient
    has to be summed here (plain tensor parallelism; under sequence parallelism the model's gather does it).
    `temperature` divides the logits: the distribution is the one that was sampled from. `chunk`: positions at a time, 0
    for as many as fit.
    """

    def __init__(
        self, weight: nn.Parameter, vocab: int, replicated_input: bool = True, chunk: int = 0, temperature: float = 1.0
    ):
        super().__init__()
        self.weight, self.vocab, self.temperature = weight, vocab, temperature
        self.chunk = chunk or chunk_positions(weight.size(0))
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.ranks = dist.get_world_size(self.group)
        self.start = dist.get_rank(self.group) * weight.size(0)
        self.replicated_input = replicated_input and self.ranks > 1

    @torch.no_grad()
    def log_probs_at(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """log p at ids int64 [N, k] -> fp32 [N, k], and the distribution's entropy, nats, fp32 [N]; no gradient."""
        log_probs = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty(ids.shape[:1], dtype=torch.float32, device=hidden.device)
        for at in self.chunks(hidden):
            log_probs[at], unnormalised, total = self._distribution(hidden[at], ids[at])
            # With p = e / sum(e): H = log sum(e) - sum(e log e) / sum(e).
            weighted = self.total(torch.xlogy(unnormalised, unnormalised).sum(-1, keepdim=True))
            entropy[at] = (total.log() - weighted / total).squeeze(-1)
        return log_probs, entropy

    def forward(self, hidden: Tensor, ids: Tensor, function: ChunkLoss) -> tuple[Tensor, Tensor]:
        """Sum of `function` over chunks of positions -> (loss, fp32 scalar; log p at ids, fp32 [N, k], detached).

        The loss has a gradient for the hidden states and, where it is trained, for the head. `function` must be a sum
        over positions; it is differentiated by autograd with respect to its log-probabilities.
        """
        log_probs = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)

        def chunk(part: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            log_probs[at], probabilities, total = self._distribution(part, ids[at])
            with torch.enable_grad():
                leaf = log_probs[at].detach().requires_grad_()
                share = function(leaf, at)
                (gradient,) = torch.autograd.grad(share, leaf)
            return share.detach(), self._backward(probabilities, total, ids[at], gradient)

        return _ChunkedLoss.apply(self.entering(hidden), self.weight, self, chunk), log_probs

    def entering(self, hidden: Tensor) -> Tensor:
        """hidden, such that its gradient is the sum over ranks where that is this module's task."""
        if self.replicated_input:
            return copy_to_tensor_model_parallel_region(hidden, group=self.group)
        return hidden

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[n, D] -> this rank's logits fp32 [n, V_local], -inf at padded rows, and their maximum over ranks [n, 1]."""
        logits = product(hidden, self.weight.t())
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        padding = self.start + logits.size(1) - self.vocab
        if padding > 0:
            logits[:, max(0, logits.size(1) - padding) :] = float("-inf")
        top = logits.amax(-1, keepdim=True)
        if self.ranks > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        return logits, top

    def total(self, *addends: Tensor) -> Tensor:
        """Addends [n, ...] -> their sums over the ranks, side by side."""
        sums = torch.cat(addends, dim=1)
        if self.ranks > 1:
            dist.all_reduce(sums, group=self.group)
        return sums

    def chunks(self, hidden: Tensor) -> list[slice]:
        """Positions that are read out together."""
        return [slice(i, i + self.chunk) for i in range(0, hidden.size(0), self.chunk)]

    def log_softmax(self, hidden: Tensor) -> Tensor:
        """log p over this rank's rows [n, V_local], fp32; -inf at padded rows."""
        logits, top = self.logits(hidden)
        total = (logits - top).exp_().sum(-1, keepdim=True)
        return logits.sub_(self.total(total).log() + top)

    def _distribution(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log p at ids [n, k], unnormalised probabilities [n, V_local], their sum over all ranks [n, 1]), fp32."""
        logits, top = self.logits(hidden)
        local, mine = self._local(ids, logits.size(1))
        chosen = torch.where(mine, logits.gather(1, local), 0.0)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        both = self.total(total, chosen)
        total, chosen = both[:, :1], both[:, 1:]
        return chosen - (total.log() + top), logits, total

    def _local(self, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Where ids [n, k] are among this rank's `rows`, and which of them it owns; the others' place means nothing."""
        local = ids - self.start
        return local.clamp(0, rows - 1), (local >= 0) & (local < rows)

    def _backward(self, probabilities: Tensor, total: Tensor, ids: Tensor, gradient: Tensor) -> Tensor:
        """Gradient [n, k] of the log-probabilities at ids -> gradient of this rank's logits, in place of the
        probabilities: d log p_i / d logit_j = [i = j] - p_j."""
        logits = probabilities.mul_(-gradient.sum(-1, keepdim=True) / total)
        local, mine = self._local(ids, logits.size(1))
        logits.scatter_add_(1, local, torch.where(mine, gradient, 0.0))
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)


class _ChunkedLoss(torch.autograd.Function):
    """A loss whose gradients are made in the forward pass, chunk by chunk, and scaled in the backward pass.

    `function`: hidden states [n, D] of a chunk and where it lies in [N] -> its share of the loss, and the slope of that
    by this rank's logits [n, V_local].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: Head,
        function: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    ) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for at in head.chunks(hidden):
            share, slope = function(hidden[at], at)
            loss += share
            d_logits = slope.to(weight.dtype)
            torch.mm(d_logits, weight, out=d_hidden[at])
            if d_weight is not None:
                d_weight += product(d_logits.t(), hidden[at])
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * gradient, None if d_weight is None else d_weight * gradient, None, None


def full_divergence(
    head: Head, hidden: Tensor, teacher_head: Head, teacher_hidden: Tensor, weight: Tensor, direction: Direction
) -> tuple[Tensor, Tensor]:
    """Sum of weight * divergence from a teacher over the whole vocabulary -> (loss, fp32 scalar; the divergences [N],
    nats, detached).

    hidden, teacher_hidden [N, D]; weight fp32 [N]. Gradients as in `Head.forward`.
    """
    divergence = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)

    def chunk(part: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        teacher = teacher_head.log_softmax(teacher_hidden[at])
        divergence[at], slope = direction.sharded(head.log_softmax(part), teacher, head.total)
        return (weight[at] * divergence[at]).sum(), slope.mul_(weight[at].unsqueeze(1) / head.temperature)

    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(head.entering(hidden), head.weight, head, chunk), divergence
    for at in head.chunks(hidden):
        chunk(hidden[at], at)
    return (weight * divergence).sum(), divergence


def lumped_kl(student: Tensor, teacher: Tensor, direction: Direction) -> Tensor:
    """Divergence between two distributions known at the teacher's k most probable tokens; the rest is one tail.

    student, teacher: log-probabilities fp32 [N, k] at the same tokens -> [N], nats. Lumping can only lower a divergence
    (data-processing inequality).
    """
    return direction.lumped(_with_tail(student), _with_tail(teacher))


def _with_tail(log_probs: Tensor) -> Tensor:
    # fp32 cannot tell a tail below about 1e-7 from rounding, so it is held at 1e-6.
    tail = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([log_probs, tail], dim=-1)
