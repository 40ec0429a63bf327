"""How far a rollout may be trusted: importance ratios, and clipped surrogates as factors of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# (log ratio of the current policy to the one at the start of the step, token and exit together; advantage; positions
# that count; clip), [B, S] each -> what A * grad log pi is multiplied by, [B, S], 0 where the surrogate is flat.
Surrogate = Callable[["Tensor", "Tensor", "Tensor", float], "Tensor"]


def truncated_ratio(learner: Tensor, rollout: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Importance ratios per position, exp(log p_learner - log p_rollout) of token and exit together, and the same
    truncated from above at `cap` (truncated importance sampling, Ionides 2008). All [B, S]."""
    raw = (learner - rollout).exp()
    return raw, raw.clamp(max=cap)


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """`ratio` where the clipped surrogate min(ratio A, clip(ratio, 1 - c, 1 + c) A) still has a gradient, else 0.

    The surrogate's gradient is then (what this returns) * A * grad log pi (Schulman et al. 2017, arXiv 1707.06347).
    clip 0: the ratio everywhere. All [B, S].
    """
    if not clip:
        return ratio
    flat = (ratio > 1 + clip).where(advantage >= 0, ratio < 1 - clip)
    return ratio.masked_fill(flat, 0.0)


def ppo(log_ratio: Tensor, advantage: Tensor, counts: Tensor, clip: float) -> Tensor:
    """A ratio for each position (Schulman et al. 2017, arXiv 1707.06347)."""
    return clipped(log_ratio.exp(), advantage, clip)


def gspo(log_ratio: Tensor, advantage: Tensor, counts: Tensor, clip: float) -> Tensor:
    """A ratio for each answer, (pi(answer) / pi_old(answer))^(1/length), the geometric mean of its positions' ratios
    (Zheng et al. 2025, "Group sequence policy optimization", arXiv 2507.18071)."""
    mean = (log_ratio * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    return clipped(mean.exp().expand_as(log_ratio), advantage, clip)


SURROGATES: dict[str, Surrogate] = {"ppo": ppo, "gspo": gspo}
