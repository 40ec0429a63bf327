"""Log-probabilities and divergences over a vocabulary that is sharded across tensor-parallel ranks, in chunks.

Logits are computed for `chunk` positions at a time and recomputed in the backward pass, so the full [N, V] tensor never
exists. Every function takes hidden states [N, D] (after the final norm) and the head's local rows [V_local, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 512


class Head:
    """The readout on the last pipeline stage.

    weight [V_local, D]; `vocab` is the true vocabulary (rows beyond it are padding and get probability 0).
    `replicated_input`: the hidden states are the same on all tensor-parallel ranks and their gradient has to be summed
    here (plain tensor parallelism; under sequence parallelism the model's gather does it). `temperature` divides the
    logits: the distribution is the one that was sampled from.
    """

    def __init__(
        self, weight: Tensor, vocab: int, replicated_input: bool = True, chunk: int = CHUNK, temperature: float = 1.0
    ):
        self.weight, self.vocab, self.chunk, self.temperature = weight, vocab, chunk, temperature
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.ranks = dist.get_world_size(self.group)
        self.start = dist.get_rank(self.group) * weight.size(0)
        self.replicated_input = replicated_input and self.ranks > 1

    def log_probs_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p(target) fp32 [N] for targets int64 [N]."""
        return self._chunked(lambda h, t: self._select(h, t.unsqueeze(-1))[0].squeeze(-1), hidden, targets)

    def log_probs_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """log p at ids int64 [N, k] -> fp32 [N, k]."""
        return self._chunked(lambda h, i: self._select(h, i)[0], hidden, ids)

    def _chunked(self, function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, other: Tensor) -> Tensor:
        if self.replicated_input:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.group)
        parts = []
        # At least one piece, empty or not, so that a micro-batch without a counted position keeps its graph whole.
        for start in range(0, max(1, hidden.size(0)), self.chunk):
            piece = (hidden[start : start + self.chunk], other[start : start + self.chunk])
            if torch.is_grad_enabled() and hidden.requires_grad:
                parts.append(checkpoint(function, *piece, use_reentrant=False))
            else:
                parts.append(function(*piece))
        return torch.cat(parts)

    def _select(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """log p at ids [N, k], and log of the partition sum [N, 1]."""
        logits = (hidden @ self.weight.t()).float()
        if self.temperature != 1.0:
            logits = logits / self.temperature
        padding = self.start + logits.size(1) - self.vocab
        if padding > 0:
            logits[:, logits.size(1) - padding :] = float("-inf")
        top = logits.detach().amax(-1, keepdim=True)
        if self.ranks > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        total = (logits - top).exp().sum(-1, keepdim=True)
        local = ids - self.start
        mine = (local >= 0) & (local < logits.size(1))
        chosen = torch.gather(logits, 1, local.clamp(0, logits.size(1) - 1))
        chosen = torch.where(mine, chosen, torch.zeros_like(chosen))
        if self.ranks > 1:
            total = reduce_from_tensor_model_parallel_region(total, group=self.group)
            chosen = reduce_from_tensor_model_parallel_region(chosen, group=self.group)
        log_total = total.log() + top
        return chosen - log_total, log_total


def lumped_kl(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """Divergence between two distributions known at the teacher's k most probable tokens; the rest is one tail.

    student, teacher: log-probabilities fp32 [N, k] at the same tokens -> [N], nats. `direction`: "student_teacher" is
    KL(student ‖ teacher), "teacher_student" the other way, "jensen_shannon" the mean of both against their midpoint.
    Lumping can only lower a divergence (data-processing inequality).
    """
    p, q = _with_tail(student), _with_tail(teacher)
    if direction == "student_teacher":
        return (p.exp() * (p - q)).sum(-1)
    if direction == "teacher_student":
        return (q.exp() * (q - p)).sum(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))


def _with_tail(log_probs: Tensor) -> Tensor:
    # fp32 cannot tell a tail below about 1e-7 from rounding, so it is held at 1e-6.
    tail = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([log_probs, tail], dim=-1)
