"""Sets of golden files are compared by what users see: values, keys and files; not by clocks, nor by meant renames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import goldens

RESULTS = {
    "rl": {"lambda_exit": 0.5, "keep": None},
    "rows": [{"accuracy": 0.25, "tokens_per_s": 71.5}],
    "depths": [2, 3],
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes a set with these results and this help."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, results: object = RESULTS, text: str = "  --lambda_exit  price\n") -> Path:
        (tmp_path / "results.json").write_text(json.dumps(results))
        goldens.save(tmp_path / name / "results.json", goldens.readable(tmp_path / "results.json"))
        goldens.save(tmp_path / name / "help.txt", text)
        return tmp_path / name

    return make


def changed(**parts: object) -> dict[str, object]:
    return {**RESULTS, **parts}


@pytest.mark.parametrize(
    ("results", "shown"),
    [
        (changed(rows=[{"accuracy": 0.2500000000000001}]), ["-rows.000.accuracy: 0.25", "+rows.000.accuracy: 0.25000"]),
        (changed(depths=[3, 2]), ["-depths: [2, 3]", "+depths: [3, 2]"]),
        (changed(rl={"lambda_exit": 0.5, "kept": None}), ["-rl.keep: null", "+rl.kept: null"]),
        (changed(rl={"lambda_exit": 0.5}), ["-rl.keep: null"]),
        (changed(rl={"lambda_exit": -0.5, "keep": None}), ["+rl.lambda_exit: -0.5"]),
    ],
)
def test_a_changed_value_or_key_is_shown(made, results: object, shown: list[str]) -> None:
    said = goldens.compare(made("a"), made("b", results))
    assert said[0].startswith("results.json") and not any("help.txt" in line for line in said)
    assert all(any(line.strip().startswith(part) for line in said) for part in shown), said


def test_a_file_that_one_set_lacks_is_named(made) -> None:
    a, b = made("a"), made("b")
    (b / "help.txt").unlink()
    assert [line.split(":")[0] for line in goldens.compare(a, b)] == ["help.txt"]
    assert [line.split(":")[0] for line in goldens.compare(b, a)] == ["help.txt"]


def test_clocks_and_places_do_not_count(made, tmp_path: Path) -> None:
    seen = "in {}: 3 tensors\n{} of 2.00 GB, 0.1 GB/s\nestimate per RL step on cpu: update {} s\n"
    rows = [{"accuracy": 0.25, "tokens_per_s": 9.0}]
    a = made("a", text=seen.format(tmp_path, 1.5, 0.2))
    b = made("b", changed(rows=rows, date="2026-01-02"), seen.format("TREE", 1.7, 0.3))
    assert goldens.compare(a, b) == []


def test_renames_leave_what_else_differs(made, tmp_path: Path) -> None:
    names = tmp_path / "renames"
    names.write_text("# settings\nrl.lambda_exit rl.depth_penalty\n\nlambda_exit depth_penalty\n")
    # A longer name is not renamed in part.
    a = made("a", changed(rl={"keep": None, "lambda_exit": 0.5, "lambda_exit_max": 1}))
    renamed = {"keep": None, "depth_penalty": 0.5, "lambda_exit_max": 1}
    b = made("b", changed(rl=renamed), text="  --depth_penalty   price\n")
    assert len([line for line in goldens.compare(a, b) if line.endswith("differs")]) == 2
    assert goldens.compare(a, b, names) == []
    said = goldens.compare(
        a, made("c", changed(rl=renamed | {"depth_penalty": 0.4}), "  --depth_penalty price\n"), names
    )
    assert [line.strip() for line in said if "rl." in line] == ["-rl.depth_penalty: 0.5", "+rl.depth_penalty: 0.4"]


def test_a_line_of_renames_that_is_no_pair_is_refused(made, tmp_path: Path) -> None:
    (tmp_path / "renames").write_text("keep\n")
    with pytest.raises(ValueError, match="renames"):
        goldens.compare(made("a"), made("b"), tmp_path / "renames")
