"""Built-in arithmetic: products, sums, one-step word problems and three-term chains, held out by operand pair.

The wording is short, because every later stage pays for each prompt token.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations_with_replacement

from ..config.schema import TaskConfig
from ..types import Prompt
from .answers import MAX_NUMBER, last_number, number_value
from .base import NO_ANSWER, SHARES, ChatTemplate, Problem, ProceduralTask, Verdict, register, split_of

Pair = tuple[int, int]


def pairs_between(low: int, high: int) -> tuple[Pair, ...]:
    """All unordered pairs of numbers from `low` to `high`, both included."""
    return tuple(combinations_with_replacement(range(low, high + 1), 2))


# fmt: off
NAMES = (
    "Ada", "Ben", "Cara", "Dan", "Ella", "Finn", "Gina", "Hugo", "Ivy", "Jack", "Kate", "Leo", "Mia", "Noah", "Olga",
    "Paul", "Rosa", "Sam", "Tom", "Uma",
)
THINGS = (
    "apples", "books", "cards", "coins", "eggs", "flowers", "keys", "marbles", "nuts", "pears", "pens", "plums",
    "shells", "stamps", "stones",
)
HOLDERS = ("bags", "boxes", "jars", "baskets", "trays", "drawers", "crates", "cups")
PRODUCT = (
    "What is {a} times {b}?", "What is {a} x {b}?", "What is {a} multiplied by {b}?",
    "What is the product of {a} and {b}?", "How much is {a} times {b}?", "How much is {a} x {b}?",
    "Multiply {a} by {b}.", "Compute {a} x {b}.", "Compute {a} times {b}.", "Calculate {a} x {b}.",
    "Calculate {a} times {b}.", "Work out {a} x {b}.", "Find the product of {a} and {b}.",
    "Give the product of {a} and {b}.", "Tell me {a} times {b}.", "Tell me {a} x {b}.", "{a} x {b} = ?",
)
SUM = (
    "What is {a} plus {b}?", "What is {a} + {b}?", "What is the sum of {a} and {b}?", "How much is {a} plus {b}?",
    "Add {a} and {b}.", "Compute {a} + {b}.", "{a} + {b} = ?",
)
WORD_PRODUCT = (
    "{name} has {a} {holders} with {b} {things} in each. How many {things} are there?",
    "{name} fills {a} {holders}, each with {b} {things}. How many {things} is that?",
    "{name} buys {a} {holders} of {b} {things}. How many {things} does {name} buy?",
    "There are {b} {things} in each of {a} {holders}. How many {things} are there?",
)
WORD_SUM = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "{name} has {a} {things} and {friend} has {b}. How many {things} do they have together?",
    "{name} finds {a} {things}, then {b} more. How many {things} is that?",
)
WORD_DIFFERENCE = (
    "{name} has {a} {things} and gives {b} away. How many {things} are left?",
    "{name} has {a} {things} and loses {b}. How many {things} does {name} still have?",
    "Of {a} {things}, {name} sells {b}. How many {things} remain?",
)
CHAIN = ("What is {term}?", "Compute {term}.", "How much is {term}?", "Work out {term}.", "{term} = ?")
# fmt: on

_SYMBOLS: dict[str, Callable[[int, int], int]] = {"x": operator.mul, "+": operator.add, "-": operator.sub}


def _group(a: int, b: int) -> str:
    return f"{min(a, b)},{max(a, b)}"


def _step(a: int, symbol: str, b: int) -> tuple[str, int]:
    result = _SYMBOLS[symbol](a, b)
    return f" {a} {symbol} {b} = {result}.", result


@dataclass(frozen=True)
class Kind:
    """One kind of problem in a family: its pairs of operands by task.operands, the symbols of its one or two
    operations, and the templates of its question, which tell a story about `words`."""

    name: str
    operands: dict[str, tuple[Pair, ...]]
    symbols: str
    templates: tuple[str, ...]
    words: bool = False

    def render(self, a: int, b: int, rng: random.Random, inside: Callable[[int, int], bool]) -> Problem | None:
        """Render a problem; None if a draw does not work. `inside`: whether a pair belongs to the split being drawn."""
        if self.symbols == "-":
            a, b = max(a, b), min(a, b)
            if a == b:
                return None
        elif rng.random() >= 0.5:
            a, b = b, a
        first, second = self.symbols[0], self.symbols[1:]
        steps, result = _step(a, first, b)
        values: dict[str, object] = {"a": a, "b": b}
        group = _group(a, b)
        if self.words:
            name, friend = rng.sample(NAMES, 2)
            values |= {"name": name, "friend": friend, "things": rng.choice(THINGS), "holders": rng.choice(HOLDERS)}
        for symbol in second:
            choices = [c for c in range(2, 21) if inside(result, c) and (symbol == "+" or c < result)]
            if not choices:
                return None
            c = rng.choice(choices)
            values["term"], group = f"{a} {first} {b} {symbol} {c}", f"{group};{_group(result, c)}"
            step, result = _step(result, symbol, c)
            steps += step
        question = rng.choice(self.templates).format(**values)
        return Problem(question, str(result), f"{steps} The answer is {result}", group)


def _both(small: tuple[Pair, ...], wide: tuple[Pair, ...]) -> dict[str, tuple[Pair, ...]]:
    return {"small": small, "wide": wide}


# Products beyond the table that a small model still gets right at times.
_BEYOND = tuple((a, b) for a in range(2, 10) for b in (*range(13, 61), 70, 80, 90))
_PRODUCTS = _both(pairs_between(2, 12), pairs_between(2, 12) + _BEYOND)

FAMILIES: dict[str, tuple[Kind, ...]] = {
    "product": (Kind("product", _PRODUCTS, "x", PRODUCT),),
    "sum": (Kind("sum", _both(pairs_between(5, 40), pairs_between(5, 99)), "+", SUM),),
    "word": (
        Kind("product", _PRODUCTS, "x", WORD_PRODUCT, words=True),
        Kind("sum", _both(pairs_between(2, 20), pairs_between(2, 60)), "+", WORD_SUM, words=True),
        Kind("difference", _both(pairs_between(2, 20), pairs_between(2, 40)), "-", WORD_DIFFERENCE, words=True),
    ),
    "chain": (
        Kind("product-sum", _both(pairs_between(2, 9), pairs_between(2, 20)), "x+", CHAIN),
        Kind("sum-sum", _both(pairs_between(2, 20), pairs_between(2, 40)), "++", CHAIN),
        Kind("product-difference", _both(pairs_between(2, 9), pairs_between(2, 20)), "x-", CHAIN),
        Kind("sum-difference", _both(pairs_between(2, 20), pairs_between(2, 40)), "+-", CHAIN),
    ),
}

ATTEMPTS = 12
_WELL_FORMED = re.compile(r"The answer is (-?[0-9]+)\.?")
_MARK = "The answer is"


class PairSplit:
    """Assigns each unordered pair of operands to one split, for all families and templates.

    The small pairs (2..12), of which there are only 66, are dealt out in exact shares; all others by a hash.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        pairs = list(pairs_between(2, 12))
        random.Random(f"pairs/{seed}").shuffle(pairs)
        first, second = round(SHARES["train"] * len(pairs)), round(SHARES["validation"] * len(pairs))
        splits = ["train"] * first + ["validation"] * second + ["evaluation"] * (len(pairs) - first - second)
        self._small = dict(zip(pairs, splits, strict=True))

    def __call__(self, a: int, b: int) -> str:
        pair = (min(a, b), max(a, b))
        return self._small.get(pair) or split_of(f"{self.seed}:{pair[0]},{pair[1]}")


