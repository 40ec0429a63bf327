"""Whatever is asked for that cannot be: one line per fault, exit code 2, nothing left behind, no traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ee_megatron import cli
from tests.bad_inputs import complaint, draw

ROOT = Path(__file__).parents[2]
COUNT = 56


def answer(arguments: list[str]) -> object:
    try:
        return cli.main(arguments)
    except SystemExit as error:
        return error.code


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with nothing in it."""
    monkeypatch.setenv("EE_CONFIG_DIR", str(ROOT / "configs"))
    for name in ("RANK", "WORLD_SIZE", "EE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_bad_inputs_are_refused_in_a_line_each(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complaints = []
    for arguments in draw(COUNT, place):
        code = answer(arguments)
        said = capsys.readouterr()
        complaints.append(complaint(arguments, code, said.out, said.err))
        left = [str(path) for path in place.rglob("*") if path.name != "here"]
        assert not left, f"{arguments} left {left}"
    wrong = [text for text in complaints if text]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"])
def test_what_launchers_say_is_checked(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "abc")
    assert cli.main(["rl", "experiment=demo_cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {name}='abc'") and err.count("\n") == 1
    assert os.listdir(place / "here") == []
