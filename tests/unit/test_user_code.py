"""Rewards and tasks from files of the user's: what they are given, what comes of their results and mistakes."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ee_megatron.config.identity import stage_dir, task_content
from ee_megatron.config.load import load
from ee_megatron.config.schema import RunConfig, TaskConfig
from ee_megatron.config.validate import validate
from ee_megatron.tasks import VerifierPool, make_task
from ee_megatron.training.preflight import check_task

TASKS_PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
ODD = """
import os
def odd(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "raise":
        raise RuntimeError("no such thing")
    if solution_str == "hang":
        while True: pass
    if solution_str == "write":
        open(extra_info["id"], "w")
    return {"many": 2, "dict": {"score": 0.25}, "bool": True, "none": None, "small": 1e-7}[solution_str]
"""


def example(named: str) -> str:
    """The block of the docs' page on tasks that has `named` in it."""
    blocks = re.findall(r"```python\n(.*?)```", TASKS_PAGE.read_text(), re.S)
    return next(text for text in blocks if named in text)


def section(file: Path, name: str) -> TaskConfig:
    return TaskConfig("arithmetic", train=4, validation=2, evaluation=2, reward=f"{file}:{name}")


def test_the_example_of_the_docs_gives_partial_credit(tmp_path: Path):
    file = tmp_path / "reward.py"
    file.write_text(example("def words"))
    task = make_task(section(file, "words"))
    prompt = task.prompts("train")[0]
    right, long = f"The answer is {prompt.answer}.", "word " * 30
    with VerifierPool(task) as pool:
        verdicts = pool.verify_many([(prompt, right), (prompt, long + right), (prompt, "no"), (prompt, long)])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.5, 0.5, 0.0]
    assert [verdict.correct for verdict in verdicts] == [True, False, False, False]


def test_scores_and_mistakes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "odd.py"
    file.write_text(ODD)
    task = make_task(section(file, "odd"))
    prompt = task.prompts("train")[0]
    with VerifierPool(task, deadline_s=2.0) as pool, caplog.at_level(logging.WARNING):
        texts = ["dict", "bool", "small", "raise", "many", "none", "write", "hang", "dict"]
        verdicts = pool.verify_many([(prompt, text) for text in texts])
        assert pool.failures == 4 and pool.timeouts == 1
    assert [verdict.reward for verdict in verdicts] == [0.25, 1.0, 1e-7, 0, 0, 0, 0, 0, 0.25]
    assert [verdict.timed_out for verdict in verdicts] == [
        text in ("raise", "many", "none", "write", "hang") for text in texts
    ]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "RuntimeError: no such thing" in line and "'raise'" in line and "\n" not in line


@pytest.mark.parametrize(
    ("setting", "content", "names"),
    [
        ("reward.py", "", "FILE.py:NAME"),
        ("absent.py:f", None, "absent.py does not exist"),
        ("reward.py:f", "def g(): pass", "no 'f' there, only g"),
        ("reward.py:f", "def f(:", "is not Python"),
        ("reward.py:f", f"x = {'-' * 200_000}1", "is not Python"),
        ("reward.txt:f", "", "FILE.py:NAME"),
    ],
)
def test_mistakes_in_the_setting_are_one_line(
    tmp_path: Path, monkeypatch, setting: str, content: str | None, names: str
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(setting.rpartition(":")[0] or setting).write_text(content)
    with pytest.raises(ValueError, match=re.escape(names)) as raised:
        make_task(replace(section(tmp_path / "x.py", "f"), reward=setting))
    assert "\n" not in str(raised.value)


def test_another_content_of_the_file_is_another_directory(tmp_path: Path):
    file = tmp_path / "reward.py"
    file.write_text("def f(*_): return 1")
    plain, cfg = (
        load(["experiment=demo_cpu"]),
        load(["experiment=demo_cpu", f"task.reward={file}:f", f"runs={tmp_path}"]),
    )
    assert stage_dir(plain, "rl").name != stage_dir(cfg, "rl").name and task_content(plain) == ""
    first = task_content(cfg)
    before = stage_dir(cfg, "rl")
    before.mkdir(parents=True)
    (before / "data.json").write_text(f'{{"sha256": "{first}"}}')
    assert stage_dir(cfg, "rl") == before
    file.write_text("def f(*_): return 0.5")
    assert stage_dir(cfg, "rl") != before


def test_the_task_of_the_docs_is_shown_judged_and_divided(tmp_path: Path):
    file = tmp_path / "modular.py"
    file.write_text(example("class Modular"))
    task = make_task(TaskConfig(f"{file}:Modular", families=["add", "times"], train=40, validation=4, evaluation=6))
    splits = [task.prompts(split) for split in ("train", "validation", "evaluation")]
    assert [len(prompts) for prompts in splits] == [40, 4, 6]
    assert len({prompt.text for prompts in splits for prompt in prompts}) == 50
    prompt = splits[2][0]
    assert prompt.task in ("modular.add", "modular.times") and "mod" in task.few_shot(prompt, 2, 0).text
    answers = [f"it is mod {prompt.answer}", prompt.answer, "none", f"{prompt.answer}, no, {int(prompt.answer) + 1}"]
    with VerifierPool(task) as pool:
        verdicts = pool.verify_many([(prompt, text) for text in answers])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.5, -1.0, 0.0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("Mine = 3", "TypeError: expected a subclass"),
        ("raise RuntimeError('of mine')\nclass Mine: pass", "RuntimeError: of mine"),
        ("class Other: pass", "no 'Mine' there, only Other"),
        ("class Mine: pass\nraise SystemExit(0)", "SystemExit: 0"),
        (
            "from ee_megatron.tasks import ProceduralTask\nclass Mine(ProceduralTask):\n"
            "    def __init__(self, task, chat): super().__init__(task, ('a',), chat)",
            "choose one or more, each once, of a",
        ),
    ],
)
def test_mistakes_in_a_task_are_one_line(tmp_path: Path, content: str, says: str):
    file = tmp_path / "mine.py"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        make_task(TaskConfig(f"{file}:Mine"))
    assert "\n" not in str(raised.value)


def test_a_tasks_file_is_named_beside_the_tasks_there_are_and_its_content_identifies_results(tmp_path: Path):
    with pytest.raises(ValueError, match=r"task\.name=modular\.py: expected one of arithmetic, .*, or FILE\.py:NAME"):
        validate(load(["experiment=demo_cpu", "task.name=modular.py"]), None)
    file = tmp_path / "modular.py"
    file.write_text(example("class Modular"))
    off = ("traces.wide_operands=0", "rl.wide_operands=0", "evaluate.wide_problems=0", "task.families=[add,times]")
    cfg = load(["experiment=demo_cpu", f"task.name={file}:Modular", *off])
    validate(cfg, None)
    first = task_content(cfg)
    file.write_text(f"{file.read_text()}\n")
    assert task_content(cfg) != first


def test_a_problem_of_two_splits_is_refused(tmp_path: Path):
    def cfg(file: Path) -> RunConfig:
        return load(["experiment=demo_cpu", f"task.name={file}:Modular", "task.families=[add]", "task.train=400"])

    whole, divided = example("class Modular"), "if split_of(question) == split:"
    (good := tmp_path / "good.py").write_text(whole)
    (leaky := tmp_path / "leaky.py").write_text(whole.replace(divided, "if True:"))
    assert divided in whole
    check_task(cfg(good), ["rl", "evaluate"])
    with pytest.raises(ValueError, match=r"is a problem of train and of validation; use split_of"):
        check_task(cfg(leaky), ["rl", "evaluate"])
