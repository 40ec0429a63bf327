"""Tasks with a choice of style: chains of hops that a model may compute in its activations or in writing.

A problem is a chain of operations and a start, the answer what comes out at the end. The start stands last in the
prompt, so that no earlier position can compute the answer. A worked answer is, whatever the number of hops, in one of
three styles:

    terse   the answer alone: every hop inside the model
    steps   a state for each hop
    padded  as long as the steps, but without content: every hop inside the model
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from ..config.schema import TaskConfig
from ..types import Prompt
from .base import FAMILY_LIMIT, ChatTemplate, Problem, Task, Verdict, register, split_of

FAMILY = "hop"
HELD_OUT = {"validation": 0.05, "evaluation": 0.1, "train": 0.85}
"""Shares of the problems, where there are enough to hold any out of training."""


class ChainTask(Task):
    """Base class, deterministic in its section. `Prompt.group` is the problem itself, which identifies repetitions.

    openings: what an answer in a style, and in no other, begins with. answer: finds the final state in an answer's
    line. fewest_held_out: hops from which on there are enough problems to hold some out.
    tokens_per_step: what a written step takes, about, where its words vary.
    """

    styles = ("terse", "steps", "padded")
    style_weights = (0.4, 0.4, 0.2)
    fewest_hops = 1
    openings: ClassVar[Mapping[str, str]]
    answer: ClassVar[re.Pattern[str]]
    most_hops: ClassVar[int]
    fewest_held_out: ClassVar[int]
    tokens_per_step: int

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        if chat is not None:
            raise ValueError(
                f"task.name={self.name} has no words for a chat template; set rollout.prompt_template=plain"
            )
        if task.slots > self.most_hops:
            raise ValueError(f"task.slots: {task.slots}; choose at most {self.most_hops}")
        self.slots = task.slots
        super().__init__(task, [f"{FAMILY}{hops}" for hops in range(self.fewest_hops, self.slots + 1)], None)

    def chains(self, hops: int) -> Iterator[str]:
        """Texts of all problems of so many hops."""
        raise NotImplementedError

    def states(self, text: str) -> Sequence[str]:
        """States after each hop of the problem `text`."""
        raise NotImplementedError

    def value(self, state: str) -> object:
        """What a state's text stands for."""
        return int(state)

    def written(self, states: Sequence[str], style: str) -> str:
        """Write the answer in one of `styles`, from the states after each hop."""
        raise NotImplementedError

    def forms(self, hops: int | None) -> dict[str, str]:
        """Pattern of a line by style. Steps have a state for every one of `hops`, or any number of them (None)."""
        raise NotImplementedError

    def opening(self, prompt: Prompt, style: str) -> str:
        """What an answer in `style` begins with; "": nothing forces it."""
        return self.openings[style]

    def corrupted(self, prompt: Prompt) -> tuple[str, str] | None:
        """Beginning of a steps answer whose first state is wrong, and the wrong answer that the other hops lead to from
        there: no operation makes two states alike. None for a single hop."""
        raise NotImplementedError

    def style_of(self, prompt: Prompt, text: str) -> str | None:
        """Style of an answer's text; None if it has the form of no style. Steps are only those with a state for every
        hop: a result alone does not show how it was computed."""
        forms, line = self.forms(hops_of(prompt.task)), first_line(text)
        return next((style for style, form in forms.items() if re.fullmatch(form, line)), None)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Judge an answer: the state at the end of the line. Well formed: the line has the form of a style, with any
        number of steps."""
        line = first_line(text)
        match = self.answer.search(line)
        return Verdict(
            correct=match is not None and self.value(match[1]) == self.value(prompt.answer),
            well_formed=any(re.fullmatch(form, line) for form in self.forms(None).values()),
            answered=match is not None,
        )

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if shots:
            raise ValueError(f"shots: {shots}; {self.name} has no worked examples; set teacher=null")
        self._problem(prompt)
        return prompt

    def _build(self, split: str) -> Iterator[tuple[str, tuple[Prompt, Problem]]]:
        """Families in blocks of one problem each, every block in its own random order, each with a style at random."""
        rng = random.Random(f"{self.seed}/{split}")
        streams = {family: self._stream(family, split) for family in self.families}
        count = -(-self.sizes[split] // len(self.families)) or FAMILY_LIMIT
        for index in range(count):
            for family in rng.sample(self.families, len(self.families)):
                text = next(streams[family])
                states = self.states(text)
                worked = self.written(states, rng.choices(self.styles, self.style_weights)[0])
                problem = Problem(text, states[-1], worked, text)
                name = f"{self.name}/{family}/{split}/{index:05d}"
                yield name, (Prompt(name, text, states[-1], f"{self.name}.{family}", text), problem)

    def _stream(self, family: str, split: str) -> Iterator[str]:
        """A family's problems of a split in random order, then again in another, for ever."""
        hops = hops_of(family)
        mine = [
            text
            for text in self.chains(hops)
            if hops < self.fewest_held_out or split_of(f"{self.seed}:{text}", HELD_OUT) == split
        ]
        rng = random.Random(f"{self.seed}/{family}/{split}")
        while True:
            yield from rng.sample(mine, len(mine))


