"""What `ee-megatron generate --help` shows answers rightly, on the model that the demo starts from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


def shell(command: str) -> str:
    line = command.replace("ee-megatron", f"{sys.executable} -m ee_megatron.cli", 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="the demo model is not here; run `make model` once")
@pytest.mark.timeout(1300)
def test_the_examples_of_its_help_are_right() -> None:
    told = shell("ee-megatron generate --help")
    examples = [line.strip() for line in told.splitlines() if line.startswith("  ee-megatron generate")]
    run, chat = examples
    # The run itself takes twenty minutes to make; its teacher answers in the same form.
    asked = run.replace("experiment=demo_cpu --exits threshold:0.7", f"--model {MODEL} --no-chat")
    assert asked != run and "56" in shell(f"{asked} --max-new-tokens 8")
    assert str(MODEL.relative_to(ROOT)) in chat and "Paris" in shell(f"{chat} --max-new-tokens 24")
