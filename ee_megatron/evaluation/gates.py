"""Whether gates are calibrated: the hazard they give against what exiting would have cost there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..exits import target_hazards
from ..statistics import bootstrap_interval

BINS = 10
RESAMPLES = 500


def gate_calibration(
    hazards: Sequence[np.ndarray],
    divergences: Sequence[np.ndarray],
    kl_factor: float,
    exit_depths: Sequence[int],
) -> dict[str, Any] | None:
    """Reliability of the hazards against the target hazards 1 - tanh(c d / 2), c = kl_factor, d the divergence in nats.

    hazards[i], divergences[i]: float [T_i, M] of answer i, NaN where a gate was not asked (`Inspection`). Bins of equal
    width over the hazard; ECE = Σ_b n_b/N |mean hazard_b - mean target_b| (Naeini et al., AAAI 2015; Guo et al. 2017,
    arXiv 1706.04599, here with a target that is a probability instead of a label). A gate may be on average right in
    each bin and know nothing: `mean_error`, the mean of |hazard - target|, is the figure that sees it.

    {"ece", "mean_error": {"value", "low", "high"}, "asked", "bins": [{"hazard", "target", "asked"}],
    "exits": [{"depth", "ece", "hazard", "target", "asked"}]}; None if no gate was asked. Intervals are 95 % over
    answers; that of the ECE shares its upward bias where bins hold few.
    """
    tables = [_sums(h, d, kl_factor) for h, d in zip(hazards, divergences, strict=True) if len(h)]
    stacked = np.array(tables)  # answers, exits, bins, (count, hazard, target, |difference|)
    if not len(stacked) or stacked[..., 0].sum() == 0:
        return None

    def mean_error(sample: np.ndarray) -> float:
        count = sample[..., 0].sum()
        return float(sample[..., 3].sum() / count) if count else math.nan

    total = stacked.sum(0)
    exits = [(depth, bins, bins.sum(0)) for depth, bins in zip(exit_depths, total, strict=True)]
    return {
        "ece": bootstrap_interval(stacked, lambda sample: _ece(sample.sum((0, 1))), resamples=RESAMPLES)._asdict(),
        "mean_error": bootstrap_interval(stacked, mean_error, resamples=RESAMPLES)._asdict(),
        "asked": int(total[..., 0].sum()),
        "bins": [{"hazard": b[1] / b[0], "target": b[2] / b[0], "asked": int(b[0])} for b in total.sum(0) if b[0] > 0],
        "exits": [
            {
                "depth": int(depth),
                "ece": _ece(bins),
                "hazard": float(sums[1] / sums[0]),
                "target": float(sums[2] / sums[0]),
                "asked": int(sums[0]),
            }
            for depth, bins, sums in exits
            if sums[0] > 0
        ],
    }


def _ece(bins: np.ndarray) -> float:
    """Bins [B, >= 3] of (count, sum of hazards, sum of targets)."""
    count = bins[:, 0].sum()
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / count) if count else math.nan


def _sums(hazards: np.ndarray, divergences: np.ndarray, kl_factor: float) -> np.ndarray:
    """float [M, BINS, 4]: per exit and bin the count and the sums of hazard, target and their absolute difference."""
    h = np.asarray(hazards, dtype=np.float64)
    target = target_hazards(torch.from_numpy(np.asarray(divergences, dtype=np.float64)), kl_factor).numpy()
    asked = ~(np.isnan(h) | np.isnan(target))
    place = np.minimum((np.where(asked, h, 0.0) * BINS).astype(int), BINS - 1)
    table = np.zeros((h.shape[1], BINS, 4))
    exits = np.broadcast_to(np.arange(h.shape[1]), h.shape)
    for k, values in enumerate((np.ones_like(h), h, target, np.abs(h - target))):
        np.add.at(table[..., k], (exits[asked], place[asked]), values[asked])
    return table
