"""reasoning-gym's families as a task: on a stand-in that misbehaves in every known way, and on the real package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import Verdict, VerifierPool, make_task, reasoning_gym
from ee_megatron.tasks.reasoning_gym import ReasoningGymTask, _safe

SPLITS = ("train", "validation", "evaluation")
INSTALLED = importlib.util.find_spec("reasoning_gym") is not None
STAND_IN = """
import random, time

class Family:
    def __init__(self, name, size, seed):
        self.name, self.size, self.seed = name, size, seed

    def __getitem__(self, index):
        rng = random.Random(self.seed + index)
        a, b = rng.randrange(1000), rng.randrange(1000)
        if self.name == "few":
            a, b = a % 3, 0
        if self.name == "unordered":
            a = sum(ord(c) for c in list({"x" * n for n in range(1, 40)})[0]) * 1000 + a
        print("a word on standard output")
        answer = None if self.name == "open" else str(a + b)
        return {"question": f"What is {a} plus {b}?", "answer": answer, "metadata": {"sum": a + b, (1, 2): {3}}}

    def score_answer(self, answer, entry):
        if self.name == "gullible":
            return 1.0
        if self.name == "strict":
            return 0.0
        if answer == "hang":
            time.sleep(3600)
        if self.name == "evaluated":
            return float(eval(answer) == entry["metadata"]["sum"])
        total = entry["metadata"]["sum"]
        return {0: 1.0, 1: 0.5, 2: 1.0000000000000002}.get(int(answer) - total, 0.01)

DATASETS = {
    name: (Family, None)
    for name in ("sums", "few", "unordered", "open", "gullible", "strict", "evaluated", "composite")
}

def create_dataset(name, size, seed):
    return Family(name, size, seed)

def get_score_answer_fn(name):
    return Family(name, 1, 0).score_answer
