"""Chains of permutations, one character a token: the task with a choice that small models learn from random weights.

A problem gives up to `slots` operations, permutations of eight states, and a start; the answer is the state at the end.
The start stands last in the prompt, so that no position before it can know the answer. Styles (tasks/chains.py):

    terse   T7
    steps   S307          a state for each hop; (tokens_per_step - 1) commas before each
    padded  P...7
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from ..config.schema import TaskConfig
from ..types import Prompt
from .base import ChatTemplate, register
from .chains import ChainTask

STATES, OPERATIONS, EMPTY = "01234567", "abcd", "_"


@register("hops")
class HopsTask(ChainTask):
    name = "hops"
    openings: ClassVar = {"terse": "T", "steps": "S", "padded": "P"}
    answer = re.compile(f"([{STATES}])\\Z")
    most_hops = 8
    # Of one hop there are 32 problems, of two 128.
    fewest_held_out = 3

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        super().__init__(task, chat)
        self.tokens_per_step = task.tokens_per_step
        self.gap = "," * (task.tokens_per_step - 1)
        rng = random.Random(f"permutations/{self.seed}")
        # What each operation makes of the states 0 to 7, in order.
        self.permutations = {operation: "".join(rng.sample(STATES, len(STATES))) for operation in OPERATIONS}

    def chains(self, hops: int) -> Iterator[str]:
        for operations in itertools.product(OPERATIONS, repeat=hops):
            for start in STATES:
                yield "".join(operations) + EMPTY * (self.slots - hops) + start

    def states(self, text: str) -> str:
        state, found = text[-1], ""
        for operation in text[:-1]:
            if operation != EMPTY:
                state = self.permutations[operation][int(state)]
                found += state
        return found

    def written(self, states: Sequence[str], style: str) -> str:
        opening = self.opening(style)
        if style == "steps":
            return opening + "".join(self.gap + state for state in states)
        return opening + ("." * (len(states) * (1 + len(self.gap))) if style == "padded" else "") + states[-1]

    def forms(self, hops: int | None) -> dict[str, str]:
        times = f"{{{hops}}}" if hops else "+"
        return {
            "terse": f"T[{STATES}]",
            "steps": f"S({self.gap}[{STATES}]){times}",
            "padded": rf"P\.+[{STATES}]",
        }

    def corrupted(self, prompt: Prompt) -> tuple[str, str] | None:
        """The beginning of a steps answer whose first state is wrong, and the state that the other hops lead to from
        there, itself wrong, since permutations keep different states apart. None for a single hop."""
        operations = prompt.text[:-1].rstrip(EMPTY)
        if len(operations) < 2:
            return None
        wrong = STATES[(int(self.states(prompt.text)[0]) + 1) % len(STATES)]
        return self.opening("steps") + self.gap + wrong, self.states(operations[1:] + wrong)[-1]
