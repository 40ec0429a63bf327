"""Tasks from files: JSONL, Parquet or a data set saved by the `datasets` library, GSM8K included."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import string
import tempfile
from pathlib import Path
from typing import Any

from ..config import hub
from ..config.schema import DatasetNames, TaskConfig
from ..types import Prompt
from .answers import last_boxed, plain_number, verify_solution
from .base import EXAMPLES, SPLITS, ChatTemplate, Problem, Task, Verdict, register

Rows = list[dict[str, Any]]
_FORMATS = {suffix: "one UTF-8 JSON object per line" for suffix in (".jsonl", ".json")} | {".parquet": "whole Parquet"}
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_CONVERSATIONS = (("messages", "messages"), ("prompt", "completion"))
"""Columns of question and answer that are read where the settings have their defaults and a table lacks those."""
_SHARD = re.compile(r".+-[0-9]{5}-of-[0-9]{5}")


@register("dataset", "jsonl")
class DatasetTask(Task):
    """A task read from files.

    Evaluation comes from the evaluation split (test.*), validation is held out of the train split (train.*). A single
    file or data set, or no evaluation split (""), is divided into all three. A question that occurs twice is used once,
    and one that occurs in the evaluation split is dropped from train.

    Question and answer may be messages (role, content): the answer is the last assistant's, the question the user's
    before it. Columns may be nested ("choices.text"). `choices_column` "": free answers. Otherwise that column lists
    the options, which the prompt shows with letters; the answer is a letter, the option's text or its number from 0.
    """

    instruction = "Reason step by step, and put your final answer within \\boxed{}."

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        super().__init__(task, None, chat)
        self.name, self.hub_id = task.name, hub.parse(task.path)
        self.path = hub.directory(hub.pin("task.path", task.path, "dataset"), "dataset")
        if not task.path or not self.path.exists():
            raise FileNotFoundError(
                f"task.path={task.path}: no such file or directory; {task.name} needs a .jsonl or .parquet file, a "
                "directory of them, a data set saved to disk, or one's id on the hub (OWNER/NAME)"
            )
        self.names = task.dataset or DatasetNames()
        self._examples: list[Problem] = []
        tables = _tables(self.path, self.names.train_split, self.names.evaluation_split, self.hub_id)
        self._divide({part: self._read(name, table) for part, (name, table) in tables.items()})

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_examples": []}

    def warm_up(self) -> None:
        import math_verify  # noqa: F401

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if not 0 <= shots <= len(self._examples):
            raise ValueError(f"shots: {shots}; {self.name} has {len(self._examples)} worked examples")
        return self._with_examples(prompt, random.Random(f"shots/{seed}").sample(self._examples, shots))

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        return verify_solution(prompt.answer, text)

    def problem(self, question: str, answer: str) -> Problem:
        """Convert a row to a problem. A "#### 18" at the end of the answer, or else its last \\boxed{18}, is the
        reference, the rest its steps."""
        steps, mark, final = answer.rpartition("####")
        boxed = "" if mark else last_boxed(answer)[1]
        reference = (final if mark else boxed or answer).strip()
        lines = [line.strip() for line in (steps if mark else answer if boxed else "").splitlines() if line.strip()]
        shown = " ".join(line if line[-1] in ".!?" else f"{line}." for line in lines)
        worked = f"{f' {shown}' if shown else ''} The answer is {reference}"
        return Problem(question.strip(), reference, worked, _group(question))

    def _divide(self, rows: dict[str, list[Problem]]) -> None:
        """The splits and worked examples, of the problems under "train" and, if there are any, "test"."""
        tested = {problem.group for problem in rows.get("test", [])}
        pool = [problem for problem in rows["train"] if problem.group not in tested]
        random.Random(f"rows/{self.seed}").shuffle(pool)
        if "test" in rows:
            random.Random(f"test/{self.seed}").shuffle(rows["test"])
            evaluation = self._take(rows["test"], "evaluation")
        else:
            evaluation = self._take(pool, "evaluation", keep=2 * len(pool) // 3)
            pool = pool[len(evaluation) :]
        validation = self._take(pool, "validation", keep=len(pool) // 2)
        pool = pool[len(validation) :]
        reserved = min(EXAMPLES, len(pool) // 4)
        self._examples, pool = pool[:reserved], pool[reserved:]
        split = {"train": self._take(pool, "train"), "validation": validation, "evaluation": evaluation}
        for part in SPLITS:
            self._problems[part] = {}
            for p in split[part]:
                name = f"{self.name}/{part}/{p.group}"
                prompt = Prompt(name, self.render(p.question, before=p.before), p.answer, self.name, p.group)
                self._problems[part][name] = (prompt, p)

    def _take(self, rows: list[Problem], split: str, keep: int = 0) -> list[Problem]:
        """The first problems for a split, leaving `keep`. Size 0: all, or a tenth where the file is shared."""
        size = self.sizes[split] or (len(rows) // 10 if keep else len(rows))
        if size > len(rows) - keep:
            raise ValueError(
                f"task.{split}: {size} problems, but only {len(rows) - keep} rows of {self.path} are left for it; "
                "set fewer"
            )
        return rows[:size]

    def _columns(self, source: str, row: dict[str, Any]) -> list[str]:
        """The columns of question and answer, and of the options if there are any. Raises ValueError."""
        usual, pair = DatasetNames(), (self.names.question_column, self.names.answer_column)
        if pair == (usual.question_column, usual.answer_column) and not {*pair} <= row.keys():
            pair = next((other for other in _CONVERSATIONS if {*other} <= row.keys()), pair)
        columns = [*pair, *([self.names.choices_column] if self.names.choices_column else [])]
        if missing := [name for name in columns if not row.keys() & {name, name.split(".")[0]}]:
            raise ValueError(
                f"{source}: no {missing}, only {[*row]}; set task.dataset.question_column and answer_column (found "
                "without: question and answer, prompt and completion, messages)"
            )
        return columns

    def _read(self, source: str, table: Rows) -> list[Problem]:
        problems: dict[str, Problem] = {}
        columns = self._columns(source, table[0]) if table else []
        for number, row in enumerate(table, start=1):
            question, answer, *options = (_value(source, name, row) for name in columns)
            before, question, answer = _turns(f"{source}: row {number}", question, answer)
            if question is None or answer is None or not str(question).strip() or not str(answer).strip():
                raise ValueError(f"{source}: row {number} has an empty question or answer; remove or fill it")
            if options:
                question, answer = _lettered(f"{source}: row {number}", question, answer, options[0])
            problem = self.problem(*(_text(f"{source}: row {number}", value) for value in (question, answer)))
            if not problem.answer:
                raise ValueError(f"{source}: row {number} has nothing behind ####; remove or fill it")
            if before:
                group = _group("\n".join([*(message["content"] for message in before), problem.question]))
                problem = problem._replace(before=before, group=group)
            problems.setdefault(problem.group, problem)
        if not problems:
            raise ValueError(f"{source}: no rows; expected one problem per row")
        return list(problems.values())


@register("gsm8k")
class GSM8KTask(DatasetTask):
    """GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems with written steps, as published: JSONL
    with `question` and `answer`, the answer's last line being "#### n", n an integer."""

    def problem(self, question: str, answer: str) -> Problem:
        """As in `DatasetTask`, without the <<calculator>> annotations. Raises ValueError if there is no "#### n"."""
        problem = super().problem(question, _CALCULATOR.sub("", answer))
        if "####" not in answer or plain_number(problem.answer) is None:
            raise ValueError(
                f"{self.path}: answer ends in {answer[-30:]!r}; expected '#### <number>' (other data: task.name=jsonl)"
            )
        return problem


