"""The notebook's cells run, in order and in one process, on a tiny model; and it is a notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.covering import EXTENDED
from tests.reference import random_policy
from tests.tiny import tiny_hf

pytestmark = EXTENDED

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "early_exits.ipynb"
SPEC = PolicySpec(6, (2, 4), rank=2, alpha=4.0)
# What its cells leave behind is looked at where they ran.
LOOK = """
assert list(said.index) == DEPTHS and said.shape[1] == min(len(answers[0].tokens), 24)
assert len(tokens) == sum(len(a.tokens) for a in answers) and tokens.entropy.min() >= 0
assert list(front.exits) == RULES and front.depth.between(0, 1).all() and front.depth.iloc[-1] == 1
assert front.depth.is_monotonic_increasing and (len(RULES) == 1 or front.depth.iloc[0] < 1)
# The last run left at the deepest exit, if there are gates: no hook behind it is called, and a patch there is nothing.
assert list(own) == list(range(depth)) and depth == (DEPTHS[-2] if len(RULES) > 1 else DEPTHS[-1])
assert all(value == float(plain[wanted]) for value in effect[depth:])
assert len(set(effect[:depth])) > 1 and len(plt.get_fignums()) == 4
print("looked at")
"""


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_it_is_a_notebook_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and notebook["metadata"]["kernelspec"]["name"]
    ids = [cell["id"] for cell in cells()]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in cells():
        code = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown")
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("gated", [True, False])
def test_its_cells_run_on_a_tiny_model(tmp_path: Path, gated: bool) -> None:
    model = tiny_hf("llama", tmp_path / "plain")
    if gated:
        model = export_hf(model, (SPEC, random_policy(HFDirectory(model).dims, SPEC)), tmp_path / "gated")
    code = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    depths = [2, 4, 6] if gated else [1, 2, 3, 4, 5, 6]
    rules = [*(f"threshold:{bar}" for bar in (0.3, 0.5, 0.7, 0.9)), "off"] if gated else ["off"]
    run = [f"exec(compile({text!r}, 'cell {i}', 'exec'), space)" for i, text in enumerate(code)]
    script = "\n".join(["space = {}", *run, f"exec({LOOK!r}, space | {{'DEPTHS': {depths}, 'RULES': {rules}}})"])
    environment = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(ROOT),
        "EE_NOTEBOOK_MODEL": str(model),
        "EE_NOTEBOOK_PROBLEMS": "4",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("looked at\n")
