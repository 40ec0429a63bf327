"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems with written steps and an integer answer."""

from __future__ import annotations

import re

from .base import Problem
from .dataset import DatasetTask
from .numbers import plain_number

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class GSM8KTask(DatasetTask):
    """The files as published: JSONL with `question` and `answer`, the answer's last line being "#### n"."""

    def problem(self, question: str, answer: str) -> Problem:
        """As in `DatasetTask`, without the <<calculator>> annotations. Raises ValueError if there is no "#### n"."""
        problem = super().problem(question, _CALCULATOR.sub("", answer))
        if "####" not in answer or plain_number(problem.answer) is None:
            raise ValueError(
                f"{self.path}: answer ends in {answer[-30:]!r}; expected '#### <number>' (other data: task.name=jsonl)"
            )
        return problem
