"""`make gpu-check` where there is torch, what torch brings, a folder of wheels, and no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.processes import ROOT
from tools.gpu_wheels import LIMIT_MIB, THERE, needed


def link_packages(names: list[str], folder: Path) -> None:
    """Installed distributions, seen from another site-packages folder as well."""
    for name in names:
        for file in distribution(name).files or ():
            top = Path(file).parts[0]
            target = folder / top
            if top not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(distribution(name).locate_file(top))


@pytest.mark.timeout(1800)
def test_a_folder_of_wheels_is_all_it_takes_beside_torch(tmp_path) -> None:
    python = "{}.{}".format(*sys.version_info)
    filled = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu_wheels.py", "--out", tmp_path / "wheels", "--python", python],
        capture_output=True, text=True,
    )  # fmt: skip
    assert filled.returncode == 0, filled.stderr
    assert sum(wheel.stat().st_size for wheel in (tmp_path / "wheels").iterdir()) < LIMIT_MIB * 2**20
    system = tmp_path / "system"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", system], check=True)
    link_packages(list(needed(THERE, python)), system / "lib" / f"python{python}" / "site-packages")
    variables = {
        "PYTHON": system / "bin" / "python", "WHEELS": tmp_path / "wheels", "GPU_VENV": tmp_path / "venv",
        "GPU_STAMP": tmp_path / "venv" / ".wheels", "GPU_OUT": tmp_path / "out", "DEVICE": "cpu",
    }  # fmt: skip
    environment = {**os.environ, "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["make", "gpu-check", *(f"{name}={value}" for name, value in variables.items())], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["passed"]
    where = "import transformers, torch; print(transformers.__file__, torch.__file__)"
    ours, theirs = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", where], capture_output=True, text=True, check=True
    ).stdout.split()
    assert ours.startswith(str(tmp_path / "venv")) and theirs.startswith(str(system))
