"""Arithmetic problems: right by construction, held out by operand pair, the same for the same seed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import Verdict
from ee_megatron.tasks.arithmetic import ArithmeticTask, PairSplit, verify_line

ALL = ["product", "sum", "word", "chain"]
SPLITS = ("train", "validation", "evaluation")


@pytest.fixture(scope="module", params=["small", "wide"])
def task(request: pytest.FixtureRequest) -> ArithmeticTask:
    settings = TaskConfig("arithmetic", ALL, train=3000, validation=400, evaluation=500, operands=request.param)
    return ArithmeticTask(settings)


def worked(task: ArithmeticTask, split: str) -> list[tuple[str, str, str, str]]:
    return [(p.text, problem.worked, p.answer, p.group) for p, problem in task._built(split).values()]  # type: ignore[arg-type]


def test_wide_operands_give_held_out_problems_pairs_of_their_own() -> None:
    """Per thousand test problems: groups that are right or wrong together, and pairs of products, the fewest."""
    groups, products = {}, {}
    for operands in ("small", "wide"):
        prompts = ArithmeticTask(TaskConfig("arithmetic", ALL, evaluation=1000, operands=operands)).prompts(
            "evaluation"
        )
        groups[operands] = len({p.group for p in prompts})
        products[operands] = len({p.group for p in prompts if p.task == "arithmetic.product"})
    assert groups["wide"] > 600 > 2 * groups["small"] and products["wide"] > 7 * products["small"]


def test_every_worked_answer_is_true_and_ends_in_the_reference(task: ArithmeticTask) -> None:
    for split in SPLITS:
        for text, steps, answer, group in worked(task, split):
            for a, symbol, b, c in re.findall(r"(\d+) ([x+-]) (\d+) = (\d+)\.", steps):
                assert {"x": int(a) * int(b), "+": int(a) + int(b), "-": int(a) - int(b)}[symbol] == int(c)
            assert steps.endswith(f"= {answer}. The answer is {answer}"), text
            assert group == ";".join(
                f"{min(int(a), int(b))},{max(int(a), int(b))}" for a, b in re.findall(r"(\d+) [x+-] (\d+) =", steps)
            )
            assert set(re.findall(r"\d+", text)) <= set(re.findall(r"\d+", steps))


def test_the_seed_decides_the_split_in_fixed_shares() -> None:
    shares = [sum(PairSplit(seed)(a, b) == "train" for a in range(2, 13) for b in range(a, 13)) for seed in (0, 1)]
    assert shares == [44, 44]
    assert any(PairSplit(0)(a, b) != PairSplit(1)(a, b) for a in range(2, 13) for b in range(a, 13))
    assert PairSplit(0)(7, 41) == PairSplit(0)(41, 7)


def test_a_chat_template_gets_turns_and_an_instruction() -> None:
    def chat(messages: list[dict[str, str]]) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    task = ArithmeticTask(TaskConfig("arithmetic", ["sum"], train=3), chat)
    prompt = task.prompts("train")[0]
    assert prompt.text.startswith("<user>") and "The answer is <number>" in prompt.text
    assert task.few_shot(prompt, 2, 0).text.count("<assistant>") == 3


@pytest.mark.parametrize(
    ("text", "correct", "well_formed", "answered", "reward"),
    [
        (" 3 x 8 = 24. The answer is 24", True, True, True, 1.0),
        (" The answer is 24.", True, True, True, 1.0),
        (" The answer is 024", True, True, True, 1.0),
        (" 3 x 8 = 24", True, False, True, 0.5),
        (" 24.0", True, False, True, 0.5),
        (" The answer is 24 apples", True, False, True, 0.5),
        (" 3 x 8 = 25. The answer is 25", False, True, True, 0.0),
        (" The answer is 24. The answer is 25", False, True, True, 0.0),
        (" The answer is -24", False, True, True, 0.0),
        (" The answer is 240", False, True, True, 0.0),
        (" 24 or 25", False, False, True, 0.0),
        (" The answer is 25\nThe answer is 24", False, True, True, 0.0),
        (" The answer is 25 Question: What is 3 x 8? Answer: The answer is 24", False, True, True, 0.0),
        (" I do not know", False, False, False, -1.0),
        ("", False, False, False, -1.0),
        (" The answer is ２４", False, False, False, -1.0),
    ],
)
def test_verdict_on_a_line(text: str, correct: bool, well_formed: bool, answered: bool, reward: float) -> None:
    verdict = verify_line("24", text)
    assert verdict == Verdict(correct, well_formed, answered)
    assert verdict.reward == reward


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_the_stated_number_is_right_iff_it_is_the_reference(reference: int, stated: int) -> None:
    assert verify_line(str(reference), f" The answer is {stated}").correct == (reference == stated)
    assert verify_line(str(reference), f" it is {stated}").correct == (reference == stated)


@pytest.mark.parametrize("text", ["7" * 100_000, " The answer is " + "7" * 100_000, "1" + "," * 100_000, "-" * 100_000])
def test_enormous_answers_are_judged_at_once(text: str) -> None:
    assert not verify_line("7", text).correct
