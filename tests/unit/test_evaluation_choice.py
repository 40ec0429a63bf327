"""The choice of style: figures by hand, and a planted writer whose shares, rights and depths are known."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ee_megatron.config.load import load
from ee_megatron.config.schema import StyleChoice, TaskConfig
from ee_megatron.evaluation.choice import ChoiceBench, Judged, by_family, choice, cycled, figures
from ee_megatron.exit_rules import ExitRule, Fixed, Off, Sample
from ee_megatron.externalise.study import depth_of_hops
from ee_megatron.report.tables import choice_tables
from ee_megatron.rollout.engine.sampling import SamplingParams
from ee_megatron.tasks.chains import HopsTask
from ee_megatron.training.evaluate import choosing
from ee_megatron.types import Prompt, Rollout
from tests.by_hand import a_rollout

PROMPT = Prompt("p", "", "7", "hops.hop1")
TASK = HopsTask(TaskConfig("hops", families=["hop1", "hop3"], train=4, validation=4, evaluation=20))
STYLES = ("terse", "steps", "padded")
SAMPLING = SamplingParams(0.75, 12, ("\n",))


def test_figures_are_means_over_answers_by_hand() -> None:
    answers = [Judged(PROMPT, a_rollout([6, 3, 6]), True), Judged(PROMPT, a_rollout([6, 2]), False)]
    found = figures(answers, 6, first_exits=False)
    assert (found["n"], found["correct"], found["length"]) == (2, 0.5, 2.5)
    # By answer, not by token: (15/18 + 8/12) / 2, where all tokens together have 23/30.
    assert found["mean_depth"] == pytest.approx((15 / 18 + 8 / 12) / 2)
    assert found["total_depth"] == pytest.approx((15 / 6 + 8 / 6) / 2)
    assert found["square"] == pytest.approx(((1 + 1 / 4 + 1) / 3 + (1 + 1 / 9) / 2) / 2)
    assert found["max_depth"] == pytest.approx((1 + 2 / 6) / 2)
    free = figures(answers, 6, first_exits=True)
    assert free.pop("max_depth") == 1.0 and free == {k: v for k, v in found.items() if k != "max_depth"}
    # Of an only token's depth nobody decided.
    assert figures([Judged(PROMPT, a_rollout([6]), True)], 6, first_exits=False)["max_depth"] == 0.0
    assert figures([], 6, first_exits=True)["n"] == 0 and np.isnan(figures([], 6, first_exits=True)["correct"])


def test_prompts_go_by_family_and_come_again_until_there_are_enough() -> None:
    prompts = [replace(PROMPT, id=str(i), task=f"hops.hop{k}") for i, k in enumerate((3, 1, 3))]
    groups = by_family(prompts)
    assert {family: [p.id for p in group] for family, group in groups.items()} == {"hop1": ["1"], "hop3": ["0", "2"]}
    assert list(groups) == ["hop1", "hop3"]
    assert [p.id for p in cycled(groups["hop3"], 5)] == ["0", "2", "0", "2", "0"]
    assert [p.id for p in cycled(groups["hop3"], 1)] == ["0"]


class PlantedWriter:
    """Steps for every second answer, else terse; right, but for padded ones, and at depth 1 none is. After an opening
    it goes on as that began. Tokens leave where the rule says, under the gates at depth 2; the first never does."""

    def __init__(self) -> None:
        self.requests: list = []

    def generate(self, request, progress=None) -> list[list[Rollout]]:
        self.requests.append(request)
        assert request.samples == 1 and request.sampling == SAMPLING
        free = Counter[str]()
        return [[self.write(prompt, request.exits, free)] for prompt in request.prompts]

    def write(self, prompt: Prompt, exits: ExitRule, free: Counter[str]) -> Rollout:
        opening, states = prompt.prefill, TASK.states(prompt.text)
        if not opening:
            free[prompt.task] += 1
            opening = "TS"[free[prompt.task] % 2]
        if opening == "P":
            text = "P" + "." * len(states) + wrong(states[-1])
        elif opening == "T":
            text = "T" + states[-1]
        else:
            # What is given is followed, whatever it says.
            operations = prompt.text[:-1].rstrip("_")
            text = opening if opening != "S" else opening + states[0]
            text += TASK.states(operations[1:] + text[-1])
        depth = exits.value if isinstance(exits, Fixed) else 6 if exits == Off() else 2
        if depth == 1:
            text = text[:-1] + wrong(text[-1])
        return replace(a_rollout([6] + [depth] * len(text)), prompt_id=prompt.id, text=text)


def wrong(state: str) -> str:
    return str((int(state) + 1) % 8)


class PlainVerifier:
    def verify_many(self, items):
        return [TASK.verify(*item) for item in items]


def bench_of(pool: PlantedWriter, answers: int) -> ChoiceBench:
    return ChoiceBench(
        pool=pool, verifier=PlainVerifier(), task=TASK, sampling=SAMPLING, num_layers=6, first_exits=False,
        answers=answers, seed=5,
    )  # type: ignore[arg-type]  # fmt: skip


def measured(exits: ExitRule, depths=(), answers: int = 30) -> tuple[dict, PlantedWriter]:
    pool = PlantedWriter()
    return choice(bench_of(pool, answers), TASK.prompts("evaluation"), exits, depths), pool


def test_a_style_without_an_opening_is_measured_on_the_answers_that_chose_it() -> None:
    """Of the free answers every second is terse; the others' length would show."""
    pool, bare = PlantedWriter(), copy.copy(TASK)
    bare.openings = {**TASK.openings, "terse": ""}  # type: ignore[misc]
    entry = choice(replace(bench_of(pool, 30), task=bare), TASK.prompts("evaluation"), Sample())["families"]["hop3"]
    assert entry["forced"]["terse"]["n"] == 15 and entry["forced"]["terse"]["length"] == 3
    assert entry["forced"]["steps"]["n"] == 30 and entry["forced"]["steps"]["length"] == 5


