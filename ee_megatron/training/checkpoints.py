"""Checkpoints of a training run: policy, optimizer state and counters, independent of the parallel layout.

policy.safetensors, policy.json   optimizer/<kind>.safetensors   training.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint.policy_files import write_policy
from ..checkpoint.store import write_stream
from ..observe.rundir import RunDirectory, atomic_directory
from ..policy import PolicySpec, open_policy
from ..tensors import FileTensors, Stream, digest, drain

if TYPE_CHECKING:
    from ..learner.engine import OptimizerState
    from ..learner.learner import Learner
    from .ranks import Distributed

KEPT_CHECKPOINTS = 2
"""How many of a stage's newest checkpoints stay."""


@dataclass(frozen=True)
class TrainingStreams:
    """A training checkpoint's tensors, streamed to rank 0: all ranks consume the policy, then each kind of state."""

    updates: int
    policy: Stream
    state: Mapping[str, Stream]

    def drain(self) -> None:
        """Take part in streaming a checkpoint that rank 0 writes."""
        for stream in (self.policy, *self.state.values()):
            drain(stream)


def write_training(
    directory: Path,
    spec: PolicySpec,
    streams: TrainingStreams,
    counters: dict[str, float],
    base: Mapping[str, str] | None = None,
) -> None:
    """Write a training checkpoint into a directory that the caller makes appear. `base`: as in `save_policy`."""
    write_policy(directory, spec, streams.policy, base)
    folder = directory / "optimizer"
    folder.mkdir()
    digests = {kind: write_stream(folder / f"{kind}.safetensors", stream) for kind, stream in streams.state.items()}
    text = json.dumps({"updates": streams.updates, "counters": counters, "sha256": digests})
    (directory / "training.json").write_text(text)


def read_training(directory: Path, *, check: bool = True) -> tuple[OptimizerState, dict[str, float]]:
    """Read the files of `write_training` beside the policy; tensors stay on disk. Without `check` their digests are not
    compared. Raises FileNotFoundError if the directory holds a policy only, ValueError if a file differs from what was
    written."""
    training = json.loads((directory / "training.json").read_text())
    tensors = {kind: FileTensors(directory / "optimizer" / f"{kind}.safetensors") for kind in training["sha256"]}
    for kind, expected in training["sha256"].items() if check else ():
        if digest(tensors[kind]) != expected:
            raise ValueError(f"{directory}/optimizer/{kind}.safetensors: not what was written; the file is damaged")
    # Imported late: it imports Megatron.
    from ..learner.engine import OptimizerState

    return OptimizerState(int(training["updates"]), tensors), training["counters"]


def damage(directory: Path) -> str | None:
    """Why a run can't resume from a checkpoint with complete files, or None. Reads all of it."""
    try:
        open_policy(directory)
        read_training(directory)
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        return " ".join(str(error).split())
    return None


class Checkpointing:
    """A stage's checkpoints on all its ranks, written atomically by rank 0 into `directory` (None on the others).
    `state`: counters that are saved beside the tensors, the same on every rank. `base`: the identity of the model that
    the policy belongs to.

    Tensors are written as they arrive: under full fine-tuning a copy of all state would be many times the model.
    """

    def __init__(
        self,
        path: Path,
        spec: PolicySpec,
        ranks: Distributed,
        directory: RunDirectory | None,
        base: Mapping[str, str] | None = None,
    ):
        self.path, self.spec, self.ranks, self.directory, self.base = path, spec, ranks, directory, base
        self.state: dict[str, float] = {}
        self.saved = 0

    def latest(self) -> tuple[int, Path | None]:
        """(steps done, checkpoint) of this stage on rank 0's disk; (0, None) if there is none. A damaged checkpoint is
        skipped with a warning, and the one before it is used."""
        directory = self.directory
        latest = self.ranks.broadcast_from_rank0(
            lambda: str(directory.latest_checkpoint(damage) or "") if directory else ""
        )
        self.saved = int(Path(latest).name.split("_")[1]) if latest else 0
        return (self.saved, Path(latest)) if latest else (0, None)

    def read_policy(self, directory: Path, *, checked: bool = True) -> Mapping[str, Tensor]:
        """Tensors of a policy checkpoint; a rank reads only those that it uses. Rank 0 compares them with their digest,
        once for all ranks, unless `latest` did. Raises as `open_policy`."""
        if not checked:
            self.ranks.broadcast_from_rank0(lambda: open_policy(directory)[0])
        return open_policy(directory, check=False)[1]

    def restore(self, learner: Learner, checkpoint: Path) -> None:
        """Restore the learner's optimizer and `state` from a checkpoint, whatever layout wrote it."""
        # Rank 0 checked the digests when it chose this checkpoint.
        optimizer, state = read_training(checkpoint, check=False)
        learner.load_optimizer(optimizer)
        self.state.update(state)

    def save(self, learner: Learner, step: int) -> None:
        """Write a checkpoint after `step` steps. Earlier ones are deleted once it is on disk.

        Raises RuntimeError if the ranks' copies have diverged, OSError if the checkpoint could not be written."""
        learner.check_copies()
        self.saved = step
        meet = self.ranks.meet
        streams = TrainingStreams(learner.updates, learner.stream_policy(meet), learner.stream_optimizer(meet))
        if self.directory is None:
            streams.drain()
        else:
            self._write(self.directory, step, streams)
        if meet is not None:
            meet()

    def _write(self, directory: RunDirectory, step: int, streams: TrainingStreams) -> None:
        try:
            with directory.write_checkpoint(step) as temporary:
                write_training(temporary, self.spec, streams, self.state, self.base)
            directory.keep_last(KEPT_CHECKPOINTS)
        except OSError as error:
            folder = directory.path / "checkpoints"
            raise OSError(f"no checkpoint could be written to {folder}: {error}; earlier ones are untouched") from error

    @contextmanager
    def on_disk(self, policy: Stream) -> Iterator[Mapping[str, Tensor]]:
        """Store a policy in a file of the stage while the block runs, readable by every rank; all ranks call it."""
        folder = self.path / "policy"
        if self.ranks.leads:
            with atomic_directory(folder) as temporary:
                write_policy(temporary, self.spec, policy)
        else:
            drain(policy)
        self.ranks.broadcast_from_rank0(None)
        yield open_policy(folder, check=False)[1]
        if dist.is_initialized():
            dist.barrier()
        if self.ranks.leads:
            shutil.rmtree(folder)
