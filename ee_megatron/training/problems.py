"""The task that a configuration names. No torch: it is asked before ranks start."""

from __future__ import annotations

from pathlib import Path

from ..config.schema import RunConfig
from ..tasks import ChatTemplate, Task, make_task


def task_of(cfg: RunConfig, model_path: Path) -> Task:
    """The task of a configuration; the chat template, where one is asked for, is the model's."""
    t = cfg.task
    return make_task(
        t.name,
        families=t.families,
        path=t.path,
        question_column=t.question_column,
        answer_column=t.answer_column,
        choices_column=t.choices_column,
        train_split=t.train_split,
        evaluation_split=t.evaluation_split,
        train=t.train,
        validation=t.validation,
        evaluation=t.evaluation,
        seed=t.seed,
        chat=chat_template(model_path) if cfg.rollout.prompt_template == "chat" else None,
    )


def chat_template(model_path: Path) -> ChatTemplate:
    """Messages -> the text that the model at `model_path` was trained to answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path), local_files_only=True)
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
