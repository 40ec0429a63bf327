"""`ee-megatron externalise`: run directories in; a page, a table and JSON out; what is missing or mixed up is said."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ee_megatron import cli
from ee_megatron.config.identity import stage_dir
from ee_megatron.externalise.figures import STEPS_SHARE, panels
from ee_megatron.externalise.page import _varied
from ee_megatron.externalise.study import CAP, FREE, LENGTH, NO_EXITS, Condition, Objective, Study, read_study
from ee_megatron.externalise.verdicts import verdicts
from ee_megatron.externalise.words import answer
from tests.externalise_samples import ANSWERS, LAYERS, WEIGHTS, config, record, records, with_share, write
from tests.snapshot import assert_as_stored, page_text

# Two bases, 1 and 3 hops, all conditions at 1 token a step and what point 6 needs at 4: 36 runs.
MADE = [r for r in records(bases=(1, 2), seeds=(1,)) if r.tau == 1 or r.condition.label in ("lambda 0", "total 1")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for made in MADE:
        write(root, made)
    return root


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command made of the runs; what it printed is in shown.txt."""
    out = tmp_path_factory.mktemp("out")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main(["externalise", str(runs), "--out", str(out)]) == 0
    (out / "shown.txt").write_text(shown.getvalue())
    return out


@pytest.mark.parametrize(
    ("objective", "expected", "label"),
    [
        (Objective(0.1, fixed_depth=LAYERS), Condition(NO_EXITS), "no exits"),
        (Objective(0.1, fixed_depth=2), Condition(CAP, 2), "cap 2"),
        # Every answer costs as much, so the price that is left in the settings changes nothing.
        (Objective(0.1, "max", 0.5, fixed_depth=2), Condition(CAP, 2), "cap 2"),
        (Objective(0.1, "total", 0.5, fixed_depth=2), Condition(CAP, 2, "total 0.5"), "cap 2 and total 0.5"),
        # A first token that may not leave early weighs less in the mean of a longer answer.
        (Objective(0.1, "mean", 0.5, fixed_depth=2), Condition(CAP, 2), "cap 2"),
        (
            Objective(0.1, "mean", 0.5, fixed_depth=2, first_exits=False),
            Condition(CAP, 2, "mean 0.5"),
            "cap 2 and mean 0.5",
        ),
        (Objective(0.1, "max"), Condition(FREE), "lambda 0"),
        (Objective(0.1, "square", 0.25), Condition("square", 0.25), "square 0.25"),
        (Objective(0.1, lambda_length=0.5), Condition(LENGTH, 0.5), "length 0.5"),
        (Objective(0.1, "mean", 1.0, lambda_length=0.5), Condition("mean", 1.0, "length 0.5"), "mean 1 and length 0.5"),
    ],
)
def test_a_run_is_named_by_what_it_paid_for(objective: Objective, expected: Condition, label: str) -> None:
    assert objective.condition(LAYERS) == expected and expected.label == label
    assert expected.priced == (label in ("square 0.25",))


def test_runs_are_read_back_as_they_were(runs: Path) -> None:
    study = read_study(runs)
    made = {r.key: r for r in MADE}
    assert {r.key for r in study.records} == set(made) and len(study.records) == len(MADE) == 36
    for found in study.records:
        assert found.models == made[found.key].models and found.objective == made[found.key].objective
        assert found.weights == made[found.key].weights and found.differs == ()
    assert not study.remarks and study.taus == [1, 4] and study.hops == {"hop1": 1, "hop3": 3}
    # Runs of a base and a length of step begin alike, whatever they pay for; others don't.
    assert len({r.origin for r in study.records}) == 4


def test_tokens_a_step_are_the_tasks_where_the_results_say_them(tmp_path: Path) -> None:
    results = write(tmp_path, record("max 1")) / "results.json"
    assert read_study(tmp_path).taus == [1]
    said = json.loads(results.read_text())
    said["choice"]["tokens_per_step"] = 4
    results.write_text(json.dumps(said))
    assert read_study(tmp_path).taus == [4]


