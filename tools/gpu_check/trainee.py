"""A run that may be killed at any moment and goes on when it is started again.

python -m tools.gpu_check.trainee SCRATCH DEVICE RUN STEPS WARN_ONLY
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from ee_megatron.learner.learner import Learner
from ee_megatron.observe.rundir import RunDirectory
from ee_megatron.policy import load_policy
from ee_megatron.training.checkpoints import CheckpointWriter, damage, read_training
from tools.workloads import make_batch

from .shapes import Bench

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


def main() -> None:
    scratch, kind, run, steps = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    bench = Bench(scratch, kind, small=kind == "cpu")
    deterministic(warn_only=sys.argv[5] == "True")
    bench.join()
    with RunDirectory(run) as directory:
        found = directory.latest_checkpoint(damage)
        policy = load_policy(found)[1] if found else bench.policy(True)
        learner = begin(bench, policy)
        if found:
            learner.load_optimizer(read_training(found)[0])
        writer = CheckpointWriter(directory, learner.spec, keep=2)
        for step in range(learner.updates, steps):
            advance(bench, learner, step)
            writer.write(step + 1, learner.export_policy(), learner.export_optimizer(), None)
        writer.close()
        directory.write_atomic(FINISHED, "")


if __name__ == "__main__":
    main()
