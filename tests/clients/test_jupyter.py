"""The notebook in Jupyter's own hands: its format is valid, and a kernel runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.reference import random_policy
from tests.tiny import tiny_hf

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "early_exits.ipynb"
PEER = ROOT / ".venv-peers" / "jupyter"
SPEC = PolicySpec(6, (2, 4), rank=2, alpha=4.0)
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
client = NotebookClient(notebook, timeout=280, resources={"metadata": {"path": sys.argv[2]}})
client.execute()
kinds = [kind for cell in notebook.cells for out in cell.get("outputs", ()) for kind in out.get("data", ())]
print(kinds.count("image/png"), kinds.count("text/html"))
"""


@pytest.mark.skipif(not (PEER / ".made").is_file(), reason="no Jupyter here; run: make .venv-peers/jupyter/.made")
@pytest.mark.timeout(600)
def test_a_kernel_runs_the_notebook(tmp_path: Path) -> None:
    base = tiny_hf("llama", tmp_path / "plain")
    model = export_hf(base, (SPEC, random_policy(HFDirectory(base).dims, SPEC)), tmp_path / "gated")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "EE_NOTEBOOK_MODEL": str(model),
        "EE_NOTEBOOK_PROBLEMS": "4",
        # Nothing of this user's own is read or left behind.
        "JUPYTER_PLATFORM_DIRS": "1",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [str(PEER / "bin" / "python"), "-c", RUN, str(NOTEBOOK), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Four pictures, and the front as a table.
    assert done.stdout.split() == ["4", "1"]
