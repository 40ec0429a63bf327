"""Whether this project is right and fast on the GPU of this machine, in ten minutes, without a network.

    python -m tools.gpu_check --out runs/gpu-check
    python -m tools.gpu_check --device cpu --only decoder learner

Every part runs in a process of its own with a deadline: one that crashes, hangs or runs out of memory is named in the
result, and the others go on. Writes result.json and index.html into --out. Exit code 0: nothing failed; 1: something
did; 2: it could not start. On a CPU shapes are small, deadlines four times as long, and what only CUDA has is marked.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ee_megatron.config.device import require_compiler
from ee_megatron.observe.rundir import write_atomic
from ee_megatron.report.page import render, style
from ee_megatron.report.tables import number

ROOT = Path(__file__).parents[2]
# The whole model, the small one twice, its export, checkpoints; and what is left to spare.
DISK_GIB = {"cuda": 16.0, "cpu": 1.0}
PATIENCE = {"cuda": 1, "cpu": 4}
LIMIT_S = 600
"""Deadline of all parts together, times PATIENCE; parts that it leaves no time for are named."""
PART = "_part"


@dataclass(frozen=True)
class Part:
    """`target`: "module:function", called with `Findings` and `Bench`; its module imports torch, the parent never does.
    `seconds`: deadline; `needs`: parts that must have ended well; `on_cpu`: without a visible GPU on any device."""

    name: str
    title: str
    target: str
    seconds: int
    needs: tuple[str, ...] = ()
    on_cpu: bool = False


MODELS = ("models",)
PARTS = (
    Part("machine", "The device", "speed:measure", 40),
    Part("models", "Random weights of real shapes", "bench:write_models", 60),
    Part("reference", "float32 on the CPU", "parity:reference", 120, MODELS, on_cpu=True),
    Part("decoder", "Decoder against the reference", "parity:decoder", 60, ("reference",)),
    Part("learner", "Learner against the reference", "parity:learner", 100, ("reference",)),
    Part("attention", "Long packed sequences: FlexAttention against blocks", "parity:attention", 150),
    Part("fused", "Norm, rotation and SwiGLU in one kernel against several", "parity:fused", 60),
    Part("export", "Hugging Face export against the reference", "parity:export", 80, ("reference",)),
    Part("resume", "Going on from a checkpoint", "resuming:resume", 90, MODELS),
    Part("kill", "Going on after SIGKILL", "resuming:kill", 150, MODELS),
    Part("nccl", "Collectives in a world of one", "speed:collectives", 30),
    Part("decode", "Decoding: speed, memory, kernels", "speed:decode", 100, MODELS),
    Part("step", "A learner's step: speed, memory, kernels", "speed:step", 90, MODELS),
)  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == [PART]:
        return run_part(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these and what they need")
    parser.add_argument("--scratch", type=Path, help="where models are written; default: the system's temporary folder")
    options = parser.parse_args()
    begun, clock = datetime.now(UTC), time.monotonic()
    parent = options.scratch or Path(tempfile.gettempdir())
    error = obstacle(options.device, parent)
    if error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Told to end, it ends what it started first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = set(options.only or (part.name for part in PARTS))
    for part in reversed(PARTS):
        wanted |= set(part.needs) if part.name in wanted else set()
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=parent))
    results: dict[str, dict[str, Any]] = {}
    try:
        for part in (part for part in PARTS if part.name in wanted):
            left = LIMIT_S * PATIENCE[options.device] - (time.monotonic() - clock)
            results[part.name] = outcome(part, options.device, scratch, left, results)
            print(summary(results[part.name]), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    parts = list(results.values())
    result = {
        "device": options.device,
        "begun": begun.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - clock,
        "passed": all(part["status"] == "passed" for part in parts),
        "failed": [f"{part['name']}: {reason}" for part in parts for reason in part["reasons"]],
        "parts": parts,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_page(options.out / "index.html", result)
    for line in result["failed"]:
        print(f"FAILED {line}")
    print(f"{result['seconds']:.0f} s; {options.out / 'result.json'}, {options.out / 'index.html'}")
    return 0 if result["passed"] else 1


def obstacle(device: str, parent: Path) -> str:
    """Why the check cannot start, in one line; empty if it can."""
    free = shutil.disk_usage(parent).free / 2**30 if parent.is_dir() else 0.0
    if free < DISK_GIB[device]:
        return f"{parent}: {free:.1f} GiB free, the check needs {DISK_GIB[device]:g}; give another folder by --scratch"
    if device == "cpu":
        return ""
    smaller = "; DEVICE=cpu (--device cpu) runs a smaller check without one"
    # In a process of its own: this one must not hold the card.
    look = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    try:
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "torch did not start within 120 s: look at nvidia-smi"
    if done.returncode:
        return f"{sys.executable} cannot import torch: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    version, cuda, available = done.stdout.split()[-3:]
    if cuda == "None":
        return f"torch {version} of {sys.executable} is built without CUDA, install one with it{smaller}"
    if available != "True":
        where = "see nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
        return f"torch {version} (CUDA {cuda}) finds no GPU here, {where}{smaller}"
    try:
        require_compiler(sys.executable, "the check")
    except ValueError as reason:
        return str(reason)
    return ""


def outcome(part: Part, device: str, scratch: Path, left: float, before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A part's status, the reasons if it is not "passed", its seconds and what it found."""
    result: dict[str, Any] = {
        "name": part.name, "title": part.title, "reasons": [], "seconds": 0.0,
        "checks": [], "figures": [], "tables": [],
    }  # fmt: skip
    lacking = [name for name in part.needs if before[name]["status"] not in ("passed", "failed")]
    deadline = min(part.seconds * PATIENCE[device], left)
    if lacking:
        return result | {"status": "not run", "reasons": [f"it needs {', '.join(lacking)}"]}
    if deadline <= 0:
        return result | {"status": "not run", "reasons": ["the time of the whole check was over"]}
    begun = time.monotonic()
    code, log = run_child(part, device, scratch, deadline)
    result["seconds"] = time.monotonic() - begun
    with contextlib.suppress(FileNotFoundError):
        result |= json.loads((scratch / f"{part.name}.json").read_text())
    if code is None:
        return result | {"status": "out of time", "reasons": [f"not done within {deadline:.0f} s"]}
    if code:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else last_error(log)
        return result | {"status": "crashed", "reasons": [how], "log": log[-4000:]}
    failed = [f"{c['name']}: {limit_in_words(c)}" for c in result["checks"] if c["status"] == "failed"]
    return result | {"status": "failed" if failed else "passed", "reasons": failed}