def _text(where: str, value: Any) -> str:
    text = str(value)
    none = isinstance(value, dict | list | bytes) or (isinstance(value, float) and not math.isfinite(value))
    if none or text != text.encode(errors="ignore").decode():
        raise ValueError(f"{where}: {text[:60]!r} in a column of questions or answers; expected text or a number")
    return text


def _group(question: str) -> str:
    return hashlib.sha256(" ".join(question.lower().split()).encode()).hexdigest()[:16]


def _turns(where: str, question: Any, answer: Any) -> tuple[list[dict[str, str]], Any, Any]:
    """(messages in front of the question, question, answer) of values that may be lists of messages. Raises
    ValueError."""
    for message in [*(question if isinstance(question, list) else ()), *(answer if isinstance(answer, list) else ())]:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: {str(message)[:60]!r} is no message; expected texts under role and content")
    if isinstance(answer, list):
        last = max((at for at, message in enumerate(answer) if message["role"] == "assistant"), default=-1)
        question = answer[: max(last, 0)] if question == answer else question
        answer = answer[last]["content"] if last >= 0 else None
    if not isinstance(question, list):
        return [], question, answer
    if not question or question[-1]["role"] != "user":
        raise ValueError(f"{where}: expected a message of the user's, and behind it the assistant's with the answer")
    return question[:-1], question[-1]["content"], answer


