"""What Megatron-Bridge converts and saves becomes, by `import --megatron`, the model that it was made of.

Its package asks for libraries that need a GPU, so it is installed without them into a folder of its own, and runs by
the environment of transformers 4.57, whose version it wants.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ee_megatron.checkpoint.store import tensor_sha256
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from tests.tiny import tiny_hf

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"
SOURCE, PYTHON = PEERS / "Megatron-Bridge", PEERS / "transformers-4.57" / "bin" / "python"
GET = ".venv/bin/pip install --no-deps --target .venv-peers/Megatron-Bridge megatron-bridge==0.3.1"
pytestmark = [
    pytest.mark.skipif(not (SOURCE / "megatron").is_dir(), reason=f"no Megatron-Bridge; run: {GET}"),
    pytest.mark.skipif(not PYTHON.is_file(), reason="run: make .venv-peers/transformers-4.57/.made"),
]
MODELS = {"llama": True, "qwen2": False, "qwen3": False}


def hashes(folder: Path) -> dict[str, str]:
    source = HFDirectory(folder)
    return {name: tensor_sha256(source.tensor(name)) for name in source.names()}


def convert(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


def test_what_megatron_bridge_saves_becomes_the_model_it_was_made_of(tmp_path):
    bases = {family: tiny_hf(family, tmp_path / family, tied=tied, layers=3) for family, tied in MODELS.items()}
    pairs = [str(part) for family, base in bases.items() for part in (base, tmp_path / f"{family}-saved")]
    path = os.pathsep.join(map(str, (SOURCE.resolve(), ROOT)))
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("megatron_bridge_save.py"), *pairs],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for family, base in bases.items():
        saved, here = tmp_path / f"{family}-saved", tmp_path / f"{family}-back"
        assert (saved / "iter_0000000" / "run_config.yaml").is_file()
        # Dimensions from run_config.yaml.
        convert("import", "--megatron", saved, "--out", here / "mc")
        convert("export", "--checkpoint", here / "mc", "--out", here / "hf", "--gates", "drop")
        assert HFDirectory(here / "hf").dims == HFDirectory(base).dims
        assert hashes(here / "hf") == hashes(base)