def test_the_command_writes_page_table_and_figures(runs: Path, written: Path) -> None:
    shown = (written / "shown.txt").read_text()
    assert re.search(r"\b36 runs\D*\b2\b", shown) and re.search(r"^3 ", shown, re.MULTILINE)
    names = {path.name for path in written.iterdir()}
    assert names == {"externalise.html", "externalise.csv", "externalise.json", "laws.csv", "plots", "shown.txt"}
    assert len(list((written / "plots").iterdir())) == 2 * 2 * 2 + 1
    with (written / "externalise.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 36
    (row,) = [
        r for r in table
        if (r["condition"], r["base"], r["tau"], r["hops"]) == ("max 1", "2", "1", "3")
    ]  # fmt: skip
    expected = record("max 1", 2).found("hop3")
    assert float(row["share_steps"]) == pytest.approx(expected.share["steps"])
    assert float(row["forecast_steps"]) == pytest.approx(0.998, abs=2e-3) and row["n"] == str(ANSWERS)
    assert (row["lambda_exit"], row["kind"], row["seconds_rl"]) == ("1.0", "max", "")
    data = json.loads((written / "externalise.json").read_text())
    assert [p["passed"] for p in data["points"]] == [True] * 6
    assert data["runs"] == 36 and len(data["rows"]) == 36 and sorted(data["points_at"]) == ["1", "4"]
    part = data["points"][2]["parts"][0]
    assert sorted(part["per_base"]) == ["1", "2"] and part["estimate"]["low"] < part["estimate"]["value"]
    assert str(runs) not in json.dumps(data)


def test_the_page_says_what_is_stored(written: Path) -> None:
    assert_as_stored(page_text(written / "externalise.html"), "externalise.txt")


def test_the_page_begins_with_question_and_answer(written: Path) -> None:
    page = (written / "externalise.html").read_text()
    assert page.index("<h1>") < page.index("100% of its answers") < page.index("<nav")
    assert page.count("✓ met") == 7
    # One answer for every opening, each token with its depth.
    assert page.count("<article") == 3 and 'data-tip="&#34;3&#34;\ndepth 1 of 6' in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_two_conditions_of_one_base_make_a_page_that_says_what_it_cannot(tmp_path: Path, capsys) -> None:
    for name in ("lambda 0", "max 1"):
        write(tmp_path / "runs", record(name))
    assert cli.main(["externalise", str(tmp_path / "runs")]) == 0
    page = (tmp_path / "runs" / "externalise.html").read_text()
    assert re.search(r"\(1, 3\).*\(2, 4, 5, 6\)", page), "points that are met, points that are open"
    assert "✓ met" in page and "✗ missed" not in page
    # Without what RL began from there is no forecast and there are no controls of it, but a page.
    shutil.rmtree(tmp_path / "runs")
    write(tmp_path / "runs", record("max 1"))
    assert cli.main(["externalise", str(tmp_path / "runs")]) == 0
    page = (tmp_path / "runs" / "externalise.html").read_text()
    assert "✓ met" not in page and "closed form</span>" not in page
    # Nor does a run without any price make it stumble, or a teacher that never pads.
    alone = record("lambda 0")
    teacher = replace(alone.models["teacher"]["hop3"], share={**WEIGHTS, "padded": 0.0, "other": 0.2})
    for i, made in enumerate((record("cap 2"), replace(alone, models={**alone.models, "teacher": {"hop3": teacher}}))):
        write(tmp_path / f"one{i}", made)
        assert cli.main(["externalise", str(tmp_path / f"one{i}")]) == 0
    table = (tmp_path / "runs" / "externalise.csv").read_text()
    assert len(table.splitlines()) == 2 and ",nan" not in table


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "/runs: .*directory"),
        (lambda root: root.mkdir(), "/runs: .*evaluate-.*DONE"),
        (lambda root: (write(root, record("max 1")) / "DONE").unlink(), "/runs: .*evaluate-.*DONE"),
        (
            lambda root: (write(root, record("max 1")) / "results.json").write_text("{}"),
            r"/runs: .*\b1\b.*evaluate\.choice",
        ),
        (
            lambda root: (write(root, record("max 1")) / "results.json").write_text("{"),
            r"results\.json: .*line 1 column 2",
        ),
        (lambda root: damage(write(root, record("max 1"))), r"results\.json: .*\bchoice\b.*'share'"),
        (lambda root: untrained(root), r"results\.json: .*hop2.*task\.families"),
        (lambda root: two_recipes(root), "study/evaluate-.*study/evaluate-.*base 1, seed 1, max 1, hop3"),
    ],
)
def test_what_is_no_study_is_refused_in_one_line(tmp_path: Path, make, message: str, capsys) -> None:
    make(tmp_path / "runs")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["externalise", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error) and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def damage(stage: Path) -> None:
    path = stage / "results.json"
    data = json.loads(path.read_text())
    del data["choice"]["models"]["reinforced"]["families"]["hop3"]["free"]["share"]
    path.write_text(json.dumps(data))


def untrained(root: Path) -> None:
    made = record("max 1")
    cfg = config(made)
    cfg.rl.families = ["hop2", "hop3"]
    write(root, made, cfg)


def two_recipes(root: Path) -> None:
    for rate in (1e-4, 5e-4):
        made = record("max 1")
        cfg = config(made)
        cfg.rl.adapter_lr = rate
        write(root, made, cfg)


