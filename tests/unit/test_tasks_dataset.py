"""GSM8K and other files: which rows go where, how answers are shown, and what the verifier accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ee_megatron.config.load import load
from ee_megatron.config.schema import DatasetNames, TaskConfig
from ee_megatron.tasks import Task, make_task, task_of

SPLITS = ("train", "validation", "evaluation")


def made(path: Path, name: str = "dataset", validation: int = 4, evaluation: int = 4, **names: str) -> Task:
    dataset = DatasetNames(**names) if names else None
    return make_task(TaskConfig(name, path=str(path), validation=validation, evaluation=evaluation, dataset=dataset))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    numbers = range(start, start + count)
    return write(path, [
        {"question": f"Number {i}: what is {i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
        for i in numbers
    ])  # fmt: skip


def saved(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def numbers(task: Task, *splits: str) -> set[int]:
    return {int(p.answer) for split in splits for p in task.prompts(split)}  # type: ignore[arg-type]


def test_a_directory_keeps_test_for_evaluation_and_drops_its_questions_from_training(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 60)
    write_rows(tmp_path / "test.jsonl", 20, start=50)
    task = made(tmp_path, "gsm8k", 10, 15)
    train, validation, evaluation = (numbers(task, split) for split in SPLITS)
    assert train | validation <= set(range(1, 51)) and evaluation <= set(range(51, 71)) and not train & validation
    assert (len(validation), len(evaluation)) == (10, 15)
    assert [p.id for p in made(tmp_path, "gsm8k", 10, 15).prompts("train")] == [p.id for p in task.prompts("train")]


def test_worked_examples_lose_the_calculator_marks_and_state_the_answer(tmp_path: Path) -> None:
    task = made(write_rows(tmp_path / "all.jsonl", 90), "gsm8k", 10, 10)
    prompt = task.prompts("evaluation")[0]
    assert prompt.text == f"Question: Number {int(prompt.answer) - 1}: what is {int(prompt.answer) - 1} + 1?\nAnswer:"
    shown = task.few_shot(prompt, 3, 0)
    assert shown.text.endswith(prompt.text) and shown.id == prompt.id
    assert shown.text.count("The answer is") == 3 and "<<" not in shown.text and "####" not in shown.text
    examples = {block.split("\n")[0] for block in shown.text.split("\n\n")[:-1]}
    assert not examples & {p.text.split("\n")[0] for p in task.prompts("train")}


def test_parquet_and_other_column_names_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"problem": [f"What is half of {2 * i}?" for i in range(40)], "solution": list(range(40))})
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet")
    task = made(tmp_path / "all.parquet", "jsonl", question_column="problem", answer_column="solution")
    prompt = task.prompts("evaluation")[0]
    assert prompt.text == f"Question: What is half of {2 * int(prompt.answer)}?\nAnswer:"
    assert task.verify(prompt, f"The answer is {prompt.answer}").reward == 1.0


def test_a_data_set_saved_to_disk_is_read_by_split_or_divided(tmp_path: Path) -> None:
    import datasets

    rows = [{"question": f"Half of {2 * i}?", "answer": str(i)} for i in range(60)]
    assert len(made(saved(tmp_path, rows), evaluation=5).prompts("evaluation")) == 5
    parts = {"train": rows[:30], "dev": rows[30:45], "test": rows[45:]}
    path = tmp_path / "whole"
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(path)
    for split, first in (("test", 45), ("dev", 30)):
        task = made(path, evaluation=15, evaluation_split=split)
        assert numbers(task, "evaluation") == set(range(first, first + 15))
        assert numbers(task, "train", "validation") <= set(range(30))
    divided = made(path, validation=2, evaluation=3, train_split="dev", evaluation_split="")
    assert numbers(divided, "evaluation") <= set(range(30, 45))
    with pytest.raises(ValueError, match=r"'validation'.*train, dev, test.*task\.dataset\.train_split"):
        made(path, evaluation_split="validation")


def test_shards_in_a_data_directory_are_one_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        write_rows(folder / f"train-{shard:05d}-of-00003.jsonl", 20, start=20 * shard)
    write_rows(folder / "test-00000-of-00001.jsonl", 10, start=90)
    task = made(tmp_path, evaluation=10)
    # 60 rows, of which 14 are worked examples.
    assert len(task.prompts("train")) + len(task.prompts("validation")) + 14 == 60
    write_rows(folder / "train.jsonl", 5)
    with pytest.raises(ValueError, match=r"\b4\b.*train\*"):
        made(tmp_path, evaluation=10)


def test_dots_lead_into_nested_columns(tmp_path: Path) -> None:
    rows = [{"item": {"text": f"Half of {2 * i}?", "solved": {"by": str(i)}}, "a.b": "flat"} for i in range(40)]
    path = saved(tmp_path, rows)

    def of(column: str) -> Task:
        return made(path, question_column="item.text", answer_column=column)

    prompt = of("item.solved.by").prompts("train")[0]
    assert prompt.text == f"Question: Half of {2 * int(prompt.answer)}?\nAnswer:"
    assert of("a.b").prompts("train")[0].answer == "flat"
    with pytest.raises(ValueError, match=r"'item\.answer'.*\['solved', 'text'\]"):
        of("item.answer")


@pytest.mark.parametrize(
    ("form", "nested"), [("number", False), ("letter", True), ("text", True), ("count", False), ("small", False)]
)
def test_choices_are_shown_with_letters_and_answered_by_letter(tmp_path: Path, form: str, nested: bool) -> None:
    rows = []
    for i in range(40):
        options = [f"place {i + k}" for k in range(4)]
        right = i % 4
        answers = {"number": right, "letter": "ABCD"[right], "text": options[right], "count": str(right + 1)}
        answer = answers.get(form, "abcd"[right])
        rows.append(
            {"question": f"Where is {i}?", "options": {"text": options} if nested else options, "answer": answer}
        )
    task = made(saved(tmp_path, rows), choices_column="options.text" if nested else "options")
    for prompt in task.prompts("train"):
        asked, *shown, last = prompt.text.splitlines()
        number = int(asked.removeprefix("Question: Where is ").rstrip("?"))
        assert shown == [f"{letter}. place {number + k}" for k, letter in enumerate("ABCD")] and last == "Answer:"
        assert prompt.answer == "ABCD"[number % 4]
        assert task.verify(prompt, f"The answer is ({prompt.answer}) it").reward == 1.0
        assert task.verify(prompt, f"The answer is {'ABCD'[(number + 1) % 4]}").reward == 0.0


def test_the_configuration_reaches_the_task(tmp_path: Path) -> None:
    for split, start in (("learn", 0), ("dev", 40)):
        rows = [{"q": {"text": f"{i}?", "options": [f"{i}", "none"]}, "key": 0} for i in range(start, start + 40)]
        write(tmp_path / f"{split}.jsonl", rows)
    cfg = load([
        "name=test", "model.path=nowhere", "task=dataset", f"task.path={tmp_path}",
        "task.dataset.question_column=q.text",
        "task.dataset.answer_column=key", "task.dataset.choices_column=q.options", "task.dataset.train_split=learn",
        "task.dataset.evaluation_split=dev", "task.validation=4", "task.evaluation=8",
    ])  # fmt: skip
    prompts = task_of(cfg, Path("nowhere")).prompts("evaluation")
    assert len(prompts) == 8 and {p.answer for p in prompts} == {"A"}
    assert all(40 <= int(p.text.split("?")[0].removeprefix("Question: ")) < 80 for p in prompts)


def test_answers_that_are_no_choice_say_so(tmp_path: Path) -> None:
    path = saved(tmp_path, [{"question": "Which?", "options": ["red", "blue"], "answer": "green"}])
    with pytest.raises(ValueError, match=r"row 1.*'green'"):
        made(path, choices_column="options")
    with pytest.raises(ValueError, match=r"choices_column.*'green'"):
        made(path, choices_column="answer")


def test_a_boxed_reference_is_taken_out_of_its_solution(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f"We halve.\nSo $x = \\boxed{{\\frac{{{i}}}{{2}}}}$."} for i in range(40)]
    task = made(saved(tmp_path, rows))
    prompt, worked = task.worked("train")[0]
    assert prompt.answer.startswith("\\frac{") and prompt.answer.endswith("}{2}")
    assert worked.startswith(" We halve. So $x") and worked.endswith(f"The answer is {prompt.answer}")
    assert task.verify(prompt, worked).reward == 1.0


@pytest.mark.parametrize(
    ("name", "file", "content", "names", "parts"),
    [
        ("jsonl", "all.jsonl", None, {"question_column": "text"}, "'text' 'question'"),
        ("dataset", "all.jsonl", None, {}, "task.evaluation 400"),
        ("gsm8k", "", None, {}, "0 train*"),
        ("gsm8k", "plain.jsonl", b'{"question": "What is 1 + 1?", "answer": "2"}\n', {}, "####"),
        ("jsonl", "broken.jsonl", b'{"question": "What is 1 + 1?", "answer"\n', {}, "broken.jsonl"),
        ("jsonl", "number.jsonl", b"7\n", {}, "number.jsonl"),
        ("jsonl", "broken.parquet", b"\0\1\2", {}, "broken.parquet"),
        ("jsonl", "deep.jsonl", b"[" * 100_000, {}, "deep.jsonl"),
        ("jsonl", "nan.jsonl", b'{"question": "1?", "answer": NaN}\n', {}, "row 1 nan"),
        ("jsonl", "dict.jsonl", b'{"question": {"a": 1}, "answer": "2"}\n', {}, "row 1 'a'"),
        ("jsonl", "half.jsonl", b'{"question": "1?", "answer": "\\ud800"}\n', {}, "row 1 text"),
        ("jsonl", "none.jsonl", b'{"question": "1?", "answer": "so ####"}\n', {}, "row 1 ####"),
        ("jsonl", "", None, {"train_split": "/etc/x"}, "0 /etc/x*"),
        ("jsonl", "latin.jsonl", '{"question": "é?", "answer": "2"}\n'.encode("latin1"), {}, "latin.jsonl UTF-8"),
    ],
)  # fmt: skip
def test_unusable_files_say_what_is_wrong(
    tmp_path: Path, name: str, file: str, content: bytes | None, names: dict[str, str], parts: str
) -> None:
    write_rows(tmp_path / "all.jsonl", 10)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        made(tmp_path / file, name, evaluation=400, **names)
    shown = str(caught.value)
    assert "\n" not in shown and all(part in shown for part in parts.split()), shown


def test_a_path_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        made(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"task\.path.*gsm8k"):
        make_task(TaskConfig("gsm8k"))


SYSTEM = {"role": "system", "content": "Be brief."}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS: dict[str, Any] = {
    "messages": lambda i: {"messages": [SYSTEM, said("user", f"{i} + 1?"), said("assistant", f"so #### {i + 1}")]},
    "thanks": lambda i: {
        "messages": [SYSTEM, said("user", f"{i} + 1?"), said("assistant", f"#### {i + 1}"), said("user", "Thanks")]
    },
    "lists": lambda i: {
        "prompt": [SYSTEM, said("user", f"{i} + 1?")], "completion": [said("assistant", f"#### {i + 1}")], "x": i,
    },
    "texts": lambda i: {"prompt": f"{i} + 1?", "completion": f"so \\boxed{{{i + 1}}}"},
}  # fmt: skip


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations_are_found_by_their_columns(tmp_path: Path, form: str) -> None:
    path = saved(tmp_path, [CONVERSATIONS[form](i) for i in range(40)])
    seen: list[list[dict[str, str]]] = []

    def chat(messages: list[dict[str, str]]) -> str:
        seen.append(messages)
        return f"<{len(seen)}>"

    task = make_task(TaskConfig("dataset", path=str(path), validation=4, evaluation=4), chat)
    prompts = [prompt for split in SPLITS for prompt in task.prompts(split)]  # type: ignore[arg-type]
    assert len({prompt.group for prompt in prompts}) == len(prompts) == 40 - 8 and all(
        p.answer.isdigit() for p in prompts
    )
    for prompt in prompts:
        *before, asked = seen[int(prompt.text[1:-1]) - 1]
        assert before == ([] if form == "texts" else [SYSTEM]) and asked["role"] == "user"
        assert asked["content"].split("\n")[0] == f"{int(prompt.answer) - 1} + 1?"
    shown = task.few_shot(prompts[0], 1, 0)
    roles = [message["role"] for message in seen[int(shown.text[1:-1]) - 1]]
    assert roles == (["system"] if form != "texts" else []) + ["user", "assistant", "user"]
    plain = made(path).prompts("train")[0].text
    assert plain.startswith("Question: " if form == "texts" else "Question: Be brief.\n\n")


def test_settings_come_before_what_is_found_and_other_messages_are_refused(tmp_path: Path) -> None:
    rows = [
        {"prompt": [said("user", f"{i} + 1?")], "completion": "#### 0", "label": {"truth": str(i + 1)}}
        for i in range(40)
    ]
    task = made(write(tmp_path / "a.jsonl", rows), question_column="prompt", answer_column="label.truth")
    assert numbers(task, *SPLITS) <= set(range(1, 41)) and task.prompts("train")[0].text.startswith("Question: ")
    for number, (row, expected) in enumerate((
        ({"messages": [said("user", "1?")]}, "user"),
        ({"messages": [said("assistant", "1")]}, "user"),
        ({"messages": [said("user", "1?"), {"role": "assistant", "content": None}]}, "role and content"),
        ({"messages": ["1?", "1"]}, "role and content"),
        ({"text": "1? 1"}, "messages"),
    )):  # fmt: skip
        with pytest.raises(ValueError, match=rf"b{number}\.jsonl.*{expected}"):
            made(write(tmp_path / f"b{number}.jsonl", [row] * 9))
