"""The interface of a task: prompts divided by split, worked examples, and a verdict on an answer.

Nothing in this folder imports torch: verifier processes must start in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from ..config.schema import TaskConfig
from ..types import Prompt

Split = Literal["train", "validation", "evaluation"]
SPLITS: tuple[str, ...] = get_args(Split)
SHARES = {"train": 0.66, "validation": 0.12, "evaluation": 0.22}
EXAMPLES = 16
"""Training problems (of each family) that are set aside as worked examples: no prompt is ever its own example."""
FAMILY_LIMIT = 1500
"""Problems per family in a split that takes all: the streams are long or endless."""

ChatTemplate = Callable[[list[dict[str, str]]], str]
"""Messages [{"role", "content"}, ...] -> the text that the model reads, up to where its answer begins."""


@dataclass(frozen=True)
class Verdict:
    """A verifier's verdict on one answer.

    - correct: the final answer equals the reference
    - well_formed: it has the form that the task requires
    - answered: there is a final answer at all
    - timed_out: no verdict within the deadline (or the verifier process died); the other fields are then False
    - score: the reward by a function of the user's (`task.reward`), in [0, 1]; None: by the other fields
    """

    correct: bool
    well_formed: bool
    answered: bool
    timed_out: bool = False
    score: float | None = None

    @property
    def reward(self) -> float:
        """r_task of docs/method.md, stage 2: 1 right and well formed, 0.5 right, 0 wrong, -1 no answer; or the score.

        0 for a timed-out verdict: what the text was worth is unknown, and silence is not what happened.
        """
        if self.score is not None:
            return self.score
        if self.timed_out or (self.answered and not self.correct):
            return 0.0
        if not self.answered:
            return -1.0
        return 1.0 if self.well_formed else 0.5


NO_ANSWER = Verdict(correct=False, well_formed=False, answered=False)


TASKS: dict[str, Callable[[TaskConfig, ChatTemplate | None], Task]] = {}
"""task.name -> what makes the task, from its section of the settings and the model's chat template, if one is used."""
Maker = TypeVar("Maker", bound=Callable[..., Any])


def register(*names: str) -> Callable[[Maker], Maker]:
    """Decorator that registers what makes the tasks of these names. Raises ValueError for a name that is taken."""

    def add(maker: Maker) -> Maker:
        for name in names:
            if name in TASKS:
                raise ValueError(f"task.name={name} is registered already, by {TASKS[name]}; choose another name")
            TASKS[name] = maker
        return maker

    return add


class Problem(NamedTuple):
    """A question, its reference answer, a worked answer as the model should write it, and the groups it belongs to.
    `before`: messages in front of the question, a system's or those of earlier turns."""

    question: str
    answer: str
    worked: str
    group: str
    before: Sequence[dict[str, str]] = ()


class Task:
    """A task's prompts and verifier; the problems are held in memory, by split and prompt id. Picklable and cheap to
    unpickle: `verify` runs in another process.

    A subclass builds a split's problems (`_build`) or sets `_problems` itself. `known`: the families that task.families
    may name.
    """

    name: str
    instruction = ""
    """The form that an answer must have; stated to chat models only; plain prompts show it by example."""
    reward: Any = None
    """The `RewardFunction` of task.reward."""
    scorer = ""
    """The setting that names code of others which scores answers; it is tried on one before anything starts."""
    source: Any = None
    """The `TaskClass` of a task from a file of the user's."""

    def __init__(self, task: TaskConfig, known: Iterable[str] | None, chat: ChatTemplate | None) -> None:
        self.sizes = {"train": task.train, "validation": task.validation, "evaluation": task.evaluation}
        if any(size < 0 for size in self.sizes.values()):
            raise ValueError(f"task sizes must not be negative: {self.sizes}; 0 means all there are")
        self.chat, self.seed = chat, task.seed
        self._problems: dict[str, dict[str, tuple[Prompt, Problem]]] = {}
        self.families = tuple(task.families)
        if known is not None:
            known, families = tuple(known), set(self.families)
            if not families or len(families) != len(self.families) or not families <= set(known):
                raise ValueError(
                    f"task.families: {list(self.families)}; choose one or more, each once, of {', '.join(known)}"
                )

    def __getstate__(self) -> dict:
        # A verifier process needs no problems, and a chat template may not be picklable.
        return {**self.__dict__, "_problems": {}, "chat": None}

    def __reduce__(self) -> tuple:
        # A process that has not run the file of a user's task must run it before it knows the class.
        return _unpickled, (self.source or type(self), self.__getstate__())

    def prompts(self, split: Split) -> list[Prompt]:
        """The problems of a split, always in the same order. Raises ValueError for an unknown split."""
        return [prompt for prompt, _ in self._built(split).values()]

    def worked(self, split: Split) -> list[tuple[Prompt, str]]:
        """`prompts` with a worked answer each, as the model should write it, up to the end of its line."""
        return [(prompt, problem.worked) for prompt, problem in self._built(split).values()]

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        """The same problem (same id) with `shots` worked examples from the train split in front of it.

        All prompts of one family get the same examples, so their texts share a prefix. Raises ValueError if there
        are fewer examples than `shots`, or if the prompt is not this task's.
        """
        raise NotImplementedError

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Judge a generated answer (without the prompt). Pure."""
        raise NotImplementedError

    def render(self, question: str, examples: Sequence[Problem] = (), before: Sequence[dict[str, str]] = ()) -> str:
        """A prompt's text, worked examples in front: plain ("Question: ...\\nAnswer:") or the model's chat template.
        `before`: as in `Problem`; a plain prompt has these messages as paragraphs of the question."""
        if self.chat is None:
            question = "\n\n".join([*(message["content"] for message in before), question])
            header = "".join(f"Question: {p.question}\nAnswer:{p.worked}\n\n" for p in examples)
            return f"{header}Question: {question}\nAnswer:"
        messages = [*before]
        for p in examples:
            messages.append({"role": "user", "content": f"{p.question}\n{self.instruction}"})
            messages.append({"role": "assistant", "content": p.worked.strip()})
        return self.chat([*messages, {"role": "user", "content": f"{question}\n{self.instruction}"}])

    def warm_up(self) -> None:
        """Import what `verify` may need, so that no answer's deadline pays for it."""

    def judge(self, prompt: Prompt, text: str) -> Verdict:
        """The verdict of `task.reward`, if there is one, else of `verify`."""
        return self.verify(prompt, text) if self.reward is None else self.reward(prompt, text)

    def _build(self, split: str) -> Iterable[tuple[str, tuple[Prompt, Problem]]]:
        """Prompt ids with their prompts and problems, at least as many as the split has."""
        raise NotImplementedError

    def _built(self, split: str) -> dict[str, tuple[Prompt, Problem]]:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        if split not in self._problems:
            self._problems[split] = dict(islice(self._build(split), self.sizes[split] or None))
        return self._problems[split]

    def _problem(self, prompt: Prompt) -> Problem:
        """Raises ValueError for a prompt of another task."""
        # Ids are "<name>/<split>/..." or "<name>/<family>/<split>/...".
        split = next((part for part in prompt.id.split("/")[1:3] if part in SPLITS), None)
        entry = self._built(split).get(prompt.id) if split else None
        if entry is None:
            raise ValueError(f"prompt {prompt.id!r} is not one of this task; pass a prompt that prompts() returned")
        return entry[1]

    def _with_examples(self, prompt: Prompt, examples: Sequence[Problem]) -> Prompt:
        problem = self._problem(prompt)
        return replace(prompt, text=self.render(problem.question, examples, problem.before))


