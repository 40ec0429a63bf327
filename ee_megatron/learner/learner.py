"""Scoring and learning on a batch whose exits are prescribed. Every rank calls every method with the same arguments."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..checkpoint.mapping import check_copies, load_base, policy_pieces
from ..checkpoint.policy_stream import GatherPlan, Holder, TensorStream, load_tensors
from ..config.derive import stage_sizes
from ..config.schema import DeepspeedConfig, ParallelConfig
from ..families.hf_directory import HFDirectory
from ..model.config import megatron_config
from ..model.gpt import EarlyExitGPT, build_stage
from ..objectives.divergences import KL_DIRECTIONS, Teacher
from ..objectives.weights import TensorRows, Weights
from ..parallel.vocabulary import Head
from ..policy import PolicySpec
from ..tensors import collect, to_device, to_host
from .batch import ReplayBatch
from .engine import (
    OptimizerState,
    Updater,
    fill_missing_gradients,
    holder_of,
    kinds,
    prepare,
    sum_replicated_gradients,
    sum_tied_gradients,
)
from .packing import MicroBatchPlan, PackedRows, PackingStats, deal
from .passes import MicroBatch, SchedulePass, run_schedule


@dataclass(frozen=True)
class Scores(TensorRows):
    """Per position, fp32 [B, S] on the CPU, 0 where nothing was computed, the same on every rank.

    token_logprobs: log p(next token) at the prescribed exits; exit_logprobs: log q(prescribed exit); exit_entropy: of
    the gates deciding there, nats; token_entropy: of the next-token distribution, nats, in `score` only; kl: divergence
    from the teacher, 0 without one; hazards: of every gate that a position reached, 0 elsewhere, [B, S, M] where
    `score` stored them, else [B, S, 0].
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
class PackedBatch:
    """A batch dealt out to data ranks and micro-batches, for as many passes as are made on it (`Learner.pack`).

    made: this rank's micro-batches on the CPU, without weights, by whether they keep their exits."""

    batch: ReplayBatch
    packing: MicroBatchPlan
    made: dict[bool, list[MicroBatch]] = field(default_factory=dict, repr=False)

    @property
    def stats(self) -> PackingStats:
        return self.packing.stats


NO_WEIGHTS = Weights()


@dataclass(frozen=True)
class Pass:
    """What is computed on a batch: "score" or "train" the policy at the prescribed exits, or read the "reference" (the
    base at full depth, without exits). Without `reads_out` nothing is said of tokens."""

    what: str
    weights: Weights = NO_WEIGHTS
    teacher: Teacher | None = None
    hazards_of: tuple[int, ...] = ()
    reads_out: bool = True

    @property
    def trains(self) -> bool:
        return self.what == "train"

    @property
    def exits(self) -> bool:
        return self.what != "reference"

    @property
    def compared(self) -> bool:
        """Whether the reference runs beside the policy."""
        return self.teacher is Teacher.REFERENCE


