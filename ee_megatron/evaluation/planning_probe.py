"""Whether a stream already knows a later token: a linear probe at each depth, against what the text itself tells.

S depths, D hidden, T_i generated tokens of answer i.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..statistics import Estimate, bootstrap_interval
from ..types import Rollout

AHEAD = (1, 2, 4)
RIDGE = 1e-2
ORDER = 3
"""The n-gram baseline reads up to this many tokens."""
FOLDS = 2
RESAMPLES = 500


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on answers that the probe was not fitted on. probe, uplift: one per depth; uplift = probe - ngram.

    `ahead` k: the stream that predicts token t is asked for token t + k. `tokens`: how many were asked for.
    """

    ahead: int
    probe: list[float]
    ngram: float
    uplift: list[Estimate]
    tokens: int


def planning_probe(
    rollouts: Sequence[Rollout], streams: Sequence[np.ndarray], ahead: int, order: int = ORDER
) -> ProbeResult:
    """Accuracy of token t + k from the stream that predicts token t (streams[i]: float [T_i, S, D]), minus an n-gram's.

    Probe: least squares with ridge r onto one-hot tokens, W = (XᵀX + r n I)⁻¹ XᵀY on streams of root mean square 1 with
    a constant, argmax of xW. Baseline: the most frequent token k places on after the same last tokens, backing off from
    `order` of them to none. Both are fitted on one half of the answers and asked about the other, both ways. Reading
    later tokens from a stream: Pal et al. 2023 (arXiv 2311.04897); planning as what goes beyond text statistics: Wu et
    al. 2024 (arXiv 2404.00859).

    Raises ValueError if streams and answers do not fit, for k < 1, or with fewer than two answers longer than k.
    """
    if len(rollouts) != len(streams) or any(r.length != len(s) for r, s in zip(rollouts, streams, strict=True)):
        raise ValueError("every answer needs the stream of each of its tokens; inspect the same answers")
    if ahead < 1:
        raise ValueError(f"ahead={ahead}: the next token is what the model predicts anyway; expected at least 1")
    used = [(r, s) for r, s in zip(rollouts, streams, strict=True) if r.length > ahead]
    if len(used) < FOLDS:
        raise ValueError(f"{len(used)} answers are longer than {ahead} tokens; a probe needs {FOLDS} or more")
    depths = used[0][1].shape[1]
    targets = [r.tokens[ahead:] for r, _ in used]
    features = [np.asarray(s[: r.length - ahead], dtype=np.float64) for r, s in used]
    contexts = [_contexts(r, len(t), order) for (r, _), t in zip(used, targets, strict=True)]
    right = [np.zeros((len(t), depths + 1)) for t in targets]
    for fold in range(FOLDS):
        held = [i for i in range(len(used)) if i % FOLDS == fold]
        seen = [i for i in range(len(used)) if i % FOLDS != fold]
        known = np.concatenate([targets[i] for i in seen])
        for s in range(depths):
            predict = _Ridge(np.concatenate([features[i][:, s] for i in seen]), known)
            for i in held:
                right[i][:, s] = predict(features[i][:, s]) == targets[i]
        table = _count([c for i in seen for c in contexts[i]], known.tolist())
        for i in held:
            right[i][:, depths] = [_look_up(table, c) == t for c, t in zip(contexts[i], targets[i], strict=True)]
    totals = np.array([np.append(r.sum(0), len(r)) for r in right])
    shares = totals.sum(0)[:-1] / totals.sum(0)[-1]
    uplift = [
        bootstrap_interval(totals[:, [s, depths, -1]], lambda x: float((x[:, 0] - x[:, 1]).sum() / x[:, 2].sum()),
                           resamples=RESAMPLES)
        for s in range(depths)
    ]  # fmt: skip
    return ProbeResult(ahead, shares[:-1].tolist(), float(shares[-1]), uplift, int(totals[:, -1].sum()))


class _Ridge:
    """A ridge classifier of x [N, D] into the tokens [N] that occur; called, it predicts tokens [n] of x [n, D]."""

    def __init__(self, x: np.ndarray, tokens: np.ndarray):
        self.scale = float(np.sqrt((x * x).mean())) or 1.0
        self.classes, index = np.unique(tokens, return_inverse=True)
        x, y = self._with_constant(x), np.eye(len(self.classes))[index]
        weight = RIDGE * len(x)
        if len(x) < x.shape[1]:
            # The same solution through the smaller of the two systems.
            self.weights = x.T @ np.linalg.solve(x @ x.T + weight * np.eye(len(x)), y)
        else:
            self.weights = np.linalg.solve(x.T @ x + weight * np.eye(x.shape[1]), x.T @ y)

    def _with_constant(self, x: np.ndarray) -> np.ndarray:
        return np.column_stack([x / self.scale, np.ones(len(x))])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = self.classes[(self._with_constant(x) @ self.weights).argmax(1)]
        return chosen


def _contexts(rollout: Rollout, count: int, order: int) -> list[tuple[int, ...]]:
    """The last `order` tokens that were there when each of the first `count` generated tokens was predicted."""
    whole = np.concatenate([rollout.prompt_tokens, rollout.tokens]).tolist()
    start = len(rollout.prompt_tokens)
    return [tuple(whole[max(0, start + t - order) : start + t]) for t in range(count)]


def _count(contexts: Sequence[tuple[int, ...]], targets: Sequence[int]) -> dict[tuple[int, ...], int]:
    """The most frequent target after each context and each of its endings, the empty one included."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for context, target in zip(contexts, targets, strict=True):
        for start in range(len(context) + 1):
            counts[context[start:]][target] += 1
    # Ties go to the smaller token id, so that the order of the answers doesn't matter.
    return {c: min(found, key=lambda token: (-found[token], token)) for c, found in counts.items()}


def _look_up(table: dict[tuple[int, ...], int], context: tuple[int, ...]) -> int:
    return next(table[context[start:]] for start in range(len(context) + 1) if context[start:] in table)