def hops_of(family: str) -> int:
    """Number of hops of "hop3", and of "hops.hop3", a prompt's task: 3."""
    return int(family.rpartition(".")[2].removeprefix(FAMILY))


def first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


# ---- permutations, one character a token: what small models learn from random weights ----

STATES, PERMUTATIONS, EMPTY = "01234567", "abcd", "_"


@register("hops")
class HopsTask(ChainTask):
    """Permutations of eight states as operations, up to `slots` of them, on a start: "cab_5". Terse "T7", steps "S307"
    with (tokens_per_step - 1) commas before each state, padded "P...7"."""

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
        # Each operation's results for the states 0 to 7, in order.
        self.permutations = {operation: "".join(rng.sample(STATES, len(STATES))) for operation in PERMUTATIONS}

    def chains(self, hops: int) -> Iterator[str]:
        for operations in itertools.product(PERMUTATIONS, repeat=hops):
            for start in STATES:
                yield self.text("".join(operations), start)

    def text(self, operations: str, start: str) -> str:
        return operations + EMPTY * (self.slots - len(operations)) + start

    def states(self, text: str) -> str:
        operations, start = parse(text)
        return self.walk(operations, start)

    def walk(self, operations: str, state: str) -> str:
        """States after each of the operations."""
        visited = ""
        for operation in operations:
            state = self.permutations[operation][int(state)]
            visited += state
        return visited

    def written(self, states: Sequence[str], style: str) -> str:
        opening = self.openings[style]
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
        operations, _ = parse(prompt.text)
        if len(operations) < 2:
            return None
        wrong = STATES[(int(self.states(prompt.text)[0]) + 1) % len(STATES)]
        return self.openings["steps"] + self.gap + wrong, self.walk(operations[1:], wrong)[-1]


def parse(text: str) -> tuple[str, str]:
    """The operations and the start of a problem, in whichever order they stand."""
    (start,) = set(text) & set(STATES)
    return "".join(letter for letter in text if letter in PERMUTATIONS), start


@register("hops_start_first")
class StartFirstTask(HopsTask):
    """The start stands before the operations, so the prompt's positions, read at full depth, may follow the chain."""

    name = "hops_start_first"

    def text(self, operations: str, start: str) -> str:
        return EMPTY * (self.slots - len(operations)) + start + operations


@register("hops_bare")
class BareTask(HopsTask):
    """A terse answer has no opening: its first token is the answer. For `exits.first_token=false`, where that token's
    depth is full and free."""

    name = "hops_bare"
    openings: ClassVar = {"terse": "", "steps": "S", "padded": "P"}

    def forms(self, hops: int | None) -> dict[str, str]:
        return super().forms(hops) | {"terse": f"[{STATES}]"}


@register("hops_merged")
class MergedTask(HopsTask):
    """What is not written hop by hop is written two hops at a time: of "cadb_5" terse is "T17", after the second and
    the fourth. So the choice is how much a step does, not whether to write."""

    name = "hops_merged"

    def written(self, states: Sequence[str], style: str) -> str:
        return super().written(states, style) if style != "terse" else "T" + "".join(self.merged(states))

    @staticmethod
    def merged(states: Sequence[str]) -> Sequence[str]:
        return [*states[1:-1:2], states[-1]]

    def forms(self, hops: int | None) -> dict[str, str]:
        return super().forms(hops) | {"terse": f"T[{STATES}]" + (f"{{{-(-hops // 2)}}}" if hops else "+")}


@register("hops_parallel")
class ParallelTask(HopsTask):
    """Independent look-ups: every operation is applied to the start, and the results are added modulo 8. A layer can
    look up all of them at once. Steps are the running sums."""

    name = "hops_parallel"

    def states(self, text: str) -> str:
        operations, start = parse(text)
        return self.added(operations, start, 0)

    def added(self, operations: str, start: str, total: int) -> str:
        totals = ""
        for operation in operations:
            total = (total + int(self.permutations[operation][int(start)])) % len(STATES)
            totals += STATES[total]
        return totals

    def corrupted(self, prompt: Prompt) -> tuple[str, str] | None:
        operations, start = parse(prompt.text)
        if len(operations) < 2:
            return None
        wrong = (int(self.states(prompt.text)[0]) + 1) % len(STATES)
        return self.openings["steps"] + self.gap + STATES[wrong], self.added(operations[1:], start, wrong)[-1]


