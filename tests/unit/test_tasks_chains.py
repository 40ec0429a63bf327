"""Hops and sums: every worked answer is right, read by an independent reader; styles, splits and mistakes are what they
say."""

from __future__ import annotations

import pickle
import re
from collections import Counter

import pytest

from ee_megatron.config.schema import HOPS, WORDED, TaskConfig
from ee_megatron.tasks import make_task
from ee_megatron.tasks.chains import ChainTask
from ee_megatron.types import Prompt

NAMES = ("hops", "sums")


def make(name: str, **settings) -> ChainTask:
    families = [f"hop{hops}" for hops in range(1, 5 if name == "hops" else 4)]
    default = {"families": families, "train": 1000 * len(families), "validation": 40, "evaluation": 400}
    task = make_task(TaskConfig(name, **{**default, **settings}))
    assert isinstance(task, ChainTask)
    return task


def walked(task: ChainTask, text: str) -> list[str]:
    """The states after each hop: by the tables of the operations alone, or by Python's own arithmetic."""
    if task.name == "hops":
        states = [text[-1]]
        for operation in text[:-1].replace("_", ""):
            states.append(task.permutations[operation][int(states[-1])])  # type: ignore[attr-defined]
        return states[1:]
    words, start = text.split(", from ")
    states = [start]
    for word in words.split(", "):
        step = word.replace("add ", "+").replace("take ", "-").replace("double", "*2")
        states.append(str(eval(f"{states[-1]}{step}")))
    return states[1:]


@pytest.mark.parametrize(("name", "gap"), [("hops", 1), ("hops", 4), ("sums", 1)])
def test_worked_answers_are_right_in_every_style(name: str, gap: int) -> None:
    task, seen = make(name, tokens_per_step=gap), Counter[tuple[str, str]]()
    for prompt, answer in task.worked("train"):
        states = walked(task, prompt.text)
        assert len(states) == int(prompt.task[-1]) and prompt.answer == states[-1] and prompt.group == prompt.text
        verdict = task.verify(prompt, answer + "\n2nd line")
        assert verdict.correct and verdict.well_formed
        (style,) = [style for style in task.styles if answer.startswith(task.openings[style])]
        assert task.style_of(prompt, answer) == style and answer == task.written(states, style)
        seen[style, prompt.task] += 1
        numbers = re.findall("[0-9]" if name == "hops" else "[0-9]+", answer)
        assert numbers == (states if style == "steps" else states[-1:])
        if style == "padded":
            # As long as the steps, about, and without their content.
            assert answer == task.written(["0"] * (len(states) - 1) + states[-1:], style)
            assert name == "sums" or len(answer) == 1 + gap * len(states) + 1
    # Shares .4, .4, .2, the same for every number of hops: 1,000 answers a family.
    for family in task.families:
        shares = [seen[style, f"{name}.{family}"] / 1000 for style in task.styles]
        assert all(abs(share - wanted) < 0.06 for share, wanted in zip(shares, task.style_weights, strict=True)), shares


def test_operations_are_permutations_that_differ() -> None:
    tables = make("hops").permutations  # type: ignore[attr-defined]
    assert all(sorted(table) == list("01234567") for table in tables.values()) and len(set(tables.values())) == 4


@pytest.mark.parametrize(("name", "hops", "held"), [("hops", 3, (35, 70)), ("sums", 2, (60, 120))])
def test_training_never_sees_the_longer_test_problems(name: str, hops: int, held: tuple[int, int]) -> None:
    task = make(name, train=20000, validation=2000, evaluation=0)
    longer = {
        split: {p.text for p in task.prompts(split) if int(p.task[-1]) >= hops}  # type: ignore[arg-type]
        for split in ("train", "validation", "evaluation")
    }
    assert all(longer.values())
    assert sum(map(len, longer.values())) == len(set().union(*longer.values()))
    # About a tenth of them; of one hop all problems are in every split.
    assert held[0] < len({p.text for p in task.prompts("evaluation") if int(p.task[-1]) == hops}) < held[1]
    assert name == "sums" or len({p.text for p in task.prompts("train") if p.task == "hops.hop1"}) == 32


