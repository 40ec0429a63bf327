"""The list of faults follows the code, its table the list; a planted fault is told from a tree without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools import mutants

ROOT = Path(__file__).parents[2]
ROOMS, LISTED = mutants.read_list()


@pytest.mark.parametrize("mutant", LISTED, ids=lambda mutant: mutant.name)
def test_every_fault_fits_the_code_and_names_a_test_of_its_files(mutant: mutants.Mutant) -> None:
    mutant.planted((ROOT / mutant.file).read_text())
    files = [ROOT / file for room in mutant.rooms for file in ROOMS[room]]
    assert any(f"def {mutant.test}(" in file.read_text() for file in files)


def test_contributing_has_the_table_of_the_list() -> None:
    assert mutants.table(LISTED) in (ROOT / "CONTRIBUTING.md").read_text()


def test_a_fault_whose_text_is_not_there_once_is_refused_by_name() -> None:
    mutant = mutants.Mutant("name", "fault", "file.py", "a + b", "a - b", ("room",), "test_a")
    assert mutant.planted("x = a + b") == "x = a - b"
    for changed, text in ((mutant, "x = a"), (mutant, "a + b, a + b"), (replace(mutant, new="a + b"), "a + b")):
        with pytest.raises(ValueError, match=r"name.*file\.py"):
            changed.planted(text)


@pytest.fixture
def minus(monkeypatch: pytest.MonkeyPatch) -> mutants.Mutant:
    """A fault in a tree that stands in for this one: a sum, and tests that fail, pass and hang if it is wrong."""
    head = "import time\nfrom sums import add\n\ndef test_add():\n    "
    files = {
        "sums.py": "def add(a, b):\n    return a + b\n",
        "test_sees.py": f"{head}assert add(1, 1) == 2\n",
        "test_is_blind.py": f"{head}assert add(1, 0) == 1\n",
        "test_hangs.py": f"{head}time.sleep(60 * (2 - add(1, 1)))\n",
        "pytest.ini": "[pytest]\nmarkers = slow\n",
    }

    def copy(to: Path) -> None:
        for name, text in files.items():
            (to / name).write_text(text)

    monkeypatch.setattr(mutants, "copy_tree", copy)
    return mutants.Mutant("minus", "sums are differences", "sums.py", "a + b", "a - b", ("room",), "test_add")


@pytest.mark.parametrize(
    ("file", "limit", "failed"),
    [
        ("test_sees.py", 60.0, "test_sees.py::test_add"),
        ("test_is_blind.py", 60.0, ""),
        ("test_hangs.py", 2.0, "the limit of 2 s"),
    ],
)
def test_a_planted_fault_is_caught_by_a_failure_or_by_the_limit(
    file: str, limit: float, failed: str, minus: mutants.Mutant
) -> None:
    assert mutants.run_tests([file], limit, minus).failed == failed


def test_what_survives_is_counted_and_tests_that_fail_without_a_fault_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rooms = {"a": ["test_a.py"], "b": ["test_b.py"]}
    found = [mutants.Mutant(name, "", "file.py", "old", "new", ("a", "b"), "test") for name in ("seen", "unseen")]
    failed = {None: "", "seen": "test_b.py::test"}

    def run(files: list[str], limit: float, mutant: mutants.Mutant | None = None) -> mutants.Outcome:
        assert files == (["test_a.py", "test_b.py"] if mutant else [f"test_{files[0][5]}.py"])
        # Slow tests get time in proportion.
        assert limit == (20.0 if mutant else 9.0)
        return mutants.Outcome(2.0, failed.get(mutant and mutant.name, ""))

    monkeypatch.setattr(mutants, "run_tests", run)
    assert mutants.check(found, rooms, 2, 9.0) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[2].startswith("caught") and said[3].startswith("SURVIVED") and "unseen" in said[3]
    failed[None] = "test_a.py::test"
    with pytest.raises(RuntimeError, match=r"test_a\.py::test"):
        mutants.check(found, rooms, 2, 9.0)