def _lettered(where: str, question: object, answer: object, options: object) -> tuple[str, str]:
    """(question with its options below it, letter of the answer)."""
    if not isinstance(options, list) or not 2 <= len(options) <= len(string.ascii_uppercase):
        raise ValueError(
            f"{where}: task.dataset.choices_column holds {str(options)[:60]!r}; expected a list of 2 to 26 options"
        )
    letters, texts = string.ascii_uppercase[: len(options)], [str(option).strip() for option in options]
    shown = "\n".join([str(question).strip(), *(f"{a}. {text}" for a, text in zip(letters, texts, strict=True))])
    given = str(answer).strip()
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(options):
            return shown, letters[answer]
    elif texts.count(given) == 1:
        return shown, letters[texts.index(given)]
    elif len(given) == 1 and given.upper() in letters:
        return shown, given.upper()
    elif given.isascii() and given.isdigit() and 1 <= int(given) <= len(options):
        # As text, numbers count from 1: so does ARC, where some questions have them for letters.
        return shown, letters[int(given) - 1]
    raise ValueError(f"{where}: answer {given[:60]!r} is none of its {len(options)} options, their letters or numbers")


def _tables(path: Path, train: str, evaluation: str, hub_id: hub.HubId | None) -> dict[str, tuple[str, Rows]]:
    """{"train": (name for messages, rows)}, and the same under "test" if there is an evaluation split."""
    wanted = {"train": train, **({"test": evaluation} if evaluation else {})}
    if path.is_file():
        return {"train": (str(path), _rows(path))}
    if hub_id or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        # Late: it takes over a second to import.
        import datasets

        saved: Any = _of_hub(path, hub_id) if hub_id else datasets.load_from_disk(str(path), keep_in_memory=True)
        if (path / "state.json").is_file():
            return {"train": (str(path), saved.to_list())}
        for name in wanted.values():
            if name not in saved:
                raise ValueError(
                    f"task.path: {path} has no split {name!r}, only {', '.join(saved)}; set task.dataset.train_split "
                    "and task.dataset.evaluation_split"
                )
        return {part: (f"{path}/{name}", saved[name].to_list()) for part, name in wanted.items()}
    paths = {part: _split_files(path, name) for part, name in wanted.items()}
    return {part: (str(files[0]), [row for file in files for row in _rows(file)]) for part, files in paths.items()}


def _of_hub(path: Path, hub_id: hub.HubId) -> Any:
    """The splits of a repository's files. Raises ValueError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        names = datasets.get_dataset_config_names(str(path))
        wanted = [hub_id.configuration] if hub_id.configuration else ["default", "main", *names[: len(names) == 1]]
        chosen = next((name for name in wanted if name in names), None)
        if chosen is None:
            raise ValueError(f"has the configurations {', '.join(names)}; name one: {hub_id.repo}:{names[0]}")
        with tempfile.TemporaryDirectory() as work:
            return datasets.load_dataset(str(path), chosen, cache_dir=work, keep_in_memory=True)
    except Exception as error:
        raise ValueError(f"task.path={hub_id}: {' '.join(str(error).split())[:300]}") from None


def _split_files(path: Path, split: str) -> list[Path]:
    """The file of a split, or its shards as the Hugging Face hub names them, in the directory or in data/ under it."""
    for folder in (path, path / "data"):
        files = sorted(f for f in folder.glob("*") if f.name.startswith(split) and f.suffix in _FORMATS)
        if len(files) == 1 or (files and all(_SHARD.fullmatch(file.stem) for file in files)):
            return files
        if files:
            break
    raise ValueError(
        f"task.path: {path} has {len(files)} files {split}*.jsonl or .parquet; expected one, or shards "
        f"{split}-00000-of-...; task.dataset.train_split and evaluation_split name them, the latter empty for none"
    )


def _rows(file: Path) -> Rows:
    if file.suffix not in _FORMATS:
        raise ValueError(f"task.path: {file.name} is neither .jsonl nor .parquet; convert it or name another file")
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        with file.open(encoding="utf-8") as lines:
            return [_object(line) for line in lines if line.strip()]
    except (ValueError, RecursionError, OSError) as error:
        # Of JSON, of UTF-8, or of pyarrow, which doesn't name the file.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: not readable ({reason}); expected {_FORMATS[file.suffix]}") from None


def _object(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"{line[:60]!r} is not an object")
    return row


def _value(source: str, name: str, row: Any) -> Any:
    """What the column of this name holds in a row: dots lead into nested columns, unless its own name has them."""
    if isinstance(row, dict) and name in row:
        return row[name]
    for key in name.split("."):
        if isinstance(row, list):
            row = [_value(source, key, item) for item in row]
            continue
        if not isinstance(row, dict) or key not in row:
            there = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{source}: column {name!r}: no {key!r} in it, only {there}; name one of these")
        row = row[key]
    return row
