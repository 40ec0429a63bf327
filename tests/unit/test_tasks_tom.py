"""Theory-of-mind stories: answers that an independent reader agrees with, nothing shared between splits, controls."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import Verdict, VerifierPool, make_task
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
            assert task.verify(prompt, worked) == Verdict(True, True, True)


def test_no_two_names_and_no_object_with_a_place_occur_in_two_splits(task: ToMTask) -> None:
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        parts: set[str] = set()
        for prompt, question, _ in questions(task, split):
            found = set(re.findall(r"[A-Za-z]+", question))
            names = sorted(found & set(words.NAMES))
            assert len(names) == 2
            first, *items = prompt.group.split(";")
            assert first == "+".join(names)
            for item in items:
                assert set(item.split("@")) <= found
            parts |= {first, *items}
        seen[split] = parts
    assert all(len(parts) > 100 for parts in seen.values())
    assert not any(seen[a] & seen[b] for a, b in combinations(SPLITS, 2))


def test_examples_are_no_prompts_and_share_nothing_with_the_held_out_splits(task: ToMTask) -> None:
    held_out = {part for split in SPLITS[1:] for prompt in task.prompts(split) for part in prompt.group.split(";")}  # type: ignore[arg-type]
    asked = {question for split in SPLITS for _, question, _ in questions(task, split)}
    for family in FAMILIES:
        prompt = next(p for p in task.prompts("evaluation") if p.task == f"tom.{family}")
        shown = task.few_shot(prompt, 6, 1)
        assert shown.id == prompt.id and shown.text.endswith(prompt.text)
        header = shown.text.removesuffix(prompt.text).strip().split("\n\n")
        assert len(header) == 6
        for block in header:
            question = block.split("\nAnswer:")[0].removeprefix("Question: ")
            assert question not in asked
            names = sorted(set(re.findall(r"[A-Za-z]+", question)) & set(words.NAMES))
            assert "+".join(names) not in held_out
        same_family = [p for p in task.prompts("evaluation") if p.task == f"tom.{family}"][:9]
        assert len({task.few_shot(p, 6, 1).text.removesuffix(p.text) for p in same_family}) == 1


def test_controls_leave_no_place_that_is_always_right(task: ToMTask) -> None:
    # Shares of prompts at which it is right to name the first, or the last, place of the object.
    hits: dict[str, list[tuple[bool, bool]]] = {family: [] for family in FAMILIES}
    for prompt, question, _ in questions(task, "train"):
        if "closed" in question:
            continue
        places = [values["place"] for kind, values in read(question, EVENTS, QUESTIONS) if kind in ("PUT", "MOVE")]
        hits[prompt.task.removeprefix("tom.")].append((places[0] == prompt.answer, places[-1] == prompt.answer))
    share = {
        family: tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)) for family, rows in hits.items()
    }
    assert share["memory"][0] == 1 and share["reality"][1] == 1
    assert 0.3 < share["first_order"][0] < 0.7 and share["first_order"][1] == 0
    assert share["true_belief"][0] == 0 and share["true_belief"][1] == 1
    assert 0.5 < share["second_order"][0] < 0.9 and share["second_order"][1] == 0


def test_the_default_task_is_large_balanced_without_repetition_and_in_many_words() -> None:
    task = make_task(TaskConfig("tom", list(FAMILIES)))
    for split, least in (("train", 7000), ("validation", 200), ("evaluation", 400)):
        prompts = task.prompts(split)  # type: ignore[arg-type]
        assert len(prompts) >= least
        assert len({p.text for p in prompts}) == len({p.id for p in prompts}) == len(prompts)
        assert all(len({p.task for p in prompts[i : i + 5]}) == 5 for i in range(0, len(prompts), 5))
    shapes = {re.sub("|".join((*words.NAMES, *words.THINGS, *VOCABULARY, *words.ROOMS)), "_", p.text) for p in prompts}
    assert len(shapes) > 380


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
