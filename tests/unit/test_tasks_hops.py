"""Hops: every worked answer is right, read by an independent reader; styles, splits and mistakes are what they say."""

from __future__ import annotations

import pickle
import re
from collections import Counter

import pytest

from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import make_task
from ee_megatron.tasks.hops import HopsTask
from ee_megatron.types import Prompt

FAMILIES = ["hop1", "hop2", "hop3", "hop4"]


def hops(**settings) -> HopsTask:
    task = make_task(
        TaskConfig("hops", **{"families": FAMILIES, "train": 4000, "validation": 40, "evaluation": 400, **settings})
    )
    assert isinstance(task, HopsTask)
    return task


def walked(task: HopsTask, prompt: Prompt) -> list[str]:
    """The states after each hop, by the tables of the operations alone."""
    operations, state, found = prompt.text[:4].replace("_", ""), prompt.text[4], []
    for operation in operations:
        state = task.permutations[operation][int(state)]
        found.append(state)
    return found


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_worked_answers_are_right_in_every_style(gap: int) -> None:
    task = hops(tokens_per_step=gap)
    seen: Counter[tuple[str, str]] = Counter()
    for prompt, answer in task.worked("train"):
        states = walked(task, prompt)
        assert len(states) == int(prompt.task[-1]) and prompt.answer == states[-1] and prompt.group == prompt.text
        verdict = task.verify(prompt, answer + "\n2nd line")
        assert verdict.correct and verdict.well_formed
        style = task.style_of(prompt, answer)
        assert style is not None and answer.startswith(task.opening(style))
        seen[style, prompt.task] += 1
        if style == "steps":
            assert answer == "S" + "".join("," * (gap - 1) + state for state in states)
        else:
            filler = "." * (len(states) * gap) if style == "padded" else ""
            assert answer == {"terse": "T", "padded": "P"}[style] + filler + states[-1]
    # Shares .4, .4, .2, the same for every number of hops: 1,000 answers a family.
    for family in FAMILIES:
        shares = [seen[style, f"hops.{family}"] / 1000 for style in task.styles]
        assert all(abs(share - wanted) < 0.06 for share, wanted in zip(shares, task.style_weights, strict=True)), shares


def test_operations_are_permutations_that_differ() -> None:
    tables = hops().permutations
    assert all(sorted(table) == list("01234567") for table in tables.values()) and len(set(tables.values())) == 4
    assert tables == hops().permutations


def test_training_never_sees_the_longer_test_problems() -> None:
    task = hops(train=20000)
    splits = {split: {p.text for p in task.prompts(split)} for split in ("train", "validation", "evaluation")}
    for text in splits["evaluation"] | splits["validation"]:
        if text.count("_") <= 1:
            assert text not in splits["train"]
    assert not {t for t in splits["evaluation"] & splits["validation"] if t.count("_") <= 1}
    # About a tenth of the 512 problems of three hops.
    held = {p.text for p in hops(evaluation=0).prompts("evaluation") if p.task == "hops.hop3"}
    assert 35 < len(held) < 70
    # Of one hop there are 32 problems in all, in every split.
    assert len({t for t in splits["train"] if t.count("_") == 3}) == 32


def test_prompts_are_named_apart_and_the_same_again() -> None:
    first, again = hops().prompts("train"), hops().prompts("train")
    assert first == again and len({p.id for p in first}) == len(first) == 4000
    assert first[:500] == hops(train=500).prompts("train")
    assert Counter(p.task for p in first) == {f"hops.{family}": 1000 for family in FAMILIES}


@pytest.mark.parametrize(
    ("text", "correct", "well_formed", "answered", "style"),
    [
        ("T{}", True, True, True, "terse"),
        ("S12{}", True, True, True, "steps"),
        ("P...{}", True, True, True, "padded"),
        # A result behind an S alone, or a step too many: right, but not the way.
        ("S{}", True, True, True, None),
        ("S112{}", True, True, True, None),
        ("{}", True, False, True, None),
        ("TS{}", True, False, True, None),
        ("T{}.", False, False, False, None),
        ("P...", False, False, False, None),
        ("", False, False, False, None),
    ],
)
def test_verdicts(text: str, correct: bool, well_formed: bool, answered: bool, style: str | None) -> None:
    task = hops()
    prompt = next(p for p in task.prompts("train") if p.task == "hops.hop3")
    said = text.format(prompt.answer)
    verdict = task.verify(prompt, said)
    assert (verdict.correct, verdict.well_formed, verdict.answered) == (correct, well_formed, answered)
    assert task.style_of(prompt, said) == style
    other = str((int(prompt.answer) + 1) % 8)
    assert not task.verify(prompt, text.format(other)).correct


def test_a_wrong_first_step_leads_to_a_wrong_answer() -> None:
    task = hops(tokens_per_step=2)
    for prompt in task.prompts("evaluation"):
        found = task.corrupted(prompt)
        if prompt.task == "hops.hop1":
            assert found is None
            continue
        assert found is not None
        opening, end = found
        assert re.fullmatch("S,[0-7]", opening) and opening[-1] != walked(task, prompt)[0]
        rest = Prompt("", prompt.text[1:4] + "_" + opening[-1], "", "")
        assert end == walked(task, rest)[-1] != prompt.answer


def test_it_travels_to_verifiers_without_its_problems() -> None:
    task = hops()
    prompt, answer = task.worked("train")[0]
    copy = pickle.loads(pickle.dumps(task))
    assert copy.verify(prompt, answer).correct and not copy._problems


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"families": ["hop5"]}, ["task.families", "['hop5']", "hop1, hop2, hop3, hop4"]),
        ({"families": ["hop6"], "slots": 5}, ["task.families", "['hop6']", "hop1, hop2, hop3, hop4, hop5"]),
        ({"slots": 9}, ["task.slots", "9", "8"]),
        ({"families": ["hop1", "hop1"]}, ["task.families", "['hop1', 'hop1']"]),
    ],
)
def test_refusals(settings: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        hops(**settings)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_more_hops_need_more_slots() -> None:
    task = hops(families=["hop1", "hop6"], slots=6, train=400)
    for prompt in task.prompts("train"):
        count = 6 if prompt.task == "hops.hop6" else 1
        assert re.fullmatch(rf"[abcd]{{{count}}}_{{{6 - count}}}[0-7]", prompt.text)
        assert task.style_of(prompt, task.written(task.states(prompt.text), "steps")) == "steps"
    assert task.permutations == hops().permutations


def test_no_chat_and_no_examples() -> None:
    with pytest.raises(ValueError, match=r"rollout\.prompt_template"):
        make_task(TaskConfig("hops", families=FAMILIES), lambda messages: "")
    task = hops()
    prompt = task.prompts("train")[0]
    assert task.few_shot(prompt, 0, 0).text == prompt.text
    with pytest.raises(ValueError, match="'hops'"):
        task.few_shot(Prompt("hops", "b___1", "1", "hops.hop1"), 0, 0)
    with pytest.raises(ValueError, match=r"teacher\.enabled"):
        task.few_shot(prompt, 2, 0)
