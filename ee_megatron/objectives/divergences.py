"""Divergence terms of the loss: which teacher distribution they use, and in which direction."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Teacher(enum.Enum):
    """The distribution that a divergence compares the policy's with."""

    STORED = "topk"
    """The one that the batch brings: its most probable tokens and the rest as one tail."""
    REFERENCE = "full"
    """The reference's over the whole vocabulary, for which it runs before the update."""


TEACHERS = {teacher.value: teacher for teacher in Teacher}

# Addends [n, 1] each -> their sums over the tensor-parallel ranks, side by side [n, number of addends].
Total = Callable[..., "Tensor"]
# A divergence [n], nats, and what makes its slope [n, V_local] by the student's logits.
Sloped = tuple["Tensor", Callable[[], "Tensor"]]


@dataclass(frozen=True)
class Direction:
    """A divergence of the student's distribution p from the teacher's q, given as log p, log q.

    lumped: both [n, k], a whole distribution -> [n], nats; autograd differentiates it.
    sharded: both [n, V_local] and `Total` -> `Sloped`. -inf stands at padded rows of a sharded vocabulary.
    """

    lumped: Callable[[Tensor, Tensor], Tensor]
    sharded: Callable[[Tensor, Tensor, Total], Sloped]


def _student_teacher(student: Tensor, teacher: Tensor, total: Total) -> Sloped:
    p, gap = student.exp(), student - teacher
    divergence = total(_expected(p, gap))
    return divergence.squeeze(-1), lambda: _slope(p, gap, divergence, 1.0)


def _teacher_student(student: Tensor, teacher: Tensor, total: Total) -> Sloped:
    q = teacher.exp()
    return total(_expected(q, teacher - student)).squeeze(-1), lambda: student.exp() - q


def _jensen_shannon(student: Tensor, teacher: Tensor, total: Total) -> Sloped:
    p, q = student.exp(), teacher.exp()
    middle = (0.5 * (p + q)).log()
    gap = student - middle
    both = total(_expected(p, gap), _expected(q, teacher - middle))
    return both.mean(-1), lambda: _slope(p, gap, both[:, :1], 0.5)


def _jensen_shannon_lumped(p: Tensor, q: Tensor) -> Tensor:
    middle = p.logaddexp(q) - math.log(2.0)
    return 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))


def _expected(p: Tensor, values: Tensor) -> Tensor:
    """sum p * values [n, 1], with 0 * inf = 0 (padded rows)."""
    return (p * values).where(p > 0, 0.0).sum(-1, keepdim=True)


def _slope(p: Tensor, gap: Tensor, mean: Tensor, share: float) -> Tensor:
    """d/dz of share * sum p gap: p (gap - sum p gap). What comes through gap itself sums to zero."""
    return (share * p * (gap - mean)).where(p > 0, 0.0)


KL_DIRECTIONS = {
    "student_teacher": Direction(lambda p, q: (p.exp() * (p - q)).sum(-1), _student_teacher),
    "teacher_student": Direction(lambda p, q: (q.exp() * (q - p)).sum(-1), _teacher_student),
    "jensen_shannon": Direction(_jensen_shannon_lumped, _jensen_shannon),
}
"""KL(student ‖ teacher), KL(teacher ‖ student), and the mean of both against their midpoint."""
