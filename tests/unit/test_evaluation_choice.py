"""The choice of style: figures by hand, and a planted writer whose shares, rights and depths are known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ee_megatron.config.load import load
from ee_megatron.config.schema import RLConfig, TaskConfig
from ee_megatron.evaluation.choice import ChoiceBench, Judged, choice, figures, shares
from ee_megatron.exit_rules import ExitRule, Fixed, Off, Sample
from ee_megatron.rollout.engine.sampling import SamplingParams
from ee_megatron.sweeps.styles import chosen_styles, forced_styles
from ee_megatron.tasks.hops import HopsTask
from ee_megatron.training.evaluate import choosing
from ee_megatron.types import Prompt, Rollout
from tests.by_hand import a_rollout

PROMPT = Prompt("p", "", "7", "hops.hop1")
TASK = HopsTask(TaskConfig("hops", families=["hop1", "hop3"], train=4, validation=4, evaluation=20))
STYLES = ("terse", "steps", "padded")
SAMPLING = SamplingParams(0.75, 12, ("\n",))
RL = RLConfig(beta=0.1, cost_length=3)
ENTIRE = {
    "share": {"steps": 1.0}, "correct": 1.0, "length": 5.0, "mean_depth": 0.2, "total_depth": 1.0, "max_depth": 0.2,
}  # fmt: skip


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
    assert np.isnan(figures([], 6, first_exits=True)["correct"])
    found = shares(["terse", "steps", None, "terse"], STYLES)
    assert found == {"terse": 0.5, "steps": 0.25, "padded": 0.0, "other": 0.25}


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


def measured(exits: ExitRule, depths=(), answers: int = 30) -> tuple[dict, PlantedWriter]:
    pool = PlantedWriter()
    bench = ChoiceBench(pool, PlainVerifier(), TASK, SAMPLING, 6, False, answers, seed=5)  # type: ignore[arg-type]
    return choice(bench, TASK.prompts("evaluation"), exits, depths), pool


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
        choice(ChoiceBench(pool, PlainVerifier(), TASK, SAMPLING, 6, False, 3), [], Off())  # type: ignore[arg-type]


def whole() -> dict:
    start, reinforced = measured(Sample(), depths=(1, 6))[0], measured(Fixed(3))[0]
    models = {"start": start, "reinforced": reinforced}
    return {"styles": STYLES, "weights": (0.4, 0.4, 0.2), "num_layers": 6, "answers_per_family": 30, "models": models}


def test_a_sweep_has_what_each_style_takes_before_rl_and_after_it() -> None:
    """Depths in layers: of the six the planted start's answers take two, the reinforced one's three."""
    columns = chosen_styles(whole(), RL)
    assert (columns["layers_terse_hop3"], columns["layers_steps_hop3"]) == (3.0, 3.0)
    assert (columns["start_layers_terse_hop3"], columns["start_layers_steps_hop1"]) == pytest.approx((2, 2))
    assert columns["right_padded_hop1"] == 0.0 and columns["start_right_terse_hop3"] == 1.0
    # The planted depth knows no hops, so the line is level.
    assert (columns["start_layers_per_hop"], columns["start_layers_at_no_hop"]) == pytest.approx((0, 2))
    # Held to one depth by RL, nothing of this is a style's own.
    capped = chosen_styles(whole(), replace(RL, fixed_depth=3))
    assert not [name for name in capped if "layers" in name or "price" in name]
    assert columns["share_steps_hop3"] == 0.5 and columns["max_depth_hop1"] == 0.5, "that of the reinforced one"
    assert chosen_styles({}, RL) == {}


def entry(hops: int, terse: tuple[float, float], steps: float = 1.0) -> dict:
    """Forced styles of six layers: how often terse answers are right, and layers of terse and of written answers."""
    right, deep = terse

    def of(correct: float, layers: float, length: int) -> dict:
        d = layers / 6
        mean = (d + 1 / 3) / length
        return {"correct": correct, "max_depth": d, "mean_depth": mean, "total_depth": d + 1 / 3, "length": length}

    return {
        "hops": hops, "free": {"share": {"terse": 0.3, "steps": 0.3, "padded": 0.2, "other": 0.2}},
        "forced": {"terse": of(right, deep, 3), "steps": of(1.0, steps, 5), "padded": of(right, deep, 5)},
    }  # fmt: skip


def test_layers_per_hop_are_those_of_chains_that_are_followed() -> None:
    """D = 1.5 k + .5, and one family that isn't solved, at which the model runs all its layers and fails."""
    families = {f"hop{k}": entry(k, (0.95, 1.5 * k + 0.5)) for k in (1, 2, 3)}
    assert forced_styles(families, 6)["layers_per_hop"] == pytest.approx(1.5)
    found = forced_styles(families | {"hop5": entry(5, (0.3, 6.0))}, 6)
    assert (found["layers_per_hop"], found["layers_at_no_hop"]) == pytest.approx((1.5, 0.5))
    assert (found["layers_terse_hop5"], found["right_terse_hop5"]) == pytest.approx((6.0, 0.3))
    assert forced_styles({"hop1": families["hop1"], "hop5": entry(5, (0.3, 6.0))}, 6)["layers_per_hop"] is None


def test_the_price_from_which_on_steps_should_take_over_by_hand() -> None:
    """Of one depth for terse and padded: .75 of them to .25 steps, so that 4 layers less at beta .1 have to be worth
    .1 ln 3. The teacher's answers in no style don't count."""
    start = {"families": {"hop3": entry(3, (1.0, 5.0))}}
    teacher = {"families": {"hop3": {"free": {"share": {"terse": 0.3, "steps": 0.2, "padded": 0.3, "other": 0.2}}}}}
    part = {"styles": STYLES, "weights": (0.25, 0.5, 0.25), "num_layers": 6}
    last = {"families": {"hop3": {**entry(3, (1.0, 5.0)), "free": ENTIRE}}}
    columns = chosen_styles({**part, "models": {"teacher": teacher, "start": start, "reinforced": last}}, RL)
    assert columns["start_price_max_hop3"] == pytest.approx(0.1 * np.log(3) / (4 / 6))
    # Without the teacher the corpus' weights: half already.
    columns = chosen_styles({**part, "models": {"start": start, "reinforced": last}}, RL)
    assert columns["start_price_max_hop3"] == 0.0
    # Steps that take as much depth never do; a style that wasn't measured leaves the cell empty.
    start["families"]["hop3"] = entry(3, (1.0, 5.0), steps=5.0)
    columns = chosen_styles({**part, "models": {"teacher": teacher, "start": start, "reinforced": last}}, RL)
    assert columns["start_price_max_hop3"] is None


def test_the_last_model_is_the_start_where_there_was_no_rl() -> None:
    cfg = load(["name=test", "model.path=nowhere"])
    assert choosing(cfg, ("calibrated", "reinforced")) == []
    cfg.evaluate.choice = "reinforced"
    assert choosing(cfg, ("calibrated", "reinforced")) == ["reinforced"] and choosing(cfg, ("calibrated",)) == ["start"]
    cfg.evaluate.choice = "all"
    assert choosing(cfg, ("calibrated", "reinforced")) == ["teacher", "start", "reinforced"]
    assert choosing(cfg, ("calibrated",)) == ["teacher", "start"]
