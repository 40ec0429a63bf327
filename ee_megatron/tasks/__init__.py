"""Tasks: prompts, worked examples, verifiers. Start at `make_task` and `VerifierPool`."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..config.fields import code_file
from ..config.schema import RunConfig, TaskConfig
from ..config.validate import check_template
from . import arithmetic, chains, dataset, environments, reasoning_gym, tom  # noqa: F401  (they register their tasks)
from .base import TASKS, ChatTemplate, Problem, ProceduralTask, Split, Task, Verdict, register, split_of
from .user_code import RewardFunction, TaskClass
from .verifier import VerifierPool, try_reward

__all__ = [
    "TASKS", "ChatTemplate", "Problem", "ProceduralTask", "Split", "Task", "Verdict", "VerifierPool", "chat_of",
    "make_task", "register", "split_of", "task_of", "try_reward",
]  # fmt: skip


def make_task(task: TaskConfig, chat: ChatTemplate | None = None) -> Task:
    """Make the task that a section names (docs/tasks.md). `chat` renders messages with a model's chat template; without
    it prompts are plain text.

    Raises ValueError for an unknown task or family, a missing path, package or column, or more problems than there are;
    FileNotFoundError.
    """
    make = TASKS.get(task.name)
    if make is None and code_file(task.name):
        make = TaskClass("task.name", task.name)
    if make is None:
        near = difflib.get_close_matches(task.name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"task.name: no task {task.name!r}; did you mean {near!r}? There are {', '.join(TASKS)}")
    made = make(task, chat)
    if task.reward:
        made.reward = RewardFunction("task.reward", task.reward)
        made.scorer = made.reward.setting
    return made


def task_of(cfg: RunConfig, model_path: Path) -> Task:
    """Make the task of a configuration, with the model's chat template if that is requested. Raises as `make_task`."""
    return make_task(cfg.task, chat_of(cfg, model_path))


def chat_of(cfg: RunConfig, model_path: Path) -> ChatTemplate | None:
    """The model's chat template, if that is requested. Raises ValueError for one that a question can't be put into."""
    if cfg.rollout.prompt_template != "chat":
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path), local_files_only=True)
    variables = cfg.rollout.chat_template_kwargs
    check_template("rollout.chat_template_kwargs", variables, tokenizer.chat_template)

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, chat_template=None, tokenize=False, add_generation_prompt=True, **variables
                )
            )
        except Exception as error:  # Templates raise what they like.
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"rollout.prompt_template=chat: the template of {model_path} refuses messages ({reason}); correct it, "
                "or set plain"
            ) from None

    render([{"role": "user", "content": "?"}])
    return render
