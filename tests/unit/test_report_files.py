"""What stands around the figures: the command that makes a run again, files, a run under way, what never changed."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from report_samples import write_run

from ee_megatron.config.command import settings_of
from ee_megatron.config.identity import STAGES, stage_dir, to_yaml
from ee_megatron.config.load import load
from ee_megatron.observe.rundir import DONE
from ee_megatron.report import svg
from ee_megatron.report.data import Inputs, ReportRun, StageData, read_inputs
from ee_megatron.report.differences import differences, embedded
from ee_megatron.report.files import links, table_csv
from ee_megatron.report.results import Results
from ee_megatron.report.runs import report_path, report_run
from ee_megatron.report.training import curves
from ee_megatron.training import launch


@pytest.mark.parametrize(
    "settings",
    [
        ["experiment=demo_cpu"],
        [
            "experiment=demo_cpu",
            "rl.depth_penalty.weight=0.3",
            "name=x1",
            "calibrate.adapter_lr=7e-4",
            "exits.depths=[5,10]",
        ],
        ["experiment=rl_7b", "model.path=no/such model", "name='007'", "rl.depth_penalty.target.margin=2"],
        ["experiment=smollm2", 'rollout.stop=["a,b", "\n", "c\\"d", "e f=[g]"]', "evaluate.controls=true"],
    ],
)
def test_the_command_gives_the_same_configuration_again(settings: list[str]) -> None:
    cfg = load(settings)
    found = settings_of(cfg)
    assert found is not None and load(found) == cfg
    assert found[0] == settings[0] and len(found) <= len(settings) + 1
    assert load(shlex.split(shlex.join(found))) == cfg


def test_links_lead_to_the_files_and_the_table_is_within_the_page(tmp_path: Path) -> None:
    run = ReportRun(write_run(tmp_path / "a run"))
    inputs = read_inputs(run)
    found = links(inputs, tmp_path / "pages" / "report.html")
    (tmp_path / "pages").mkdir()
    assert len(found) == 7
    for link in found:
        assert (tmp_path / "pages" / unquote(link["href"])).is_file() and link["href"].startswith("./../a%20run/")
    head, _, text = table_csv(inputs.results).partition(",")
    rows = list(csv.DictReader(io.StringIO(unquote(text))))
    assert head == "data:text/csv;charset=utf-8" and len(rows) == 7
    assert rows[0]["model"] == "teacher" and float(rows[0]["accuracy"]) == 0.86
    evil = Results(rows=[{"model": "=cmd()", "accuracy": -0.5}])
    assert "'=cmd()" in unquote(table_csv(evil)) and ",-0.5" in unquote(table_csv(evil))


def test_a_run_under_way_says_what_is_to_come_and_misses_nothing(tmp_path: Path) -> None:
    cfg = load(["experiment=demo_cpu", f"runs={tmp_path}", "name=front"])
    samples = write_run(tmp_path / "samples")
    target = stage_dir(cfg, "teacher")
    shutil.copytree(samples["teacher"], target)
    (target / "config.yaml").write_text(to_yaml(cfg))
    # The next one has begun and has written nothing yet.
    stage_dir(cfg, "traces").mkdir()
    page = report_run(cfg, ["traces", "calibrate", "rl", "evaluate"])
    text = page.read_text()
    assert page == report_path(cfg) and "<h1>front</h1>" in text
    assert "traces, calibrate, rl, evaluate" in text and "Not in this report" not in text
    assert "<h3>teacher " in text and 'http-equiv="refresh"' not in text and "Verdict" not in text
    whole = report_run(cfg).read_text()
    assert "traces, calibrate, rl, evaluate" not in whole and "Not in this report" in whole and "rl: " in whole


class Stages:
    """Stages that take no time: what `run` starts as processes leaves the samples' files."""

    def __init__(self, cfg, samples: dict[str, Path]) -> None:
        self.cfg, self.samples, self.pages = cfg, samples, list[str]()

    def __call__(self, arguments: list[str]) -> int:
        page, stage = report_path(self.cfg), arguments[0]
        self.pages.append(page.read_text() if page.exists() else "")
        target = stage_dir(self.cfg, stage)
        shutil.copytree(self.samples[stage], target)
        (target / "config.yaml").write_text(to_yaml(self.cfg))
        (target / DONE).write_text("\n")
        (target / "table.txt").write_text("model exits accuracy\n")
        if stage == "evaluate":
            print("model exits accuracy")
        return 0


