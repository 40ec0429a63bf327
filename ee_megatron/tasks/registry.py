"""Tasks by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from .arithmetic import ArithmeticTask
from .base import ChatTemplate, Task
from .dataset import DatasetTask
from .gsm8k import GSM8KTask

TASKS = ("arithmetic", "gsm8k", "tom", "reasoning_gym", "dataset", "jsonl")


def make_task(
    name: str,
    *,
    families: Sequence[str] = ("product", "sum", "word"),
    path: str = "",
    question_column: str = "question",
    answer_column: str = "answer",
    train: int = 0,
    validation: int = 200,
    evaluation: int = 400,
    seed: int = 0,
    chat: ChatTemplate | None = None,
) -> Task:
    """The task that a configuration names.

    `train`, `validation`, `evaluation` are numbers of problems, 0 for all there are; `seed` decides which problem is in
    which split; `families` are for arithmetic; `path` and the columns for gsm8k and jsonl (JSONL or Parquet). `chat`
    renders messages with a model's chat template; without it prompts are plain text.

    Raises ValueError for an unknown task or family, a missing path, or more problems than there are; FileNotFoundError.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"task.name: no task {name!r}; did you mean {near!r}? There are {', '.join(TASKS)}")
    if name == "arithmetic":
        return ArithmeticTask(families, train=train, validation=validation, evaluation=evaluation, seed=seed, chat=chat)
    if not path:
        raise ValueError(f"task.path: {name} needs a .jsonl or .parquet file, or a directory with train and test")
    return (GSM8KTask if name == "gsm8k" else DatasetTask)(
        name,
        path,
        question_column=question_column,
        answer_column=answer_column,
        train=train,
        validation=validation,
        evaluation=evaluation,
        seed=seed,
        chat=chat,
    )
