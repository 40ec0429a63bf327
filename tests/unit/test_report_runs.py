"""Runs named by directories: which stages belong to them, how they differ, what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest

from ee_megatron.cli import main
from ee_megatron.config.identity import stage_dir, to_yaml
from ee_megatron.config.load import load, read_saved
from ee_megatron.report.runs import report_directories
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


def test_a_runs_directory_stands_for_every_evaluation_in_it(tmp_path: Path) -> None:
    ends = [
        made(tmp_path, "rl.depth_penalty.weight=0", "rl.steps=12"),
        made(tmp_path, "rl.depth_penalty.weight=0.3", "rl.steps=5"),
    ]
    page = report_directories([tmp_path / "front"])
    text = page.read_text()
    assert page == tmp_path / "front" / "report.html"
    for words in ("reinforced (steps=12, lambda_exit=0)", "reinforced (steps=5, lambda_exit=0.3)", "2 early-exit"):
        assert words in text, words
    assert "calibrated (steps" not in text and "teacher (steps" not in text, "what they share has one name"
    again = report_directories([*sorted(ends), ends[0]], tmp_path / "page.html").read_text()
    # The same but for where the files are from there.
    assert again.replace('href="./front/', 'href="./') == text, "each run once"
    only = report_directories([ends[1]], tmp_path / "one.html").read_text()
    assert "reinforced (steps" not in only and "rl: config.yaml" in only


def test_runs_that_differ_in_much_are_numbered_and_their_settings_stand_in_the_table(tmp_path: Path) -> None:
    one = made(tmp_path, "rl.depth_penalty.weight=0")
    two = made(
        tmp_path, "rl.depth_penalty.weight=0.3", "rl.steps=5", "rl.kl_penalty.weight=0.25", "calibrate.adapter_lr=7e-4"
    )
    three = made(tmp_path, "rl.depth_penalty.weight=1")
    text = report_directories([one, two, three], tmp_path / "page.html").read_text()
    for words in ("reinforced (run 2)", "calibrated (run 2)", "calibrated (run 1, run 3)", "<td>0.0007</td>"):
        assert words in text, words
    assert "reinforced (steps" not in text


def test_runs_that_differ_in_seeds_are_summed_up(tmp_path: Path) -> None:
    grid = [(price, seed) for price in (0, 0.5) for seed in (1, 2)]
    ends = [
        made(tmp_path, f"rl.depth_penalty.weight={price}", f"calibrate.seed={seed}", f"rl.seed={seed}")
        for price, seed in grid
    ]
    for (price, seed), end in zip(grid, ends, strict=True):
        data = json.loads((end / "results.json").read_text())
        row = next(r for r in data["rows"] if r["model"] == "reinforced" and r["exits"] == "hazard > 0.9")
        row.update(accuracy=0.7 + 0.02 * seed, low=0.6, high=0.8, mean_depth=0.8 - 0.4 * price)
        (end / "results.json").write_text(json.dumps(data))
    text = " ".join(re.sub("<[^>]*>", " ", report_directories(ends, tmp_path / "page.html").read_text()).split())
    assert "lambda_exit=0 2 73.0% [72.0%, 74.0%] 0.800 [0.800, 0.800]" in text
    assert "lambda_exit=0.5 2 73.0% [72.0%, 74.0%] 0.600 [0.600, 0.600]" in text
    assert "reinforced (seed=2, lambda_exit=0.5)" in text and "calibrated (seed=2)" in text
    assert "73.0% [72.0%, 74.0%]" not in report_directories(ends[::2], tmp_path / "two.html").read_text()


def test_a_run_that_was_moved_is_found_and_one_without_evaluation_ends_at_its_last_stage(tmp_path: Path) -> None:
    end = made(tmp_path, "rl.seed=3")
    shutil.rmtree(end)
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "front", moved)
    text = report_directories([moved]).read_text()
    assert (
        "evaluate: " in text
        and "evaluate: config.yaml" not in text
        and "rl: config.yaml" in text
        and "calibrate: config.yaml" in text
    )


def test_runs_without_a_difference_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    one = made(tmp_path / "a")
    two = made(tmp_path / "b")
    text = report_directories([one, two], tmp_path / "page.html").read_text()
    assert f"reinforced (front/{one.name})" in text


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = made(tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "nowhere"], str(tmp_path / "nowhere")),
        ([tmp_path / "empty"], str(tmp_path / "empty")),
        ([end, "rl.steps=5"], "rl.steps=5"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
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
    cfg = load(["experiment=ladder"])
    text = to_yaml(cfg)
    for old, new in (("sequence", "answer"), ("token", "token")):
        assert "\n  credit: answer\n" in text
        (tmp_path / "config.yaml").write_text(text.replace("\n  credit: answer\n", f"\n  depth_credit: {old}\n"))
        assert read_saved(tmp_path / "config.yaml").rl.credit == new
