"""What the report shows of single answers, in files beside results.json: every answer, and the readouts behind a few.

answers.jsonl: a line per problem with each model's answer at the exits that were chosen for it. lens.json: for a few
problems what the readout at every exit would write, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..observe.rundir import write_atomic
from ..rollout.engine.lens import Lens
from ..rollout.pool.interface import RolloutPool
from ..types import Rollout
from .evaluate import Answer

ANSWERS, LENS = "answers.jsonl", "lens.json"
LENS_PROBLEMS = 3
"""Problems whose answers are read at every exit; of each so many tokens of a readout, positions of the prompt's end and
tokens of the answer."""
TOP_K, PROMPT_POSITIONS, ANSWER_TOKENS = 3, 32, 48


class Records:
    """The files of one evaluation. exit_depths [M]; `problems`: how many the report shows token by token."""

    def __init__(self, exit_depths: Sequence[int], problems: int, decode: Callable[[int], str]):
        self.exit_depths, self.problems, self.decode = exit_depths, problems, decode
        self._lines: dict[str, dict[str, Any]] = {}
        self._read: list[dict[str, Any]] = []

    def add(self, pool: RolloutPool, answers: Sequence[Answer], rollouts: Sequence[Rollout]) -> None:
        """A model's answers [n], made under the weights that the pool holds."""
        for answer in answers:
            line = self._lines.setdefault(
                answer["id"],
                {key: answer.get(key, "") for key in ("id", "prompt", "reference", "task")} | {"answers": {}},
            )
            line["answers"][f"{answer['model']}, {answer['exits']}"] = {
                "correct": bool(answer["correct"]),
                "pieces": [token["text"] for token in answer["tokens"]],
                "depths": [token["depth"] for token in answer["tokens"]],
            }
        few = [i for i in range(min(LENS_PROBLEMS, self.problems, len(answers))) if rollouts[i].length]
        found = pool.lens([rollouts[i] for i in few], TOP_K, PROMPT_POSITIONS, ANSWER_TOKENS) if few else []
        for i, entry in zip(few, found, strict=True):
            kept = {key: answers[i][key] for key in ("id", "prompt", "model", "exits")}  # type: ignore[literal-required]
            self._read.append({**kept, "given": entry.given, "tokens": len(answers[i]["tokens"]), **self._rows(entry)})

    def _rows(self, entry: Lens) -> dict[str, Any]:
        def readout(ids: np.ndarray, logprobs: np.ndarray) -> list[list[Any]]:
            return [[self.decode(int(i)), round(float(p), 4)] for i, p in zip(ids, logprobs, strict=True)]

        return {
            "rows": [
                {
                    "text": self.decode(int(entry.following[r])),
                    "taken": int(entry.taken[r]),
                    "readouts": [
                        readout(ids, logprobs) for ids, logprobs in zip(entry.ids[r], entry.logprobs[r], strict=True)
                    ],
                    "teacher": readout(entry.teacher_ids[r], entry.teacher_logprobs[r]),
                }
                for r in range(len(entry.following))
            ]
        }

    def write(self, directory: Path) -> None:
        """Both files, each whole or not at all."""
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines.values()]
        write_atomic(directory / ANSWERS, "".join(lines))
        found = {"exit_depths": list(self.exit_depths), "answers": self._read}
        write_atomic(directory / LENS, json.dumps(found, ensure_ascii=False))
