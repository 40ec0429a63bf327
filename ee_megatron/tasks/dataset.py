"""Problems from JSONL or Parquet files, GSM8K among them."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..types import Prompt
from .answers import verify_solution
from .base import SPLITS, ChatTemplate, Problem, PromptFormat, Split, Verdict, check_split

EXAMPLES = 16
"""Training problems that are set aside as worked examples."""
INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class DatasetTask:
    """A task read from files; see `make_task` for the arguments.

    A directory holds train.* and test.* (.jsonl or .parquet): evaluation comes from test, validation is held out of
    train. A single file is divided into all three. A question that occurs twice is kept once, and one that occurs in
    test is dropped from train.
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        *,
        question_column: str = "question",
        answer_column: str = "answer",
        train: int = 0,
        validation: int = 200,
        evaluation: int = 400,
        seed: int = 0,
        chat: ChatTemplate | None = None,
    ) -> None:
        self.name, self.path, self.seed = name, Path(path), seed
        self.columns = (question_column, answer_column)
        self.sizes = {"train": train, "validation": validation, "evaluation": evaluation}
        if any(size < 0 for size in self.sizes.values()):
            raise ValueError(f"task sizes must not be negative: {self.sizes}; 0 means all there are")
        self.format = PromptFormat(INSTRUCTION, chat)
        self._examples: list[Problem] = []
        self._problems: dict[str, dict[str, tuple[Prompt, Problem]]] = {}
        self._load()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_problems": {}, "_examples": [], "format": PromptFormat(INSTRUCTION)}

    def warm_up(self) -> None:
        """Import what `verify` may need, so that no answer's deadline pays for it."""
        import math_verify  # noqa: F401

    def prompts(self, split: Split) -> list[Prompt]:
        check_split(split)
        return [prompt for prompt, _ in self._problems[split].values()]

    def worked(self, split: Split) -> list[tuple[Prompt, str]]:
        check_split(split)
        return [(prompt, problem.worked) for prompt, problem in self._problems[split].values()]

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if not 0 <= shots <= len(self._examples):
            raise ValueError(f"shots: {shots}; {self.name} has {len(self._examples)} worked examples")
        found = next((rows[prompt.id] for rows in self._problems.values() if prompt.id in rows), None)
        if found is None:
            raise ValueError(f"prompt {prompt.id!r} is not one of this task; pass a prompt that prompts() returned")
        chosen = random.Random(f"shots/{seed}").sample(self._examples, shots)
        text = self.format.render(found[1].question, [(p.question, p.worked) for p in chosen])
        return Prompt(prompt.id, text, prompt.answer, prompt.task, prompt.group)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        return verify_solution(prompt.answer, text)

    def problem(self, question: str, answer: str) -> Problem:
        """One row as a problem. A "#### 18" at the end of the answer is the reference, what precedes it its steps."""
        steps, mark, final = answer.rpartition("####")
        reference = (final if mark else answer).strip()
        lines = [line.strip() for line in (steps if mark else "").splitlines() if line.strip()]
        shown = " ".join(line if line[-1] in ".!?" else f"{line}." for line in lines)
        worked = f" {shown} The answer is {reference}" if shown else f" The answer is {reference}"
        group = hashlib.sha256(" ".join(question.lower().split()).encode()).hexdigest()[:16]
        return Problem(question.strip(), reference, worked, group)

    def _load(self) -> None:
        files = _files(self.path)
        rows = {part: self._read(file) for part, file in files.items()}
        tested = {problem.group for problem in rows.get("test", [])}
        pool = [problem for problem in rows["train"] if problem.group not in tested]
        random.Random(f"rows/{self.seed}").shuffle(pool)
        if "test" in rows:
            evaluation = list(rows["test"])
            random.Random(f"test/{self.seed}").shuffle(evaluation)
            evaluation = self._take(evaluation, "evaluation")
        else:
            evaluation = self._take(pool, "evaluation", keep=2 * len(pool) // 3)
            pool = pool[len(evaluation) :]
        validation = self._take(pool, "validation", keep=len(pool) // 2)
        pool = pool[len(validation) :]
        reserved = min(EXAMPLES, len(pool) // 4)
        self._examples, pool = pool[:reserved], pool[reserved:]
        split = {"train": self._take(pool, "train"), "validation": validation, "evaluation": evaluation}
        for part in SPLITS:
            ids = (f"{self.name}/{part}/{problem.group}" for problem in split[part])
            self._problems[part] = {
                id_: (Prompt(id_, self.format.render(p.question), p.answer, self.name, p.group), p)
                for id_, p in zip(ids, split[part], strict=True)
            }

    def _take(self, rows: list[Problem], split: str, keep: int = 0) -> list[Problem]:
        """The first problems for a split, leaving `keep`. Size 0: all, or a tenth where the file is shared."""
        size = self.sizes[split] or (len(rows) // 10 if keep else len(rows))
        if size > len(rows) - keep:
            raise ValueError(
                f"task.{split}: {size} problems, but {self.path} leaves {len(rows) - keep} for it; ask for fewer"
            )
        return rows[:size]

    def _read(self, file: Path) -> list[Problem]:
        problems: dict[str, Problem] = {}
        for number, row in enumerate(_rows(file, self.columns), start=1):
            question, answer = (row[column] for column in self.columns)
            if question is None or answer is None or not str(question).strip() or not str(answer).strip():
                raise ValueError(f"{file}: row {number} has an empty question or answer; remove or fill it")
            problem = self.problem(str(question), str(answer))
            problems.setdefault(problem.group, problem)
        if not problems:
            raise ValueError(f"{file}: no rows; expected one problem per row")
        return list(problems.values())


def _files(path: Path) -> dict[str, Path]:
    """{"train": file} or {"train": file, "test": file}."""
    if not path.exists():
        raise FileNotFoundError(f"task.path: {path} does not exist; expected a .jsonl or .parquet file or a directory")
    if path.is_file():
        _format(path)
        return {"train": path}
    found = {}
    for part in ("train", "test"):
        files = sorted(file for file in path.glob(f"{part}*") if file.suffix in _FORMATS)
        if len(files) != 1:
            raise ValueError(
                f"task.path: {path} has {len(files)} files {part}*.jsonl or .parquet; expected one each of train, test"
            )
        found[part] = files[0]
    return found


def _format(file: Path) -> str:
    if file.suffix not in _FORMATS:
        raise ValueError(f"task.path: {file.name} is neither .jsonl nor .parquet; convert it or name another file")
    return _FORMATS[file.suffix]


def _rows(file: Path, columns: tuple[str, ...]) -> Iterable[Mapping[str, Any]]:
    """The rows of a file. Nothing is left in a cache: the rows are few, and a stale copy would go unnoticed."""
    import datasets

    quiet = not datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.load_dataset(
                _format(file), data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True
            )
            missing = [column for column in columns if column not in table.column_names]
            if missing:
                raise ValueError(
                    f"{file}: no {missing}, only {table.column_names}; set task.question_column and answer_column"
                )
            return list(table.select_columns(list(columns)))
    except datasets.exceptions.DatasetGenerationError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{file}: not readable as {_format(file)} ({reason}); expected one object per line") from None
    finally:
        if not quiet:
            datasets.enable_progress_bar()
