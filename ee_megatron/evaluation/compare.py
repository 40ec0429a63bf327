"""What changed from one model to the next on the same problems: accuracy, depth, length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..statistics import bootstrap_interval, clustered_difference, mcnemar_exact
from .evaluate import Answer


def compared(before: Sequence[Answer], after: Sequence[Answer], num_layers: int) -> dict[str, Any] | None:
    """`after` minus `before` on the problems that both answered; None if there are none.

    {"against": label of `before`, "n", "groups", "only_before", "only_after" (right there alone), "p_value" (McNemar,
    exact), "accuracy", "depth" (mean over tokens, share of the layers), "total_depth" (layers per answer), "length"
    (tokens per answer): {"value", "low", "high"}}. Intervals are 95 % percentile bootstraps over groups of problems
    that share operands.
    """
    known = {answer["id"]: answer for answer in before}
    pairs = [(known[a["id"]], a) for a in after if a["id"] in known]
    if not pairs:
        return None
    first, second = ([bool(answer["correct"]) for answer in side] for side in zip(*pairs, strict=True))
    clusters = [a.get("group") or a["id"] for _, a in pairs]
    test = mcnemar_exact(first, second)
    _, place = np.unique(np.array(clusters, dtype=str), return_inverse=True)
    # Per group: depth and tokens before, after, and how many problems.
    columns = [[sum(t["depth"] for t in a["tokens"]) for a in side] for side in zip(*pairs, strict=True)]
    columns += [[len(a["tokens"]) for a in side] for side in zip(*pairs, strict=True)]
    columns.append([1] * len(pairs))
    sums = np.stack([np.bincount(place, weights=column) for column in columns], axis=1)

    def change(kind: str) -> dict[str, float]:
        def statistic(sample: np.ndarray) -> float:
            depth_before, depth_after, tokens_before, tokens_after, n = sample.sum(0)
            return float(
                {
                    "depth": (depth_after / max(tokens_after, 1) - depth_before / max(tokens_before, 1)) / num_layers,
                    "total_depth": (depth_after - depth_before) / n,
                    "length": (tokens_after - tokens_before) / n,
                }[kind]
            )

        return bootstrap_interval(sums, statistic)._asdict()

    return {
        "against": f"{before[0]['model']}, {before[0]['exits']}",
        "n": len(pairs),
        "groups": len(set(clusters)),
        "only_before": test.only_first,
        "only_after": test.only_second,
        "p_value": test.p_value,
        "accuracy": clustered_difference(first, second, clusters)._asdict(),
        **{kind: change(kind) for kind in ("depth", "total_depth", "length")},
    }
