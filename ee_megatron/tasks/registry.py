"""Tasks by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from ..config.schema import RunConfig, TaskConfig
from .arithmetic import ArithmeticTask
from .base import ChatTemplate, Task
from .dataset import DatasetTask
from .gsm8k import GSM8KTask
from .reasoning_gym import ReasoningGymTask
from .tom import ToMTask

TASKS: dict[str, Callable[[TaskConfig, ChatTemplate | None], Task]] = {
    "arithmetic": ArithmeticTask,
    "gsm8k": GSM8KTask,
    "tom": ToMTask,
    "reasoning_gym": ReasoningGymTask,
    "dataset": DatasetTask,
    "jsonl": DatasetTask,
}


def make_task(task: TaskConfig, chat: ChatTemplate | None = None) -> Task:
    """The task that a section names; docs/tasks.md says what each is. `chat` renders messages with a model's chat
    template; without it prompts are plain text.

    Raises ValueError for an unknown task or family, a missing path, package or column, or more problems than there are;
    FileNotFoundError.
    """
    if task.name not in TASKS:
        near = difflib.get_close_matches(task.name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"task.name: no task {task.name!r}; did you mean {near!r}? There are {', '.join(TASKS)}")
    return TASKS[task.name](task, chat)


def task_of(cfg: RunConfig, model_path: Path) -> Task:
    """The task of a configuration; the chat template, where one is asked for, is the model's. Raises as `make_task`."""
    return make_task(cfg.task, chat_template(model_path) if cfg.rollout.prompt_template == "chat" else None)


def chat_template(model_path: Path) -> ChatTemplate:
    """Messages -> the text that the model at `model_path` was trained to answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path), local_files_only=True)
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