def _unpickled(source: Any, state: dict) -> Task:
    kind = source if isinstance(source, type) else source.load()
    made = object.__new__(kind)
    made.__dict__.update(state)
    return made


class ProceduralTask(Task):
    """A task that generates its problems, deterministic in its section: families in turn, worked examples set aside.

    A subclass says its `name`, `instruction` and families (`known`), makes a family's problems and verifies answers.
    `Prompt.id` is "<name>/<family>/<split>/<number>" and `Prompt.task` "<name>.<family>".
    """

    def _streams(self, family: str, split: str) -> Sequence[Iterator[Problem]]:
        """Distinct problems of a family and split, a stream for each of its kinds; problems take the kinds in turn."""
        raise NotImplementedError

    def _draw(self, family: str, split: str, limit: int) -> list[Problem]:
        """The first `limit` problems, fewer if a kind has no more. A longer draw starts with a shorter one."""
        return list(islice(chain.from_iterable(zip(*self._streams(family, split), strict=False)), limit))

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if not 0 <= shots <= EXAMPLES:
            raise ValueError(f"shots: {shots}; {self.name} has 0 to {EXAMPLES} worked examples per family")
        family = prompt.id.split("/")[1:2]
        # Kinds alternate in `examples`, so a rotation keeps the mixture where a sample would not.
        examples = self._draw(family[0], "train", EXAMPLES) if family and family[0] in self.families else []
        start = random.Random(f"shots/{seed}").randrange(EXAMPLES)
        return self._with_examples(prompt, (examples[start:] + examples[:start])[:shots])

    def _build(self, split: str) -> Iterable[tuple[str, tuple[Prompt, Problem]]]:
        """Families in blocks of one problem each, every block in its own random order."""
        size, count = self.sizes[split], len(self.families)
        wanted = -(-size // count) if size else FAMILY_LIMIT
        skip = EXAMPLES if split == "train" else 0
        drawn = {family: self._draw(family, split, wanted + skip)[skip:] for family in self.families}
        least = min(drawn, key=lambda family: len(drawn[family]))
        if size and len(drawn[least]) < wanted:
            most = count * len(drawn[least])
            raise ValueError(f"task.{split}: {size} problems, but family {least} allows at most {most}; set fewer")
        order = random.Random(f"order/{self.seed}/{split}")
        for index in range(len(drawn[least])):
            block = list(self.families)
            order.shuffle(block)
            for family in block:
                problem = drawn[family][index]
                name, text = f"{self.name}/{family}/{split}/{index:05d}", self.render(problem.question)
                yield name, (Prompt(name, text, problem.answer, f"{self.name}.{family}", problem.group), problem)


def split_of(text: str, shares: Mapping[str, float] = SHARES) -> str:
    """Split of a problem by a hash of `text` and these shares: the same however many problems are requested."""
    point = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    for split, share in shares.items():
        if point < share:
            return split
        point -= share
    # The shares' sum, as floats, may be a little less than 1.
    return split
