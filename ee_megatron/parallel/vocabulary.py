"""Log-probabilities and losses over a vocabulary that is sharded across tensor-parallel ranks, in chunks.

Logits exist for a few positions at a time only. A loss is differentiated chunk by chunk while its logits are there: no
chunk is computed twice, and what stays is the gradient of the hidden states. Hidden states [N, D] come after the final
norm; the head's local rows are [V_local, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from ..mixed_matmul import chunk_positions, product, products_with
from ..objectives.divergences import Direction, Sloped

# (log-probabilities [n, k] of a chunk, where it lies in [N]) -> the chunk's share of the loss, a scalar.
ChunkLoss = Callable[[Tensor, slice], Tensor]
# Hidden states [n, D] -> this rank's logits fp32 [n, V_local].
Products = Callable[[Tensor], Tensor]
# Below any difference of logits that leaves a probability, and finite: times 0 it is 0.
NOTHING = -1e4


@dataclass(frozen=True)
class Against:
    """A divergence over the whole vocabulary from a teacher's distribution, given its head and hidden states [N, D];
    `weight` fp32 [N]: each position's in the loss."""

    head: Head
    hidden: Tensor
    weight: Tensor
    direction: Direction


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
        on_cpu, trained = weight.device.type == "cpu", weight.requires_grad
        self.chunk = chunk or chunk_positions(weight.size(0), on_cpu=on_cpu, trained=trained)
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.ranks = dist.get_world_size(self.group)
        self.start = dist.get_rank(self.group) * weight.size(0)
        self.replicated_input = replicated_input and self.ranks > 1

    @torch.no_grad()
    def score(self, hidden: Tensor, ids: Tensor, against: Against | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities at ids int64 [N, k], fp32 [N, k], the distribution's entropy, nats, fp32 [N], and its
        divergence from a teacher's, nats, fp32 [N], zeros without one; no gradient."""
        log_probs = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        entropy, divergence = log_probs.new_zeros(2, len(ids))
        readings = _Readings.of(self, against)
        for at in self.chunks(hidden):
            shifted, top = self.logits(readings.own, hidden[at])
            shifted.sub_(top).clamp_(min=NOTHING)
            chosen, weights = self._at(shifted, ids[at]), shifted.exp()
            total = weights.sum(-1, keepdim=True)
            # With p = e / sum(e): H = log sum(e) - sum(e log e) / sum(e).
            weighted = torch.einsum("nv,nv->n", weights, shifted).unsqueeze(-1)
            sums = self.total(total, weighted, chosen)
            total, weighted, chosen = sums[:, :1], sums[:, 1:2], sums[:, 2:]
            log_probs[at] = chosen - total.log()
            entropy[at] = (total.log() - weighted / total).squeeze(-1)
            if against is not None:
                divergence[at], _ = readings.divergence(self._padded(shifted.sub_(total.log())), at)
        return log_probs, entropy, divergence

    def forward(
        self, hidden: Tensor, ids: Tensor, function: ChunkLoss | None, against: Against | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of `function` over chunks of positions, and of the weighted divergence from a teacher, if there is one
        -> (loss, fp32 scalar; log p at ids, fp32 [N, k], and the divergence, nats, fp32 [N], zeros without a teacher:
        both detached).

        The loss has a gradient for the hidden states and, where it is trained, for the head. `function` must be a sum
        over positions; it is differentiated by autograd with respect to its log-probabilities. None: `score`, behind
        the hooks of a module's call, by which ZeRO-3 gathers the weight.
        """
        if function is None:
            return self.score(hidden, ids, against)
        log_probs = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        divergence = log_probs.new_zeros(len(ids))
        readings = _Readings.of(self, against)

        def chunk(part: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            logits, top = self.logits(readings.own, part)
            chosen = self._at(logits, ids[at])
            if against is None:
                probabilities = logits.sub_(top).exp_()
                total = probabilities.sum(-1, keepdim=True)
            else:
                total = (logits - top).exp_().sum(-1, keepdim=True)
            sums = self.total(total, chosen)
            total, log_probs[at] = sums[:, :1], sums[:, 1:] - (sums[:, :1].log() + top)
            with torch.enable_grad():
                leaf = log_probs[at].detach().requires_grad_()
                share = function(leaf, at)
                (gradient,) = torch.autograd.grad(share, leaf)
            share, slope = share.detach(), None
            if against is not None:
                log_p = logits.sub_(total.log() + top)
                divergence[at], sloped = readings.divergence(log_p, at)
                share = share + (against.weight[at] * divergence[at]).sum()
                slope = sloped().mul_(against.weight[at].unsqueeze(1))
                probabilities, total = log_p.exp_(), torch.ones_like(total)
            return share, self._backward(probabilities, total, ids[at], gradient, slope)

        loss = _ChunkedLoss.apply(self.entering(hidden), self.weight, self, chunk)
        return loss, log_probs, divergence

    def entering(self, hidden: Tensor) -> Tensor:
        """`hidden`, with its gradient summed over ranks where that is this module's task."""
        if self.replicated_input:
            return copy_to_tensor_model_parallel_region(hidden, group=self.group)
        return hidden

    def logits(self, products: Products, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's logits of [n, D], fp32 [n, V_local], -inf at padded rows, and their maximum over ranks [n, 1]."""
        logits = products(hidden)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        self._padded(logits)
        top = logits.amax(-1, keepdim=True)
        if self.ranks > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        return logits, top

    def total(self, *addends: Tensor) -> Tensor:
        """Sum addends [n, ...] over the ranks, side by side."""
        sums = torch.cat(addends, dim=1)
        if self.ranks > 1:
            dist.all_reduce(sums, group=self.group)
        return sums

    def chunks(self, hidden: Tensor) -> list[slice]:
        """Positions per chunk of logits."""
        return [slice(i, i + self.chunk) for i in range(0, hidden.size(0), self.chunk)]

    def log_softmax(self, products: Products, hidden: Tensor) -> Tensor:
        """Log-probabilities of this rank's rows, fp32 [n, V_local]; -inf at padded rows."""
        logits, top = self.logits(products, hidden)
        total = (logits - top).exp_().sum(-1, keepdim=True)
        return logits.sub_(self.total(total).log() + top)

    def _padded(self, values: Tensor) -> Tensor:
        """values [n, V_local], -inf at rows that are padding, in place."""
        padding = self.start + values.size(1) - self.vocab
        if padding > 0:
            values[:, max(0, values.size(1) - padding) :] = float("-inf")
        return values

    def _at(self, values: Tensor, ids: Tensor) -> Tensor:
        """values [n, V_local] at ids [n, k] where this rank has them, else 0."""
        local, mine = self._local(ids, values.size(1))
        return torch.where(mine, values.gather(1, local), 0.0)

    def _local(self, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Where ids [n, k] are among this rank's `rows`, and which of them it owns; the others' place means nothing."""
        local = ids - self.start
        return local.clamp(0, rows - 1), (local >= 0) & (local < rows)

    def _backward(
        self, probabilities: Tensor, total: Tensor, ids: Tensor, gradient: Tensor, slope: Tensor | None
    ) -> Tensor:
        """Gradient [n, k] of the log-probabilities at ids -> gradient of this rank's logits, in place of the
        unnormalised probabilities: d log p_i / d logit_j = [i = j] - p_j. With `slope` [n, V_local], that of another
        term by logits over the temperature, added."""
        logits = probabilities.mul_(-gradient.sum(-1, keepdim=True) / total)
        local, mine = self._local(ids, logits.size(1))
        logits.scatter_add_(1, local, torch.where(mine, gradient, 0.0))
        if slope is not None:
            logits += slope
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)


@dataclass(frozen=True)
class _Readings:
    """The products of one pass over all chunks: a head's own, and those of the teacher that it is compared with."""

    head: Head
    own: Products
    against: Against | None
    teacher: Products | None

    @staticmethod
    def of(head: Head, against: Against | None) -> _Readings:
        own = products_with(head.weight.detach())
        if against is None:
            return _Readings(head, own, None, None)
        same = against.head.weight is head.weight
        return _Readings(head, own, against, own if same else products_with(against.head.weight.detach()))

    def divergence(self, log_p: Tensor, at: slice) -> Sloped:
        """From the teacher's of a chunk; log_p [n, V_local]."""
        assert self.against is not None and self.teacher is not None
        teacher = self.against.head.log_softmax(self.teacher, self.against.hidden[at])
        return self.against.direction.sharded(log_p, teacher, self.head.total)


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
