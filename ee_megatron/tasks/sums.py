"""Chains of small sums in words: the task with a choice for a pretrained language model.

"add 5, double, take 3, from 7" is 21. The start stands last in the prompt, so that no position before it can know the
answer; its digit is a token of its own where tokenizers split numbers into digits. Styles (tasks/chains.py):

    terse   " That is 21"
    steps   " First 12, then 24, then 21"                  a total for each hop
    padded  " Well, let me see, let me see, 21"            about as many tokens
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from ..types import Prompt
from .base import register
from .chains import ChainTask

STARTS, AMOUNTS, LARGEST = range(1, 10), range(1, 6), 99
OPERATIONS = ("double", *(f"{verb} {amount}" for verb in ("add", "take") for amount in AMOUNTS))
FROM = ", from "
NUMBER = "[0-9]{1,3}"


@register("sums")
class SumsTask(ChainTask):
    name = "sums"
    openings: ClassVar = {"terse": " That", "steps": " First", "padded": " Well"}
    answer = re.compile(f"(?<![0-9])({NUMBER})\\Z")
    # A comma, "then", a space where it is a token, one or two digits.
    tokens_per_step = 4
    # Of five hops there are over a million problems, all of which a family would have to be drawn from.
    most_hops = 4
    # Of one hop there are fewer than a hundred problems, of two a thousand.
    fewest_held_out = 2

    def chains(self, hops: int) -> Iterator[str]:
        for operations in itertools.product(OPERATIONS, repeat=hops):
            for start in STARTS:
                if all(0 <= total <= LARGEST for total in totals(operations, start)):
                    yield ", ".join(operations) + FROM + str(start)

    def states(self, text: str) -> list[str]:
        operations, start = _read(text)
        return [str(total) for total in totals(operations, start)]

    def written(self, states: Sequence[str], style: str) -> str:
        if style == "steps":
            return f"{self.opening(style)} {', then '.join(states)}"
        if style == "padded":
            return f"{self.opening(style)}{', let me see' * (len(states) - 1)}, {states[-1]}"
        return f"{self.opening(style)} is {states[-1]}"

    def forms(self, hops: int | None) -> dict[str, str]:
        times = f"{{{hops - 1}}}" if hops else "*"
        return {
            "terse": f"That is {NUMBER}",
            "steps": f"First {NUMBER}(, then {NUMBER}){times}",
            "padded": f"Well(, let me see)*, {NUMBER}",
        }

    def corrupted(self, prompt: Prompt) -> tuple[str, str] | None:
        """The beginning of a steps answer whose first total is one too large, and what the other hops make of it,
        itself wrong, since no operation makes two totals alike. None for a single hop."""
        operations, start = _read(prompt.text)
        if len(operations) < 2:
            return None
        wrong = totals(operations[:1], start)[0] + 1
        return f"{self.opening('steps')} {wrong}", str(totals(operations[1:], wrong)[-1])


def totals(operations: Sequence[str], start: int) -> list[int]:
    """The running totals of operations on `start`, one for each."""
    total, found = start, []
    for operation in operations:
        verb, _, amount = operation.partition(" ")
        total = {"double": total * 2, "add": total + int(amount or 0), "take": total - int(amount or 0)}[verb]
        found.append(total)
    return found


def _read(text: str) -> tuple[list[str], int]:
    operations, _, start = text.rpartition(FROM)
    return operations.split(", "), int(start)
