"""What tasks that make up their problems share: families in turn, worked examples set aside, prompts by split."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from ..config.schema import TaskConfig
from ..types import Prompt
from .base import SPLITS, ChatTemplate, Problem, ProblemTask, Verdict

FAMILY_LIMIT = 1500
"""Problems per family in a split that asks for all there are: the streams go on for long, or for ever."""
EXAMPLES = 16
"""Training problems per family that are set aside as worked examples: no prompt is ever its own example."""


class ProceduralTask(ProblemTask, ABC):
    """Deterministic in its section.

    A subclass names itself and its families and draws a family's problems; `Prompt.id` is
    "<name>/<family>/<split>/<number>" and `Prompt.task` "<name>.<family>".
    """

    instruction: ClassVar[str]

    def __init__(self, task: TaskConfig, known: Sequence[str], chat: ChatTemplate | None) -> None:
        super().__init__(task, self.instruction, chat)
        families = task.families
        if not families or len(set(families)) != len(families) or not set(families) <= set(known):
            raise ValueError(f"task.families: {list(families)}; choose one or more, each once, of {', '.join(known)}")
        self.families = tuple(families)

    @abstractmethod
    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """As in `Task`."""

    @abstractmethod
    def _draw(self, family: str, split: str, limit: int) -> list[Problem]:
        """The first `limit` problems of a family and split, fewer if there are no more.

        A longer draw starts with a shorter one.
        """

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if not 0 <= shots <= EXAMPLES:
            raise ValueError(f"shots: {shots}; {self.name} has 0 to {EXAMPLES} worked examples per family")
        family, split = self._locate(prompt)
        examples = self._draw(family, "train", EXAMPLES)
        # Kinds alternate in `examples`, so a rotation keeps the mixture where a sample would not.
        start = random.Random(f"shots/{seed}").randrange(EXAMPLES)
        chosen = [examples[(start + i) % EXAMPLES] for i in range(shots)]
        return self._with_examples(prompt, self._built(split).get(prompt.id), chosen)

    def _locate(self, prompt: Prompt) -> tuple[str, str]:
        parts = prompt.id.split("/")
        if len(parts) != 4 or parts[0] != self.name or parts[1] not in self.families or parts[2] not in SPLITS:
            raise self._unknown(prompt)
        return parts[1], parts[2]

    def _built(self, split: str) -> dict[str, tuple[Prompt, Problem]]:
        if split in SPLITS and split not in self._problems:
            self._problems[split] = self._build(split)
        return super()._built(split)

    def _build(self, split: str) -> dict[str, tuple[Prompt, Problem]]:
        """Families in blocks of one problem each, every block in its own random order."""
        size, count = self.sizes[split], len(self.families)
        wanted = -(-size // count) if size else FAMILY_LIMIT
        skip = EXAMPLES if split == "train" else 0
        drawn = {family: self._draw(family, split, wanted + skip)[skip:] for family in self.families}
        least = min(drawn, key=lambda family: len(drawn[family]))
        if size and len(drawn[least]) < wanted:
            most = count * len(drawn[least])
            raise ValueError(f"task.{split}: {size} problems, but family {least} allows at most {most}; ask for fewer")
        order = random.Random(f"order/{self.seed}/{split}")
        built: dict[str, tuple[Prompt, Problem]] = {}
        for index in range(len(drawn[least])):
            block = list(self.families)
            order.shuffle(block)
            for family in block:
                problem = drawn[family][index]
                name = f"{self.name}/{family}/{split}/{index:05d}"
                text = self.format.render(problem.question)
                built[name] = Prompt(name, text, problem.answer, f"{self.name}.{family}", problem.group), problem
        return dict(islice(built.items(), size or None))