@pytest.mark.parametrize(
    ("name", "text", "correct", "well_formed", "answered", "style"),
    [
        ("hops", "T{}", True, True, True, "terse"),
        ("hops", "S12{}", True, True, True, "steps"),
        ("hops", "P...{}", True, True, True, "padded"),
        # A result behind an S alone, or a step too many: right, but not the way.
        ("hops", "S{}", True, True, True, None),
        ("hops", "S112{}", True, True, True, None),
        ("hops", "{}", True, False, True, None),
        ("hops", "TS{}", True, False, True, None),
        ("hops", "T{}.", False, False, False, None),
        ("hops", "P...", False, False, False, None),
        ("hops", "", False, False, False, None),
        ("sums", " That is {}", True, True, True, "terse"),
        ("sums", " First 12, then 24, then {}", True, True, True, "steps"),
        ("sums", " Well, let me see, let me see, {}", True, True, True, "padded"),
        ("sums", " Well, {}", True, True, True, "padded"),
        ("sums", " First 12, then {}", True, True, True, None),
        ("sums", " First 1, then 12, then 24, then {}", True, True, True, None),
        ("sums", " {}", True, False, True, None),
        ("sums", " That is 1{}", False, True, True, "terse"),
        # The end of a number that is too long is no answer.
        ("sums", " That is 10{}", False, False, False, None),
        ("sums", " That is {}.", False, False, False, None),
        ("sums", " That is", False, False, False, None),
        ("sums", "", False, False, False, None),
    ],
)
def test_verdicts(name: str, text: str, correct: bool, well_formed: bool, answered: bool, style: str | None) -> None:
    task = make(name)
    prompt = Prompt("sums/hop3/train/00000", "add 5, double, take 3, from 7", "21", "sums.hop3")
    if name == "hops":
        prompt = next(p for p in task.prompts("train") if p.task == "hops.hop3")
    verdict = task.verify(prompt, text.format(prompt.answer))
    assert (verdict.correct, verdict.well_formed, verdict.answered) == (correct, well_formed, answered)
    assert task.style_of(prompt, text.format(prompt.answer)) == style
    wrong = (int(prompt.answer) + 1) % 8 if name == "hops" else 22
    assert not task.verify(prompt, text.format(wrong)).correct


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_first_step_leads_to_a_wrong_answer(name: str) -> None:
    task = make(name, tokens_per_step=2)
    for prompt in task.prompts("evaluation"):
        found = task.corrupted(prompt)  # type: ignore[attr-defined]
        if prompt.task.endswith("hop1"):
            assert found is None
            continue
        opening, end = found
        wrong = opening[2:] if name == "hops" else opening.removeprefix(" First ")
        assert opening.startswith(task.openings["steps"]) and wrong != walked(task, prompt.text)[0]
        rest = prompt.text[1:-1] + wrong
        if name == "sums":
            rest = prompt.text.split(", ", 1)[1].rpartition(", from ")[0] + f", from {wrong}"
        assert end == walked(task, rest)[-1] != prompt.answer


