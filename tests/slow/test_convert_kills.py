"""Ten blows at an import and ten at an export, on a model that takes some seconds."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from test_conversion_faults import kills_and_resumes


def test_ten_kills_each_leave_nothing_that_looks_complete(tmp_path, capsys):
    hits = kills_and_resumes(tmp_path, capsys, kills=10, vocab=60_000)
    print(f"{hits} kills hit a conversion that was under way")
    assert hits == 20
