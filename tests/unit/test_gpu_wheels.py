"""Which wheels go along to a machine that has torch and no network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import gpu_wheels


def test_what_is_needed_is_complete_and_leaves_out_what_torch_brings() -> None:
    there = frozenset(gpu_wheels.needed(gpu_wheels.THERE, "3.12"))
    names = set(gpu_wheels.needed(gpu_wheels.ROOTS, "3.12", there))
    assert {"transformers", "tokenizers", "safetensors", "megatron-core", "deepspeed", "pydantic-core"} <= names
    assert not names & {"torch", "numpy", "sympy", "filelock", "ray", "wandb", "datasets", "hydra-core", "scipy"}
    assert gpu_wheels.pinned("transformers").startswith("transformers==5.")


def test_a_root_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match="no-such-package"):
        list(gpu_wheels.needed(("no-such-package",), "3.12"))


@pytest.fixture
def download(monkeypatch) -> list[list[str]]:
    """pip's calls; in its place each wheel is a file of 1 MiB."""
    calls: list[list[str]] = []

    def pip(*arguments: str, **_: str) -> None:
        calls.append(list(arguments))
        for name in (argument.split("==")[0] for argument in arguments if "==" in argument):
            Path(arguments[2], f"{name}-1-py3-none-any.whl").write_bytes(bytes(2**20))

    monkeypatch.setattr(gpu_wheels, "pip", pip)
    return calls


def test_old_wheels_give_way_and_the_target_is_asked_for(tmp_path, download) -> None:
    (tmp_path / "old-1-py3-none-any.whl").touch()
    size = gpu_wheels.fill(tmp_path, "3.12")
    found = [path.name for path in tmp_path.iterdir()]
    assert "old-1-py3-none-any.whl" not in found and len(found) == size
    binary, source = download
    assert {"--python-version=3.12", "--platform=manylinux_2_28_x86_64", "--only-binary=:all:"} <= set(binary)
    assert [a.split("==")[0] for a in source if "==" in a] == ["deepspeed"]


def test_too_much_is_refused_and_nothing_is_written(tmp_path, download, monkeypatch) -> None:
    monkeypatch.setattr(gpu_wheels, "LIMIT_MIB", 5)
    with pytest.raises(ValueError, match=r"\b5\b.*\.whl"):
        gpu_wheels.fill(tmp_path, "3.12")
    assert not list(tmp_path.iterdir())
