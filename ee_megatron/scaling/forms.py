"""Competing forms of how a metric (mean exit fraction, accuracy lost) depends on size, tokens and penalty.

Columns enter as t = ln x, the penalty lambda as itself since it may be 0; both centred and divided by their standard
deviation while fitting. Shape suffixes: S problems, P parameters, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .refusal import Refused, unexplained_share
from .solver import Array, Curve, minimise

# Of a standardised ln x: a factor of e^8 per standard deviation is a step, not a trend.
STEEPEST = 8.0
# Problems times rows that are solved together.
BATCH = 50_000


@dataclass(frozen=True)
class Features:
    """values [C, R], standardised; centres and scales [C] to undo that; `penalty` is lambda's place or None."""

    names: tuple[str, ...]
    values: Array
    centres: Array
    scales: Array
    penalty: int | None

    def standardised(self, raw: Array) -> Array:
        """Raw columns (ln x, lambda) [C, R'] on the scale of `values`."""
        return (raw - self.centres[:, None]) / self.scales[:, None]


@dataclass(frozen=True)
class Form:
    """A family of curves.

    `design` takes standardised columns [C, R] and lambda's place among them to [P, R], and `curve` and `starts` take
    that to what `solver.minimise` needs. Each of `needs` raises Refused where the metric [R] or the features rule the
    form out. `steepness` is the place of the first slope where slopes have a bound; `range` is what no value of the
    form leaves.
    """

    name: str
    formula: str
    design: Callable[[Array, int | None], Array]
    curve: Callable[[Array], Curve]
    starts: Callable[[Array, Array], Array]
    needs: tuple[Callable[[Features, Array], None], ...] = ()
    steepness: int | None = None
    range: tuple[float, float] = (-math.inf, math.inf)


def features(names: tuple[str, ...], raw: Array, penalty: int | None) -> Features:
    """From raw columns [C, R]. Raises Refused for one that doesn't vary, and for two that vary as one."""
    for index, name in enumerate(names):
        if len(np.unique(raw[index])) < 2:
            raise Refused(
                f"column {name} has one value; expected at least 2 to see an influence; leave it out of --against"
            )
        for other in range(index):
            if unexplained_share(raw[index], raw[other]) < 0.01:
                raise Refused(
                    f"columns {names[other]} and {name} are collinear (squared correlation above 0.99), so their "
                    f"influences cannot be told apart; name one of them in --against"
                )
    scales = raw.std(axis=1)
    centres = raw.mean(axis=1)
    return Features(names, (raw - centres[:, None]) / scales[:, None], centres, scales, penalty)


Link = Callable[[Array], tuple[Array, Array]]
"""theta·design -> the prediction and its slope there."""


def _linked(link: Link) -> Callable[[Array], Curve]:
    """Curves of a link: from a design [P, R] to what `solver.minimise` needs."""

    def of(design: Array) -> Curve:
        def curve(theta: Array, weights: Array) -> tuple[Array, Array]:
            value, slope = link(theta @ design)
            return value, slope[:, None, :] * design

        return curve

    return of


def _identity(z: Array) -> tuple[Array, Array]:
    return z, np.ones_like(z)


def _exponential(z: Array) -> tuple[Array, Array]:
    value = np.exp(np.minimum(z, 50.0))
    return value, value


def _sigmoid(z: Array) -> tuple[Array, Array]:
    value = 0.5 * (1 + np.tanh(0.5 * z))
    return value, value * (1 - value)


def _saturating(design: Array) -> Curve:
    """theta = (limit, amplitude, slopes): limit + amplitude · exp(slopes·t)."""

    def curve(theta: Array, weights: Array) -> tuple[Array, Array]:
        falling = np.exp(np.minimum(theta[:, 2:] @ design[1:], 50.0))
        scaled = theta[:, 1:2] * falling
        ones = np.ones((len(theta), 1, design.shape[1]))
        slopes = scaled[:, None, :] * design[1:]
        return theta[:, :1] + scaled, np.concatenate([ones, falling[:, None, :], slopes], axis=1)

    return curve


def _constant(values: Array, penalty: int | None) -> Array:
    return np.ones((1, values.shape[1]))


def _with_one(values: Array, penalty: int | None) -> Array:
    return np.concatenate([np.ones((1, values.shape[1])), values])


def _crossed(values: Array, penalty: int | None) -> Array:
    assert penalty is not None
    others = [c for c in range(len(values)) if c != penalty]
    return np.concatenate([_with_one(values, None), values[others] * values[penalty]])


def _least_squares(design: Array, y: Array) -> Array:
    return np.linalg.lstsq(design.T, y, rcond=None)[0][None]


