"""RL's objective: a weighted log-likelihood of tokens and exits, and what holds the policy near its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .divergences import Teacher
from .surrogates import Surrogate
from .weights import Positions, TensorRows, Weights, mean_weights

if TYPE_CHECKING:
    from torch import Tensor


def k3_slope(policy: Tensor, reference: Tensor) -> Tensor:
    """Slope of the k3 estimate of KL(policy ‖ reference) by log pi: 1 - pi_ref / pi, of the log-probabilities' shape.

    k3 = pi_ref / pi - 1 - log(pi_ref / pi) (Schulman 2020, "Approximating KL divergence").
    """
    return 1.0 - (reference - policy).exp()


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

    @property
    def teacher(self) -> Teacher | None:
        return self.kl.teacher

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
