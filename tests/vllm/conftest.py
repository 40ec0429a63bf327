"""The environment that `make vllm` makes, and engines in it that the tests of a module share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.is_file():
        pytest.fail(f"{python.relative_to(ROOT)} is missing; run: make vllm")
    return str(python)


@pytest.fixture(scope="module")
def engines(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    from vllm_setup import Engines

    with Engines(vllm_python, tmp_path_factory.mktemp("vllm_cache")) as running:
        yield running