class Learner:
    """A Megatron model under one layout with its DeepSpeed engine.

    `policy`: whole tensors (policy.py) to start from, of which a rank reads what it holds. The reference is the base in
    `source`: under adapters the same weights with adapters off, under full fine-tuning a second, frozen model, built
    on first use. `adapter_dropout`: of the adapters' inputs; `kl_direction`: of a divergence from the
    teacher, as calibrate.kl_direction; `temperature`: of the token distribution. Raises ValueError for stages that
    don't end at exits.
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
        adapter_dropout: float = 0.0,
        kl_direction: str = "student_teacher",
        temperature: float = 1.0,
    ):
        self.spec, self.dims, self.parallel, self.device = spec, source.dims, parallel, device
        # Told how far a pass has come: what it is ("score", "reference" or "train"), positions done, positions in all.
        self.progress: Callable[[str, int, int], None] | None = None
        self.direction, self.temperature = KL_DIRECTIONS[kl_direction], temperature
        compiles = device.type == "cuda" and os.environ.get("EE_MEGATRON_FLEX") != "0"
        self.config = megatron_config(
            source.dims,
            spec,
            stage_sizes(parallel, spec.layout),
            tensor=parallel.tensor,
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute,
            dtype=dtype,
            on_cpu=device.type == "cpu",
            adapter_dropout=adapter_dropout,
            flex_attention=compiles,
            fused=compiles,
        )
        self._base_directory = source.path
        self.model = self._base_model(source)
        self._base: EarlyExitGPT | None = None
        self.pieces = policy_pieces(self.model)
        self.shapes = spec.tensor_shapes(source.dims)
        load_tensors(self.pieces, Holder(), self.shapes, policy, "policy")
        for piece in self.pieces:
            piece.parameter.requires_grad_()
        self.head = self._make_head(self.model)
        whole = nn.ModuleList([self.model, *([self.head] if self.head else [])])
        self.updater = Updater(self.pieces, deepspeed, on_cpu=device.type == "cpu", whole=whole)
        self.updates = 0
        self._plans: dict[str, GatherPlan] = {}

    def _make_head(self, model: EarlyExitGPT) -> Head | None:
        if not model.post_process:
            return None
        return Head(
            model.readout_weight(),
            self.dims.vocab,
            replicated_input=not self.config.sequence_parallel,
            temperature=self.temperature,
        )

    def _base_model(self, source: HFDirectory) -> EarlyExitGPT:
        model = build_stage(self.config).to(self.device)
        load_base(model, source)
        source.close()
        # It scores before it learns, and after every step: dropout is on inside a step alone.
        return model.requires_grad_(False).eval()

    # -- what the loops call ------------------------------------------------------------------------------------------

    def pack(self, batch: ReplayBatch) -> PackedBatch:
        """Deal a batch out to ranks and micro-batches. Passes do it themselves to a batch that isn't packed yet; who
        scores a batch and then learns on it packs it once."""
        ranks = parallel_state.get_data_parallel_world_size()
        tokens = self.parallel.tokens_per_micro_batch
        return PackedBatch(batch, deal(batch, tokens, ranks, one_width=self.parallel.pipeline > 1))

    def score(
        self,
        batch: ReplayBatch | PackedBatch,
        *,
        reference: bool = False,
        teacher: Teacher | None = None,
        hazards: bool = False,
    ) -> Scores:
        """Scores without gradients. `reference`: the base at full depth, without exits. They include the divergence
        from `teacher`, if there is one, and with `hazards` these."""
        if reference:
            return self._run(batch, Pass("reference"))
        return self._run(batch, Pass("score", teacher=teacher, hazards_of=self.spec.exit_depths if hazards else ()))

    def hazards(self, batch: ReplayBatch) -> Tensor:
        """`Scores.hazards` alone: nothing is read out."""
        return self._run(batch, Pass("score", hazards_of=self.spec.exit_depths, reads_out=False)).hazards

    def step(
        self,
        batch: ReplayBatch | PackedBatch,
        weights: Weights,
        teacher: Teacher | None = None,
        *,
        adapter_lr: float,
        gate_lr: float,
    ) -> Update:
        """One optimizer update on the loss that `weights` describes (objectives/weights.py), its divergence, if there
        is one, from `teacher`."""
        if self.config.adapter_dropout:
            # The masks depend on the update alone, so that a resumed run draws what the undisturbed one did; tensor
            # ranks drop the same inputs, data ranks others.
            torch.manual_seed(self.updates * 65_537 + parallel_state.get_data_parallel_rank())
        with self.updater.accumulate():
            scores = self._run(batch, Pass("train", weights, teacher))
            self.complete_gradients()
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
        """Raises RuntimeError if the tensor-parallel ranks' copies of a replicated parameter differ."""
        check_copies(self.pieces)

    def stream_policy(self, meet: Callable[[], None] | None = None) -> TensorStream:
        """The whole policy, fp32, on its way to the leader; `meet` as in `TensorStream`."""
        holder = holder_of(self.updater, "value") if self.updater.settings.zero_stage == 3 else Holder()
        return self._stream("value", holder, meet)

    def stream_optimizer(self, meet: Callable[[], None] | None = None) -> dict[str, TensorStream]:
        """AdamW's state by kind, whatever the layout, on its way to the leader."""
        return {kind: self._stream("state", holder_of(self.updater, kind), meet) for kind in kinds(self.updater)}

    def _stream(self, plan: str, holder: Holder, meet: Callable[[], None] | None) -> TensorStream:
        if plan not in self._plans:
            self._plans[plan] = GatherPlan(self.pieces, holder, self.shapes)
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

    def _run(self, batch: ReplayBatch | PackedBatch, wanted: Pass) -> Scores:
        """The scores; the gradients of a pass that trains are left on the parameters."""
        packed = batch if isinstance(batch, PackedBatch) else self.pack(batch)
        own = packed.packing.ranks[parallel_state.get_data_parallel_rank()]
        if self.spec.full and self._base is None and (wanted.compared or not wanted.exits):
            # Before the schedule: stages exchange tied embeddings in building it.
            self._base = self._base_model(HFDirectory(self._base_directory))
        with contextlib.ExitStack() as stack:
            model, head = self.model, self.head
            if not wanted.exits:
                model, head = stack.enter_context(self._reference())
            passes = SchedulePass(
                head, self.direction, exits=wanted.exits, train=wanted.trains, teacher=wanted.teacher,
                reference=self._reference, hazards_of=wanted.hazards_of, reads_out=wanted.reads_out,
                done=self._clock(wanted.what, own),
            )  # fmt: skip
            micro_batches = self._micro_batches(packed, wanted)
            model.train(wanted.trains)
            run_schedule(
                model, micro_batches, passes.forward, passes.loss,
                slots=passes.streams * micro_batches[0].tokens.size(1), train=wanted.trains,
            )  # fmt: skip
            model.eval()
        return self._collect(passes, packed)

    def _micro_batches(self, packed: PackedBatch, wanted: Pass) -> list[MicroBatch]:
        """This rank's, at their exits or at full depth, on the device."""
        own = packed.packing.ranks[parallel_state.get_data_parallel_rank()]
        for early in ({True, False} if wanted.compared else {wanted.exits}) - packed.made.keys():
            batch = packed.batch if early else packed.batch.at_full_depth(self.dims.num_layers)
            packed.made[early] = [MicroBatch.of(batch, rows) for rows in own]
        made = packed.made[wanted.exits]
        if wanted.compared:
            made = [replace(one, full_depth=its.control) for one, its in zip(made, packed.made[False], strict=True)]
        # Gradients are averaged over data-parallel ranks; the weights are normalised over all of them already.
        scale, exits = float(parallel_state.get_data_parallel_world_size()), len(self.spec.exit_depths)
        pairs = zip(made, own, strict=True)
        return to_device([one.weighted(wanted.weights, rows, scale, exits) for one, rows in pairs], self.device)

    @contextlib.contextmanager
    def _reference(self) -> Iterator[tuple[EarlyExitGPT, Head | None]]:
        """Inside, the base, and the head that reads it out."""
        if not self.spec.full:
            with self.model.adapters_off():
                yield self.model, self.head
            return
        assert self._base is not None
        yield self._base, self._make_head(self._base)

    def _clock(self, what: str, own: Sequence[PackedRows]) -> Callable[[], None]:
        """Tells `progress` of every micro-batch that this rank has run forward."""
        positions = [rows.positions for rows in own]
        done = iter(range(1, len(positions) + 1))

        def advance() -> None:
            if self.progress is not None:
                self.progress(what, sum(positions[: next(done)]), sum(positions))

        return advance

    def _collect(self, passes: SchedulePass, packed: PackedBatch) -> Scores:
        """Put the stages' parts together (a sum: each part is 0 where another stage owns it), then the data ranks'."""
        parts = passes.stacked()
        dist.all_reduce(parts, group=parallel_state.get_pipeline_model_parallel_group())
        batch, each = packed.batch, packed.packing.ranks
        widths = [sum(rows.width for rows in part) for part in each]
        ranks = [parts]
        if len(each) > 1:
            # Ranks without a pipeline have other numbers of slots.
            parts = nn.functional.pad(parts, (0, max(widths) - parts.size(1)))
            ranks = [torch.empty_like(parts) for _ in each]
            dist.all_gather(ranks, parts, group=parallel_state.get_data_parallel_group())
        sequence = batch.tokens.size(1)
        whole = torch.zeros(len(parts), batch.tokens.numel())
        for columns, part in zip(ranks, each, strict=True):
            start, (on_host,) = 0, to_host(columns)
            for rows in part:
                places = rows.places(sequence)
                whole[:, places] = on_host[:, start : start + len(places)]
                start += rows.width
        whole = whole.unflatten(1, batch.tokens.shape)
        tokens, exits, kl, token_entropy, exit_entropy = whole[:5].unbind()
        return Scores(tokens, exits, kl, token_entropy, exit_entropy, whole[5:].movedim(0, -1))
