"""Sums: every worked answer is right, read by an independent reader; styles, splits and mistakes are what they say."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import make_task
from ee_megatron.tasks.sums import SumsTask
from ee_megatron.types import Prompt

FAMILIES = ["hop1", "hop2", "hop3"]


def sums(**settings) -> SumsTask:
    task = make_task(
        TaskConfig("sums", **{"families": FAMILIES, "train": 3000, "validation": 30, "evaluation": 300, **settings})
    )
    assert isinstance(task, SumsTask)
    return task


def worked_out(text: str) -> list[int]:
    """The totals of a problem, by Python's own arithmetic."""
    words, start = text.split(", from ")
    totals = [int(start)]
    for word in words.split(", "):
        totals.append(eval(f"{totals[-1]}{word.replace('add ', '+').replace('take ', '-').replace('double', '*2')}"))
    return totals[1:]


def test_worked_answers_are_right_in_every_style() -> None:
    task, seen = sums(), Counter[tuple[str, str]]()
    for prompt, answer in task.worked("train"):
        totals = worked_out(prompt.text)
        assert len(totals) == int(prompt.task[-1]) and prompt.answer == str(totals[-1]) and prompt.group == prompt.text
        assert all(0 <= total <= 99 for total in totals)
        verdict = task.verify(prompt, answer + "\n2nd line")
        assert verdict.correct and verdict.well_formed
        style = task.style_of(prompt, answer)
        assert style is not None and answer.startswith(task.opening(style))
        assert [s for s in task.styles if answer.startswith(task.opening(s))] == [style]
        seen[style, prompt.task] += 1
        numbers = [int(number) for number in re.findall("[0-9]+", answer)]
        assert numbers == (totals if style == "steps" else totals[-1:])
    for family in FAMILIES:
        shares = [seen[style, f"sums.{family}"] / 1000 for style in task.styles]
        assert all(abs(share - wanted) < 0.06 for share, wanted in zip(shares, task.style_weights, strict=True)), shares


def test_padded_answers_are_as_long_as_steps_and_say_nothing() -> None:
    task = sums()
    for prompt in task.prompts("train")[:200]:
        totals = task.states(prompt.text)
        steps, padded = (re.findall(r"\w+|,", task.written(totals, style)) for style in ("steps", "padded"))
        # "First 12, then 24" and "Well, let me see, 24": a word more a hop, where a total's digits and the space before
        # them are two or three tokens.
        assert len(padded) - len(steps) == len(totals)
        assert task.written(totals, "padded") == task.written([*["0"] * (len(totals) - 1), totals[-1]], "padded")


def test_training_never_sees_test_problems_of_several_hops() -> None:
    task = sums(train=20000, evaluation=0, validation=2000)
    splits = {split: {p.text for p in task.prompts(split)} for split in ("train", "validation", "evaluation")}
    several = {split: {text for text in texts if text.count(",") > 1} for split, texts in splits.items()}
    for split, other in (("train", "validation"), ("train", "evaluation"), ("validation", "evaluation")):
        assert several[split] and several[other] and not several[split] & several[other]
    held = {p.text for p in task.prompts("evaluation") if p.task == "sums.hop2"}
    assert 60 < len(held) < 120


@pytest.mark.parametrize(
    ("text", "correct", "well_formed", "answered", "style"),
    [
        (" That is {}", True, True, True, "terse"),
        (" First 12, then 24, then {}", True, True, True, "steps"),
        (" Well, let me see, let me see, {}", True, True, True, "padded"),
        (" Well, {}", True, True, True, "padded"),
        # A total too few or too many: right, but not the way.
        (" First 12, then {}", True, True, True, None),
        (" First 1, then 12, then 24, then {}", True, True, True, None),
        (" {}", True, False, True, None),
        (" That is 1{}", False, True, True, "terse"),
        # The end of a number that is too long is no answer.
        (" That is 10{}", False, False, False, None),
        (" That is {}.", False, False, False, None),
        (" That is", False, False, False, None),
        ("", False, False, False, None),
    ],
)
def test_verdicts(text: str, correct: bool, well_formed: bool, answered: bool, style: str | None) -> None:
    task = sums()
    prompt = Prompt("sums/hop3/train/00000", "add 5, double, take 3, from 7", "21", "sums.hop3")
    said = text.format(prompt.answer)
    verdict = task.verify(prompt, said)
    assert (verdict.correct, verdict.well_formed, verdict.answered) == (correct, well_formed, answered)
    assert task.style_of(prompt, said) == style
    assert not task.verify(prompt, text.format("22")).correct


def test_a_wrong_first_total_leads_to_a_wrong_answer() -> None:
    task = sums()
    for prompt in task.prompts("evaluation"):
        found = task.corrupted(prompt)
        if prompt.task == "sums.hop1":
            assert found is None
            continue
        assert found is not None
        opening, end = found
        wrong = int(opening.removeprefix(" First "))
        assert wrong != worked_out(prompt.text)[0]
        rest = prompt.text.split(", ", 1)[1].rpartition(", from ")[0]
        assert int(end) == worked_out(f"{rest}, from {wrong}")[-1] != int(prompt.answer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"families": ["hop5"]}, "task.families: ['hop5']; choose one or more, each once, of hop1, hop2, hop3, hop4"),
        ({"slots": 5}, "task.slots: 5; choose at most 4"),
    ],
)
def test_refusals(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        sums(**settings)
