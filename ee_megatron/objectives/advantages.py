"""Advantages of K rollouts of one prompt from their rewards. Pure functions: float [N, K] -> float [N, K]."""

from __future__ import annotations

import numpy as np


def rloo(rewards: np.ndarray) -> np.ndarray:
    """Leave-one-out: A_k = R_k - mean of the others (Ahmadian et al. 2024, arXiv 2402.14740)."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdims=True)) * (k / (k - 1))


def mean_centred(rewards: np.ndarray) -> np.ndarray:
    """A_k = R_k - mean of the group (Liu et al. 2025, arXiv 2503.20783)."""
    return rewards - rewards.mean(1, keepdims=True)


def grpo(rewards: np.ndarray) -> np.ndarray:
    """A_k = (R_k - mean) / (standard deviation + 1e-4) (Shao et al. 2024, arXiv 2402.03300)."""
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)


def none(rewards: np.ndarray) -> np.ndarray:
    """A_k = R_k: plain REINFORCE, no baseline."""
    return rewards


ADVANTAGES = {"rloo": rloo, "mean": mean_centred, "grpo": grpo, "none": none}
