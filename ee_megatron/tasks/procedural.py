"""What tasks that make up their problems share: families in turn, worked examples set aside, prompts by split."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

from ..config.schema import TaskConfig
from ..types import Prompt
from .base import SPLITS, ChatTemplate, Problem, PromptFormat, Split, Verdict, check_split, split_sizes

FAMILY_LIMIT = 1500
"""Problems per family in a split that asks for all there are: the streams go on for long, or for ever."""
EXAMPLES = 16
"""Training problems per family that are set aside as worked examples: no prompt is ever its own example."""


class ProceduralTask(ABC):
    """Deterministic in its section.

    A subclass names itself and its families and draws a family's problems; `Prompt.id` is
    "<name>/<family>/<split>/<number>" and `Prompt.task` "<name>.<family>".
    """

    name: str
    instruction: ClassVar[str]

    def __init__(self, task: TaskConfig, known: Sequence[str], chat: ChatTemplate | None) -> None:
        families, sizes = task.families, split_sizes(task)
        if not families or len(set(families)) != len(families) or not set(families) <= set(known):
            raise ValueError(f"task.families: {list(families)}; choose one or more, each once, of {', '.join(known)}")
        self.families, self.sizes, self.seed = tuple(families), sizes, task.seed
        self.format = PromptFormat(self.instruction, chat)
        self._problems: dict[str, list[tuple[Prompt, Problem]]] = {}

    def __getstate__(self) -> dict:
        # A verifier process needs no problems, and a chat template may not be picklable.
        return {**self.__dict__, "_problems": {}, "format": PromptFormat(self.instruction)}

    @abstractmethod
    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """As in `Task`."""

    @abstractmethod
    def _draw(self, family: str, split: str, limit: int) -> list[Problem]:
        """The first `limit` problems of a family and split, fewer if there are no more.

        A longer draw starts with a shorter one.
        """

    def prompts(self, split: Split) -> list[Prompt]:
        check_split(split)
        return [prompt for prompt, _ in self._built(split)]

    def worked(self, split: Split) -> list[tuple[Prompt, str]]:
        check_split(split)
        return [(prompt, problem.worked) for prompt, problem in self._built(split)]

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if not 0 <= shots <= EXAMPLES:
            raise ValueError(f"shots: {shots}; {self.name} has 0 to {EXAMPLES} worked examples per family")
        family, split = self._locate(prompt)
        question = next((p.question for known, p in self._built(cast(Split, split)) if known.id == prompt.id), None)
        if question is None:
            raise ValueError(f"prompt {prompt.id!r} is not one of this task; pass a prompt that prompts() returned")
        examples = self._draw(family, "train", EXAMPLES)
        # Kinds alternate in `examples`, so a rotation keeps the mixture where a sample would not.
        start = random.Random(f"shots/{seed}").randrange(EXAMPLES)
        chosen = [examples[(start + i) % EXAMPLES] for i in range(shots)]
        text = self.format.render(question, [(p.question, p.worked) for p in chosen])
        return Prompt(prompt.id, text, prompt.answer, prompt.task, prompt.group)

    def _locate(self, prompt: Prompt) -> tuple[str, str]:
        parts = prompt.id.split("/")
        if len(parts) != 4 or parts[0] != self.name or parts[1] not in self.families or parts[2] not in SPLITS:
            raise ValueError(f"prompt {prompt.id!r} is not one of this task; pass a prompt that prompts() returned")
        return parts[1], parts[2]

    def _built(self, split: Split) -> list[tuple[Prompt, Problem]]:
        if split not in self._problems:
            self._problems[split] = self._build(split)
        return self._problems[split]

    def _build(self, split: str) -> list[tuple[Prompt, Problem]]:
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
        built: list[tuple[Prompt, Problem]] = []
        for index in range(len(drawn[least])):
            block = list(self.families)
            order.shuffle(block)
            for family in block:
                problem = drawn[family][index]
                name = f"{self.name}/{family}/{split}/{index:05d}"
                text = self.format.render(problem.question)
                built.append((Prompt(name, text, problem.answer, f"{self.name}.{family}", problem.group), problem))
        return built[: size or None]
