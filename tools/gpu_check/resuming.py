"""A learner that goes on from what it wrote, undisturbed and after SIGKILL, against one that was never stopped.

Deterministic algorithms are on. What may differ at most is what two undisturbed runs differ by:
nothing, and then it has to be the same to the bit, or four times that, as the largest of a few such differences.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ee_megatron.learner.learner import Learner
from ee_megatron.observe.rundir import COMPLETE, RunDirectory, latest_checkpoint
from ee_megatron.policy import load_policy
from ee_megatron.training.checkpoints import KEPT_CHECKPOINTS, TrainingStreams, damage, read_training, write_training
from tools.workloads import make_batch

from .bench import GROWTH, Bench, Findings

T = TypeVar("T")
STEPS = 6
SEQUENCES, PROMPT, ANSWER = 4, 16, 48
FINISHED = "FINISHED"


def begin(bench: Bench, policy: dict[str, Tensor]) -> Learner:
    """A learner in bfloat16, as a user's: ZeRO-1, and AdamW in its fused form on a GPU."""
    return bench.learner(bench.settings(True, tokens=96), torch.bfloat16, policy)


def advance(bench: Bench, learner: Learner, step: int) -> None:
    """Update `step`, from 0: its batch depends on nothing else."""
    outcomes = learner.spec.layout.outcomes
    shares = [1 / len(outcomes)] * len(outcomes)
    batch, weights = make_batch(learner.spec, learner.dims.vocab, SEQUENCES, PROMPT, ANSWER, shares, 2, seed=step)
    update = learner.step(batch, weights, adapter_lr=1e-3, gate_lr=1e-3)
    if not update.applied:
        raise RuntimeError(f"step {step}: gradient norms {update.norms} are not finite")


def deterministic(*, warn_only: bool) -> None:
    """As the setting of that name has it, but empty tensors stay as they are: DeepSpeed's buffers take gigabytes.
    `warn_only`: where an operation has no deterministic form, the other one is taken."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = False


def state_of(learner: Learner) -> dict[str, Tensor]:
    """Policy and moments, whole, fp32 on the CPU."""
    moments = learner.export_optimizer().tensors
    return {**learner.export_policy(), **{f"{kind} {n}": t for kind, part in moments.items() for n, t in part.items()}}


def streams_of(learner: Learner) -> TrainingStreams:
    return TrainingStreams(learner.updates, learner.stream_policy(), learner.stream_optimizer())


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖found - expected‖ / ‖expected‖ of the tensor that differs most; 0 only if all are the same to the bit."""
    assert found.keys() == expected.keys()
    return max(
        0.0 if torch.equal(found[n], t) else float((found[n].double() - t.double()).norm() / t.double().norm())
        for n, t in expected.items()
    )


def undisturbed(findings: Findings, bench: Bench, steps: int) -> tuple[dict[str, Tensor], float, str]:
    """The state after so many steps, the limit for what differs from it, and why; live memory is watched meanwhile."""
    states: list[dict[str, Tensor]] = []
    for _ in range(2):
        learner, live = begin(bench, bench.policy(True)), []
        for step in range(steps):
            advance(bench, learner, step)
            live.append(bench.live_bytes())
        states.append(state_of(learner))
        del learner
    # Moments are made by the first step.
    findings.check("live memory grows over steps by", max(live[1:]) - live[1], at_most=GROWTH, unit="bytes")
    noise = apart(states[1], states[0])
    findings.figure("two undisturbed runs differ by", noise)
    why = f"four times what two undisturbed runs differ by ({noise:.1e})" if noise else "two undisturbed runs are equal"
    return states[0], 4 * noise, why


def settle(findings: Findings, bench: Bench) -> bool:
    """Join, with deterministic algorithms as far as there are some; whether one was missing, which is named."""
    deterministic(warn_only=False)
    bench.join()
    try:
        advance(bench, begin(bench, bench.policy(True)), 0)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        findings.figure("no deterministic form of", str(error).split(". ")[0])
        deterministic(warn_only=True)
        return True
    return False


