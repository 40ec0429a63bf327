"""Advantages of answers within the K rollouts of a prompt, and the costs of length and divergence. Functions in
ADVANTAGES take values float [N, K] and which of them count, bool [N, K], and return as many, 0 for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .weights import Positions

if TYPE_CHECKING:
    from torch import Tensor


def rloo(rewards: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Leave-one-out: A_k = R_k - mean of the others (Ahmadian et al. 2024, arXiv 2402.14740)."""
    k = counted.sum(1, keepdims=True)
    return mean_centred(rewards, counted) * (k / np.maximum(k - 1, 1))


def mean_centred(rewards: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """A_k = R_k - mean of the group (Liu et al. 2025, arXiv 2503.20783)."""
    return np.where(counted, rewards - _mean(rewards, counted), 0.0)


def grpo(rewards: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """A_k = (R_k - mean) / (standard deviation + 1e-4) (Shao et al. 2024, arXiv 2402.03300)."""
    centred = mean_centred(rewards, counted)
    return centred / (np.sqrt(_mean(centred**2, counted)) + 1e-4)


def none(rewards: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """A_k = R_k: plain REINFORCE, no baseline."""
    return np.where(counted, rewards, 0.0)


def _mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    return np.where(counted, values, 0.0).sum(1, keepdims=True) / np.maximum(counted.sum(1, keepdims=True), 1)


ADVANTAGES = {"rloo": rloo, "mean": mean_centred, "grpo": grpo, "none": none}

CHARGES: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda correct: correct | True,
    "right": lambda correct: correct,
}
"""Which answers pay for their depth and length, from which are right, bool [B] both. Where wrong ones do, too, groups
without a right answer are rewarded for being shallow."""


def length_cost(batch: Positions, cost_length: int) -> Tensor:
    """Length of each answer as a cost, float32 [B]: generated tokens / cost_length."""
    return batch.loss_mask.sum(1).float() / cost_length


def mean_log_ratio(batch: Positions, policy: Tensor, reference: Tensor) -> Tensor:
    """k1 estimate of KL(policy ‖ reference): mean over generated tokens of log pi - log pi_ref, float32 [B]."""
    return ((policy - reference) * batch.loss_mask).sum(1) / batch.loss_mask.sum(1).clamp(min=1)
