"""What runs when. `make test`: what guards correctness, in minutes. `make test-all`: also what is marked EXTENDED,
whole commands with their ranks, kills and files. `make slow`: what is marked SLOW. Of a product of cases `make test`
takes a part that has every value and mixes them; cases keep their order and names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

EXTENDED, SLOW = pytest.mark.extended, pytest.mark.slow


def covering(cases: Iterable[Any], others: Iterable[Any], later: pytest.MarkDecorator = SLOW) -> list[Any]:
    """Parameters `(case, other)`: every case with one of the others, in turn, every time; the rest marked `later`."""
    rest = list(others)
    return [
        pytest.param(case, other, marks=() if i % len(rest) == j else later)
        for i, case in enumerate(cases)
        for j, other in enumerate(rest)
    ]


def some(cases: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """The cases, those that are not `kept` marked slow. Raises ValueError for a case that isn't there."""
    every, wanted = list(cases), list(kept)
    if strangers := [case for case in wanted if case not in every]:
        raise ValueError(f"{strangers}: no such case")
    return [pytest.param(case, marks=() if case in wanted else SLOW) for case in every]
