"""When data cannot carry a fit: what is too little, and the error that says so."""

from __future__ import annotations

import numpy as np

from .solver import Array

MIN_DISTINCT = 3
"""Along one axis the law is c + A/x^alpha: three unknowns, so three values of x."""
MIN_CELLS = 6
"""Five parameters, and one pair of size and tokens more, or every residual is 0."""
MIN_RUNS = 12
"""A resample holds about 63 % of the runs: 12 leave seven to eight of them for five parameters."""
MIN_SPREAD = 0.01
"""Share of the variance of ln D that ln N must leave unexplained (a correlation below 0.995)."""
MAX_AT_BOUND = 0.025
"""Share of resamples on a parameter's bound from which a two-sided 95 % interval reaches it."""


class Refused(ValueError):
    """The data do not determine what was asked for: what was found, what is needed, what to do."""


def check_design(params: Array, tokens: Array, runs: Array) -> None:
    """Refuse rows [R] on which L(N, D) has no unique fit."""
    sizes, counts = len(np.unique(params)), len(np.unique(tokens))
    for name, found in (("parameter counts N", sizes), ("token counts D", counts)):
        if found < MIN_DISTINCT:
            raise Refused(
                f"{found} distinct {name}; expected at least {MIN_DISTINCT}, since the constant, the coefficient and "
                f"the exponent along that axis are three unknowns; add runs at other values"
            )
    number = int(runs.max()) + 1
    if number < MIN_RUNS:
        raise Refused(
            f"{number} runs; expected at least {MIN_RUNS}, since intervals come from resampling whole runs and a "
            f"resample holds about 63 % of them, for five parameters; add runs"
        )
    if not enough_cells(params, tokens, np.ones(len(params), dtype=bool)):
        raise Refused(
            f"fewer than {MIN_CELLS} distinct pairs of N and D; five parameters need one more than five; add pairs"
        )
    unexplained = unexplained_share(np.log(params), np.log(tokens))
    if unexplained < MIN_SPREAD:
        raise Refused(
            f"ln N and ln D are collinear (squared correlation {1 - unexplained:.4f}): the two power laws cannot be "
            f"told apart; expected at most {1 - MIN_SPREAD:.2f}; train some sizes on several token counts"
        )


def enough_cells(params: Array, tokens: Array, rows: Array) -> bool:
    """Whether the rows (bool [R]) have enough distinct sizes, token counts and pairs of them for a fit."""
    n, d = params[rows], tokens[rows]
    few = len(np.unique(n)) < MIN_DISTINCT or len(np.unique(d)) < MIN_DISTINCT
    return not few and len(np.unique(np.stack([n, d]), axis=1).T) >= MIN_CELLS


def unexplained_share(x: Array, y: Array) -> float:
    """1 - r² of x [R] and y [R]; 0 where one of them is constant."""
    a, b = x - x.mean(), y - y.mean()
    scale = float((a @ a) * (b @ b))
    return 1 - float(a @ b) ** 2 / scale if scale > 0 else 0.0


def check_bounds(names: tuple[str, ...], share: Array, at: tuple[str, ...], fits: str) -> None:
    """Refuse where the share of `fits` on a bound ([K], like `names`) is such that a 95 % interval has no end there."""
    worst = int(np.argmax(share))
    if share[worst] > MAX_AT_BOUND:
        raise Refused(
            f"{names[worst]} is not identified: it lies on its bound ({at[worst]}) in {share[worst]:.0%} of {fits}, so "
            f"its 95 % interval has no end there; expected at most {MAX_AT_BOUND:.1%}; widen the range of sizes or "
            f"tokens, or add runs"
        )