@register("arithmetic")
class ArithmeticTask(ProceduralTask):
    """Built-in arithmetic. `Prompt.group` lists a problem's operand pairs, "3,8" or, for a chain, "3,8;5,24"."""

    name = "arithmetic"
    instruction = 'Write the calculation on one line and end it with "The answer is <number>".'

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        super().__init__(task, FAMILIES, chat)
        self._pair_split, self.operands = PairSplit(self.seed), task.operands

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        return verify_line(prompt.answer, text)

    def _streams(self, family: str, split: str) -> list[Iterator[Problem]]:
        seen: set[str] = set()
        return [self._stream(kind, family, split, seen) for kind in FAMILIES[family]]

    def _stream(self, kind: Kind, family: str, split: str, seen: set[str]) -> Iterator[Problem]:
        """Distinct problems: all pairs of the split once before a pair is repeated in other words."""
        rng = random.Random(f"{self.seed}/{family}/{kind.name}/{split}")
        pairs = [pair for pair in kind.operands[self.operands] if self._pair_split(*pair) == split]
        fresh = True
        while fresh:
            fresh = False
            rng.shuffle(pairs)
            for pair in pairs:
                for _ in range(ATTEMPTS):
                    problem = kind.render(*pair, rng, lambda a, b: self._pair_split(a, b) == split)
                    if problem is not None and problem.question not in seen:
                        seen.add(problem.question)
                        fresh = True
                        yield problem
                        break


def verify_line(reference: str, text: str) -> Verdict:
    """Judge the first line of an answer; later text (a run-on second question) does not count.

    Well formed: the line ends in "The answer is N", N an integer. Otherwise the line's last number is the answer.
    """
    line = text.strip()[:20000].split("\n", 1)[0].split("Question:", 1)[0].rstrip()
    at = line.rfind(_MARK)
    match = _WELL_FORMED.fullmatch(line, at) if at >= 0 else None
    if match is not None:
        written = match[1]
        correct = len(written) <= MAX_NUMBER and int(written) == int(reference)
        return Verdict(correct=correct, well_formed=True, answered=True)
    number = last_number(line)
    if number is None:
        return NO_ANSWER
    return Verdict(correct=number_value(number) == Decimal(reference), well_formed=False, answered=True)
