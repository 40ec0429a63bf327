"""What may be absent. Which way imports go is `lint-imports` (pyproject.toml), which `make lint` runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

VLLM = ("hydra", "omegaconf", "megatron", "deepspeed", "datasets", "submitit", "ray")


@pytest.mark.parametrize(
    ("absent", "imports"),
    [
        # The package is there without its dependencies (Makefile): vLLM pins other versions of them.
        (VLLM, "ee_megatron.rollout.pool.vllm"),
        # megatron takes as long to import as everything else together.
        (("megatron", "deepspeed"), "ee_megatron.training.teacher, ee_megatron.training.evaluate"),
    ],
)
def test_a_process_does_without_what_it_does_not_need(absent: tuple[str, ...], imports: str) -> None:
    code = f"import sys\nfor name in {absent}:\n    sys.modules[name] = None\nimport {imports}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