def test_run_writes_the_report_after_every_stage_and_prints_the_table_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load(["experiment=demo_cpu", f"runs={tmp_path / 'runs'}", "name=front"])
    stages = Stages(cfg, write_run(tmp_path / "samples"))
    monkeypatch.setattr(launch, "_followed", lambda arguments, _, meanwhile: (meanwhile(), stages(arguments))[1])
    monkeypatch.setattr(launch, "may_fork", lambda _: False)
    monkeypatch.setattr(launch, "pick_device", lambda *_: "cpu")
    monkeypatch.setattr(launch.stages, "check_given", lambda _: None)
    monkeypatch.setattr(launch, "export", lambda _: tmp_path / "export")
    monkeypatch.setattr("ee_megatron.config.validate.validate", lambda *_: None)
    monkeypatch.setattr("ee_megatron.config.derive.read_dims", lambda _: None)
    launch.run_method(cfg, [])
    order = [stage for stage in STAGES if stage not in ("imported", "pretrain")]
    assert len(stages.pages) == len(order) and stages.pages[0] == ""
    for done, text in enumerate(stages.pages[1:], start=1):
        assert f": {', '.join(order[done:])}." in text
        assert ("<h3>rl " in text) == ("rl" in order[:done])
    assert f": {order[-1]}." not in report_path(cfg).read_text()
    printed = capsys.readouterr().out
    assert printed.startswith(f"report: {report_path(cfg)}") and printed.count("model exits accuracy") == 1
    # When everything was there before, the table is what the command has to show.
    launch.run_method(cfg, [])
    assert capsys.readouterr().out.count("model exits accuracy") == 1


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load(["experiment=demo_cpu", f"runs={tmp_path}", "name=front"])
    report_path(cfg).mkdir(parents=True)
    launch._report_so_far(cfg)
    assert capsys.readouterr().err == "", "nothing to report yet"
    done = stage_dir(cfg, "teacher") / DONE
    done.parent.mkdir()
    done.touch()
    assert launch._followed(["no-such-command"], False, lambda: launch._report_so_far(cfg)) == 2
    assert capsys.readouterr().err.startswith("report: ")
    assert sys.modules[launch.__name__] is launch


def test_a_stage_is_not_ended_by_what_goes_wrong_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    child = SimpleNamespace(wait=lambda *_: seen.append("waited for"), kill=lambda: seen.append("killed"))
    monkeypatch.setattr(launch, "Forked", lambda *_: child)

    def fail() -> None:
        raise KeyError("a report's fault")

    with pytest.raises(KeyError):
        launch._followed(["rl"], True, fail)
    assert seen == ["waited for"]


def test_metrics_that_never_change_are_listed_without_a_chart() -> None:
    varying, same = [(s, float(s)) for s in range(1, 5)], [(s, 2.0) for s in range(1, 5)]
    first = StageData("rl", Path("a"), run="a", curves={"reward": varying, "alive": same, "lambda": same})
    second = StageData("rl", Path("b"), run="b", curves={"reward": varying, "alive": same, "lambda": [(1, 3.0)]})
    (found,) = curves(Inputs([first, second], Results(), [], []))
    assert [p["name"] for p in found["panels"]] == ["reward", "lambda"] and found["constant"] == [("alive", "2")]
    (alone,) = curves(Inputs([first], Results(), [], []))
    assert alone["constant"] == [("alive", "2"), ("lambda", "2")]
    once = StageData("rl", Path("c"), curves={"loss": [(1, 2.0)]})
    assert not curves(Inputs([once], Results(), [], []))[0]["constant"], "a single step has not failed to change"