def _saturating_starts(design: Array, y: Array) -> Array:
    """Rising and falling, fast and slow along the direction in which the metric moves. As the slope grows the amplitude
    shrinks exponentially, a valley in which descent is slow: so starts reach up to the bound."""
    direction = _least_squares(design, y)[0, 1:]
    length = float(np.linalg.norm(direction)) or 1.0
    starts = []
    for rate in (-STEEPEST, -4.0, -2.0, -0.8, -0.3, 0.3, 0.8, 2.0, 4.0, STEEPEST):
        slopes = direction / length * rate
        basis = np.stack([np.ones(design.shape[1]), np.exp(slopes @ design[1:])])
        starts.append(np.concatenate([_least_squares(basis, y)[0], slopes]))
    return np.stack(starts)


def _positive(feats: Features, y: Array) -> None:
    if (y <= 0).any():
        raise Refused(f"the metric has values <= 0 (least {y.min():.4g}); a power law is positive")


def _fraction(feats: Features, y: Array) -> None:
    if (y < 0).any() or (y > 1).any():
        raise Refused(f"the metric runs from {y.min():.4g} to {y.max():.4g}; a logistic curve runs from 0 to 1")


def _three_values(feats: Features, y: Array) -> None:
    few = [name for name, x in zip(feats.names, feats.values, strict=True) if len(np.unique(x)) < 3]
    if few:
        raise Refused(f"column {few[0]} has 2 distinct values; limit, amplitude and exponent need at least 3")


def _has_penalty(feats: Features, y: Array) -> None:
    if feats.penalty is None or len(feats.names) < 2:
        raise Refused("needs lambda and another column in --against")


def _logit_start(design: Array, y: Array) -> Array:
    inside = np.clip(y, 0.02, 0.98)
    return _least_squares(design, np.log(inside / (1 - inside)))


def _log_start(design: Array, y: Array) -> Array:
    return _least_squares(design, np.log(np.maximum(y, 1e-12 * max(float(y.max()), 1e-300))))


_POSITIVE, _SHARE = (0.0, math.inf), (0.0, 1.0)
_LINEAR, _POWER, _LOGISTIC = _linked(_identity), _linked(_exponential), _linked(_sigmoid)
FORMS = (
    Form("constant", "c", _constant, _LINEAR, _least_squares),
    Form("linear", "c + Σ b t", _with_one, _LINEAR, _least_squares),
    Form("power", "exp(c + Σ b t)", _with_one, _POWER, _log_start, (_positive,), range=_POSITIVE),
    Form("saturating", "c + a exp(Σ b t)", _with_one, _saturating, _saturating_starts, (_three_values,), 2),
    Form("logistic", "1 / (1 + exp(-c - Σ b t))", _with_one, _LOGISTIC, _logit_start, (_fraction,), range=_SHARE),
    Form("linear × lambda", "c + Σ b t + λ Σ g t", _crossed, _LINEAR, _least_squares, (_has_penalty,)),
    Form("logistic × lambda", "1 / (1 + exp(-c - Σ b t - λ Σ g t))", _crossed, _LOGISTIC, _logit_start,
         (_has_penalty, _fraction), range=_SHARE),
)  # fmt: skip


def fit_form(form: Form, design: Array, y: Array, weights: Array) -> Array:
    """Least squares under each weighting [S, R] of the metric y [R]: parameters [S, P], the best of the form's starts.

    design [P0, R]. A start is found from the rows of all weightings together; it decides where the search begins, and
    the held-out rows of a fold do not enter what it minimises.
    """
    starts = form.starts(design, y)
    size = starts.shape[1]
    low, high = np.full(size, -np.inf), np.full(size, np.inf)
    if form.steepness is not None:
        low[form.steepness :], high[form.steepness :] = -STEEPEST, STEEPEST
    count = len(weights)
    # Small batches cost calls, large ones the cache.
    together = max(1, BATCH // (count * len(y)))
    minima = [
        minimise(form.curve(design), y, np.tile(weights, (len(part), 1)), np.repeat(part, count, axis=0), low, high,
                 steps=80)
        for part in np.split(starts, range(together, len(starts), together))
    ]  # fmt: skip
    objective = np.concatenate([minimum.objective for minimum in minima]).reshape(-1, count)
    theta = np.concatenate([minimum.theta for minimum in minima]).reshape(-1, count, size)
    return np.asarray(theta[objective.argmin(axis=0), np.arange(count)])


def evaluate(form: Form, theta: Array, design: Array) -> Array:
    """Predictions [S, R]."""
    return form.curve(design)(theta, np.empty((0, 0)))[0]
