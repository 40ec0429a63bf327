"""Three hundred bad inputs, each a process of its own: a line per fault, exit code 2, nothing left, little CPU time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs import complaint, draw

ROOT = Path(__file__).parents[2]
COUNT = 300
CPU_S = 2.0
# What reads a model, or the arithmetic of plans, imports what takes longer.
IMPORTING = ("plan", "serve", "generate")


def cpu_seconds(usage_before, usage_after) -> float:
    return sum(usage_after[:2]) - sum(usage_before[:2])


@pytest.mark.timeout(7200)
def test_three_hundred_bad_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import resource

    here = tmp_path / "here"
    here.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "EE_DEBUG")}
    environment |= {"PYTHONPATH": str(ROOT), "EE_CONFIG_DIR": str(ROOT / "configs"), "OMP_NUM_THREADS": "1"}
    complaints, seconds = [], []
    drawn = [line for line in draw(COUNT, tmp_path) if not any("\0" in word for word in line)]
    for arguments in drawn:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "ee_megatron.cli", *arguments], cwd=here, env=environment, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
        seconds.append(cpu_seconds(before, resource.getrusage(resource.RUSAGE_CHILDREN)))
        complaints.append(complaint(arguments, done.returncode, done.stdout, done.stderr))
        left = [str(path) for path in tmp_path.rglob("*") if path != here]
        assert not left, f"{arguments} left {left}"
    quick = sum(second < CPU_S for second in seconds)
    with capsys.disabled():
        print(
            f"\n{quick} of {len(seconds)} under {CPU_S:g} s of CPU; the longest {max(seconds):.2f} s, all together "
            f"{sum(seconds):.0f} s; others: {[a[0] for a, s in zip(drawn, seconds, strict=True) if s >= CPU_S]}"
        )
    wrong = [text for text in complaints if text]
    assert not wrong, "\n".join(wrong)
    slow = [a for a, s in zip(drawn, seconds, strict=True) if s >= CPU_S and a[:1] and a[0] not in IMPORTING]
    assert not slow, slow
