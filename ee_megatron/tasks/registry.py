"""Tasks by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from .arithmetic import ArithmeticTask
from .base import ChatTemplate, Task
from .dataset import DatasetTask
from .gsm8k import GSM8KTask
from .reasoning_gym import ReasoningGymTask
from .tom import ToMTask

PROCEDURAL: dict[str, Callable[..., Task]] = {
    "arithmetic": ArithmeticTask,
    "tom": ToMTask,
    "reasoning_gym": ReasoningGymTask,
}
TASKS = ("arithmetic", "gsm8k", "tom", "reasoning_gym", "dataset", "jsonl")


def make_task(
    name: str,
    *,
    families: Sequence[str] | None = None,
    path: str = "",
    question_column: str = "question",
    answer_column: str = "answer",
    choices_column: str = "",
    train_split: str = "train",
    evaluation_split: str = "test",
    train: int = 0,
    validation: int = 200,
    evaluation: int = 400,
    seed: int = 0,
    chat: ChatTemplate | None = None,
) -> Task:
    """The task that a configuration names; docs/tasks.md says what each is. `jsonl` is another name of `dataset`.

    `train`, `validation`, `evaluation` are numbers of problems, 0 for all there are; `seed` decides which problem is in
    which split; `families` are for arithmetic, tom and reasoning_gym (None: all of tom's, arithmetic's usual three);
    `path`, columns and splits for gsm8k and dataset. `chat` renders messages with a model's chat template; without it
    prompts are plain text.

    Raises ValueError for an unknown task or family, a missing path, package or column, or more problems than there are;
    FileNotFoundError.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"task.name: no task {name!r}; did you mean {near!r}? There are {', '.join(TASKS)}")
    sizes = {"train": train, "validation": validation, "evaluation": evaluation}
    if name in PROCEDURAL:
        chosen = {} if families is None else {"families": families}
        return PROCEDURAL[name](**chosen, **sizes, seed=seed, chat=chat)
    if not path:
        raise ValueError(
            f"task.path: {name} needs a .jsonl or .parquet file, a directory of them, or a data set saved to disk"
        )
    return (GSM8KTask if name == "gsm8k" else DatasetTask)(
        name,
        path,
        question_column=question_column,
        answer_column=answer_column,
        choices_column=choices_column,
        train_split=train_split,
        evaluation_split=evaluation_split,
        train=train,
        validation=validation,
        evaluation=evaluation,
        seed=seed,
        chat=chat,
    )
