"""Built-in arithmetic: products, sums, one-step word problems and three-term chains, held out by operand pair."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice

from ..config.schema import TaskConfig
from ..types import Prompt
from .arithmetic_templates import FAMILIES, Kind, among
from .base import SHARES, ChatTemplate, Problem, Verdict, split_of
from .numbers import MAX_NUMBER, last_number, number_value
from .procedural import ProceduralTask

_ATTEMPTS = 12

_WELL_FORMED = re.compile(r"The answer is (-?[0-9]+)\.?")
_MARK = "The answer is"


class PairSplit:
    """Which split an unordered pair of operands belongs to, in whatever family or template it occurs.

    The small pairs (2..12), of which there are only 66, are dealt out in exact shares; all others by a hash.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        pairs = list(among(2, 12))
        random.Random(f"pairs/{seed}").shuffle(pairs)
        first, second = round(SHARES["train"] * len(pairs)), round(SHARES["validation"] * len(pairs))
        splits = ["train"] * first + ["validation"] * second + ["evaluation"] * (len(pairs) - first - second)
        self._small = dict(zip(pairs, splits, strict=True))

    def __call__(self, a: int, b: int) -> str:
        pair = (min(a, b), max(a, b))
        return self._small.get(pair) or split_of(f"{self.seed}:{pair[0]},{pair[1]}")


class ArithmeticTask(ProceduralTask):
    """Deterministic in its section.

    `Prompt.group` lists the operand pairs of the problem, "3,8" or, for a chain, "3,8;5,24".
    """

    name = "arithmetic"
    instruction = 'Write the calculation on one line and end it with "The answer is <number>".'

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        super().__init__(task, tuple(FAMILIES), chat)
        self._pair_split, self.operands = PairSplit(self.seed), task.operands

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        return verify_line(prompt.answer, text)

    def _draw(self, family: str, split: str, limit: int) -> list[Problem]:
        """As in `ProceduralTask`: the family's kinds in turn, until one has run out."""
        seen: set[str] = set()
        streams = [self._stream(kind, family, split, seen) for kind in FAMILIES[family]]
        problems: list[Problem] = []
        while len(problems) < limit:
            round_ = [problem for stream in streams for problem in islice(stream, 1)]
            if len(round_) < len(streams):
                break
            problems += round_
        return problems[:limit]

    def _stream(self, kind: Kind, family: str, split: str, seen: set[str]) -> Iterator[Problem]:
        """Distinct problems, going round all pairs of the split before any pair comes again in other words."""
        rng = random.Random(f"{self.seed}/{family}/{kind.name}/{split}")
        pairs = [pair for pair in kind.operands[self.operands] if self._pair_split(*pair) == split]
        fresh = True
        while fresh:
            fresh = False
            rng.shuffle(pairs)
            for pair in pairs:
                for _ in range(_ATTEMPTS):
                    problem = kind.render(*pair, rng, lambda a, b: self._pair_split(a, b) == split)
                    if problem is not None and problem.question not in seen:
                        seen.add(problem.question)
                        fresh = True
                        yield problem
                        break


def verify_line(reference: str, text: str) -> Verdict:
    """The verdict on the first line of an answer; what comes after it (a run-on second question) does not count.

    Well formed: the line ends in "The answer is N", N an integer. Otherwise the line's last number is the answer.
    """
    line = text.strip()[:20000].split("\n", 1)[0].split("Question:", 1)[0].rstrip()
    at = line.rfind(_MARK)
    match = _WELL_FORMED.fullmatch(line, at) if at >= 0 else None
    if match is not None:
        written = match[1]
        correct = len(written) <= MAX_NUMBER and int(written) == int(reference)
        return Verdict(correct=correct, well_formed=True, answered=True)
    found = last_number(line)
    if found is None:
        return Verdict(correct=False, well_formed=False, answered=False)
    return Verdict(correct=number_value(found) == Decimal(reference), well_formed=False, answered=True)
