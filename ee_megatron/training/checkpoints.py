"""What a learning run needs to go on: policy, optimizer state and counters, free of the layout that wrote them.

policy.safetensors, policy.json   optimizer/<kind>.safetensors   training.json
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
from ..tensors import FileTensors, HeldStream, Stream, digest, drain
from .distributed import Distributed

if TYPE_CHECKING:
    from ..learner.engine import OptimizerState
    from ..learner.learner import Learner

KEPT_CHECKPOINTS = 2
"""Newest ones of a stage; RL also keeps the one with the best reward."""

# The counters that the writer maintains itself.
BEST = ("best_value", "best_step")


@dataclass(frozen=True)
class TrainingStreams:
    """The tensors of a checkpoint on their way to the leader: all ranks use up the policy, then each kind of state."""

    updates: int
    policy: Stream
    state: Mapping[str, Stream]

    @staticmethod
    def of(policy: Mapping[str, Tensor], state: OptimizerState) -> TrainingStreams:
        """From tensors in memory."""
        return TrainingStreams(state.updates, HeldStream(policy), {k: HeldStream(t) for k, t in state.tensors.items()})

    def drain(self) -> None:
        """A rank's part in a checkpoint that the leader writes."""
        for stream in (self.policy, *self.state.values()):
            drain(stream)


def write_training(
    directory: Path,
    spec: PolicySpec,
    streams: TrainingStreams,
    counters: dict[str, float],
    base: Mapping[str, str] | None = None,
) -> None:
    """Write into an existing directory (the caller makes it appear whole). `base`: as `policy.save_policy` has it."""
    write_policy(directory, spec, streams.policy, base)
    folder = directory / "optimizer"
    folder.mkdir()
    digests = {kind: write_stream(folder / f"{kind}.safetensors", stream) for kind, stream in streams.state.items()}
    text = json.dumps({"updates": streams.updates, "counters": counters, "sha256": digests})
    (directory / "training.json").write_text(text)


def read_training(directory: Path, *, check: bool = True) -> tuple[OptimizerState, dict[str, float]]:
    """What `write_training` wrote beside the policy; tensors stay in their files. Without `check` nobody looks at their
    digests. Raises FileNotFoundError if the directory holds a policy only, ValueError if its contents are not what was
    written."""
    file = directory / "training.json"
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: no training.json; it holds a policy to start from, not a run to resume")
    found = json.loads(file.read_text())
    tensors = {kind: FileTensors(directory / "optimizer" / f"{kind}.safetensors") for kind in found["sha256"]}
    for kind, expected in found["sha256"].items() if check else ():
        if digest(tensors[kind]) != expected:
            raise ValueError(f"{directory}/optimizer/{kind}.safetensors: not what was written; the file is damaged")
    # Late: it brings Megatron along.
    from ..learner.engine import OptimizerState

    return OptimizerState(int(found["updates"]), tensors), found["counters"]


def damage(directory: Path) -> str | None:
    """Why a run can't be resumed from a checkpoint whose files are all there, or None. Reads all of it."""
    try:
        open_policy(directory)
        read_training(directory)
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        return " ".join(str(error).split())
    return None


class CheckpointWriter:
    """The leader's checkpoints, one at a time, whole or not at all: in a thread if their tensors are in memory, else as
    these come.

    `base`, the identity of the model that the policy belongs to, and `counters` go into every checkpoint; with a value
    to judge by, the best one outlives the `keep` newest. A write that failed is raised by the next `write`, by `wait`
    or by `close`; the checkpoints before it are still there.
    """

    def __init__(self, directory: RunDirectory, spec: PolicySpec, keep: int, base: Mapping[str, str] | None = None):
        self.directory, self.spec, self.keep, self.base = directory, spec, keep, base
        self.counters: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def write(self, step: int, policy: Mapping[str, Tensor], state: OptimizerState, value: float | None) -> None:
        """Hand over a checkpoint; nobody may change its tensors any more."""
        counters = self._judge(step, value)
        self._writing = self._thread.submit(self._write, step, TrainingStreams.of(policy, state), counters)

    def write_as_it_comes(self, step: int, streams: TrainingStreams, value: float | None) -> None:
        """Returns when it is on disk."""
        counters = self._judge(step, value)
        try:
            self._write(step, streams, counters)
        except OSError as error:
            raise self._failure(error) from error

    def _judge(self, step: int, value: float | None) -> dict[str, float]:
        self.wait()
        if value is not None and value > self.counters.get(BEST[0], -math.inf):
            self.counters |= dict(zip(BEST, (value, step), strict=True))
        return dict(self.counters)

    def _write(self, step: int, streams: TrainingStreams, counters: dict[str, float]) -> None:
        with self.directory.write_checkpoint(step) as temporary:
            write_training(temporary, self.spec, streams, counters, self.base)
        best = counters.get(BEST[1])
        self.directory.keep_last(self.keep, None if best is None else int(best))

    def _failure(self, error: BaseException) -> OSError:
        folder = self.directory.path / "checkpoints"
        return OSError(f"no checkpoint could be written to {folder}: {error}; earlier ones are untouched")

    def wait(self) -> None:
        """Return when what was handed over is on disk. Raises OSError or what else kept it from getting there."""
        error = self._writing.exception() if self._writing else None
        self._writing = None
        if error is not None:
            raise self._failure(error) from error

    def close(self) -> None:
        self._thread.shutdown()
        self.wait()


