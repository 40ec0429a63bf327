"""The parts of the check, in order. Nothing here imports torch: the parent of the parts stays light and alive."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """`target`: "module:function", given `Findings` and `Bench`; `seconds`: its deadline; `needs`: parts that must have
    ended well; `on_cpu`: runs without a visible GPU, whatever the device."""

    name: str
    title: str
    target: str
    seconds: int
    needs: tuple[str, ...] = ()
    on_cpu: bool = False


MODELS = ("models",)
PARTS = (
    Part("machine", "The device", "machine:measure", 40),
    Part("models", "Random weights of real shapes", "shapes:write_models", 60),
    Part("reference", "float32 on the CPU", "parity:reference", 120, MODELS, on_cpu=True),
    Part("decoder", "Decoder against the reference", "parity:decoder", 60, ("reference",)),
    Part("learner", "Learner against the reference", "parity:learner", 100, ("reference",)),
    Part("export", "Hugging Face export against the reference", "parity:export", 80, ("reference",)),
    Part("resume", "Going on from a checkpoint", "resuming:resume", 90, MODELS),
    Part("kill", "Going on after SIGKILL", "resuming:kill", 150, MODELS),
    Part("nccl", "Collectives in a world of one", "machine:collectives", 30),
    Part("decode", "Decoding: speed, memory, kernels", "decoding:decode", 100, MODELS),
    Part("step", "A learner's step: speed, memory, kernels", "learning:step", 90, MODELS),
)  # fmt: skip
LIMIT_S = 600
"""Deadline of all parts together; those that it leaves no time for are named."""
