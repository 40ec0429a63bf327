"""What tasks with a choice share: chains of hops that a model may follow in its activations or in writing.

A problem is a chain of operations and a start, the answer what comes out at the end. A worked answer is, whatever the
number of hops, in one of three styles:

    terse   the answer alone: every hop inside the model
    steps   a state for each hop
    padded  as long as the steps, but without content: every hop inside the model
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from ..config.schema import TaskConfig
from ..types import Prompt
from .base import FAMILY_LIMIT, ChatTemplate, Problem, ProblemTask, Verdict, share_of

FAMILY = "hop"
HELD_OUT = {"validation": 0.05, "evaluation": 0.1}
"""Shares of the problems that training never sees, where there are enough to hold any out."""


class ChainTask(ProblemTask):
    """Deterministic in its section. `Prompt.group` is the problem itself, by which repetitions are told.

    A task says what its texts are (`chains`), what they come to (`states`), how that is written (`written`, `forms`,
    `openings`: what an answer in a style, and in no other, begins with) and read (`answer`); `fewest_held_out`: hops
    from which on there are enough problems to hold some out.
    """

    styles = ("terse", "steps", "padded")
    style_weights = (0.4, 0.4, 0.2)
    openings: ClassVar[Mapping[str, str]]
    answer: ClassVar[re.Pattern[str]]
    most_hops: ClassVar[int]
    fewest_held_out: ClassVar[int]

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        if chat is not None:
            raise ValueError(
                f"task.name={self.name} has no words for a chat template; set rollout.prompt_template=plain"
            )
        if task.slots > self.most_hops:
            raise ValueError(f"task.slots: {task.slots}; choose at most {self.most_hops}")
        self.slots = task.slots
        super().__init__(task, "", None, [f"{FAMILY}{hops}" for hops in range(1, self.slots + 1)])

    def chains(self, hops: int) -> Iterator[str]:
        """The text of every problem of so many hops."""
        raise NotImplementedError

    def states(self, text: str) -> Sequence[str]:
        """The states after each hop of the problem `text`."""
        raise NotImplementedError

    def written(self, states: Sequence[str], style: str) -> str:
        """The answer in one of `styles`, from the states after each hop."""
        raise NotImplementedError

    def forms(self, hops: int | None) -> dict[str, str]:
        """Style -> pattern of its line. Steps have a state for every one of `hops`, or any number of them (None)."""
        raise NotImplementedError

    def opening(self, style: str) -> str:
        return self.openings[style]

    def style_of(self, prompt: Prompt, text: str) -> str | None:
        """Steps are only those with a state for every hop: a result alone says nothing of the way to it."""
        forms, line = self.forms(hops_of(prompt.task)), first_line(text)
        return next((style for style, form in forms.items() if re.fullmatch(form, line)), None)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """The answer is the state at the end of the line. Well formed: the line has the form of a style, with however
        many steps."""
        line = first_line(text)
        found = self.answer.search(line)
        return Verdict(
            correct=found is not None and int(found[1]) == int(prompt.answer),
            well_formed=any(re.fullmatch(form, line) for form in self.forms(None).values()),
            answered=found is not None,
        )

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if shots:
            raise ValueError(f"shots: {shots}; {self.name} has no worked examples; set teacher=null")
        split = prompt.id.split("/")[2:3]
        if not split or split[0] not in self.sizes or prompt.id not in self._built(split[0]):
            raise self._unknown(prompt)
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
        mine = [text for text in self.chains(hops) if hops < self.fewest_held_out or self._split(text) == split]
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


def hops_of(family: str) -> int:
    """ "hop3", and "hops.hop3" of a prompt's task, -> 3."""
    return int(family.rpartition(".")[2].removeprefix(FAMILY))


def first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()
