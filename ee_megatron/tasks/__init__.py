"""Tasks: prompts, worked examples, verifiers. Start at `make_task` and `VerifierPool`."""

from .base import ChatTemplate, Split, Task, Verdict
from .registry import TASKS, make_task, task_of
from .verifier import VerifierPool

__all__ = ["TASKS", "ChatTemplate", "Split", "Task", "Verdict", "VerifierPool", "make_task", "task_of"]
