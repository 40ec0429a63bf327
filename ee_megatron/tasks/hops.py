"""Chains of permutations that a model may follow in its activations or in writing: a task with a choice.

A problem gives up to `slots` operations, permutations of eight states, and a start; the answer is the state at the end.
One character is one token, and the start stands last in the prompt, so that no position before it can know the answer.
A worked answer is, whatever the number of hops:

    terse   T7            every hop inside the model
    steps   S307          a state for each hop; (tokens_per_step - 1) commas before each
    padded  P...7         as long as the steps, but without content: every hop inside the model
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

from ..config.schema import TaskConfig
from ..types import Prompt
from .base import ChatTemplate, Problem, ProblemTask, Verdict, share_of

STATES, OPERATIONS, EMPTY = "01234567", "abcd", "_"
MOST_HOPS = 8
FAMILIES = {f"hop{hops}": hops for hops in range(1, MOST_HOPS + 1)}
HELD_OUT = {"validation": 0.05, "evaluation": 0.1}
"""Shares of the problems that training never sees; of one and two hops there are too few to hold any out."""
FEWEST_HELD_OUT = 3
PROBLEMS = 1500
"""Problems of a split per family, where all there are are asked for: they come again and again."""


class HopsTask(ProblemTask):
    """Deterministic in its section. `Prompt.group` is the problem itself, by which repetitions are told."""

    name = "hops"
    styles = ("terse", "steps", "padded")

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        if chat is not None:
            raise ValueError("task.name=hops has no words for a chat template; set rollout.prompt_template=plain")
        super().__init__(task, "", None)
        if task.slots > MOST_HOPS:
            raise ValueError(f"task.slots: {task.slots}; choose at most {MOST_HOPS}")
        self.slots = task.slots
        known, families = [name for name, hops in FAMILIES.items() if hops <= self.slots], task.families
        if not families or len(set(families)) != len(families) or not set(families) <= set(known):
            raise ValueError(f"task.families: {list(families)}; choose one or more, each once, of {', '.join(known)}")
        weights = task.style_weights
        if len(weights) != len(self.styles) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"task.style_weights: {list(weights)}; give {len(self.styles)} shares, of {', '.join(self.styles)}"
            )
        self.families, self.gap = tuple(families), "," * (task.tokens_per_step - 1)
        self.style_weights = tuple(weight / sum(weights) for weight in weights)
        self.permutations = _permutations(self.seed)

    # ---- problems ----

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if shots:
            raise ValueError(f"shots: {shots}; hops has no worked examples; set teacher.enabled=false")
        split = prompt.id.split("/")[2:3]
        if not split or split[0] not in self.sizes or prompt.id not in self._built(split[0]):
            raise self._unknown(prompt)
        return prompt

    def _built(self, split: str) -> dict[str, tuple[Prompt, Problem]]:
        if split in self.sizes and split not in self._problems:
            self._problems[split] = dict(itertools.islice(self._build(split), self.sizes[split] or None))
        return super()._built(split)

    def _build(self, split: str) -> Iterator[tuple[str, tuple[Prompt, Problem]]]:
        """Families in blocks of one problem each, every block in its own random order, each with a style at random."""
        rng = random.Random(f"{self.seed}/{split}")
        streams = {family: self._stream(family, split) for family in self.families}
        count = -(-self.sizes[split] // len(self.families)) or PROBLEMS
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
        hops = FAMILIES[family]
        every = [
            "".join(operations) + EMPTY * (self.slots - hops) + start
            for operations in itertools.product(OPERATIONS, repeat=hops)
            for start in STATES
        ]
        mine = [text for text in every if hops < FEWEST_HELD_OUT or self._split(text) == split]
        rng = random.Random(f"{self.seed}/{family}/{split}")
        while True:
            yield from rng.sample(mine, len(mine))

    def _split(self, text: str) -> str:
        point = share_of(f"{self.seed}:{text}")
        for split, share in HELD_OUT.items():
            if point < share:
                return split
            point -= share
        return "train"

    def states(self, text: str) -> str:
        """The states after each hop of the problem `text`."""
        state, found = text[-1], ""
        for operation in text[:-1]:
            if operation != EMPTY:
                state = self.permutations[operation][int(state)]
                found += state
        return found

    # ---- answers ----

    def written(self, states: str, style: str) -> str:
        """The answer in one of `styles`, from the states after each hop."""
        opening = self.opening(style)
        if style == "steps":
            return opening + "".join(self.gap + state for state in states)
        return opening + ("." * (len(states) * (1 + len(self.gap))) if style == "padded" else "") + states[-1]

    def opening(self, style: str) -> str:
        """What an answer in that style begins with, and none of another."""
        return {"terse": "T", "steps": "S", "padded": "P"}[style]

    def style_of(self, prompt: Prompt, text: str) -> str | None:
        """The style of an answer, None if it has the form of none. Steps are only those with a state for every hop: a
        result behind an S alone says nothing of the way to it."""
        hops, line = FAMILIES[prompt.task.partition(".")[2]], _first_line(text)
        if re.fullmatch(f"T[{STATES}]", line):
            return "terse"
        if re.fullmatch(f"S({self.gap}[{STATES}]){{{hops}}}", line):
            return "steps"
        return "padded" if re.fullmatch(rf"P\.+[{STATES}]", line) else None

    def corrupted(self, prompt: Prompt) -> tuple[str, str] | None:
        """The beginning of a steps answer whose first state is wrong, and the state that the other hops lead to from
        there, itself wrong, since permutations keep different states apart. None for a single hop."""
        operations = prompt.text[:-1].rstrip(EMPTY)
        if len(operations) < 2:
            return None
        wrong = STATES[(int(self.states(prompt.text)[0]) + 1) % len(STATES)]
        return self.opening("steps") + self.gap + wrong, self.states(operations[1:] + wrong)[-1]

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """The answer is the state at the end of the line. Well formed: the line has the form of a style, with however
        many steps."""
        line = _first_line(text)
        answered = line[-1:] in STATES and bool(line)
        form = rf"T[{STATES}]|S({self.gap}[{STATES}])+|P\.+[{STATES}]"
        return Verdict(
            correct=answered and line[-1] == prompt.answer,
            well_formed=re.fullmatch(form, line) is not None,
            answered=answered,
        )


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


def _permutations(seed: int) -> dict[str, str]:
    """What each operation makes of the states 0 to 7, in order."""
    rng = random.Random(f"permutations/{seed}")
    return {operation: "".join(rng.sample(STATES, len(STATES))) for operation in OPERATIONS}