def test_what_was_left_out_and_what_isnt_alike_is_said(tmp_path: Path) -> None:
    write(tmp_path, record("lambda 0"))
    (write(tmp_path, record("max 1", seed=5)) / "results.json").write_text("{}")
    longer = config(record("max 1"))
    longer.rl.steps, longer.rl.kl_penalty.sum = 99, False
    write(tmp_path, record("max 1"), longer)
    # The same run evaluated again, with less measured: the fuller one stays.
    again = config(record("lambda 0"))
    again.evaluate.answers = 1
    made = record("lambda 0")
    write(tmp_path, replace(made, models={"reinforced": made.models["reinforced"]}), again)
    # With longer steps answers may be longer: that is no difference among runs that are compared.
    long = config(record("lambda 0", tau=4))
    long.rollout.max_new_tokens = 24
    write(tmp_path, record("lambda 0", tau=4), long)
    study = read_study(tmp_path)
    remarks = " | ".join(study.remarks)
    assert len(study.records) == 3 and all(len(r.models) == 3 for r in study.records if r.condition == Condition(FREE))
    assert "1 of 5" in remarks
    assert "rl.steps: 12, 99" in remarks and "max_new_tokens" not in remarks
    assert re.search(r"\b1 of 3\b.*rl\.kl_sum=false", remarks)


def test_time_on_record_is_that_of_every_stage_once(tmp_path: Path) -> None:
    """Both runs share a calibration; its time counts once."""
    for name in ("lambda 0", "max 1"):
        stage = write(tmp_path, record(name))
        (stage / "spent.json").write_text('{"seconds": 30, "device_seconds": 60, "starts": 1}')
        for before, seconds in (("calibrate", 90), ("rl", 20)):
            shared = stage.parent / stage_dir(config(record(name)), before).name
            shared.mkdir(exist_ok=True)
            (shared / "spent.json").write_text(json.dumps({"seconds": seconds, "device_seconds": seconds, "starts": 1}))
    study = read_study(tmp_path)
    assert study.device_seconds == 60 + 60 + 90 + 20 + 20 and (study.timed, study.stages) == (5, 5)
    assert {r.seconds for r in study.records} == {20}


def test_a_panel_has_a_course_for_every_cost_and_a_place_for_what_has_no_price() -> None:
    """Dashed: three costs', and a dash for each of no exits, the cap and length. They need what was measured before."""
    made = records(bases=(1, 2), seeds=(1,), taus=(1,), hops=(3,))
    (chart,) = panels(Study(made), 1, STEPS_SHARE)
    assert chart.title == "3 hops" and [name for _, name in chart.legend] == ["mean", "total", "max", "closed form"]
    drawing = str(chart.drawing)
    assert len(re.findall(r'polyline class="line s\d r1"', drawing)) == 3 + 3
    assert len(re.findall(r'polyline class="line s\d r0"', drawing)) == 3
    assert re.findall(r'rotate\(-90\)" text-anchor="end">([^<]+)<', drawing) == ["no exits", "cap 2", "length 0.5"]
    # Seven means, of which lambda 0 thrice, as the beginning of each line.
    assert drawing.count("data-tip") == 3 * 2 + 3
    bare = [replace(r, models={"reinforced": r.models["reinforced"]}) for r in made]
    (chart,) = panels(Study(bare), 1, STEPS_SHARE)
    assert " r1" not in str(chart.drawing) and "closed form" not in [name for _, name in chart.legend]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({1: 0.7, 2: 0.72}, r"Yes\b.*71%.*\b3 hops.*40%.*\+31 points \["),
        ({1: 0.2, 2: 0.21}, r"No\b.*-20 points \["),
        ({1: 0.7, 2: 0.2}, r"Not\b.*\+5 points \["),
        ({1: 0.7}, r"(?!Yes|No).*\+30 points\b(?! \[)"),
        ({1: 0.2}, r"(?!Yes|No).*n't.*-20 points\b(?! \[)"),
    ],
)
def test_the_answer_is_what_the_interval_says(shares: dict[int, float], said: str) -> None:
    made = [with_share(record("max 1", base), steps=share) for base, share in shares.items()]
    study = Study([*made, *(with_share(record("lambda 0", base), steps=0.4) for base in shares)])
    assert re.match(said, answer(study, verdicts(study)))


def test_of_the_answers_one_of_each_opening_is_shown_first() -> None:
    def say(prompt: str, text: str) -> dict[str, str]:
        return {"prompt": prompt, "text": text}

    steps = [say("a", "S12"), say("b", "S34"), say("a", "T2")]
    assert _varied([*steps, say("c", "T5"), say("d", "P.5")]) == [steps[0], say("c", "T5"), say("d", "P.5")]
    assert _varied([*steps, say("c", "S5")]) == [steps[0], steps[1], say("c", "S5")]
    # Words begin with a space where a question ends without one.
    words = [say("a", " That is 3"), say("b", " That is 4"), say("c", " First 2, then 3")]
    assert _varied(words) == [words[0], words[2], words[1]]
