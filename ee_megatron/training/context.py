"""The context of a running stage on one rank: settings, model, learner, pool, files.

Rank 0 generates, writes files and shows progress; the others receive its results.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoint.hf_export import export_hf
from ..checkpoint.policy_files import base_identity
from ..config.cluster import verifier_workers
from ..config.derive import policy_spec
from ..config.device import pick_device, pick_dtype
from ..config.identity import RECORD, identity, recorded, stage_dir, task_content, to_yaml
from ..config.schema import RunConfig
from ..exit_rules import Off
from ..families.hf_directory import HFDirectory
from ..learner.batch import ReplayBatch
from ..objectives.weights import Weights
from ..observe.metrics import MetricsLog, Tracking, read_metrics
from ..observe.progress import Progress
from ..observe.rundir import RunDirectory, write_atomic
from ..parallel.heartbeat import Heartbeat
from ..policy import PolicySpec, initial_policy
from ..rollout.engine.request import GenerationRequest
from ..rollout.engine.sampling import SamplingParams
from ..rollout.pool import make_pool
from ..rollout.pool.interface import TEACHER, RolloutPool
from ..tasks import Task, VerifierPool, task_of
from ..tensors import FileTensors, LayeredTensors
from ..types import Prompt, Rollout
from .answer_cache import ANSWERS, AnswerCache
from .checkpoints import Checkpointing
from .ranks import Distributed, Stopped, keeping_signals, listener, part

if TYPE_CHECKING:
    from ..learner.learner import Learner, Update

T = TypeVar("T")
logger = logging.getLogger(__name__)
# Waves of full rows in each stored part of the answers: enough that waiting for its last answers costs little.
PART_WAVES = 16
BAD_STEPS = 5
"""Updates in a row without a finite gradient after which a stage stops."""


class StageContext:
    """A running stage: settings, model, ranks, checkpoints, files. Enter it once; leaving closes pool, files and
    process groups, also after an error.

    `model_path`: the Hugging Face directory of the model that this stage builds on. `full`: every weight is trained,
    whatever the configuration says of adapters.
    """

    def __init__(self, cfg: RunConfig, stage: str, model_path: Path, *, learner: bool, full: bool = False):
        self.cfg, self.stage, self.model_path, self.learns = cfg, stage, Path(model_path), learner
        self.ranks = Distributed()
        self.path = stage_dir(cfg, stage)
        self.device_type = pick_device(cfg, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.dtype = pick_dtype(cfg, self.device_type)
        self.source = HFDirectory(self.model_path)
        self.spec: PolicySpec = policy_spec(cfg, self.source.dims)
        if full:
            self.spec = replace(self.spec, full=True, rank=0)
        self.stack = ExitStack()
        self.directory: RunDirectory | None = None
        self.metrics: MetricsLog | None = None
        self.bad_steps = 0

    def __enter__(self) -> StageContext:
        base = None
        if self.leads:
            self.directory = self.stack.enter_context(RunDirectory(self.path))
            self.directory.write_atomic("config.yaml", to_yaml(self.cfg))
            content = task_content(self.cfg)
            if content and not recorded(self.path):
                self.directory.write_atomic(RECORD, json.dumps({"sha256": content}) + "\n")
            base = base_identity(self.source).to_json() if self.learns else None
        self.checkpoints = Checkpointing(self.path, self.spec, self.ranks, self.directory, base)
        if self.learns:
            # Imported late: stages that only use the pool don't need Megatron, which takes seconds to import.
            from ..parallel import groups

            p = self.cfg.parallel
            degrees = groups.Degrees(p.tensor, p.pipeline, p.data)
            self.device = groups.initialise(degrees, device=self.device_type, timeout_s=p.timeout_s)
            self.stack.callback(groups.finish)
            if degrees.world > 1:
                self.ranks.heartbeat = Heartbeat(p.timeout_s)
                self.stack.callback(self.ranks.heartbeat.close)
        return self

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone calls the rollout pool, writes files and shows progress."""
        return self.ranks.leads

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None and self.ranks.heartbeat is not None:
            part(dist.distributed_c10d._get_default_store(), self.ranks.rank, dist.get_world_size())
        self.stack.close()

    # -- parts --------------------------------------------------------------------------------------------------------

    def make_learner(
        self, policy: Mapping[str, torch.Tensor], checkpoint: Path | None = None, **options: Any
    ) -> Learner:
        """Make this rank's part of a learner, its optimizer restored from `checkpoint`, whatever layout wrote that;
        `options` as in `Learner`."""
        from ..learner.learner import Learner

        learner = Learner(
            self.source,
            self.spec,
            policy,
            self.cfg.parallel,
            self.cfg.deepspeed,
            device=self.device,
            dtype=self.dtype,
            **options,
        )
        if checkpoint:
            self.checkpoints.restore(learner, checkpoint)
        return learner

    def make_pool(self, spec: PolicySpec | None) -> RolloutPool:
        """Make the rollout pool for this stage's model; on rank 0 only."""
        # Ray takes TERM for itself when a driver starts, to print the C++ stack and abort.
        with keeping_signals():
            pool = make_pool(self.cfg.rollout, self.model_path, spec, self.dtype, self.device_type)
        self.stack.callback(pool.close)
        return pool

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(str(self.model_path), local_files_only=True)

    def decode(self, token: int) -> str:
        """Text of one token."""
        return str(self.tokenizer.decode([token]))

    def make_task(self) -> Task:
        return task_of(self.cfg, self.model_path)

    def make_verifier(self, task: Task) -> VerifierPool:
        workers = verifier_workers(self.cfg, self.stage, self.device_type, os.environ, len(os.sched_getaffinity(0)))
        return self.stack.enter_context(VerifierPool(task, workers))

    def open_metrics(self, resume_step: int | None) -> None:
        """Open rank 0's metrics.jsonl and trackers."""
        if self.leads:
            settings = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(self.cfg)))
            config = {"stage": self.stage, **settings}
            name = f"{self.cfg.name}-{self.path.name}"
            wanted = self.cfg.tracker
            tracking = Tracking(wanted.wandb, name, self.cfg.name, self.stage, config, wanted.kind)
            self.metrics = self.stack.enter_context(MetricsLog(self.path, tracking, resume_step))

    def progress(self, total: int, done: int = 0, what: str = "") -> Progress:
        """Context manager of rank 0's progress bar; one at a time."""
        return Progress(f"{self.stage} {what}".strip(), total, enabled=self.leads, done=done)

    def log(self, step: int, values: dict[str, float], timings: dict[str, float] | None = None) -> None:
        if self.metrics is not None:
            self.metrics.log(step, values, timings)

    def stop_if_requested(self, learner: Learner | None, step: int) -> None:
        """Stop before step `step` if any rank has received a signal; all ranks call it."""
        if self.ranks.stop_requested():
            self.stop(learner, step)

    def unless_stopped(self, learner: Learner | None, step: int, make: Callable[..., T] | None, *arguments: Any) -> T:
        """`broadcast_from_rank0` for work that may be abandoned half-way: `stop` if rank 0 receives a signal."""

        def attempt() -> tuple[bool, T | None]:
            assert make is not None
            try:
                with listener.at_once():
                    return True, make(*arguments)
            except Stopped:
                return False, None

        finished, result = self.ranks.broadcast_from_rank0(attempt if make else None)
        if not finished:
            self.stop(learner, step)
        return cast(T, result)

    def stop(self, learner: Learner | None, step: int) -> NoReturn:
        """End the stage on every rank after `step` steps, with a checkpoint (`learner` None: without one).

        Raises Stopped."""
        if learner is not None and step > self.checkpoints.saved:
            self.checkpoints.save(learner, step)
        world = dist.get_world_size() if dist.is_initialized() else 1
        store = dist.distributed_c10d._get_default_store() if world > 1 else None
        raise Stopped(f"stopped on request after {step} step(s); rerun to resume", self.ranks.rank, world, store)

    def sample(
        self, pool: RolloutPool, prompts: list[Prompt], samples: int, temperature: float, seed: int, what: str
    ) -> list[list[Rollout]]:
        """Generate the teacher's answers at full depth, `samples` per prompt; on rank 0 only, with a pool that has
        loaded the teacher. Complete parts stay on disk until the stage is finished."""
        r = self.cfg.rollout
        sampling = SamplingParams(temperature, r.max_new_tokens, tuple(r.stop))
        cache, part = self.answer_cache(self.path / ANSWERS), max(1, PART_WAVES * r.max_num_seqs * r.actors // samples)
        rollouts: list[Rollout] = []
        with self.progress(len(prompts) * samples, what=what) as bar:
            for first in range(0, len(prompts), part):
                request = GenerationRequest(prompts[first : first + part], samples, sampling, Off(), seed)

                def advance(done: int, total: int, before: int = len(rollouts)) -> None:
                    bar.advance(before + done - bar.done)

                (made,) = cache.answers(pool, TEACHER[1], request, advance)
                rollouts += made.rollouts
                if bar.done < len(rollouts):
                    bar.advance(len(rollouts) - bar.done)
        return [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]

    def answer_cache(self, directory: Path) -> AnswerCache:
        """The answer cache; its key holds everything of this stage that affects answers beside weights and request."""
        base = base_identity(self.source)
        made_by = {
            "base": [base.bfloat16, base.float16],
            "spec": self.spec.to_json(),
            "dtype": str(self.dtype),
            "device": self.device_type,
            "rollout": identity(self.cfg, self.stage)["rollout"],
        }
        return AnswerCache(directory, made_by)

    def fit(
        self, learner: Learner, batch: ReplayBatch, weights: Weights, rate: float, step: int, bar: Progress
    ) -> None:
        """Make update `step` (from 0) of maximum likelihood at rate `rate`, checked for finiteness and logged."""
        update = learner.step(batch, weights, adapter_lr=rate, gate_lr=0.0)
        self.check_finite(update, batch, weights, step + 1)
        assert weights.token is not None
        loss = -float((update.scores.token_logprobs * weights.token).sum())
        self.log(step + 1, {"loss": loss, "grad_norm": update.norms["all"], "learning_rate": rate})
        bar.advance(1, loss=loss)

    def start(self, seed: int) -> Mapping[str, torch.Tensor]:
        """The policy that the stage starts from; in full fine-tuning a rank reads tensors of the base on access."""
        if not self.spec.full:
            return initial_policy(self.source.dims, self.spec, seed)
        added = initial_policy(self.source.dims, replace(self.spec, full=False), seed)
        return LayeredTensors(added, FileTensors(self.source.files, torch.float32))

    def write_model(self, learner: Learner) -> None:
        """Write the trained model as a Hugging Face directory, model/: adapters merged, no gates; all ranks call it."""
        out = self.path / "model"
        with self.checkpoints.on_disk(learner.stream_policy(self.ranks.meet)) as tensors:
            if self.leads:
                # There is one already if a run was killed between writing it and saying so.
                shutil.rmtree(out, ignore_errors=True)
                export_hf(self.source, (self.spec, tensors), out, adapters="merge", gates="drop")
            self.ranks.broadcast_from_rank0(None)

    def check_finite(self, update: Update, batch: ReplayBatch, weights: Weights, step: int) -> None:
        """Count updates whose gradient was not finite; too many in a row end the run, their batch left on disk.

        Raises RuntimeError.
        """
        self.bad_steps = 0 if update.applied else self.bad_steps + 1
        if update.applied:
            return
        logger.warning("step %d: gradient norms %s are not finite; the update is left out", step, update.norms)
        if self.bad_steps < BAD_STEPS:
            return
        where = self.path / f"bad_batch_step_{step}.pt"
        if self.leads:
            torch.save({"batch": vars(batch), "weights": vars(weights)}, buffer := io.BytesIO())
            write_atomic(where, buffer.getvalue())
        raise RuntimeError(
            f"{self.bad_steps} updates in a row had a gradient that is not finite; the last batch is in {where}. "
            "Lower the learning rates, or look at the batch"
        )

    def finish(self, text: str = "") -> None:
        """Mark the stage as finished. Raises RuntimeError if it has diverged."""
        if self.directory:
            self._check_last_step()
            self.directory.finish(self.stage, text + "\n")
            shutil.rmtree(self.path / ANSWERS, ignore_errors=True)

    def _check_last_step(self) -> None:
        # From the file: a stage that was resumed after its last step has no metrics in memory.
        file = self.path / "metrics.jsonl"
        rows = read_metrics(file) if file.is_file() else []
        wrong = [name for name in ("reward", "loss") if rows and math.isnan(rows[-1].get(name, 0.0))]
        if wrong or self.bad_steps:
            what = f"{wrong[0]} is not finite" if wrong else "the gradient is not finite"
            raise RuntimeError(
                f"{self.stage} has diverged: {what} at step {rows[-1]['step'] if rows else 0}, its last, so that it is "
                f"not finished; lower the learning rates, and remove {self.path} or give other settings"
            )
