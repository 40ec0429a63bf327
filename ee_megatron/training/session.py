"""One stage of one run, on every rank: where things are, who writes, what is shared.

Rank 0 leads: it alone talks to the rollout pool, writes files and shows progress; the others receive what it found.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoint.hf_export import export_hf
from ..checkpoint.policy_files import base_identity, write_policy
from ..config.cluster import verifier_workers
from ..config.content import RECORD, digest, recorded
from ..config.derive import policy_spec
from ..config.device import pick_device, pick_dtype
from ..config.identity import identity, stage_dir, to_yaml
from ..config.schema import RunConfig
from ..exit_rules import Off
from ..families.hf_directory import HFDirectory
from ..learner.batch import ReplayBatch
from ..objectives.weights import Weights
from ..observe.metrics import Metrics, read_metrics
from ..observe.progress import Progress
from ..observe.rundir import RunDirectory, atomic_directory
from ..observe.trackers import Tracking
from ..parallel.heartbeat import Heartbeat
from ..policy import PolicySpec, change_share, initial_policy, open_policy, sharpened
from ..rollout.engine.request import GenerationRequest
from ..rollout.engine.sampling import SamplingParams
from ..rollout.pool import make_pool
from ..rollout.pool.interface import TEACHER, RolloutPool
from ..tasks import Task, VerifierPool, task_of
from ..tensors import FileTensors, InterpolatedTensors, LayeredTensors, Stream, drain
from ..types import Prompt, Rollout
from .checkpoints import BEST, CheckpointWriter, TrainingStreams, damage, read_training
from .kept import ANSWERS, KeptAnswers
from .stages import DONE
from .stopping import Parting, Stopped, keeping_signals, listener

if TYPE_CHECKING:
    from ..learner.learner import Learner, Update

logger = logging.getLogger(__name__)
# Waves of full rows in a part of the answers that is kept: enough that the wait for its last answers is little of it.
PART_WAVES = 16
T = TypeVar("T")


class Session:
    """A stage at work. Enter it once; leaving closes pool, files and process groups, whatever happened.

    `model_path`: the Hugging Face directory of the model that this stage builds on. `full`: every weight is trained,
    whatever the configuration says of adapters.
    """

    def __init__(self, cfg: RunConfig, stage: str, model_path: Path, *, learner: bool, full: bool = False):
        self.cfg, self.stage, self.model_path, self.learns = cfg, stage, Path(model_path), learner
        self.rank = int(os.environ.get("RANK", "0"))
        self.leads = self.rank == 0
        self.path = stage_dir(cfg, stage)
        self.device_type = pick_device(cfg, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.dtype = pick_dtype(cfg, self.device_type)
        self.source = HFDirectory(self.model_path)
        self.spec: PolicySpec = policy_spec(cfg, self.source.dims)
        if full:
            self.spec = replace(self.spec, full=True, rank=0)
        self.stack = ExitStack()
        self.directory: RunDirectory | None = None
        self.metrics: Metrics | None = None
        self.writer: CheckpointWriter | None = None
        self.heartbeat: Heartbeat | None = None
        self.bad_steps = 0
        self.saved = 0
        # What a stage keeps in its checkpoints beside tensors, the same on every rank.
        self.counters: dict[str, float] = {}

    def __enter__(self) -> Session:
        if self.leads:
            self.directory = self.stack.enter_context(RunDirectory(self.path))
            self.directory.write_atomic("config.yaml", to_yaml(self.cfg))
            content = digest(self.cfg.task.path)
            if content and not recorded(self.path):
                self.directory.write_atomic(RECORD, json.dumps({"sha256": content}) + "\n")
            base = base_identity(self.source).to_json() if self.learns else None
            self.writer = CheckpointWriter(self.directory, self.spec, self.cfg.checkpoint.keep, base)
            self.stack.callback(self.writer.close)
        if self.learns:
            # Here, as the learner below: stages that only ask the pool do without Megatron, seconds of imports.
            from ..parallel import groups

            p = self.cfg.parallel
            degrees = groups.Degrees(p.tensor, p.pipeline, p.data, p.virtual)
            self.device = groups.initialise(degrees, device=self.device_type, timeout_s=p.timeout_s)
            self.stack.callback(groups.finish)
            if degrees.world > 1:
                self.heartbeat = Heartbeat(p.timeout_s)
                self.stack.callback(self.heartbeat.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    # -- parts --------------------------------------------------------------------------------------------------------

    def make_learner(
        self, policy: Mapping[str, torch.Tensor], checkpoint: Path | None = None, **options: Any
    ) -> Learner:
        """This rank's part of a learner, its optimizer where `checkpoint` left it, whatever layout wrote that;
        `options` as in `LearnerOptions`."""
        from ..learner.learner import Learner, LearnerOptions

        learner = Learner(
            self.source,
            self.spec,
            policy,
            self.cfg.parallel,
            self.cfg.deepspeed,
            device=self.device,
            dtype=self.dtype,
            options=LearnerOptions(**options),
        )
        if checkpoint:
            # The leader looked at the digests when it chose this checkpoint.
            state, counters = read_training(checkpoint, check=False)
            learner.load_optimizer(state)
            self.counters.update(counters)
            if self.writer is not None:
                self.writer.counters = counters
        return learner

    def make_pool(self, spec: PolicySpec | None) -> RolloutPool:
        """The rollout pool round this stage's model; the leader's only."""
        # Ray takes TERM for itself when a driver starts, to print the C++ stack and abort.
        with keeping_signals():
            pool = make_pool(self.cfg.rollout, self.model_path, spec, self.dtype, self.device_type)
        self.stack.callback(pool.close)
        return pool

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(str(self.model_path), local_files_only=True)

    def decode(self, token: int) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([token]))

    def make_task(self) -> Task:
        return task_of(self.cfg, self.model_path)

    def make_verifier(self, task: Task) -> VerifierPool:
        t = self.cfg.task
        workers = verifier_workers(self.cfg, self.stage, self.device_type, os.environ, len(os.sched_getaffinity(0)))
        return self.stack.enter_context(VerifierPool(task, workers, t.verifier_deadline_s, t.verifier_memory_mb))

    def open_metrics(self, resume_step: int | None) -> None:
        """The leader's metrics.jsonl and trackers."""
        if self.leads:
            t = self.cfg.tracker
            settings = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(self.cfg)))
            config = {"stage": self.stage, **settings}
            name = f"{self.cfg.name}-{self.path.name}"
            tracking = Tracking(t.wandb, t.project, name, self.cfg.name, self.stage, config, t.tensorboard)
            self.metrics = self.stack.enter_context(Metrics(self.path, tracking, resume_step))

    def progress(self, total: int, done: int = 0, what: str = "") -> Progress:
        """The leader's progress bar, to be entered; one at a time."""
        return Progress(f"{self.stage} {what}".strip(), total, enabled=self.leads, done=done)

    def log(self, step: int, values: dict[str, float], timings: dict[str, float] | None = None) -> None:
        if self.metrics is not None:
            self.metrics.log(step, values, timings)

    # -- together -----------------------------------------------------------------------------------------------------

    def from_leader(self, make: Callable[..., T] | None, *arguments: Any) -> T:
        """What rank 0 makes of the arguments, on every rank; the others' are not looked at. Plain records only. The
        others wait for as long as the leader lives: deadlines of what it does are `make`'s own."""
        box: list[Any] = [make(*arguments) if self.leads and make else None]
        if self.heartbeat is not None:
            self.heartbeat.meet()
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def unless_stopped(self, make: Callable[..., T] | None, *arguments: Any) -> T | None:
        """`from_leader` for work that may be given up: None on every rank if the leader is told to stop meanwhile."""

        def attempt() -> T | None:
            assert make is not None
            try:
                with listener.at_once():
                    return make(*arguments)
            except Stopped:
                return None

        return self.from_leader(attempt if make else None)

    def stop_if_asked(self, learner: Learner | None, step: int) -> None:
        """`stop` before step `step` if any rank has been told to; all ranks call it."""
        asked = torch.tensor([listener.asked])
        if self.heartbeat is not None:
            self.heartbeat.meet()
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item():
            self.stop(learner, step)

    def stop(self, learner: Learner | None, step: int) -> NoReturn:
        """End the stage on every rank after `step` steps, with a checkpoint of them (None: the stage keeps none).

        Raises Stopped."""
        if learner is not None and step > self.saved:
            self.save(learner, step)
        if self.writer is not None:
            self.writer.wait()
        world = dist.get_world_size() if dist.is_initialized() else 1
        store = dist.distributed_c10d._get_default_store() if world > 1 else None
        raise Stopped(
            f"stopped after {step} step(s), as told; the same command goes on", Parting(self.rank, world, store).leave
        )

    def sample(
        self, pool: RolloutPool, prompts: list[Prompt], samples: int, temperature: float, seed: int, what: str
    ) -> list[list[Rollout]]:
        """The teacher's answers at full depth, so many samples per prompt, by a pool that holds it; the leader's only.
        Parts that are complete are kept until the stage is finished."""
        r = self.cfg.rollout
        sampling = SamplingParams(temperature, r.max_new_tokens, tuple(r.stop))
        kept, part = self.kept_answers(self.path / ANSWERS), max(1, PART_WAVES * r.rows * r.actors // samples)
        found: list[Rollout] = []
        with self.progress(len(prompts) * samples, what=what) as bar:
            for first in range(0, len(prompts), part):
                request = GenerationRequest(prompts[first : first + part], samples, sampling, Off(), seed)

                def told(done: int, total: int, before: int = len(found)) -> None:
                    bar.advance(before + done - bar.done)

                found += kept.answer(pool, TEACHER[1], request, told).rollouts
                if bar.done < len(found):
                    bar.advance(len(found) - bar.done)
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    def kept_answers(self, directory: Path) -> KeptAnswers:
        """Sets of answers, told apart by what of this stage decides them beside weights and requests."""
        base = base_identity(self.source)
        made_by = {
            "base": [base.bfloat16, base.float16],
            "spec": self.spec.to_json(),
            "dtype": str(self.dtype),
            "device": self.device_type,
            "rollout": identity(self.cfg, self.stage)["rollout"],
        }
        return KeptAnswers(directory, made_by)

    def fit(
        self, learner: Learner, batch: ReplayBatch, weights: Weights, rate: float, step: int, bar: Progress
    ) -> None:
        """Update `step` (from 0) of maximum likelihood, at learning rate `rate`; it is guarded and logged."""
        update = learner.step(batch, weights, adapter_lr=rate, gate_lr=0.0)
        self.guard(update, batch, weights, step + 1)
        assert weights.token is not None
        loss = -float((update.scores.token_logprobs * weights.token).sum())
        self.log(step + 1, {"loss": loss, "grad_norm": update.norms["all"], "learning_rate": rate})
        bar.advance(1, loss=loss)

    def start(self, seed: int) -> Mapping[str, torch.Tensor]:
        """The policy that the stage starts from; of a base that is trained, what a rank holds is read when it is
        asked for."""
        if not self.spec.full:
            return initial_policy(self.source.dims, self.spec, seed)
        added = initial_policy(self.source.dims, replace(self.spec, full=False), seed)
        return LayeredTensors(added, FileTensors(self.source.files, torch.float32))

    def rl_start(self, calibrated: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What RL starts from, of a calibrated policy: rl.keep, gate_centre and gate_sharpness."""
        rl, c = self.cfg.rl, self.cfg.calibrate
        policy = calibrated
        if rl.keep is not None:
            lower, upper = rl.keep / c.keep, rl.keep / (c.keep * c.keep_upper)
            share = partial(change_share, num_layers=self.spec.num_layers, lower=lower, upper=upper)
            policy = InterpolatedTensors(self.start(c.seed), calibrated, share)
        return sharpened(policy, rl.gate_centre, rl.gate_sharpness)

    def read_policy(self, directory: Path, *, checked: bool) -> tuple[PolicySpec, Mapping[str, torch.Tensor]]:
        """A policy checkpoint, of which a rank reads what it asks for. The leader compares it with its digest, once for
        all ranks, unless `latest` did. Raises as `open_policy`."""
        if not checked:
            self.from_leader(lambda: open_policy(directory)[0])
        return open_policy(directory, check=False)

    @contextmanager
    def on_disk(self, policy: Stream) -> Iterator[Mapping[str, torch.Tensor]]:
        """A policy in a file of the stage for the length of the block, readable by every rank; all ranks call it."""
        folder = self.path / "policy"
        if self.leads:
            with atomic_directory(folder) as temporary:
                write_policy(temporary, self.spec, policy)
        else:
            drain(policy)
        self.from_leader(None)
        yield open_policy(folder, check=False)[1]
        if dist.is_initialized():
            dist.barrier()
        if self.leads:
            shutil.rmtree(folder)

    @property
    def meet(self) -> Callable[[], None] | None:
        """What ranks wait for the leader with; None where there is one rank."""
        return self.heartbeat.meet if self.heartbeat else None

    def write_model(self, learner: Learner) -> Path:
        """What was learned as a Hugging Face directory, adapters merged, without gates; all ranks call it."""
        out = self.path / "model"
        with self.on_disk(learner.stream_policy(self.meet)) as tensors:
            if self.leads:
                # There is one already if a run was killed between writing it and saying so.
                shutil.rmtree(out, ignore_errors=True)
                export_hf(self.source, (self.spec, tensors), out, adapters="merge", gates="drop")
            self.from_leader(None)
        return out

    def save(self, learner: Learner, step: int, value: float | None = None) -> None:
        """Checkpoint after `step` steps. Adapters are collected here and written in a thread of the leader's while
        training goes on; under full fine-tuning they are written as they come, since a copy of all of it would be many
        times the model. `value`: what the best checkpoint is judged by, the larger the better.

        Raises RuntimeError where the ranks have come apart: that is not worth keeping."""
        learner.check_copies()
        self.saved = step
        if self.writer is not None:
            self.writer.counters |= {name: self.counters[name] for name in self.counters if name not in BEST}
        if self.spec.full:
            state = learner.stream_optimizer(self.meet)
            streams = TrainingStreams(learner.updates, learner.stream_policy(self.meet), state)
            if self.writer is not None:
                self.writer.write_as_it_comes(step, streams, value)
            else:
                streams.drain()
        else:
            policy, moments = learner.export_policy(), learner.export_optimizer()
            if self.writer is not None:
                self.writer.write(step, policy, moments, value)
        if self.heartbeat is not None:
            # Writing waits for the checkpoint before this one.
            self.heartbeat.meet()

    def guard(self, update: Update, batch: ReplayBatch, weights: Weights, step: int) -> None:
        """Count updates whose gradient was not finite; too many in a row end the run, their batch left on disk.

        Raises RuntimeError.
        """
        self.bad_steps = 0 if update.applied else self.bad_steps + 1
        if update.applied:
            return
        logger.warning("step %d: gradient norms %s are not finite; the update is left out", step, update.norms)
        if self.bad_steps < self.cfg.checkpoint.bad_steps:
            return
        where = self.path / f"bad_batch_step_{step}.pt"
        if self.leads:
            with NamedTemporaryFile(dir=self.path, delete=False) as file:
                torch.save({"batch": vars(batch), "weights": vars(weights)}, file)
            os.replace(file.name, where)
        raise RuntimeError(
            f"{self.bad_steps} updates in a row had a gradient that is not finite; the last batch is in {where}. "
            "Lower the learning rates, or look at the batch"
        )

    def latest(self) -> tuple[int, Path | None]:
        """(steps done, checkpoint) of this stage as the leader finds it; (0, None) at the start. A damaged checkpoint
        is passed over, with a warning, for the one before it."""
        found = self.from_leader(lambda: str(self.directory.latest_checkpoint(damage) or "") if self.directory else "")
        self.saved = int(Path(found).name.split("_")[1]) if found else 0
        return (self.saved, Path(found)) if found else (0, None)

    def finish(self, text: str = "") -> None:
        """Mark the stage as finished, once its last checkpoint is on disk.

        Raises RuntimeError if it has diverged: what it left is no result."""
        if self.writer is not None:
            self.writer.wait()
        if self.directory:
            self._check_last_step()
            self.directory.write_atomic(DONE, text + "\n")
            shutil.rmtree(self.path / ANSWERS, ignore_errors=True)

    def _check_last_step(self) -> None:
        # From the file: a stage that goes on after its last step has seen no figures itself.
        file = self.path / "metrics.jsonl"
        rows = read_metrics(file) if file.is_file() else []
        wrong = [name for name in ("reward", "loss") if rows and math.isnan(rows[-1].get(name, 0.0))]
        if wrong or self.bad_steps:
            what = f"{wrong[0]} is not finite" if wrong else "the gradient is not finite"
            raise RuntimeError(
                f"{self.stage} has diverged: {what} at step {rows[-1]['step'] if rows else 0}, its last, so that it is "
                f"not finished; lower the learning rates, and remove {self.path} or give other settings"
            )