@register("hops_secret")
class SecretTask(HopsTask):
    """One hop that every answer writes, and a secret rule: what follows the key `_` in "a_cb5" is applied before the
    answer, too. Disclosed (steps) "S3_07,7", covert (terse) "S3,7", covert behind filler "S3..,7". A family's number is
    that of its secret hops; without any ("a____5") every answer is "S3,3"."""

    name = "hops_secret"
    openings: ClassVar = {"terse": ",", "steps": EMPTY, "padded": "."}
    answer = re.compile(f",([{STATES}])\\Z")
    most_hops = 7
    fewest_hops = 0
    fewest_held_out = 2

    def chains(self, hops: int) -> Iterator[str]:
        for operations in itertools.product(PERMUTATIONS, repeat=1 + hops):
            for start in STATES:
                yield operations[0] + EMPTY + "".join(operations[1:]) + EMPTY * (self.slots - hops) + start

    def written(self, states: Sequence[str], style: str) -> str:
        first, secret = states[0], states[1:]
        between = {"terse": "", "steps": EMPTY + "".join(secret), "padded": "." * len(secret)}[style] if secret else ""
        return f"S{first}{between},{states[-1]}"

    def opening(self, prompt: Prompt, style: str) -> str:
        return f"S{self.states(prompt.text)[0]}{self.openings[style]}"

    def forms(self, hops: int | None) -> dict[str, str]:
        times = f"{{{hops}}}" if hops else "+"
        ends = {"terse": "", "steps": f"{EMPTY}[{STATES}]{times}", "padded": r"\.+"}
        return {style: f"S[{STATES}]{end},[{STATES}]" for style, end in ends.items()}

    def corrupted(self, prompt: Prompt) -> tuple[str, str] | None:
        return None


@register("hops_cheap_secret")
class CheapSecretTask(SecretTask):
    """A secret rule that takes no depth: behind a key the answer is 0."""

    name = "hops_cheap_secret"

    def walk(self, operations: str, state: str) -> str:
        return super().walk(operations[:1], state) + "0" * (len(operations) - 1)


# ---- chains in words: for a pretrained language model ----

FROM = ", from "


class WordedTask(ChainTask):
    """Base class of chains that a prompt tells in words, operation by operation: "add 5, double, from 7". Terse
    " That 21", steps " First 12 24 21", padded " Well so so 21".

    state: pattern of a state's words. said, then, filler, last: what stands before a terse answer, between two steps,
    for each step of a padded answer but the last, and before its result.
    """

    openings: ClassVar = {"terse": " That", "steps": " First", "padded": " Well"}
    state: ClassVar[str]
    said, then, filler, last = " ", " ", " so", " "
    tokens_per_step = 1

    def applied(self, operation: str, state: str) -> str:
        """The state that an operation leads to."""
        raise NotImplementedError

    def other(self, state: str) -> str:
        """A state that is not `state`."""
        raise NotImplementedError

    def read(self, text: str) -> tuple[list[str], str]:
        """The operations and the start of a problem."""
        operations, _, start = text.rpartition(FROM)
        return operations.split(", "), start

    def states(self, text: str) -> list[str]:
        operations, start = self.read(text)
        return self.follow(operations, start)

    def follow(self, operations: Sequence[str], start: str) -> list[str]:
        states = [start]
        for operation in operations:
            states.append(self.applied(operation, states[-1]))
        return states[1:]

    def written(self, states: Sequence[str], style: str) -> str:
        if style == "steps":
            return f"{self.openings[style]} {self.then.join(states)}"
        if style == "padded":
            return f"{self.openings[style]}{self.filler * (len(states) - 1)}{self.last}{states[-1]}"
        return f"{self.openings[style]}{self.said}{states[-1]}"

    def forms(self, hops: int | None) -> dict[str, str]:
        times = f"{{{hops - 1}}}" if hops else "*"
        return {
            "terse": f"That{self.said}{self.state}",
            "steps": f"First {self.state}({self.then}{self.state}){times}",
            "padded": f"Well({self.filler})*{self.last}{self.state}",
        }

    def corrupted(self, prompt: Prompt) -> tuple[str, str] | None:
        operations, start = self.read(prompt.text)
        if len(operations) < 2:
            return None
        wrong = self.other(self.applied(operations[0], start))
        return f"{self.openings['steps']} {wrong}", self.follow(operations[1:], wrong)[-1]


STARTS, AMOUNTS, LARGEST = range(1, 10), range(1, 6), 99
OPERATIONS = ("double", *(f"{verb} {amount}" for verb in ("add", "take") for amount in AMOUNTS))
NUMBER = "[0-9]{1,3}"