def resume(findings: Findings, bench: Bench) -> None:
    settle(findings, bench)
    expected, limit, why = undisturbed(findings, bench, 2 * STEPS // 3)
    learner, folder = begin(bench, bench.policy(True)), bench.scratch / "resume"
    for step in range(STEPS // 3):
        advance(bench, learner, step)
    folder.mkdir()
    policy, state = learner.export_policy(), learner.export_optimizer()
    write_training(folder, learner.spec, streams_of(learner), {})
    del learner
    again = begin(bench, load_policy(folder)[1])
    again.load_optimizer(read_training(folder)[0])
    findings.check("policy as it was written", apart(again.export_policy(), policy), at_most=0)
    for kind, tensors in again.export_optimizer().tensors.items():
        findings.check(f"{kind} as it was written", apart(tensors, state.tensors[kind]), at_most=0)
    for step in range(STEPS // 3, 2 * STEPS // 3):
        advance(bench, again, step)
    findings.check("resumed against undisturbed", apart(state_of(again), expected), at_most=limit, why=why)


def kill(findings: Findings, bench: Bench) -> None:
    warn_only, run = settle(findings, bench), bench.scratch / "killed"
    first = start(bench, run, warn_only)
    # While a later checkpoint than the first is written: there is a directory that has not yet its name.
    half = wait_for(first, lambda: next((name for name in unfinished(run) if not name.startswith(".step_1.")), ""))
    end(first)
    findings.figure("killed while writing", half)
    findings.figure("left behind half-written", len(unfinished(run)))
    before = max(complete(run), default=0)
    findings.check("newest whole checkpoint then", before, at_least=1, why="it has to go on from there")
    second = start(bench, run, warn_only)
    reached = wait_for(second, lambda: max([step for step in complete(run) if step > before], default=0))
    end(second)
    findings.figure("killed again after step", reached)
    usable = latest_checkpoint(run, damage)
    findings.check("newest whole checkpoint", float(usable.name.split("_")[1]) if usable else 0, at_least=reached)
    third = start(bench, run, warn_only)
    begun_at = time.perf_counter()
    code = third.wait()
    findings.figure("third start, seconds to the end", time.perf_counter() - begun_at, "s")
    findings.check("exit code of the run that went on", code, at_most=0, at_least=0)
    findings.check("runs that ended", float((run / FINISHED).is_file()), at_least=1)
    last = run / "checkpoints" / f"step_{STEPS}"
    found, (state, _) = load_policy(last)[1], read_training(last)
    for kind, tensors in state.tensors.items():
        found |= {f"{kind} {name}": tensor for name, tensor in tensors.items()}
    expected, limit, why = undisturbed(findings, bench, STEPS)
    findings.check("killed twice against undisturbed", apart(found, expected), at_most=limit, why=why)
    findings.check("half-written checkpoints in the end", len(unfinished(run)), at_most=0)


def start(bench: Bench, run: Path, warn_only: bool) -> subprocess.Popen[bytes]:
    arguments = [str(bench.scratch), bench.kind, str(run), str(warn_only)]
    return subprocess.Popen([sys.executable, "-m", "tools.gpu_check.resuming", *arguments])


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_for(process: subprocess.Popen[bytes], look: Callable[[], T]) -> T:
    """What `look` finds once it is not empty. Raises RuntimeError if the run ends before."""
    while not (found := look()):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended, exit code {process.returncode}, before it could be killed")
        time.sleep(0.0005)
    return found


def unfinished(run: Path) -> list[str]:
    """Names of the checkpoints that are being written, or were when their writer was killed."""
    return [path.name for path in run.glob("checkpoints/.step_*")]


def complete(run: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    return [int(path.parent.name.split("_")[1]) for path in run.glob(f"checkpoints/step_*/{COMPLETE}")]


def train(scratch: Path, kind: str, run: Path, warn_only: bool) -> None:
    """STEPS updates, each with a checkpoint, that may be killed at any moment and go on when they are started again."""
    bench = Bench(scratch, kind, small=kind == "cpu")
    deterministic(warn_only=warn_only)
    bench.join()
    with RunDirectory(run) as directory:
        found = directory.latest_checkpoint(damage)
        policy = load_policy(found)[1] if found else bench.policy(True)
        learner = begin(bench, policy)
        if found:
            learner.load_optimizer(read_training(found)[0])
        for step in range(learner.updates, STEPS):
            advance(bench, learner, step)
            with directory.write_checkpoint(step + 1) as folder:
                write_training(folder, learner.spec, streams_of(learner), {})
            directory.keep_last(KEPT_CHECKPOINTS)
        directory.write_atomic(FINISHED, "")


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "True")
