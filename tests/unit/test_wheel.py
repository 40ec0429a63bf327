"""What a wheel of this package holds, and that an installed one finds its configurations."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from ee_megatron.config import load as loading
from ee_megatron.config.derive import model_dir, read_dims
from ee_megatron.config.identity import stage_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel installs it, built here without a network."""
    if Version(importlib.metadata.version("setuptools")) < Version("77"):
        pytest.skip("setuptools is older than pyproject.toml asks for; run: pip install -U setuptools")
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    # A build leaves its directories in the source tree: this one is not the checkout's.
    for name in ("ee_megatron", "configs", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return work / "site"


def test_the_wheel_holds_everything_that_is_not_python(unpacked: Path) -> None:
    def files(root: Path) -> set[str]:
        found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
        return {name for name in found if "__pycache__" not in name}

    packed = files(unpacked / "ee_megatron")
    assert packed == files(ROOT / "ee_megatron") | {f"configs/{name}" for name in files(ROOT / "configs")}
    for name in ("kernels/decoding.c", "checkpoint/export_files/modeling_early_exit.py", "configs/config.yaml"):
        assert name in packed
    assert {".js", ".css", ".j2"} <= {Path(name).suffix for name in packed}


def test_an_installed_package_finds_its_settings_and_shapes_outside_a_checkout(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import ee_megatron; from ee_megatron.config import derive, load; cfg = load.load(['experiment=externalise']); "
        "print(ee_megatron.__file__, cfg.model.path, derive.model_dir(cfg), sep='\\n')"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EE_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**env, "PYTHONPATH": str(unpacked)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The name of the shape, by which results are found again, stays that of a checkout.
    expected = [unpacked / "ee_megatron" / "__init__.py", Path("configs/hops"), unpacked / "ee_megatron/configs/hops"]
    assert [Path(line) for line in done.stdout.splitlines()] == expected


def test_a_shape_of_the_package_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = loading.load(["experiment=ladder"])
    here = stage_dir(cfg, "calibrate")
    monkeypatch.chdir(tmp_path)
    assert read_dims(cfg).num_layers > 0 and stage_dir(cfg, "calibrate") == here
    # What the working directory has under that name comes first.
    own = tmp_path / cfg.model.path
    own.mkdir(parents=True)
    assert model_dir(cfg) == Path(cfg.model.path)
