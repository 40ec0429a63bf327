"""A data set is what is in its files: a stage that was made from something else is not found again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ee_megatron.config.identity import RECORD, STAGES, digest, outdated, recorded, stage_dir, task_content
from ee_megatron.config.load import load
from ee_megatron.tasks import make_task


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "1?", "answer": "1"}\n')
    return file


def settings(tmp_path: Path, data: Path):
    return load(["name=x", "model.path=none", f"runs={tmp_path / 'runs'}", "task=dataset", f"task.path={data}"])


def make(directory: Path, content: str) -> None:
    directory.mkdir(parents=True)
    (directory / RECORD).write_text(json.dumps({"sha256": content}))


def test_another_content_is_another_stage_and_the_old_one_is_found_again(tmp_path: Path, data: Path) -> None:
    cfg = settings(tmp_path, data)
    before, old = data.read_text(), {stage: stage_dir(cfg, stage) for stage in STAGES}
    for directory in old.values():
        make(directory, digest(str(data)))
    assert {stage: stage_dir(cfg, stage) for stage in STAGES} == old and outdated(cfg, "traces") is None
    data.write_text(before + '{"question": "2?", "answer": "2"}\n')
    new = {stage: stage_dir(cfg, stage) for stage in STAGES}
    assert not set(new.values()) & set(old.values()) and outdated(cfg, "traces") == old["traces"]
    make(new["traces"], digest(str(data)))
    assert stage_dir(cfg, "traces") == new["traces"]
    data.write_text(before)
    assert {stage: stage_dir(cfg, stage) for stage in STAGES} == old


def test_an_environment_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_mine").mkdir()
    code = tmp_path / "of_mine" / "__init__.py"
    code.write_text("raise SystemExit")
    cfg = load(["name=x", "model.path=none", "task=verifiers", "task.path=own/of-mine@1.2"])
    before = task_content(cfg)
    code.write_text("raise SystemExit(3)")
    assert cfg.task.path == "own/of-mine@1.2" and before and task_content(cfg) not in (before, "")
    cfg.task.path = "own/of-others"
    assert not task_content(cfg)
    with pytest.raises(ValueError, match=r"task.path=own/of-others: the package \w+ is not installed; "):
        make_task(cfg.task)


def test_stages_that_nobody_knows_the_data_of_stay_as_they_are(tmp_path: Path, data: Path) -> None:
    cfg = settings(tmp_path, data)
    directory = stage_dir(cfg, "traces")
    directory.mkdir(parents=True)
    data.write_text("another\n")
    assert recorded(directory) == "" and stage_dir(cfg, "traces") == directory


def test_content_counts_not_place_or_time(tmp_path: Path, data: Path) -> None:
    found = digest(str(data))
    os.utime(data, (1, 1))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(data.read_bytes())
    assert digest(str(data)) == digest(str(moved)) == found and digest("") == digest("/nonexistent") == ""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("a\n")
    (folder / "test.jsonl").write_text("b\n")
    first = digest(str(folder))
    (folder / "README").write_text("not data")
    assert digest(str(folder)) == first
    # The same rows in the other split are other data.
    (folder / "train.jsonl").write_text("b\n")
    (folder / "test.jsonl").write_text("a\n")
    assert digest(str(folder)) != first


def test_without_a_path_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory may hold a million files, and every stage's name asks."""
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("looked into the working directory"))
    assert digest("") == ""
