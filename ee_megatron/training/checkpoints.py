"""What a learning run needs to go on: policy, optimizer state and counters, free of the layout that wrote them.

policy.safetensors, policy.json   optimizer/<kind>.safetensors   training.json
"""

from __future__ import annotations

import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..learner.optimizer_state import OptimizerState
from ..observe.rundir import RunDirectory
from ..policy import PolicySpec, digest, load_policy, save_policy


def write_training(
    directory: Path, spec: PolicySpec, policy: dict[str, Tensor], state: OptimizerState, counters: dict[str, float]
) -> None:
    """Write into an existing directory (the caller makes it appear whole)."""
    save_policy(directory, spec, policy)
    folder = directory / "optimizer"
    folder.mkdir()
    for kind, tensors in state.tensors.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{kind}.safetensors")
    digests = {kind: digest(tensors) for kind, tensors in state.tensors.items()}
    text = json.dumps({"updates": state.updates, "counters": counters, "sha256": digests})
    (directory / "training.json").write_text(text)


def read_training(directory: Path) -> tuple[OptimizerState, dict[str, float]]:
    """What `write_training` wrote beside the policy. Raises FileNotFoundError if the directory holds a policy only,
    ValueError if its contents are not what was written."""
    file = directory / "training.json"
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: no training.json; it holds a policy to start from, not a run to resume")
    found = json.loads(file.read_text())
    tensors = {path.stem: load_file(path) for path in sorted((directory / "optimizer").glob("*.safetensors"))}
    for kind, expected in found["sha256"].items():
        if kind not in tensors or digest(tensors[kind]) != expected:
            raise ValueError(f"{directory}/optimizer/{kind}.safetensors: not what was written; the file is damaged")
    return OptimizerState(int(found["updates"]), tensors), found["counters"]


def damage(directory: Path) -> str | None:
    """Why a run can't be resumed from a checkpoint whose files are all there, or None. Reads all of it."""
    try:
        load_policy(directory)
        read_training(directory)
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        return " ".join(str(error).split())
    return None


class CheckpointWriter:
    """The leader's checkpoints: written in a thread, one at a time, whole or not at all.

    `counters` go into every checkpoint; with a value to judge by, the best one outlives the `keep` newest. A write that
    failed is raised by the next `write`, by `wait` or by `close`; the checkpoints before it are still there.
    """

    def __init__(self, directory: RunDirectory, spec: PolicySpec, keep: int):
        self.directory, self.spec, self.keep = directory, spec, keep
        self.counters: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def write(self, step: int, policy: dict[str, Tensor], state: OptimizerState, value: float | None) -> None:
        self.wait()
        if value is not None and value > self.counters.get("best_value", -math.inf):
            self.counters |= {"best_value": value, "best_step": step}
        self._writing = self._thread.submit(self._write, step, policy, state, dict(self.counters))

    def _write(self, step: int, policy: dict[str, Tensor], state: OptimizerState, counters: dict[str, float]) -> None:
        with self.directory.write_checkpoint(step) as temporary:
            write_training(temporary, self.spec, policy, state, counters)
        best = counters.get("best_step")
        self.directory.keep_last(self.keep, None if best is None else int(best))

    def wait(self) -> None:
        """Return when what was handed over is on disk. Raises OSError or what else kept it from getting there."""
        error = self._writing.exception() if self._writing else None
        self._writing = None
        if error is not None:
            folder = self.directory.path / "checkpoints"
            raise OSError(f"no checkpoint could be written to {folder}: {error}; earlier ones are untouched") from error

    def close(self) -> None:
        self._thread.shutdown()
        self.wait()
