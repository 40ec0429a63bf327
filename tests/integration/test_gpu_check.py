"""`make gpu-check` as far as a CPU goes: every part runs and says something sensible, and what is wrong is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ee_megatron.observe.lock import process_start
from ee_megatron.planning.devices import find_device
from tests.covering import EXTENDED, SLOW
from tests.processes import ROOT
from tools.gpu_check import __main__ as check
from tools.gpu_check.__main__ import PARTS, Part
from tools.gpu_check.bench import Findings, ideal

pytestmark = EXTENDED

# Parts are run by an interpreter that does as it's told here before anything else.
FAULTS = """
import os, sys
part = sys.orig_argv[-3] if "_part" in sys.orig_argv else ""
if part == "decoder":
    from ee_megatron.rollout.engine.decoder import Decoder
    readout = Decoder.readout
    Decoder.readout = lambda self, hidden: readout(self, hidden).roll(1, -1)
elif part == "export":
    os.kill(os.getpid(), 11)
elif part == "learner":
    from ee_megatron.objectives import weights
    weights.mean_weights = None
elif part == "resume":
    from ee_megatron.training import checkpoints
    read = checkpoints.read_training
    def forgetful(directory):
        state, counters = read(directory)
        state.tensors["exp_avg"] = {name: 0 * tensor for name, tensor in state.tensors["exp_avg"].items()}
        return state, counters
    checkpoints.read_training = forgetful
"""


def run(out: Path, *arguments: str, path: Path | None = None) -> tuple[int, str, dict]:
    """Exit code, output and result.json."""
    python_path = f"{path}{os.pathsep}{ROOT}" if path else str(ROOT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    command = [sys.executable, "-m", "tools.gpu_check", "--device", "cpu", "--out", out, "--scratch", out.parent]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    file = out / "result.json"
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text()) if file.is_file() else {}


def part_of(result: dict, name: str) -> dict:
    return next(part for part in result["parts"] if part["name"] == name)


@SLOW
@pytest.mark.timeout(900)
def test_every_part_passes_on_a_cpu_measures_something_and_says_what_only_a_gpu_has(tmp_path) -> None:
    out = tmp_path / "out"
    code, output, result = run(out)
    assert code == 0 and result["passed"] and not result["failed"], output
    assert [(part["name"], part["status"]) for part in result["parts"]] == [(part.name, "passed") for part in PARTS]
    assert all(part["title"] in output for part in result["parts"])
    checks = [check for part in result["parts"] for check in part["checks"]]
    absent = {check["name"] for check in checks if check["status"] == "not applicable on cpu"}
    assert {"NCCL", "float32 with TF32", "memory against the plan"} <= absent
    # Nothing is left of models and children.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # bfloat16 rounds: an error of nothing would mean that both sides were computed in float32.
    rounded = [check["value"] for check in checks if check["name"].startswith("bfloat16")]
    assert len(rounded) >= 12 and min(rounded) > 1e-3
    figures = {f["name"]: f["value"] for part in result["parts"] for f in part["figures"]}
    assert figures["torch"] and figures["roofline's bandwidth"] > 0
    assert figures["killed while writing"].startswith(".step_")
    assert 0 < figures["mean depth"] < 1
    shares = [check["value"] for check in checks if "share of the roofline" in check["name"]]
    assert len(shares) == 4 and min(shares) > 1e-4
    assert all(len(part_of(result, name)["tables"][-1]["rows"]) == 10 for name in ("decode", "step"))
    speeds = {row[0]: row[1:4] for row in part_of(result, "decode")["tables"][0]["rows"]}
    assert set(speeds) == {"full depth", "mean depth 0.7", "transformers"}
    assert all(0 < least <= median <= most for median, least, most in speeds.values())

    page = (out / "index.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for part in result["parts"]:
        for entry in (*part["checks"], *part["figures"]):
            assert entry["name"].replace("'", "&#39;") in page


@SLOW
@pytest.mark.timeout(900)
def test_faults_are_named_and_the_other_parts_go_on(tmp_path) -> None:
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULTS)
    names = ["decoder", "learner", "export", "resume", "nccl"]
    code, output, result = run(tmp_path / "out", "--only", *names, path=tmp_path / "faults")
    assert code == 1, output
    status = {part["name"]: part["status"] for part in result["parts"]}
    assert status == {
        "models": "passed", "reference": "passed", "decoder": "failed", "learner": "crashed", "export": "crashed",
        "resume": "failed", "nccl": "passed",
    }  # fmt: skip
    assert part_of(result, "export")["reasons"][0].endswith("SIGSEGV")
    assert "NoneType" in part_of(result, "learner")["reasons"][0]
    assert any(reason.startswith("float32: logits") for reason in part_of(result, "decoder")["reasons"])
    assert any(reason.startswith("resumed") for reason in part_of(result, "resume")["reasons"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(line.split(":")[0] in output and line[:40].replace("'", "&#39;") in page for line in result["failed"])


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        f"pid = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']).pid\n"
        f"pathlib.Path({str(tmp_path)!r}, 'grandchild').write_text(str(pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begun = time.monotonic()
    found = check.outcome(Part("nccl", "Collectives", "speed:collectives", 1), "cpu", tmp_path, 100.0, {})
    assert found["status"] == "out of time" and "4 s" in found["reasons"][0]
    assert time.monotonic() - begun < 60
    # Gone, or dead and not yet collected by whoever inherited it.
    deadline, grandchild = time.monotonic() + 10, int((tmp_path / "grandchild").read_text())
    while process_start(grandchild) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process_start(grandchild) is None


def test_parts_that_lack_what_they_need_or_time_are_named(tmp_path) -> None:
    part = next(part for part in PARTS if part.name == "decoder")
    broken = {"reference": {"status": "crashed"}}
    (reason,) = check.outcome(part, "cpu", tmp_path, 100.0, broken)["reasons"]
    assert "reference" in reason
    late = check.outcome(part, "cpu", tmp_path, 0.0, {"reference": {"status": "passed"}})
    assert late["status"] == "not run" and "reference" not in late["reasons"][0] and "time" in late["reasons"][0]


def test_without_a_gpu_one_line_says_what_is_missing(tmp_path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = check.obstacle("cuda", tmp_path)
    assert "DEVICE=cpu" in line and "\n" not in line and "torch" in line
    assert check.obstacle("cpu", tmp_path) == ""
    assert "--scratch" in check.obstacle("cpu", tmp_path / "absent")


def test_a_roofline_is_never_below_the_faster_kind_of_products() -> None:
    """A CPU without bfloat16 instructions emulates them; a GPU has its bfloat16 peak."""
    emulating, board = replace(find_device("H100"), tflops=0.01, fp32=0.08), find_device("H100")
    assert ideal(emulating).peak(2) == ideal(emulating).peak(4) == pytest.approx(0.08e12)
    assert ideal(board).peak(2) == board.peak(2) > ideal(board).peak(4)


def test_what_is_no_number_fails_and_is_null(tmp_path) -> None:
    findings = Findings(tmp_path / "f.json", "cuda")
    findings.check("error", float("nan"), at_most=1.0)
    findings.check("share", 0.5, at_least=0.1, at_most=1.0)
    checks = json.loads((tmp_path / "f.json").read_text())["checks"]
    assert [(c["status"], c["value"]) for c in checks] == [("failed", None), ("passed", 0.5)]