"""


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "reasoning_gym"
    package.mkdir()
    (package / "factory.py").write_text(STAND_IN)
    (package / "__init__.py").write_text("from .factory import create_dataset, get_score_answer_fn\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield package
    forget()


def make(*families: str, train: int = 12, validation: int = 4, evaluation: int = 6) -> ReasoningGymTask:
    task = make_task(TaskConfig(
        "reasoning_gym", list(families), train=train, validation=validation, evaluation=evaluation
    ))  # fmt: skip
    assert isinstance(task, ReasoningGymTask)
    return task


def test_families_take_turns_and_no_question_is_in_two_splits_whatever_the_sizes(stand_in: Path) -> None:
    small, large = make("sums", "evaluated"), make("sums", "evaluated", train=600, validation=80, evaluation=160)
    assert [p.text for p in large.prompts("train")][:12] == [p.text for p in small.prompts("train")]
    groups = {split: {p.group for p in large.prompts(split)} for split in SPLITS}  # type: ignore[arg-type]
    assert [len(groups[split]) for split in SPLITS] == [600, 80, 160]
    assert not groups["train"] & groups["validation"] and not groups["train"] & groups["evaluation"]
    assert not groups["validation"] & groups["evaluation"]
    assert {p.task for p in large.prompts("train")[:2]} == {"reasoning_gym.sums", "reasoning_gym.evaluated"}


def test_families_that_walk_over_sets_are_the_same_in_every_process(stand_in: Path) -> None:
    code = (
        "from ee_megatron.tasks import make_task; from ee_megatron.config.schema import TaskConfig;"
        "t = make_task(TaskConfig('reasoning_gym', families=['unordered'], train=3, validation=3, evaluation=3));"
        "print('|'.join(p.text for p in t.prompts('train')))"
    )
    shown = set()
    for hash_seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
        )
        shown.add(done.stdout)
    assert len(shown) == 1


def test_worked_examples_are_tagged_and_set_aside(stand_in: Path) -> None:
    task = make("sums")
    prompt, worked = task.worked("evaluation")[0]
    assert worked == f" <answer>{prompt.answer}</answer>"
    shown = task.few_shot(prompt, 3, 0)
    assert shown.text.count("<answer>") == 3 and shown.text.endswith(prompt.text)
    examples = {block.split("\nAnswer:")[0] for block in shown.text.split("\n\n")[:-1]}
    assert not examples & {p.text.split("\nAnswer:")[0] for split in SPLITS for p in task.prompts(split)}  # type: ignore[arg-type]


def test_the_packages_scorer_judges_in_the_verifier_process(stand_in: Path) -> None:
    task = make("sums")
    prompt = task.prompts("train")[0]
    right, close, summed = (str(int(prompt.answer) + off) for off in (0, 1, 2))
    texts = {
        f"So <answer> {right} </answer>": 1.0,
        f"<answer>7</answer> no: <answer>{right}</answer>": 1.0,
        f"<think><answer>7</answer></think>\n<answer>{right}.</answer>": 1.0,
        f"So <answer>{right}": 1.0,
        f"<answer>{right}</answer>, as I said": 1.0,
        f"The answer is {right}.": 0.5,
        f"\\boxed{{{right}}}": 0.5,
        f"First, then\n{right}": 0.5,
        right: 0.5,
        f"<answer>{close}</answer>": 0.0,
        f"<answer>{summed}</answer>": 0.0,
        f"The answer is {close}": 0.0,
        "<answer>so many</answer>": 0.0,
        "<answer></answer>": -1.0,
        f"<think>{right}": -1.0,
        close: -1.0,
        "": -1.0,
    }
    with VerifierPool(task, deadline_s=20) as pool:
        verdicts = pool.verify_many([(prompt, text) for text in texts])
        assert (pool.timeouts, pool.failures) == (0, 0)
    assert dict(zip(texts, [verdict.reward for verdict in verdicts], strict=True)) == texts


def test_a_scorer_that_hangs_costs_its_deadline(stand_in: Path) -> None:
    task = make("sums")
    prompt = task.prompts("train")[0]
    with VerifierPool(task, deadline_s=1) as pool:
        pool.verify_many([(prompt, prompt.answer)])
        verdicts = pool.verify_many([(prompt, "<answer>hang</answer>"), (prompt, f"<answer>{prompt.answer}</answer>")])
        assert pool.timeouts == 1
    assert verdicts == [Verdict(False, False, False, timed_out=True), Verdict(True, True, True)]


def test_what_a_scorer_would_run_never_reaches_it(stand_in: Path, tmp_path: Path) -> None:
    task = make("evaluated")
    prompt = task.prompts("train")[0]
    marker = tmp_path / "touched"
    write = f"open({str(marker)!r}, 'w')"
    attacks = [
        write,
        f"__import__('os').system('touch {marker}')",
        f"[open][0]({str(marker)!r}, 'w')",
        f"ｏｐｅｎ({str(marker)!r}, 'w')",
        f"open ({str(marker)!r}, 'w')",
        f"open\\\n({str(marker)!r}, 'w')",
        f"(open#\n({str(marker)!r}, 'w'))",
        f"(lambda: {write})()",
        f"f'{{{write}}}'",
    ]
    assert not any(_safe(text) for text in (*attacks, "__debug__", "7" * 30_000, ""))
    assert all(
        map(_safe, ("24", "(3 + 4)*2", "x*sin(x) + C", "[['a', 'b']]", "(A or B) and (not C)", "$\\frac{1}{2}$"))
    )
    with VerifierPool(task, deadline_s=20) as pool:
        verdicts = pool.verify_many([(prompt, f"<answer>{text}</answer>") for text in attacks])
        right = pool.verify_many([(prompt, f"<answer>{prompt.answer} + (3 - 3)</answer>")])[0]
    assert not any(verdict.correct for verdict in verdicts)
    assert right.correct
    assert not marker.exists()


def test_unusable_families_say_why(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'sum'.*\bsums\b"):
        make("sum")
    with pytest.raises(ValueError, match="'composite'"):
        make("composite")
    with pytest.raises(ValueError, match="gullible"):
        make("gullible")
    with pytest.raises(ValueError, match="strict"):
        make("strict")
    with pytest.raises(ValueError, match=r"task\.train.*\b12\b.*\bfew\b"):
        make("few").prompts("train")
    with pytest.raises(ValueError, match=r"task\.families"):
        make_task(TaskConfig("reasoning_gym", families=[]))
    monkeypatch.setattr(reasoning_gym, "GENERATE_TIMEOUT_S", 0.01)
    with pytest.raises(ValueError, match=r"sums.*\b0 s\b"):
        make("sums")


def test_families_without_references_have_prompts_and_verdicts_but_no_worked_examples(stand_in: Path) -> None:
    task = make("open")
    prompt = task.prompts("train")[0]
    a, b = (int(word) for word in prompt.text.replace("?", "").split() if word.isdigit())
    assert prompt.answer == "" and task.verify(prompt, f"<answer>{a + b}</answer>").reward == 1.0
    assert task.few_shot(prompt, 0, 0).text == prompt.text
    with pytest.raises(ValueError, match=r"\bopen\b"):
        task.worked("train")
    with pytest.raises(ValueError, match=r"\bopen\b"):
        task.few_shot(prompt, 1, 0)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "reasoning_gym" else found(name))
    with pytest.raises(ValueError, match=r"ee-megatron\[reasoning-gym\]") as error:
        make("sums")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not INSTALLED, reason="reasoning-gym is not installed")
def test_the_real_package_accepts_its_own_references_and_no_others() -> None:
    forget()
    # fmt: off
    families = (
        "chain_sum", "basic_arithmetic", "gcd", "leg_counting", "letter_counting", "caesar_cipher",
        "family_relationships", "syllogism", "spell_backward", "polynomial_multiplication", "countdown",
        "rotate_matrix", "ab", "products",
    )
    # fmt: on
    task = make(*families, train=140, validation=14, evaluation=14)
    worked = task.worked("train")
    with VerifierPool(task, deadline_s=20) as pool:
        right = pool.verify_many(worked)
        wrong = pool.verify_many([(prompt, text.replace("</answer>", "7Q</answer>")) for prompt, text in worked])
        assert (pool.timeouts, pool.failures) == (0, 0)
    assert [verdict.reward for verdict in right] == [1.0] * 140
    assert not any(verdict.correct for verdict in wrong)
    forget()
