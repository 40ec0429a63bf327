"""A reward function of the user's: `task.reward=FILE.py:NAME`."""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..types import Prompt
from .base import Verdict


class RewardFunction:
    """NAME in FILE.py, called as verl calls `compute_score`:

        NAME(data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> float | bool | {"score": ...}

    with the problem's task and family, the answer's text, the reference, and {"id", "prompt"}. The score, in [0, 1], is
    the answer's reward; 1 counts as right. The file is run in verifier processes only.

    Raises ValueError, one line: no such file, no Python, no such name in it.
    """

    def __init__(self, setting: str) -> None:
        file, _, self.name = setting.rpartition(":")
        self.path = Path(file)
        if self.path.suffix != ".py" or not self.name.isidentifier():
            raise ValueError(f"task.reward={setting}: expected FILE.py:NAME, a function in a file of Python")
        if not self.path.is_file():
            raise ValueError(f"task.reward={setting}: {self.path} does not exist; expected FILE.py:NAME")
        try:
            names = _top_level(self.path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"task.reward={setting}: {self.path} is not Python: {error}") from None
        if self.name not in names:
            raise ValueError(
                f"task.reward={setting}: no {self.name!r} there, only {', '.join(sorted(names)) or 'nothing'}"
            )
        self.path = self.path.resolve()
        self._function: Callable[..., Any] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_function": None}

    def load(self) -> Callable[..., Any]:
        """Run the file, once; whatever it raises."""
        if self._function is None:
            spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self._function = getattr(module, self.name)
        return self._function

    def __call__(self, prompt: Prompt, text: str) -> Verdict:
        """Raises ValueError for a score outside [0, 1], and what the function raises."""
        made = self.load()(prompt.task, text, prompt.answer, {"id": prompt.id, "prompt": prompt.text})
        score = made.get("score") if isinstance(made, dict) else made
        if not isinstance(score, (int, float)) or not (math.isfinite(score) and 0 <= score <= 1):
            raise ValueError(f"{self.name} returned {made!r}; expected a number in [0, 1]")
        return Verdict(correct=score == 1, well_formed=True, answered=True, score=float(score))


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