def test_a_planted_writer_is_found_out() -> None:
    found, _ = measured(Sample(), depths=(1, 3, 6))
    assert found["exits"] == "sampled" and list(found["families"]) == ["hop1", "hop3"]
    for family, hops in (("hop1", 1), ("hop3", 3)):
        entry = found["families"][family]
        assert entry["hops"] == hops and entry["free"]["n"] == 30
        assert entry["free"]["share"] == {"terse": 0.5, "steps": 0.5, "padded": 0.0, "other": 0.0}
        assert entry["free"]["correct"] == 1.0
        # One character is one token, and a token ends the answer.
        assert entry["free"]["length"] == pytest.approx((3 + hops + 2) / 2)
        assert entry["free"]["max_depth"] == pytest.approx(2 / 6)
        lengths = {"terse": 3, "steps": hops + 2, "padded": hops + 3}
        for part, right, depth in (("forced", 1.0, 2), ("forced_full", 1.0, 6)):
            assert {s: f["length"] for s, f in entry[part].items()} == lengths
            assert {s: f["correct"] for s, f in entry[part].items()} == {"terse": right, "steps": right, "padded": 0.0}
            assert all(f["max_depth"] == pytest.approx(depth / 6) for f in entry[part].values())
        assert list(entry["fixed"]) == ["1", "3", "6"] and entry["fixed"]["6"] == entry["forced_full"]
        for depth, of in entry["fixed"].items():
            for style, held in of.items():
                assert held["max_depth"] == pytest.approx(int(depth) / 6)
                assert held["total_depth"] == pytest.approx(1 + (lengths[style] - 1) * int(depth) / 6)
        assert entry["fixed"]["1"]["steps"]["correct"] == 0.0 == entry["fixed"]["1"]["terse"]["correct"]
    assert found["families"]["hop1"]["corrupted"] is None
    assert found["families"]["hop3"]["corrupted"] == {"n": 30, "correct": 0.0, "followed": 1.0}


def test_a_request_per_rule_holds_all_families_and_no_two_answers_share_their_random_numbers() -> None:
    _, pool = measured(Sample(), depths=(1, 3, 6))
    # At L a token leaves where it does without exits.
    assert [r.exits for r in pool.requests] == [Sample(), Off(), Fixed(1), Fixed(3)]
    assert [len(r.prompts) for r in pool.requests] == [2 * 30 * 4 + 30, 180, 180, 180]
    assert {r.seed for r in pool.requests} == {5}
    for request in pool.requests:
        names = Counter((p.id, p.prefill) for p in request.prompts)
        assert set(names.values()) == {1}
    # 20 problems, 10 of a family: each is answered 3 times.
    free = Counter(p.text for p in pool.requests[0].prompts if not p.prefill)
    assert sum(free.values()) == 60 and set(Counter(p.id.split("#")[1] for p in pool.requests[1].prompts)) == set("012")
    _, pool = measured(Off())
    assert [r.exits for r in pool.requests] == [Off()], "nothing is asked twice"
    with pytest.raises(ValueError, match="prompts"):
        choice(bench_of(pool, 3), [], Off())


def whole() -> dict:
    start, reinforced = measured(Sample(), depths=(1, 6))[0], measured(Fixed(3))[0]
    models = {"start": start, "reinforced": reinforced}
    return {"styles": STYLES, "weights": (0.4, 0.4, 0.2), "num_layers": 6, "answers_per_family": 30, "models": models}


def test_the_tables_show_every_figure() -> None:
    found = whole()
    free, forced, wrong = (
        [" ".join(line.split()) for line in made.text().splitlines()[2:]] for _, made in choice_tables(found)
    )
    assert free[0] == "start sampled hop1 50.0% 50.0% 0.0% 0.0% 100.0% 3.00 0.556 1.667 0.333"
    assert [line[:23] for line in free[2:]] == ["reinforced fixed 3 hop1", "reinforced fixed 3 hop3"]
    assert forced[4] == "start hop3 steps 100.0% 5.00 0.467 2.333 0.333 100.0% 0.0%"
    assert forced[6] == "reinforced hop1 terse 100.0% 3.00 0.667 2.000 0.500 100.0% –"
    assert wrong == ["start hop3 30 0.0% 100.0%", "reinforced hop3 30 0.0% 100.0%"]
    assert "terse 40%, steps 40%, padded 20%" in choice_tables(found)[0][0]


def test_layers_per_hop_are_those_of_chains_that_are_followed() -> None:
    """D = 1.5 k + .5, and one family that isn't solved, at which the model runs all its layers and fails."""
    terse = [(k, 0.95, 1.5 * k + 0.5) for k in (1, 2, 3)]
    assert depth_of_hops([*terse, (5, 0.3, 6.0)]) == pytest.approx((1.5, 0.5))
    assert np.isnan(depth_of_hops([terse[0], (5, 0.3, 6.0)])).all()


def test_the_last_model_is_the_start_where_there_was_no_rl() -> None:
    cfg = load(["name=test", "model.path=nowhere"])
    assert choosing(cfg, ("calibrated", "reinforced")) == []
    cfg.evaluate.style_choice = StyleChoice(models="reinforced")
    assert choosing(cfg, ("calibrated", "reinforced")) == ["reinforced"] and choosing(cfg, ("calibrated",)) == ["start"]
    cfg.evaluate.style_choice = StyleChoice(models="all")
    assert choosing(cfg, ("calibrated", "reinforced")) == ["teacher", "start", "reinforced"]
    assert choosing(cfg, ("calibrated",)) == ["teacher", "start"]