class Checkpointing:
    """A stage's checkpoints on all its ranks. `state`: counters that are saved beside the tensors, the same on every
    rank. On rank 0 `writer` writes them into `directory`; both are None on the others.

    Checkpoints are written in a thread of rank 0 if their tensors are collected in memory (adapters); under full
    fine-tuning they are written as they arrive, because a copy of all of it would be many times the model.
    """

    def __init__(
        self,
        path: Path,
        spec: PolicySpec,
        ranks: Distributed,
        directory: RunDirectory | None,
        base: Mapping[str, str] | None = None,
    ):
        self.path, self.spec, self.ranks, self.directory = path, spec, ranks, directory
        self.writer = CheckpointWriter(directory, spec, KEPT_CHECKPOINTS, base) if directory else None
        self.state: dict[str, float] = {}
        self.saved = 0

    def latest(self) -> tuple[int, Path | None]:
        """(steps done, checkpoint) of this stage as rank 0 finds it; (0, None) at the start. A damaged checkpoint is
        skipped, with a warning, for the one before it."""
        directory = self.directory
        found = self.ranks.broadcast_from_rank0(
            lambda: str(directory.latest_checkpoint(damage) or "") if directory else ""
        )
        self.saved = int(Path(found).name.split("_")[1]) if found else 0
        return (self.saved, Path(found)) if found else (0, None)

    def read_policy(self, directory: Path, *, checked: bool) -> tuple[PolicySpec, Mapping[str, Tensor]]:
        """A policy checkpoint, of which a rank reads what it uses. Rank 0 compares it with its digest, once for all
        ranks, unless `latest` did. Raises as `open_policy`."""
        if not checked:
            self.ranks.broadcast_from_rank0(lambda: open_policy(directory)[0])
        return open_policy(directory, check=False)

    def restore(self, learner: Learner, checkpoint: Path) -> None:
        """The learner's optimizer and `state` as they were at a checkpoint, whatever layout wrote it."""
        # Rank 0 checked the digests when it chose this checkpoint.
        optimizer, state = read_training(checkpoint, check=False)
        learner.load_optimizer(optimizer)
        self.state.update(state)
        if self.writer is not None:
            self.writer.counters = state

    def save(self, learner: Learner, step: int, value: float | None = None) -> None:
        """Checkpoint after `step` steps. `value`: what the best checkpoint is judged by, the larger the better.

        Raises RuntimeError if the ranks' copies have diverged: that is not worth keeping."""
        learner.check_copies()
        self.saved = step
        if self.writer is not None:
            self.writer.counters |= {name: self.state[name] for name in self.state if name not in BEST}
        if self.spec.full:
            state = learner.stream_optimizer(self.ranks.meet)
            streams = TrainingStreams(learner.updates, learner.stream_policy(self.ranks.meet), state)
            if self.writer is not None:
                self.writer.write_as_it_comes(step, streams, value)
            else:
                streams.drain()
        else:
            policy, moments = learner.export_policy(), learner.export_optimizer()
            if self.writer is not None:
                self.writer.write(step, policy, moments, value)
        if self.ranks.meet is not None:
            # Writing waits for the checkpoint before this one.
            self.ranks.meet()

    def wait(self) -> None:
        """Return when the last checkpoint is on disk. Raises OSError or whatever prevented it."""
        if self.writer is not None:
            self.writer.wait()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    @contextmanager
    def on_disk(self, policy: Stream) -> Iterator[Mapping[str, Tensor]]:
        """A policy in a file of the stage while the block runs, readable by every rank; all ranks call it."""
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
