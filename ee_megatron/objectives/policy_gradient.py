"""RL's objective: a weighted log-likelihood of tokens and exits, and what holds the policy near its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .divergences import Teacher
from .weights import Positions, TensorRows, Weights, mean_weights

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


K3_GAP = 5.0
"""Nats of log(pi_ref / pi) from which on k3 goes on as its tangent."""


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
    "loss": KLTerm(slope=k3_slope),
    "exact": KLTerm(teacher=Teacher.REFERENCE),
}


@dataclass(frozen=True)
class Experience(TensorRows):
    """What a step's rollouts teach, the same for all updates on them; float32 [B, S] each.

    advantage; importance: truncated importance ratio of the policy at the start of the step to the one that sampled;
    old_logprobs: the former's log-probability of token and exit together; reference_logprobs: the reference's of the
    token.
    """

    advantage: Tensor
    importance: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor


@dataclass(frozen=True)
class PolicyGradient:
    """- surrogate(ratio, A) of tokens and exits + beta * KL - entropy_bonus * H(gates) (method.md, stage 2)."""

    surrogate: Surrogate
    kl: KLTerm
    clip: float
    beta: float
    entropy_bonus: float

    def weights(
        self, batch: Positions, experience: Experience, token_logprobs: Tensor, exit_logprobs: Tensor
    ) -> tuple[Weights, float]:
        """The log-probabilities [B, S] are the current policy's -> (weights whose loss has the objective's gradient
        there, share of the positions that clipping leaves out)."""
        log_ratio = token_logprobs + exit_logprobs - experience.old_logprobs
        factor = self.surrogate(log_ratio, experience.advantage, batch.counts, self.clip)
        scale = experience.advantage * experience.importance * factor
        per_token, per_exit = mean_weights(batch, batch.counts), mean_weights(batch, batch.asked)
        token = scale * per_token
        if self.kl.slope is not None:
            token = token - self.beta * per_token * self.kl.slope(token_logprobs, experience.reference_logprobs)
        weights = Weights(
            token=token,
            exit=scale * per_exit,
            entropy=self.entropy_bonus * per_exit if self.entropy_bonus else None,
            divergence=self.beta * per_token if self.kl.teacher else None,
        )
        return weights, float((factor == 0)[batch.counts].float().mean())
