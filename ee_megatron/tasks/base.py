"""What a task is: prompts kept apart by split, worked examples, and a verdict on an answer.

Nothing in this folder imports torch: verifier processes must start in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

from ..config.schema import TaskConfig
from ..types import Prompt

Split = Literal["train", "validation", "evaluation"]
SPLITS: tuple[str, ...] = get_args(Split)

ChatTemplate = Callable[[list[dict[str, str]]], str]
"""Messages [{"role", "content"}, ...] -> the text that the model reads, up to where its answer begins."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier found in one answer.

    - correct: the final answer equals the reference
    - well_formed: it was given in the form that the task asks for
    - answered: there is a final answer at all
    - timed_out: no verdict within the deadline (or the verifier process died); the other fields are then False
    """

    correct: bool
    well_formed: bool
    answered: bool
    timed_out: bool = False

    @property
    def reward(self) -> float:
        """r_task of docs/method.md, stage 2: 1 right and well formed, 0.5 right, 0 wrong, -1 no answer.

        0 for a timed-out verdict: what the text was worth is unknown, and silence is not what happened.
        """
        if self.timed_out:
            return 0.0
        if not self.answered:
            return -1.0
        if not self.correct:
            return 0.0
        return 1.0 if self.well_formed else 0.5


class Task(Protocol):
    """Prompts and their verifier. Implementations are picklable and cheap to unpickle: `verify` runs elsewhere."""

    name: str

    def prompts(self, split: Split) -> list[Prompt]:
        """The problems of a split, always in the same order. Raises ValueError for an unknown split."""
        ...

    def worked(self, split: Split) -> list[tuple[Prompt, str]]:
        """`prompts` with a worked answer each, as the model should write it, up to the end of its line."""
        ...

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        """The same problem (same id) with `shots` worked examples from the train split in front of it.

        All prompts of one family get the same examples, so their texts share a prefix. Raises ValueError if there
        are fewer examples than `shots`, or if the prompt is not this task's.
        """
        ...

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """The verdict on a generated answer (without the prompt). Pure."""
        ...


class Problem(NamedTuple):
    """A question, its reference answer, a worked answer as the model should write it, and the groups it belongs to."""

    question: str
    answer: str
    worked: str
    group: str


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes text: plain ("Question: ...\\nAnswer:") or, with `chat`, the model's own chat template.

    `instruction` says which form the answer must have; only chat models are told, plain prompts show it by example.
    """

    instruction: str
    chat: ChatTemplate | None = None

    def render(self, question: str, examples: Sequence[tuple[str, str]] = ()) -> str:
        """Question and (question, worked answer) examples -> prompt text."""
        if self.chat is not None:
            messages: list[dict[str, str]] = []
            for asked, worked in examples:
                messages += [
                    {"role": "user", "content": f"{asked}\n{self.instruction}"},
                    {"role": "assistant", "content": worked.strip()},
                ]
            return self.chat([*messages, {"role": "user", "content": f"{question}\n{self.instruction}"}])
        header = "".join(f"Question: {asked}\nAnswer:{worked}\n\n" for asked, worked in examples)
        return f"{header}Question: {question}\nAnswer:"


def check_split(split: str) -> None:
    """Raises ValueError for a split that no task has."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")


def split_sizes(task: TaskConfig) -> dict[str, int]:
    """Problems by split, 0 for all there are. Raises ValueError for a negative number."""
    sizes = {"train": task.train, "validation": task.validation, "evaluation": task.evaluation}
    if any(size < 0 for size in sizes.values()):
        raise ValueError(f"task sizes must not be negative: {sizes}; 0 means all there are")
    return sizes