def run_child(part: Part, device: str, scratch: Path, deadline: float) -> tuple[int | None, str]:
    """The part's exit code, None past its deadline, and what it printed. Nothing of it is left alive."""
    environment = {
        # A world of one needs no network, and there may be none to find.
        "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # What one part compiles the next one finds.
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "TRITON_CACHE_DIR": str(scratch / "triton"),
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf"), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if part.on_cpu or device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if part.on_cpu and device == "cuda":
        environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "tools.gpu_check", PART, part.name, str(scratch), device]
    file = scratch / f"{part.name}.log"
    with file.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(deadline)
        finally:
            # The whole session: a part that is over may have left a process of its own behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, file.read_text(errors="replace")


def run_part(name: str, scratch: Path, device: str) -> int:
    """A part, in its own process. Returns 0 if it ran to its end, whether its checks passed or not."""
    from ee_megatron.parallel.cpu_shims import lean_imports

    part = next(part for part in PARTS if part.name == name)
    module, function = part.target.split(":")
    with lean_imports():
        from .bench import Bench, Findings

        run = getattr(importlib.import_module(f".{module}", __package__), function)
    # What has been imported is never garbage; memory is looked at with a collection each time.
    gc.freeze()
    run(Findings(scratch / f"{name}.json", device), Bench(scratch, "cpu" if part.on_cpu else device, device == "cpu"))
    return 0


def last_error(log: str) -> str:
    """The last line that is not indented: an exception's."""
    lines = [line for line in log.splitlines() if line.strip() and not line[0].isspace()]
    return lines[-1][:300] if lines else "it ended without a word"


def limit_in_words(check: dict[str, Any]) -> str:
    """ "0.2, expected at most 0.1" """
    value = "no number" if check["value"] is None else f"{check['value']:.3g}"
    limits = [f"{word} {check[key]:.3g}" for key, word in (("at_least", "at least"), ("at_most", "at most"))
              if check[key] is not None]  # fmt: skip
    return f"{value}, expected {' and '.join(limits)}"


def summary(part: dict[str, Any]) -> str:
    """A part's status, seconds, checks that passed, and the first reason if it did not pass, in one line."""
    judged = [check["status"] for check in part["checks"] if check["status"] in ("passed", "failed")]
    reason = f"  {part['reasons'][0]}" if part["reasons"] else ""
    counts = f"{judged.count('passed'):>2}/{len(judged):<2}"
    return f"{part['status']:<12} {part['seconds']:>5.0f} s  {counts} {part['title']}{reason}"


def cell(value: Any) -> str:
    """Text as it is, numbers with three digits, a dash for what is not there."""
    if value is None:
        return "–"
    return number(value) if isinstance(value, int | float) else str(value)


def write_page(path: Path, result: dict[str, Any]) -> None:
    """The whole result, what failed first."""
    machine: list[dict[str, Any]] = next((part["figures"] for part in result["parts"] if part["name"] == "machine"), [])
    facts = [f"{f['name']} {f['value']}" for f in machine if isinstance(f["value"], str)]
    template = Path(__file__).with_name("page.html.j2")
    write_atomic(path, render(template, style=style(), result=result, facts=facts, cell=cell))


if __name__ == "__main__":
    sys.exit(main())
