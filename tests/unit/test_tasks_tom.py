"""Theory-of-mind stories: answers that an independent reader agrees with, nothing shared between splits, controls."""

from __future__ import annotations

import re

import pytest

from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import Verdict, VerifierPool
from ee_megatron.tasks import tom as words
from ee_megatron.tasks.tom import FAMILIES, VOCABULARY, ToMTask
from ee_megatron.types import Prompt

SPLITS = ("train", "validation", "evaluation")
EVENTS = ("INTRO", "PUT", "MOVE", "LEAVE", "RETURN", "WATCHES", "STAYS", "UNNOTICED", "NOTICED", "ASIDE")
CONTENTS = ("LABEL", "INSIDE", "NEWCOMER", "WITNESS")
QUESTIONS = ("NESTED", "BELIEF", "REALITY", "MEMORY")


@pytest.fixture(scope="module")
def task() -> ToMTask:
    return ToMTask(TaskConfig("tom", list(FAMILIES), train=2000, validation=300, evaluation=400))


def pattern(template: str) -> re.Pattern[str]:
    """A template as a pattern: every {name} is one word, or one of the rooms."""
    seen: set[str] = set()

    def group(found: re.Match[str]) -> str:
        name = found[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{'|'.join(words.ROOMS) if name == 'room' else '[A-Za-z]+'})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(template)) + r"(?: |$)")


def read(text: str, kinds: tuple[str, ...], questions: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """The events of a story and its question, by what is written: (kind, what each word stands for)."""
    known = [
        (kind.removeprefix("CONTENTS_"), pattern(t)) for kind in (*kinds, *questions) for t in getattr(words, kind)
    ]
    told, at = [], 0
    while at < len(text):
        fits = [(found, kind) for kind, regex in known if (found := regex.match(text, at))]
        assert fits, text[at:]
        found, kind = max(fits, key=lambda fit: fit[0].end())
        told.append((kind, found.groupdict()))
        at = found.end()
    return told


def expected(question: str) -> str:
    """The answer as a reader finds it who goes through the story with three lists."""
    if "closed" in question:
        *story, (asked, who) = read(question, CONTENTS, tuple(f"CONTENTS_{kind}" for kind in QUESTIONS))
        facts = {key: value for _, values in story for key, value in values.items()}
        knows = any(kind == "WITNESS" for kind, _ in story)
        if asked == "MEMORY" or (asked in ("BELIEF", "NESTED") and not knows):
            return facts["label"]
        return facts["stock"]
    *story, (asked, who) = read(question, EVENTS, QUESTIONS)
    places: list[str] = []
    seen: list[bool] = []
    known_seen: list[bool] = []
    away = next(values["a"] for kind, values in story if kind in ("LEAVE", "STAYS", "WATCHES"))
    present = True
    for kind, values in story:
        if kind in ("PUT", "MOVE"):
            places.append(values["place"])
            seen.append(present)
            known_seen.append(present)
        elif kind in ("LEAVE", "RETURN"):
            present = kind == "RETURN"
        elif kind in ("UNNOTICED", "NOTICED"):
            seen[-1] = True
            known_seen[-1] = kind == "NOTICED"
    if asked == "REALITY":
        return places[-1]
    if asked == "MEMORY":
        return places[0]
    if asked == "BELIEF":
        return [p for p, s in zip(places, seen, strict=True) if s][-1] if who["who"] == away else places[-1]
    assert who["other"] == away
    return [p for p, s in zip(places, known_seen, strict=True) if s][-1]


def questions(task: ToMTask, split: str) -> list[tuple[Prompt, str, str]]:
    return [(prompt, problem.question, problem.worked) for prompt, problem in task._built(split).values()]  # type: ignore[arg-type]


def test_an_independent_reader_of_the_stories_finds_the_same_answers(task: ToMTask) -> None:
    for split in SPLITS:
        for prompt, question, worked in questions(task, split):
            assert expected(question) == prompt.answer, question
            assert worked.endswith((f" The answer is the {prompt.answer}", f" The answer is {prompt.answer}"))
            assert "\n" not in worked and prompt.answer in VOCABULARY
            found = set(re.findall(r"[A-Za-z]+", question))
            names, *items = prompt.group.split(";")
            assert names == "+".join(sorted(found & set(words.NAMES))) and names.count("+") == 1
            assert all(set(item.split("@")) <= found for item in items)
            assert task.verify(prompt, worked) == Verdict(True, True, True)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (" Ada last saw it in the box. The answer is the box", 1.0),
        (" The answer is the box.", 1.0),
        (" The answer is: Box", 1.0),
        (" The answer is in the box", 1.0),
        (" \\boxed{box}", 1.0),
        (" She looks in the box.", 0.5),
        (" the box", 0.5),
        (" The answer is that Ada will look in the box", 0.5),
        (" The answer is the basket", 0.0),
        (" The answer is the box or the basket", 0.0),
        (" She looks in the basket.", 0.0),
        (" The answer is the boxes", 0.0),
        (" The answer is the box. \nThe answer is the basket", 0.0),
        (" <think>The answer is the box", -1.0),
        (" Nobody could ever know such a thing", -1.0),
        ("", -1.0),
    ],
)
def test_verdict(text: str, reward: float) -> None:
    prompt = Prompt("tom/first_order/train/00000", "", "box", "tom.first_order")
    task = ToMTask(TaskConfig("tom", list(FAMILIES), train=5))
    assert task.verify(prompt, text).reward == reward
    with VerifierPool(task, deadline_s=20) as pool:
        assert pool.verify_many([(prompt, text)])[0].reward == reward
