"""What all tasks share: the registry, the same problems for ever, refusals."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest

from ee_megatron.config.fields import settings
from ee_megatron.config.schema import RunConfig, TaskConfig
from ee_megatron.config.validate import TASK_FAMILIES
from ee_megatron.tasks import TASKS, Verdict, arithmetic, make_task, register, tom
from ee_megatron.tasks.chains import ChainTask
from ee_megatron.types import Prompt

SPLITS = ("train", "validation", "evaluation")
# Of id, text, answer, group and worked answer of each split's first 200 problems. Stage hashes and metrics of runs that
# are there already depend on them, so they never change.
DIGESTS = {
    "arithmetic": "dcc3a6cf79b08fe5", "tom": "b09beb954cc3456b",
    "hops": "da8a08323e1444f7", "sums": "b7211ce9f4d2cf37",
}  # fmt: skip


def first_problems(name: str) -> str:
    digest = hashlib.sha256()
    task = make_task(TaskConfig(name, list(TASK_FAMILIES[name])[:4]))
    for split in SPLITS:
        for prompt, worked in task.worked(split)[:200]:  # type: ignore[arg-type]
            digest.update(repr((prompt.id, prompt.text, prompt.answer, prompt.group, worked)).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("name", DIGESTS)
def test_problems_are_the_same_in_every_process_and_for_ever(name: str) -> None:
    """This process hashes strings by a seed of its own."""
    assert first_problems(name) == DIGESTS[name]
    some, more = (
        make_task(TaskConfig(name, list(TASK_FAMILIES[name])[:4], train=n)).prompts("train") for n in (40, 90)
    )
    assert more[:40] == some and len({p.id for p in more}) == 90


def test_another_seed_divides_the_operands_anew() -> None:
    settings = TaskConfig("arithmetic", ["product", "sum"])
    first, second = (make_task(replace(settings, seed=seed)).prompts("evaluation") for seed in (0, 1))
    pairs, others = ({prompt.group for prompt in prompts} for prompts in (first, second))
    assert first != second and len(pairs & others) < len(pairs) / 2


PROCEDURAL = [
    TaskConfig("arithmetic", ["product", "sum", "word", "chain"], operands="small"),
    TaskConfig("arithmetic", ["product", "sum", "word", "chain"], operands="wide"),
    TaskConfig("tom", list(tom.FAMILIES)),
]


@pytest.mark.parametrize("settings", PROCEDURAL, ids=lambda s: f"{s.name}-{s.operands}")
def test_splits_share_no_operands_names_or_places_and_examples_are_no_prompts(settings: TaskConfig) -> None:
    task = make_task(settings)
    prompts = {split: task.prompts(split) for split in SPLITS}  # type: ignore[arg-type]
    groups = {split: {part for p in of for part in p.group.split(";")} for split, of in prompts.items()}
    assert all(len(found) > 50 for found in groups.values())
    assert not any(groups[a] & groups[b] for a, b in itertools.combinations(SPLITS, 2))
    for family in settings.families:
        same = [p for p in prompts["evaluation"] if p.task.endswith(f".{family}")][:9]
        shown = [task.few_shot(p, 16, 1) for p in same]
        assert [p.id for p in shown] == [p.id for p in same]
        (header,) = {s.text.removesuffix(p.text) for s, p in zip(shown, same, strict=True)}
        questions = {f"{block.split('Answer:')[0]}Answer:" for block in header.split("\n\n") if block}
        assert len(questions) == 16 and not questions & {p.text for of in prompts.values() for p in of}
        examples = task._draw(family, "train", 16)  # type: ignore[attr-defined]
        held_out = groups["validation"] | groups["evaluation"]
        assert not held_out & {part for problem in examples for part in problem.group.split(";")}
        assert len({task.few_shot(same[0], 4, seed).text for seed in range(8)}) > 1
        assert task.few_shot(same[0], 0, 0) == same[0]


@pytest.mark.parametrize(("name", "least"), [("arithmetic", 3000), ("tom", 7000)])
def test_default_tasks_are_large_balanced_and_without_repetition(name: str, least: int) -> None:
    families = TaskConfig("arithmetic").families if name == "arithmetic" else list(tom.FAMILIES)
    task, count = make_task(TaskConfig(name, families)), len(families)
    for split, size in (("train", least), ("validation", 200), ("evaluation", 400)):
        prompts = task.prompts(split)  # type: ignore[arg-type]
        assert len(prompts) >= size and len({p.text for p in prompts}) == len({p.id for p in prompts}) == len(prompts)
        blocks = [tuple(p.task for p in prompts[i : i + count]) for i in range(0, len(prompts) - count + 1, count)]
        assert all(len(set(block)) == count for block in blocks) and len(set(blocks[:50])) > 3


def test_the_configuration_knows_the_tasks_and_their_families() -> None:
    rules = {key: rules for key, _, rules in settings(RunConfig())}["task.name"]
    assert set(rules.choices) == set(TASKS)
    known = {"arithmetic": arithmetic.FAMILIES, "tom": tom.FAMILIES}
    for chained in filter(lambda task: issubclass(task, ChainTask), TASKS.values()):
        known[chained.name] = [f"hop{count}" for count in range(chained.fewest_hops, chained.most_hops + 1)]
    assert {name: tuple(families) for name, families in known.items()} == TASK_FAMILIES


def test_a_task_of_ones_own_is_registered_once() -> None:

    @register("mine")
    class Mine(arithmetic.ArithmeticTask):
        name = "mine"

    assert isinstance(make_task(TaskConfig("mine")), Mine)
    with pytest.raises(ValueError, match=r"task\.name=sums"):
        register("sums")(Mine)
    del TASKS["mine"]


@pytest.mark.parametrize(
    ("section", "act", "parts"),
    [
        (TaskConfig("arithmetics"), None, "'arithmetics','arithmetic'"),
        (TaskConfig("arithmetic", families=["products"]), None, "task.families,products,product, sum, word, chain"),
        (TaskConfig("tom", families=["third_order"]), None, "third_order,first_order, second_order"),
        (TaskConfig("arithmetic", train=-1), None, "'train': -1"),
        (TaskConfig("arithmetic", train=100_000), lambda task: task.prompts("train"), "100000,product"),
        (TaskConfig("arithmetic", train=3), lambda task: task.prompts("test"), "'test'"),
        (TaskConfig("arithmetic"), lambda task: task.few_shot(task.prompts("train")[0], 17, 0), "17,16"),
        (TaskConfig("tom", families=["memory"]), lambda task: task.few_shot(Prompt("a/b/train/0", "", "", ""), 1, 0),
         "a/b/train/0"),
    ],
)  # fmt: skip
def test_bad_requests_say_what_is_possible(section: TaskConfig, act, parts: str) -> None:
    with pytest.raises(ValueError) as caught:
        act(make_task(section)) if act else make_task(section)
    assert all(part in str(caught.value) for part in parts.split(",")), caught.value


def test_tasks_need_no_torch() -> None:
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, ee_megatron.tasks; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"


def test_a_timed_out_verdict_is_worth_nothing_either_way() -> None:
    assert Verdict(False, False, False, timed_out=True).reward == 0.0
