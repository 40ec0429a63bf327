"""Which stages belong to a run, how runs differ, what is refused; and the report that `run` writes as it goes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from ee_megatron.cli import main
from ee_megatron.config.identity import STAGES, stage_dir, to_yaml
from ee_megatron.config.load import load, read_saved, settings_of
from ee_megatron.observe.rundir import DONE
from ee_megatron.report.page import report_directories, report_run
from ee_megatron.report.results import report_path
from ee_megatron.training import launch
from tests.integration.report_samples import write_run


def made(root: Path, *settings: str) -> Path:
    """A run's stage directories under the names that its settings give them; returns that of `evaluate`."""
    cfg = load(["experiment=demo_cpu", f"runs={root}", "name=front", *settings])
    for stage, source in write_run(root / "samples").items():
        target = stage_dir(cfg, stage)
        if not target.exists():
            shutil.copytree(source, target)
            (target / "config.yaml").write_text(to_yaml(cfg))
    shutil.rmtree(root / "samples")
    return stage_dir(cfg, "evaluate")


def words(page: Path) -> str:
    return " ".join(re.sub("<[^>]*>", " ", page.read_text()).split())


def test_a_runs_directory_stands_for_every_evaluation_in_it(tmp_path: Path) -> None:
    ends = [
        made(tmp_path, "rl.depth_penalty.weight=0", "rl.steps=12"),
        made(tmp_path, "rl.depth_penalty.weight=0.3", "rl.steps=5"),
    ]
    page = report_directories([tmp_path / "front"])
    text = page.read_text()
    assert page == tmp_path / "front" / "report.html"
    for label in ("reinforced (steps=12, lambda_exit=0)", "reinforced (steps=5, lambda_exit=0.3)", "2 early-exit"):
        assert label in text, label
    assert "calibrated (steps" not in text and "teacher (steps" not in text, "what they share has one name"
    again = report_directories([*sorted(ends), ends[0]], tmp_path / "page.html").read_text()
    # The same but for where the files are from there.
    assert again.replace('href="./front/', 'href="./') == text, "each run once"


def test_runs_that_differ_in_much_are_numbered_and_their_settings_stand_in_the_table(tmp_path: Path) -> None:
    one = made(tmp_path, "rl.depth_penalty.weight=0")
    two = made(
        tmp_path, "rl.depth_penalty.weight=0.3", "rl.steps=5", "rl.kl_penalty.weight=0.25", "calibrate.adapter_lr=7e-4"
    )
    three = made(tmp_path, "rl.depth_penalty.weight=1")
    text = report_directories([one, two, three], tmp_path / "page.html").read_text()
    for label in ("reinforced (run 2)", "calibrated (run 2)", "reinforced (run 3)", "<td>0.0007</td>"):
        assert label in text, label
    assert "reinforced (steps" not in text and "calibrated (run 1)" not in text, "1 and 3 share theirs"


def test_runs_that_differ_in_seeds_are_summed_up(tmp_path: Path) -> None:
    grid = [(price, seed) for price in (0, 0.5) for seed in (1, 2)]
    ends = [
        made(tmp_path, f"rl.depth_penalty.weight={price}", f"calibrate.seed={s}", f"rl.seed={s}") for price, s in grid
    ]
    for (price, seed), end in zip(grid, ends, strict=True):
        data = json.loads((end / "results.json").read_text())
        row = next(r for r in data["rows"] if r["model"] == "reinforced" and r["exits"] == "hazard > 0.9")
        row.update(accuracy=0.7 + 0.02 * seed, low=0.6, high=0.8, mean_depth=0.8 - 0.4 * price)
        (end / "results.json").write_text(json.dumps(data))
    text = words(report_directories(ends, tmp_path / "page.html"))
    assert "lambda_exit=0 2 73.0% [72.0%, 74.0%] 0.800 [0.800, 0.800]" in text
    assert "lambda_exit=0.5 2 73.0% [72.0%, 74.0%] 0.600 [0.600, 0.600]" in text
    assert "reinforced (seed=2, lambda_exit=0.5)" in text and "calibrated (seed=2)" in text


