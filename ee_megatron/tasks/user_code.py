"""Code of the user's that settings name as FILE.py:NAME: a reward function (`task.reward`), a task (`task.name`)."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

from ..config.schema import TaskConfig
from ..types import Prompt
from .base import ChatTemplate, Task, Verdict


class UserCode:
    """NAME in FILE.py, which is run when `load` is called, not before.

    Raises ValueError, one line: no such file, no Python, no such name in it.
    """

    def __init__(self, key: str, value: str) -> None:
        self.setting = f"{key}={value}"
        file, _, self.name = value.rpartition(":")
        self.path = Path(file)
        if self.path.suffix != ".py" or not self.name.isidentifier():
            raise ValueError(f"{self.setting}: expected FILE.py:NAME, something defined in a file of Python")
        if not self.path.is_file():
            raise ValueError(f"{self.setting}: {self.path} does not exist; expected FILE.py:NAME")
        try:
            names = _top_level(self.path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{self.setting}: {self.path} is not Python: {error}") from None
        if self.name not in names:
            raise ValueError(f"{self.setting}: no {self.name!r} there, only {', '.join(sorted(names)) or 'nothing'}")
        self.path = self.path.resolve()

    def load(self) -> Any:
        """Run the file, once per process, as a module that pickling finds; whatever it raises."""
        module = f"user_code_{hashlib.sha256(str(self.path).encode()).hexdigest()[:16]}"
        if module not in sys.modules:
            spec = importlib.util.spec_from_file_location(module, self.path)
            assert spec is not None and spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[module])
            except BaseException:
                del sys.modules[module]
                raise
        return getattr(sys.modules[module], self.name)

    def blamed(self, error: BaseException) -> ValueError:
        """What the code raised, in one line that names the setting."""
        return ValueError(f"{self.setting}: {type(error).__name__}: {' '.join(str(error).split())}")


class RewardFunction(UserCode):
    """`task.reward`, called as verl calls `compute_score`:

        NAME(data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> float | bool | {"score": ...}

    with the problem's task and family, the answer's text, the reference, and {"id", "prompt"}. The score, in [0, 1], is
    the answer's reward; 1 counts as right. The file is run in verifier processes only.
    """

    def __call__(self, prompt: Prompt, text: str) -> Verdict:
        """Raises ValueError for a score outside [0, 1], and what the function raises."""
        made = self.load()(prompt.task, text, prompt.answer, {"id": prompt.id, "prompt": prompt.text})
        score = made.get("score") if isinstance(made, dict) else made
        if not isinstance(score, (int, float)) or not (math.isfinite(score) and 0 <= score <= 1):
            raise ValueError(f"{self.name} returned {made!r}; expected a number in [0, 1]")
        return Verdict(correct=score == 1, well_formed=True, answered=True, score=float(score))


class TaskClass(UserCode):
    """`task.name`: a subclass of `Task`. The file is run where the task is made and in verifier processes."""

    def __call__(self, task: TaskConfig, chat: ChatTemplate | None) -> Task:
        """Raises ValueError, one line, for what the file or the class raises."""
        try:
            kind = self.load()
            if not (isinstance(kind, type) and issubclass(kind, Task)):
                raise TypeError(f"expected a subclass of {Task.__module__}.{Task.__name__}")
            made: Task = kind(task, chat)  # type: ignore[call-arg]  # a subclass knows its families
            made.source = self
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            raise self.blamed(error) from error
        return made


def _top_level(source: str) -> set[str]:
    """Names that a file defines or imports at its top level."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
