"""Scoring and learning on a batch whose exits are prescribed. Every rank calls every method with the same arguments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..checkpoint.mapping import load_base
from ..checkpoint.policy_shards import check_copies, policy_pieces
from ..checkpoint.policy_stream import Holder, Plan, TensorStream, Values, load_tensors
from ..config.derive import stage_sizes
from ..config.schema import DeepspeedConfig, ParallelConfig
from ..families.hf_directory import HFDirectory
from ..model.config import megatron_config
from ..model.gpt import RankModel, build_model
from ..objectives.divergences import KL_DIRECTIONS, Teacher
from ..objectives.weights import TensorRows, Weights
from ..parallel.schedule import run_schedule
from ..parallel.vocabulary import Head
from ..policy import PolicySpec
from ..tensors import collect
from ..transfer import to_device
from .batch import ReplayBatch
from .engine import Updater, fill_missing_gradients, sum_replicated_gradients, sum_tied_gradients
from .optimizer_state import OptimizerState, holder_of, kinds, prepare
from .passes import MicroBatch, ReferenceStates, SchedulePass


@dataclass(frozen=True)
class Scores(TensorRows):
    """Per position, fp32 [B, S] on the CPU, 0 where nothing was computed, the same on every rank.

    token_logprobs: log p(next token) at the prescribed exits; exit_logprobs: log q(prescribed exit); exit_entropy: of
    the gates asked there, nats; token_entropy: of the next-token distribution, nats, in `score` only; kl: divergence
    from the teacher, 0 without one; hazards: of every gate that a position came by, 0 elsewhere, [B, S, M] where
    `score` was told to keep them, else [B, S, 0].
    """

    token_logprobs: Tensor
    exit_logprobs: Tensor
    kl: Tensor
    token_entropy: Tensor
    exit_entropy: Tensor
    hazards: Tensor


@dataclass
class Update:
    """What a step saw: its scores, the gradient norm per group ("body", "gates") and together ("all") before clipping,
    and whether it was applied: a step whose gradient is not finite is not."""

    scores: Scores
    norms: dict[str, float]
    applied: bool


@dataclass(frozen=True)
class LearnerOptions:
    """What a stage asks of its learner: dropout of the adapters' inputs, the direction of a divergence from the teacher
    (as calibrate.kl_direction), the temperature of the token distribution."""

    adapter_dropout: float = 0.0
    kl_direction: str = "student_teacher"
    temperature: float = 1.0


DEFAULTS = LearnerOptions()
NO_WEIGHTS = Weights()


class Learner:
    """A Megatron model under one layout with its DeepSpeed engine.

    `policy`: whole tensors (policy.py) to start from, of which a rank reads what it holds. The reference is the base in
    `source`: under adapters the same weights with adapters off, under full fine-tuning a second, frozen model, built
    when it is first asked for. Raises ValueError for stages that don't end at exits.
    """

    def __init__(
        self,
        source: HFDirectory,
        spec: PolicySpec,
        policy: Mapping[str, Tensor],
        parallel: ParallelConfig,
        deepspeed: DeepspeedConfig,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        options: LearnerOptions = DEFAULTS,
    ):
        self.spec, self.dims, self.parallel, self.device = spec, source.dims, parallel, device
        self.micro_batch_size = parallel.micro_batch_size
        self.direction, self.temperature = KL_DIRECTIONS[options.kl_direction], options.temperature
        self.config = megatron_config(
            source.dims,
            spec,
            stage_sizes(parallel, spec.layout),
            tensor=parallel.tensor,
            virtual=parallel.virtual,
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute,
            dtype=dtype,
            on_cpu=device.type == "cpu",
            adapter_dropout=options.adapter_dropout,
        )
        self._base_directory = source.path
        self.model = self._base_model(source)
        self._reference: RankModel | None = None
        self.pieces = policy_pieces(self.model)
        self.shapes = spec.tensor_shapes(source.dims)
        load_tensors(self.pieces, Values(), self.shapes, policy, "policy")
        for piece in self.pieces:
            piece.parameter.requires_grad_()
        self.head = self._make_head(self.model)
        whole = nn.ModuleList([self.model, *([self.head] if self.head else [])])
        self.updater = Updater(self.pieces, deepspeed, on_cpu=device.type == "cpu", whole=whole)
        self.updates = 0
        self._plans: dict[str, Plan] = {}

    def _make_head(self, model: RankModel) -> Head | None:
        if not model.last.post_process:
            return None
        return Head(
            model.last.readout_weight(),
            self.dims.vocab,
            replicated_input=not self.config.sequence_parallel,
            temperature=self.temperature,
        )

    def _base_model(self, source: HFDirectory) -> RankModel:
        model = build_model(self.config).to(self.device)
        for stage in model:
            load_base(stage, source)
        source.close()
        # It scores before it learns, and after every step: dropout is on inside a step alone.
        return model.requires_grad_(False).eval()

    # -- what the loops call ------------------------------------------------------------------------------------------

    def score(
        self, batch: ReplayBatch, *, reference: bool = False, teacher: Teacher | None = None, hazards: bool = False
    ) -> Scores:
        """Scores without gradients. `reference`: the base at full depth, without exits. They include the divergence
        from `teacher`, if there is one, and with `hazards` these."""
        if reference:
            return self._run_reference(batch)[0]
        return self._run(
            batch, train=False, exits=True, teacher=teacher, reference=self._reference_for(batch, teacher),
            hazards_of=self.spec.exit_depths if hazards else (),
        )  # fmt: skip

    def step(
        self, batch: ReplayBatch, weights: Weights, teacher: Teacher | None = None, *, adapter_lr: float, gate_lr: float
    ) -> Update:
        """One optimizer update on the loss that `weights` describes (objectives/weights.py), its divergence, if there
        is one, from `teacher`; where that is the reference, it runs first."""
        reference = self._reference_for(batch, teacher)
        if self.config.adapter_dropout:
            # The masks depend on the update alone, so that a resumed run draws what the undisturbed one did; tensor
            # ranks drop the same inputs, data ranks others.
            torch.manual_seed(self.updates * 65_537 + parallel_state.get_data_parallel_rank())
        self.model.train()
        with self.updater.accumulate():
            scores = self._run(batch, weights, train=True, exits=True, teacher=teacher, reference=reference)
            self.complete_gradients()
        self.model.eval()
        norms = self.updater.norms()
        applied = math.isfinite(norms["all"])
        if applied:
            self.updater.step({"body": adapter_lr, "gates": gate_lr})
            self.updates += 1
        self.updater.skip()
        return Update(scores, norms, applied)

    def complete_gradients(self) -> None:
        """After a backward pass: sums what ranks hold in parts, so that each holds the gradient of the loss."""
        if self.updater.settings.zero_stage == 3:
            # No rank holds parts then (TP = PP = 1), and ZeRO-3 fills gaps itself.
            return
        fill_missing_gradients(p for group in self.updater.groups.values() for p in group)
        sum_replicated_gradients(self.model.parameters())
        sum_tied_gradients(self.pieces)

    def check_copies(self) -> None:
        """RuntimeError where what the tensor-parallel ranks hold in copies is no longer the same on all of them."""
        check_copies(self.pieces)

    def stream_policy(self, meet: Callable[[], None] | None = None) -> TensorStream:
        """The whole policy, fp32, on its way to the leader; `meet` as in `TensorStream`."""
        holder = holder_of(self.updater, "value") if self.updater.settings.zero_stage == 3 else Values()
        return self._stream("value", holder, meet)

    def stream_optimizer(self, meet: Callable[[], None] | None = None) -> dict[str, TensorStream]:
        """AdamW's state by kind, whatever the layout, on its way to the leader."""
        return {kind: self._stream("state", holder_of(self.updater, kind), meet) for kind in kinds(self.updater)}

    def _stream(self, plan: str, holder: Holder, meet: Callable[[], None] | None) -> TensorStream:
        if plan not in self._plans:
            self._plans[plan] = Plan(self.pieces, holder, self.shapes)
        return TensorStream(self._plans[plan], holder, meet)

    def export_policy(self) -> dict[str, Tensor]:
        """The whole policy, fp32, in the leader's memory; nothing on other ranks."""
        return collect(self.stream_policy())

    def export_optimizer(self) -> OptimizerState:
        """AdamW's state, whole tensors in the leader's memory, whatever the layout; none on other ranks."""
        return OptimizerState(self.updates, {kind: collect(part) for kind, part in self.stream_optimizer().items()})

    def load_optimizer(self, state: OptimizerState) -> None:
        """The inverse of `export_optimizer`, under this or another layout; the policy is loaded by the constructor.

        Raises ValueError when the state belongs to another policy.
        """
        prepare(self.updater, state.updates)
        for kind in kinds(self.updater):
            if kind in state.tensors:
                holder, what = holder_of(self.updater, kind), f"optimizer state {kind}"
                load_tensors(self.pieces, holder, self.shapes, state.tensors[kind], what)
        self.updates = state.updates

    # -- one pass -----------------------------------------------------------------------------------------------------

    def _run_reference(self, batch: ReplayBatch, keep_hidden: list[Tensor] | None = None) -> tuple[Scores, Head | None]:
        """The base at full depth: its scores, and the head that reads it out."""
        if not self.spec.full:
            with self.model.adapters_off():
                return self._run(batch, train=False, exits=False, keep_hidden=keep_hidden), self.head
        if self._reference is None:
            self._reference = self._base_model(HFDirectory(self._base_directory))
        head = self._make_head(self._reference)
        scores = self._run(batch, train=False, exits=False, model=self._reference, head=head, keep_hidden=keep_hidden)
        return scores, head

    def _reference_for(self, batch: ReplayBatch, teacher: Teacher | None) -> ReferenceStates | None:
        if teacher is not Teacher.REFERENCE:
            return None
        hidden: list[Tensor] = []
        return ReferenceStates(self._run_reference(batch, hidden)[1], hidden)

    def _run(
        self,
        batch: ReplayBatch,
        weights: Weights = NO_WEIGHTS,
        *,
        train: bool,
        exits: bool,
        model: RankModel | None = None,
        head: Head | None = None,
        teacher: Teacher | None = None,
        reference: ReferenceStates | None = None,
        keep_hidden: list[Tensor] | None = None,
        hazards_of: tuple[int, ...] = (),
    ) -> Scores:
        head = self.head if model is None else head
        model = model or self.model
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        block = self.micro_batch_size * ranks
        if self.parallel.virtual > 1:
            # The interleaved schedule deals micro-batches out in groups of one per pipeline rank.
            block *= self.parallel.pipeline
        rows = -(-batch.rows // block) * block
        share = rows // ranks
        mine = slice(rank * share, (rank + 1) * share)
        own, own_weights = batch.pad_rows(rows).select(mine), weights.pad_rows(rows).select(mine)
        if not exits:
            own = own.at_full_depth(self.dims.num_layers)
        cuts = [slice(i, i + self.micro_batch_size) for i in range(0, share, self.micro_batch_size)]
        # Gradients are averaged over data-parallel ranks; the weights are normalised over all of them already.
        micro_batches = [MicroBatch.of(own.select(cut), own_weights.select(cut), scale=float(ranks)) for cut in cuts]
        passes = SchedulePass(
            model, head, self.direction, exits=exits, train=train, teacher=teacher,
            reference=reference, keep_hidden=keep_hidden, hazards_of=hazards_of,
        )  # fmt: skip
        with model.recording_gates() if exits else contextlib.nullcontext():
            run_schedule(
                model,
                to_device(micro_batches, self.device),
                passes.forward,
                passes.loss,
                sequence=batch.tokens.size(1),
                rows=self.micro_batch_size,
                train=train,
            )
        return self._collect(passes, batch.rows)

    def _collect(self, passes: SchedulePass, wanted: int) -> Scores:
        """Put the stages' parts together (a sum: each part is 0 where another stage owns it), then the data ranks'."""
        parts = passes.stacked()
        dist.all_reduce(parts, group=parallel_state.get_pipeline_model_parallel_group())
        group = parallel_state.get_data_parallel_group()
        if dist.get_world_size(group) > 1:
            gathered = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, parts, group=group)
            parts = torch.cat(gathered, dim=1)
        parts = parts[:, :wanted].cpu()
        tokens, exits, kl, token_entropy, exit_entropy = parts[:5].unbind()
        return Scores(tokens, exits, kl, token_entropy, exit_entropy, parts[5:].movedim(0, -1))