def test_ticks_tell_values_apart_and_leave_room_for_themselves() -> None:
    assert svg.tick_words([0.9985, 0.999, 0.9995]) == ["0.9985", "0.999", "0.9995"]
    assert svg.tick_words([0.785, 0.79, 0.795], percent=True) == ["78.5%", "79.0%", "79.5%"]
    assert svg.tick_words([1000.2, 1000.4]) == ["1,000.2", "1,000.4"]
    plain, long = svg.Frame(460, 330, (0, 1), (0, 1)), svg.Frame(460, 330, (0, 1), (0.00012, 0.00018))
    for frame in (plain, long):
        words = svg.tick_words(frame.y_values)
        assert frame.left - 5 - max(svg.width_of(w, svg.TICK) for w in words) >= svg.LABEL
    assert long.left > plain.left
    parts = "".join(svg.Frame(270, 140, (1, 4), (0, 1), labelled=False).axes("", "", x_ticks=9, whole_x=True))
    x_words = re.findall(r'text-anchor="middle">([^<]*)<', parts)
    assert x_words == ["1", "2", "3", "4"]


def test_answers_are_paired_by_problem_and_long_ones_lose_their_middle(tmp_path: Path) -> None:
    inputs = read_inputs(ReportRun(write_run(tmp_path / "run")))
    found = differences(inputs.results, inputs.problems)
    assert found is not None and (found["count"], found["cut"]) == (35, 0)
    assert (found["first"], found["second"]) == ("calibrated, hazard > 0.9", "reinforced, hazard > 0.9")
    long = {"correct": True, "pieces": [f"w{i}" for i in range(5000)], "depths": [10] * 5000}
    problem = {"prompt": "p", "answers": {found["first"]: long, found["second"]: {**long, "correct": False}}}
    cut = differences(inputs.results, [problem])
    assert cut is not None and cut["cut"] == 400
    right, tokens, depth, pieces, places, gap = json.loads(cut["data"])["problems"][0][2][0]
    assert (right, tokens, depth, gap) == (1, 5000, 0.3333, 200) and len(pieces) == len(places) == 400
    assert pieces[199:201] == ["w199", "w4800"] and pieces[-1] == "w4999" and set(places) == {0}
    assert differences(inputs.results, [{"prompt": "p", "answers": {found["first"]: long}}]) is None


def test_an_evaluation_without_the_newer_files_shows_what_it_kept(tmp_path: Path) -> None:
    stages = write_run(tmp_path / "run")
    for path in (stages["evaluate"] / "answers.jsonl", stages["evaluate"] / "lens.json"):
        path.unlink()
    shutil.rmtree(stages["rl"] / "samples")
    inputs = read_inputs(ReportRun(stages))
    assert inputs.missing == [] and inputs.lens == {} and len(inputs.problems) == 4
    found = differences(inputs.results, inputs.problems)
    assert found is not None and found["count"] == 4
    (stages["evaluate"] / "answers.jsonl").write_text("{}\n")
    (stages["evaluate"] / "lens.json").write_text('{"exit_depths": [1], "answers": [{"rows": [{"readouts": []}]}]}')
    damaged = read_inputs(ReportRun(stages))
    assert [line.split(" can't")[0] for line in damaged.missing] == ["evaluate: answers.jsonl", "evaluate: lens.json"]
    assert len(damaged.problems) == 4


def test_embedded_json_ends_no_script() -> None:
    evil = "</script><!--<script>\u2028&"
    assert not set("<>&\u2028") & set(embedded([evil])) and json.loads(embedded([evil])) == [evil]
