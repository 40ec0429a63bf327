"""RL's objective: a weighted log-likelihood of tokens and exits, and KL penalties towards the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .divergences import Teacher
from .weights import Positions, TensorRows, Weights, mean_weights

if TYPE_CHECKING:
    from torch import Tensor


class Clip(NamedTuple):
    """PPO's clip range [1 - low, 1 + high] (with different bounds "clip-higher", Yu et al. 2025, arXiv 2503.14476); low
    0: no clipping."""

    low: float
    high: float


def _truncated(raw: Tensor, floor: float, cap: float) -> Tensor:
    return raw.clamp(max=cap)


def _masked(raw: Tensor, floor: float, cap: float) -> Tensor:
    return raw.where((raw >= floor) & (raw <= cap), 0.0)


IMPORTANCE: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "truncate": _truncated,
    "mask": _masked,
}
"""What becomes of the ratios of the learner's probabilities to the rollout's: cut from above (truncated importance
sampling, Ionides 2008); left out where they are outside [floor, cap] (Ling team 2025, "Every step evolves", arXiv
2510.18855, IcePop)."""


def clipped(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """`ratio` where the clipped surrogate min(ratio A, clip(ratio, 1 - low, 1 + high) A) still has a gradient, else 0.

    The surrogate's gradient is then (what this returns) * A * grad log pi (Schulman et al. 2017, arXiv 1707.06347).
    All [B, S].
    """
    if not clip.low:
        return ratio
    flat = (ratio > 1 + clip.high).where(advantage >= 0, ratio < 1 - clip.low)
    return ratio.masked_fill(flat, 0.0)


RATIOS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "together": lambda token, exit_: (token + exit_, token + exit_),
    "apart": lambda token, exit_: (token, exit_),
}
"""Log ratios that weight and clip token and exit, from their own log ratios: both by their product, or each by its own,
so that each has the whole trust region."""


K3_GAP = 5.0
"""Nats of log(pi_ref / pi) above which k3 is replaced by its tangent."""


def k3_slope(policy: Tensor, reference: Tensor) -> Tensor:
    """Slope of the k3 estimate of KL(policy ‖ reference) by log pi: 1 - pi_ref / pi, of the log-probabilities' shape.

    k3 = pi_ref / pi - 1 - log(pi_ref / pi) (Schulman 2020, "Approximating KL divergence"). Its slope grows without
    bound where a token was sampled that the reference likes far better: -1.2e6 at a gap of 14 nats, one token for the
    whole step. Beyond K3_GAP it stays what it is there, -147, which still pulls. The ratio's mean under pi is 1, so its
    square's is then at most e^K3_GAP, and at most e^-K3_GAP of the tokens are beyond (Markov's inequality).
    """
    return 1.0 - (reference - policy).clamp(max=K3_GAP).exp()


@dataclass(frozen=True)
class KLTerm:
    """Where beta * KL(policy ‖ reference) enters: the reward (its k1 estimate), the loss as an estimate with the given
    slope by log pi(token), or the loss as the divergence from a teacher."""

    in_reward: bool = False
    slope: Callable[[Tensor, Tensor], Tensor] | None = None
    teacher: Teacher | None = None


KL_TERMS = {
    "reward": KLTerm(in_reward=True),
    "reward_sum": KLTerm(in_reward=True),
    "loss": KLTerm(slope=k3_slope),
    "exact": KLTerm(teacher=Teacher.REFERENCE),
}


@dataclass(frozen=True)
class Experience(TensorRows):
    """Advantages and importance weights of a step's rollouts for all updates; float32 [B, S] but for `firing_cost`.

    token_advantage, exit_advantage: of the token and of the exit; token_importance, exit_importance: weights of the
    policy at the start of the step against the one that sampled; old_tokens, old_exits: the former's log-probabilities;
    reference_logprobs: the reference's of the token, None where no term needs them; firing_cost: cost of exiting less
    that of continuing at each gate, [B, S, M], None without rl.exit_credit.
    """

    token_advantage: Tensor
    exit_advantage: Tensor
    token_importance: Tensor
    exit_importance: Tensor
    old_tokens: Tensor
    old_exits: Tensor
    reference_logprobs: Tensor | None = None
    firing_cost: Tensor | None = None


@dataclass(frozen=True)
class PolicyGradient:
    """- surrogate(ratio, A) of tokens and of exits + expected cost at the gates + beta * KL (method.md, stage 2).
    `average`, `constant`: as in `mean_weights`."""

    kl: KLTerm
    clip: Clip
    beta: float
    ratios: str = "together"
    average: str = "answer"
    constant: int = 1

    def weights(
        self, batch: Positions, experience: Experience, token_logprobs: Tensor, exit_logprobs: Tensor
    ) -> tuple[Weights, float]:
        """Compute weights whose loss has the objective's gradient at the current policy, whose log-probabilities [B, S]
        are given, and the share of the positions that are clipped."""
        moved = RATIOS[self.ratios](token_logprobs - experience.old_tokens, exit_logprobs - experience.old_exits)
        advantages = (experience.token_advantage, experience.exit_advantage)
        factors = [clipped(m.exp(), a, self.clip) for m, a in zip(moved, advantages, strict=True)]
        per_token, per_exit = (
            mean_weights(batch, where, self.average, self.constant) for where in (batch.loss_mask, batch.gate_mask)
        )
        token = experience.token_advantage * experience.token_importance * factors[0] * per_token
        if self.kl.slope is not None and experience.reference_logprobs is not None:
            token = token - self.beta * per_token * self.kl.slope(token_logprobs, experience.reference_logprobs)
        exit_weight = experience.exit_advantage * experience.exit_importance * factors[1] * per_exit
        # Not multiplied by a ratio: already an expectation over the gate's decision. Positions masked by
        # rl.loss.importance are still dropped.
        judged, hazard = per_exit * (experience.exit_importance > 0), None
        if experience.firing_cost is not None:
            hazard = experience.firing_cost * judged.unsqueeze(-1)
        weights = Weights(
            token=token, exit=exit_weight, hazard=hazard, divergence=self.beta * per_token if self.kl.teacher else None
        )
        flat = (factors[0] == 0) | ((factors[1] == 0) & batch.gate_mask)
        return weights, float(flat[batch.loss_mask].float().mean())