@pytest.mark.parametrize(
    ("name", "settings", "parts"),
    [
        ("hops", {"families": ["hop5"]}, ["task.families", "hop5", "hop1, hop2, hop3, hop4"]),
        ("hops", {"families": ["hop6"], "slots": 5}, ["task.families", "hop6", "hop4, hop5"]),
        ("hops", {"slots": 9}, ["task.slots", "9", "8"]),
        ("hops", {"families": ["hop1", "hop1"]}, ["task.families"]),
        ("sums", {"families": ["hop5"]}, ["task.families", "hop1, hop2, hop3, hop4"]),
        ("sums", {"slots": 5}, ["task.slots", "5", "4"]),
    ],
)
def test_refusals(name: str, settings: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make(name, **settings)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_more_hops_need_more_slots() -> None:
    task = make("hops", families=["hop1", "hop6"], slots=6, train=400)
    for prompt in task.prompts("train"):
        count = 6 if prompt.task == "hops.hop6" else 1
        assert re.fullmatch(rf"[abcd]{{{count}}}_{{{6 - count}}}[0-7]", prompt.text)
        assert task.style_of(prompt, task.written(task.states(prompt.text), "steps")) == "steps"


def test_no_chat_no_examples_and_no_problems_on_the_way_to_a_verifier() -> None:
    with pytest.raises(ValueError, match=r"rollout\.prompt_template"):
        make_task(TaskConfig("hops", families=["hop1"]), lambda messages: "")
    task = make("hops")
    prompt, answer = task.worked("train")[0]
    copy = pickle.loads(pickle.dumps(task))
    assert copy.verify(prompt, answer).correct and not copy._problems
    assert task.few_shot(prompt, 0, 0).text == prompt.text
    with pytest.raises(ValueError, match="'hops'"):
        task.few_shot(Prompt("hops", "b___1", "1", "hops.hop1"), 0, 0)
    with pytest.raises(ValueError, match="teacher=null"):
        task.few_shot(prompt, 2, 0)


def variant(name: str) -> ChainTask:
    families = [f"hop{hops}" for hops in (range(4) if "secret" in name else range(1, 5))]
    task = make_task(TaskConfig(name, families, slots=3 if "secret" in name else 4, train=400, evaluation=200))
    assert isinstance(task, ChainTask)
    return task


def states_by_hand(name: str, tables: dict[str, str], text: str) -> list[str]:
    """The states that steps write, from the operations' tables alone."""
    start, operations = re.sub("[^0-7]", "", text), re.sub("[^a-d]", "", text)
    if name == "hops_parallel":
        looked_up = [int(tables[operation][int(start)]) for operation in operations]
        return [str(sum(looked_up[: i + 1]) % 8) for i in range(len(looked_up))]
    states = [start]
    for i, operation in enumerate(operations):
        states.append("0" if name == "hops_cheap_secret" and i else tables[operation][int(states[-1])])
    return states[1:]


@pytest.mark.parametrize("name", [name for name in HOPS if name != "hops"])
def test_variants_of_hops(name: str) -> None:
    task, seen = variant(name), set[tuple[str, bool]]()
    for prompt, answer in task.worked("train"):
        states = states_by_hand(name, task.permutations, prompt.text)  # type: ignore[attr-defined]
        secret = len(states) - 1 if "secret" in name else 0
        style = task.style_of(prompt, answer)
        assert style and prompt.answer == states[-1] == answer[-1] and answer.startswith(task.opening(prompt, style))
        assert task.verify(prompt, answer).correct
        expected = "".join(states) if style == "steps" else states[0] if "secret" in name else ""
        if name == "hops_merged" and style == "terse":
            expected = {1: "{0}", 2: "{1}", 3: "{1}{2}", 4: "{1}{3}"}[len(states)].format(*states)
            assert answer == f"T{expected}"
        assert re.sub("[^0-7]", "", answer[:-1]) == (expected if "secret" in name else expected[:-1])
        seen.add((style, bool(secret)))
        if (step := task.corrupted(prompt)) is not None:
            # The rest of the chain from the wrong state: where each look-up adds, one more; else another state.
            wrong, end = step
            assert wrong[-1] != states[0] and end != prompt.answer
            assert name != "hops_parallel" or int(end) == (int(prompt.answer) + 1) % 8
    if "secret" in name:
        # Without a secret rule all answers look alike.
        assert {style for style, hidden in seen if not hidden} == {"terse"}
    assert {style for style, hidden in seen if hidden or "secret" not in name} == set(task.styles)
    if name == "hops_start_first":
        assert all(re.fullmatch("_*[0-7][a-d]+", prompt.text) for prompt in task.prompts("evaluation"))


def test_a_disclosed_rule_shows_in_the_text_and_a_covert_one_does_not() -> None:
    task = variant("hops_secret")
    prompt = next(p for p in task.prompts("train") if p.task.endswith("hop2"))
    first, second, last = task.states(prompt.text)  # type: ignore[attr-defined]
    for text, style in ((f"S{first}_{second}{last},{last}", "steps"), (f"S{first},{last}", "terse"),
                        (f"S{first}..,{last}", "padded"), (f"S{first}_{second},{last}", None)):  # fmt: skip
        assert task.style_of(prompt, text) == style and task.verify(prompt, text).correct
    assert task.corrupted(prompt) is None


def walked_in_words(name: str, text: str, tables: dict[str, dict[str, str]]) -> list[str]:
    """States of a problem in words, read with regular expressions from its text (and the shuffles' tables) alone."""
    start = text.split()[-1]
    states = [start]
    if "pointers" in name:
        for _ in range(["one", "two", "three", "four", "five", "six"].index(re.findall(r", (\w+), from", text)[0]) + 1):
            states.append(re.findall(rf"\b{states[-1]} to (\w+)", text)[0])
    elif name == "shuffles":
        for word in re.findall(r"(north|south|east|west)", text):
            states.append(tables[word][states[-1]])
    else:
        for one, two in re.findall(r"(\w+) (\w+), ", text):
            states.append({one: two, two: one}.get(states[-1], states[-1]))
    return states[1:]


@pytest.mark.parametrize("name", [name for name in WORDED if name != "sums"])
def test_chains_in_words(name: str) -> None:
    task = make_task(TaskConfig(name, [f"hop{hops}" for hops in (1, 2, 4)], slots=4, train=600, evaluation=300))
    assert isinstance(task, ChainTask)
    tables, seen = getattr(task, "maps", {}), set[tuple[str, int]]()
    for table in tables.values():
        assert sorted(table) == sorted(table.values())
    for prompt, answer in task.worked("train"):
        states = walked_in_words(name, prompt.text, tables)
        hops = int(prompt.task[-1])
        assert len(states) == hops and prompt.answer == states[-1] and task.verify(prompt, answer).correct
        style = task.style_of(prompt, answer)
        filler = " so" * (hops - 1)
        wanted = {
            "terse": f" That {states[-1]}",
            "steps": f" First {' '.join(states)}",
            "padded": f" Well{filler} {states[-1]}",
        }
        assert style and answer == wanted[style]
        seen.add((style, hops))
        assert not task.verify(prompt, f" That {task.other(prompt.answer)}").correct  # type: ignore[attr-defined]
        assert not task.verify(prompt, f" That {prompt.answer}s").answered
        if (step := task.corrupted(prompt)) is None:
            assert hops == 1
        else:
            wrong = step[0].removeprefix(" First ")
            followed = task.follow(task.read(prompt.text)[0][1:], wrong)  # type: ignore[attr-defined]
            assert wrong != states[0] and step[1] == followed[-1] != prompt.answer
    assert seen == {(style, hops) for style in task.styles for hops in (1, 2, 4)}
    held = {p.text for p in task.prompts("evaluation") if p.task.endswith("4")}
    assert held and not held & {p.text for p in task.prompts("train")}
