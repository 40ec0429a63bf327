"""The wheel in an environment of its own, from an empty directory: pip makes and installs it, a model is trained."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1200)
def test_the_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EE_"))}

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout

    # Not in the checkout itself, where a build leaves directories.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ee_megatron", "configs", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("ee_megatron-*.whl")
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    python, command = venv / "bin" / "python", venv / "bin" / "ee-megatron"
    # This environment's packages behind the new one's own: what the wheel brings comes first.
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "zz_base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel)
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(python, "-c", "import ee_megatron; print(ee_megatron.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(own)

    planned = run(command, "run", "experiment=demo_cpu", "--dry-run", cwd=empty)
    assert "# evaluate: runs/demo_cpu/evaluate-" in planned and not list(empty.iterdir())
    settings = (
        "experiment=externalise", "name=small", "task.train=200", "task.validation=20", "task.evaluation=20",
        "pretrain.steps=2", "pretrain.batch_size=8",
    )  # fmt: skip
    run(command, "pretrain", *settings, cwd=empty)
    (stage,) = empty.glob("runs/small/pretrain-*")
    code = (
        "import sys; from ee_megatron import EarlyExitModel; m = EarlyExitModel.load(sys.argv[1]); "
        "print(len(m.generate([[1, 2, 3]], max_new_tokens=4)[0].tokens))"
    )
    assert 1 <= int(run(python, "-c", code, stage, cwd=empty)) <= 4