def test_a_run_that_was_moved_is_found_and_one_without_evaluation_ends_at_its_last_stage(tmp_path: Path) -> None:
    shutil.rmtree(made(tmp_path, "rl.seed=3"))
    shutil.move(tmp_path / "front", tmp_path / "elsewhere")
    text = report_directories([tmp_path / "elsewhere"]).read_text()
    assert "evaluate: " in text and "evaluate: config.yaml" not in text
    assert "rl: config.yaml" in text and "calibrate: config.yaml" in text


def test_runs_without_a_difference_are_named_after_their_directories(tmp_path: Path) -> None:
    one, two = made(tmp_path / "a"), made(tmp_path / "b")
    assert f"reinforced (front/{one.name})" in report_directories([one, two], tmp_path / "page.html").read_text()


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = made(tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        ([tmp_path / "nowhere"], str(tmp_path / "nowhere")),
        ([tmp_path / "empty"], str(tmp_path / "empty")),
        ([end, "rl.steps=5"], "rl.steps=5"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1
    (end / "config.yaml").write_text("rl: {lamda_exit: 1}\n")
    with pytest.raises(ValueError, match=r"rl\.lamda_exit"):
        read_saved(end / "config.yaml")
    (end / "config.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=re.escape(str(end / "config.yaml"))):
        read_saved(end / "config.yaml")


def test_a_saved_configuration_is_read_as_it_was(tmp_path: Path) -> None:
    cfg = load(["experiment=demo_cpu", "rl.depth_penalty.weight=0.3", "task.families=[sum]"])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert read_saved(tmp_path / "config.yaml") == cfg


def test_a_run_that_was_saved_under_older_names_is_read(tmp_path: Path) -> None:
    text = to_yaml(load(["experiment=ladder"]))
    assert "\n    credit: answer\n" in text
    for old, new in (("sequence", "answer"), ("token", "token")):
        older = text.replace("\n    credit: answer\n", "\n").replace("\nrl:\n", f"\nrl:\n  depth_credit: {old}\n")
        (tmp_path / "config.yaml").write_text(older)
        assert read_saved(tmp_path / "config.yaml").rl.credit == new


@pytest.mark.parametrize(
    "settings",
    [
        ["experiment=demo_cpu", "rl.depth_penalty.weight=0.3", "name=x1", "exits.depths=[5,10]"],
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


# -- as a run goes on -------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(launch, "_run_child", lambda arguments, _: stages(arguments))
    monkeypatch.setattr(launch, "may_fork", lambda _: False)
    monkeypatch.setattr(launch, "pick_device", lambda *_: "cpu")
    monkeypatch.setattr(launch.stages, "check_given", lambda _: None)
    monkeypatch.setattr(launch, "export", lambda *_: tmp_path / "export")
    monkeypatch.setattr("ee_megatron.config.validate.validate", lambda *_: None)
    monkeypatch.setattr("ee_megatron.config.derive.read_dims", lambda _: None)
    launch.run_method(cfg, [])
    order = [stage for stage in STAGES if stage not in ("import-checkpoint", "pretrain")]
    assert len(stages.pages) == len(order) and stages.pages[0] == ""
    for done, text in enumerate(stages.pages[1:], start=1):
        # What is to come is named, and isn't missing.
        assert f": {', '.join(order[done:])}." in text and "Not in this report" not in text
        assert ("<h3>rl " in text) == ("rl" in order[:done])
    assert f": {order[-1]}." not in report_path(cfg).read_text()
    printed = capsys.readouterr().out
    assert printed.startswith(f"report: {report_path(cfg)}") and printed.count("model exits accuracy") == 1
    # When everything was there before, the table is what the command has to show.
    launch.run_method(cfg, [])
    assert capsys.readouterr().out.count("model exits accuracy") == 1
    shutil.rmtree(stage_dir(cfg, "rl"))
    text = report_run(cfg).read_text()
    assert "Not in this report" in text and "rl: " in text


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
    launch._report_so_far(cfg)
    assert capsys.readouterr().err.startswith("report: ")
