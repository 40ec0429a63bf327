"""What all tasks share: the registry, the same problems for ever, refusals."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from ee_megatron.config.fields import settings
from ee_megatron.config.schema import RunConfig, TaskConfig
from ee_megatron.config.validate import TASK_FAMILIES
from ee_megatron.tasks import TASKS, Verdict, arithmetic, make_task, register, tom
from ee_megatron.tasks.chains import HopsTask, SumsTask
from ee_megatron.types import Prompt

# Of id, text, answer, group and worked answer of each split's first 200 problems. Stage hashes and metrics of runs that
# are there already depend on them, so they never change.
DIGESTS = {
    "arithmetic": "dcc3a6cf79b08fe5", "tom": "b09beb954cc3456b",
    "hops": "da8a08323e1444f7", "sums": "b7211ce9f4d2cf37",
}  # fmt: skip


def first_problems(name: str) -> str:
    digest = hashlib.sha256()
    task = make_task(TaskConfig(name, list(TASK_FAMILIES[name])[:4]))
    for split in ("train", "validation", "evaluation"):
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


def test_the_configuration_knows_the_tasks_and_their_families() -> None:
    rules = {key: rules for key, _, rules in settings(RunConfig())}["task.name"]
    assert set(rules.choices) == set(TASKS)
    known = {"arithmetic": arithmetic.FAMILIES, "tom": tom.FAMILIES}
    for chained in (HopsTask, SumsTask):
        known[chained.name] = [f"hop{count}" for count in range(1, chained.most_hops + 1)]
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