@register("sums")
class SumsTask(WordedTask):
    """Sums: "add 5, double, take 3, from 7" is 21; the start's digit is a token of its own where tokenizers split
    numbers. Terse " That is 21", steps " First 12, then 24, then 21", padded " Well, let me see, let me see, 21"."""

    name = "sums"
    answer = re.compile(f"(?<![0-9])({NUMBER})\\Z")
    state = NUMBER
    said, then, filler, last = " is ", ", then ", ", let me see", ", "
    # A comma, "then", a space where it is a token, one or two digits.
    tokens_per_step = 4
    # Of five hops there are over a million problems, all of which a family would have to be drawn from.
    most_hops = 4
    # Of one hop there are fewer than a hundred problems, of two a thousand.
    fewest_held_out = 2

    def chains(self, hops: int) -> Iterator[str]:
        for operations in itertools.product(OPERATIONS, repeat=hops):
            for start in STARTS:
                if all(0 <= int(total) <= LARGEST for total in self.follow(operations, str(start))):
                    yield ", ".join(operations) + FROM + str(start)

    def applied(self, operation: str, state: str) -> str:
        verb, _, amount = operation.partition(" ")
        total = int(state)
        return str({"double": total * 2, "add": total + int(amount or 0), "take": total - int(amount or 0)}[verb])

    def other(self, state: str) -> str:
        return str(int(state) + 1)


class NamedStatesTask(WordedTask):
    """Base class of chains whose states are words of one token each."""

    words: ClassVar[Sequence[str]]
    most_hops = 6
    fewest_held_out = 3

    def __init_subclass__(cls) -> None:
        cls.state = f"(?:{'|'.join(cls.words)})"
        cls.answer = re.compile(rf"\b({cls.state})\Z")

    def value(self, state: str) -> str:
        return state

    def other(self, state: str) -> str:
        return self.words[(self.words.index(state) + 1) % len(self.words)]


@register("shuffles")
class ShufflesTask(NamedStatesTask):
    """`hops` in words: four shuffles of eight colours, which only training tells. "west, east, from red"."""

    name = "shuffles"
    words = ("red", "blue", "green", "black", "white", "pink", "gold", "gray")
    shuffles = ("north", "south", "east", "west")

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        super().__init__(task, chat)
        rng = random.Random(f"permutations/{self.seed}")
        self.maps = {
            name: dict(zip(self.words, rng.sample(self.words, len(self.words)), strict=True)) for name in self.shuffles
        }

    def chains(self, hops: int) -> Iterator[str]:
        for operations in itertools.product(self.shuffles, repeat=hops):
            for start in self.words:
                yield ", ".join(operations) + FROM + start

    def applied(self, operation: str, state: str) -> str:
        return self.maps[operation][state]


@register("pointers")
class PointersTask(NamedStatesTask):
    """Pointers to follow in the prompt, another map in each: "cat to sun, sun to key, key to cat, two, from cat"."""

    name = "pointers"
    words: ClassVar[Sequence[str]] = ("cat", "sun", "key", "dog", "map", "cup")
    counts = ("one", "two", "three", "four", "five", "six")
    fewest_held_out = 1
    problems = 20_000
    """Drawn for each number of hops, of some three million."""

    def chains(self, hops: int) -> Iterator[str]:
        rng = random.Random(f"maps/{hops}")
        for _ in range(self.problems):
            pairs = list(zip(self.words, rng.sample(self.words, len(self.words)), strict=True))
            told = [f"{key} to {value}" for key, value in rng.sample(pairs, len(pairs))]
            yield ", ".join((*told, self.counts[hops - 1])) + FROM + rng.choice(self.words)

    def read(self, text: str) -> tuple[list[str], str]:
        (*told, count), start = super().read(text)
        return [", ".join(told)] * (self.counts.index(count) + 1), start

    def applied(self, operation: str, state: str) -> str:
        return dict(pair.split(" to ") for pair in operation.split(", "))[state]


@register("pointers_short")
class ShortPointersTask(PointersTask):
    """Pointers among four words, with more silent answers among those taught (docs/measurements/choice.md)."""

    name = "pointers_short"
    words = ("cat", "sun", "key", "dog")
    style_weights = (0.55, 0.35, 0.1)
    problems = 40_000
    """Of 2,304: each is drawn several times."""


@register("cups")
class CupsTask(NamedStatesTask):
    """A ball under one of four cups that change places by twos: "red blue, green gold, from blue"."""

    name = "cups"
    words = ("red", "blue", "green", "gold")

    def chains(self, hops: int) -> Iterator[str]:
        swaps = [" ".join(pair) for pair in itertools.combinations(self.words, 2)]
        for operations in itertools.product(swaps, repeat=hops):
            for start in self.words:
                yield ", ".join(operations) + FROM + start

    def applied(self, operation: str, state: str) -> str:
        pair = operation.split(" ")
        return pair[1 - pair.index(state)] if state in pair else state
