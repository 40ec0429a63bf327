"""One pass of a batch through the pipeline schedule: what each stage computes, the loss, the scores left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from ..exits import gate_log_term
from ..model.gpt import EarlyExitGPT
from ..model.layer import gate_entropy
from ..model.packed import ASKED, EXIT_DEPTH, HAZARD, LIKELIHOOD, TARGET, Control, make_control
from ..objectives.divergences import Direction, Teacher
from ..objectives.weights import Weights
from ..parallel.vocabulary import Against, Head, lumped_kl
from .batch import ReplayBatch
from .packing import PackedRows

Part = TypeVar("Part")


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences as the device sees them. N of the W slots predict a token that counts.

    tokens int64 [1, W]; counted int64 [N]: those slots; labels int64 [N]; token, divergence fp32 [N] or None: weights
    of the loss; teacher_ids int64, teacher_logprobs fp32 [N, k] or None. full_depth: the control of the same sequences
    without exits, where a reference runs beside them.
    """

    tokens: Tensor
    control: Control
    counted: Tensor
    labels: Tensor
    token: Tensor | None
    divergence: Tensor | None
    teacher_ids: Tensor | None
    teacher_logprobs: Tensor | None
    full_depth: Control | None = None

    @staticmethod
    def of(batch: ReplayBatch, rows: PackedRows) -> MicroBatch:
        """Without weights; on the CPU, where it is known how many positions count."""
        places = rows.places(batch.tokens.size(1))
        counted = batch.loss_mask.flatten()[places].nonzero().squeeze(1)

        def at(value: Tensor | None) -> Tensor | None:
            """[B, S, ...] -> where a token counts [N, ...]."""
            return None if value is None else value.flatten(0, 1)[places[counted]]

        tokens, depths, gate_mask = (
            _in_slots(x, places, rows.width) for x in (batch.tokens, batch.exit_depths, batch.gate_mask)
        )
        labels = at(batch.labels())
        assert tokens is not None and depths is not None and labels is not None
        return MicroBatch(
            tokens.unsqueeze(0), make_control(rows.packed(), depths, gate_mask), counted, labels, None, None,
            at(batch.teacher_ids), at(batch.teacher_logprobs),
        )  # fmt: skip

    def weighted(self, weights: Weights, rows: PackedRows, scale: float, num_exits: int) -> MicroBatch:
        """The same, made by `of` from `rows`, with `weights` of the batch [B, S, ...] times `scale`."""

        def slots(value: Tensor | None, scale: float = 1) -> Tensor | None:
            return None if value is None else _in_slots(value, rows.places(value.size(1)), rows.width, scale)

        def at(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            taken = value.flatten(0, 1)[rows.places(value.size(1))[self.counted]]
            return taken if scale == 1 else taken * scale

        gates = gate_weights(
            slots(weights.exit, scale), slots(weights.target_hazards), slots(weights.hazard, scale), num_exits
        )
        return replace(
            self, control=self.control.with_gates(gates), token=at(weights.token), divergence=at(weights.divergence)
        )


def _in_slots(value: Tensor, places: Tensor, width: int, scale: float = 1) -> Tensor:
    """[B, S, ...] -> of every slot [W, ...], zeros for padding."""
    taken = value.flatten(0, 1)[places]
    whole = taken.new_zeros(width, *taken.shape[1:])
    whole[: len(taken)] = taken if scale == 1 else taken * scale
    return whole


def gate_weights(
    likelihood: Tensor | None, targets: Tensor | None, hazard: Tensor | None, num_exits: int
) -> dict[int, Tensor] | None:
    """The terms of the gates' loss [W, M] each, from the weights (objectives/weights.py) of W slots; None: there are
    none."""
    given = likelihood if likelihood is not None else hazard
    if given is None:
        return None
    if likelihood is None:
        likelihood = given.new_zeros(len(given))
    each = likelihood if likelihood.dim() == 2 else likelihood.unsqueeze(-1).expand(-1, num_exits)
    terms = {LIKELIHOOD: each, TARGET: targets, HAZARD: hazard}
    return {term: value for term, value in terms.items() if value is not None}


# Inside, the base and the head that reads it out (last stage only).
Reference = Callable[[], AbstractContextManager[tuple[EarlyExitGPT, Head | None]]]


class SchedulePass:
    """The two callables of one schedule run and what they leave behind, per micro-batch in order.

    With a `reference` every stage runs it on a micro-batch just before the policy and hands on both streams, one behind
    the other [2 W, 1, D]. So the pipeline fills and drains once, and the reference's states are never stored.
    """

    def __init__(
        self,
        head: Head | None,
        direction: Direction,
        *,
        exits: bool,
        train: bool,
        teacher: Teacher | None = None,
        reference: Reference | None = None,
        reads_out: bool = True,
        hazards_of: tuple[int, ...] = (),
        done: Callable[[], None] | None = None,
    ):
        self.head, self.exits, self.train = head, exits, train
        self.direction = direction
        # Divergence is from the batch's stored distribution, from the reference, or there is none.
        self.stored, self.reads_out = teacher is Teacher.STORED, reads_out
        self.reference = reference if teacher is Teacher.REFERENCE else None
        # The reference's head and its hidden states at the counted slots [N, D] of the latest micro-batch.
        self.compared: tuple[Head, Tensor] | None = None
        # Told of every micro-batch that this rank has run forward.
        self.done = done
        self.token_logprobs: list[Tensor] = []
        self.token_entropy: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.exit_logprobs: list[Tensor] = []
        self.exit_entropy: list[Tensor] = []
        # Gates at these depths leave their hazards, 0 where they did not run.
        self.hazards_of = hazards_of
        self.hazards: list[Tensor] = []

    @property
    def streams(self) -> int:
        """Streams of a micro-batch that stages exchange."""
        return 1 if self.reference is None else 2

    def forward(self, stage: EarlyExitGPT, micro_batch: MicroBatch) -> Tensor:
        theirs = None
        if self.reference is not None:
            # None on the first stage, which embeds.
            entering = stage.decoder.input_tensor
            own, its = (None, None) if entering is None else entering.chunk(2)
            with self.reference() as (base, head), torch.no_grad():
                base.set_input_tensor(its)
                theirs = base(micro_batch.tokens, micro_batch.full_depth)
                if head is not None:
                    self.compared = head, theirs.flatten(0, 1).index_select(0, micro_batch.counted)
            stage.set_input_tensor(own)
        with stage.recording_gates() if self.exits else nullcontext():
            output = stage(micro_batch.tokens, micro_batch.control)
            gates = stage.take_gates()
        channels = micro_batch.control.channels
        exit_depths, gate_mask = channels[..., EXIT_DEPTH], channels[..., ASKED] > 0
        logprobs = torch.zeros(gate_mask.shape, device=gate_mask.device)
        entropy = torch.zeros_like(logprobs)
        hazards = logprobs.new_zeros(len(self.hazards_of), *logprobs.shape)
        for depth, logit in gates.items():
            reached = exit_depths >= depth
            if self.hazards_of:
                hazards[self.hazards_of.index(depth)] = torch.sigmoid(logit) * (gate_mask & reached)
            logprobs += gate_log_term(logit, exit_depths, depth)
            entropy += torch.where(reached, gate_entropy(logit), 0.0)
        self.exit_logprobs.append(torch.where(gate_mask, logprobs, 0.0))
        self.exit_entropy.append(torch.where(gate_mask, entropy, 0.0))
        self.hazards.append(hazards)
        if self.done is not None:
            self.done()
        return output if theirs is None or self.compared is not None else torch.cat([output, theirs])

    def loss(self, micro_batch: MicroBatch, output: Tensor) -> Tensor:
        """The terms of tokens and divergence (those of the gates are with their layers)."""
        # The last stage returns [W, 1, D]; only slots that predict a generated token are read out.
        hidden = output.flatten(0, 1).index_select(0, micro_batch.counted)
        if not self.reads_out:
            return hidden.new_zeros(())
        no_weight = torch.zeros(len(hidden), device=hidden.device)
        token, divergence = (
            no_weight if weight is None else weight for weight in (micro_batch.token, micro_batch.divergence)
        )
        loss, *values = self._read_out(micro_batch, hidden, token, divergence)
        for store, value in zip((self.token_logprobs, self.token_entropy, self.kl), values, strict=True):
            whole = value.new_zeros(micro_batch.tokens.size(1))
            store.append(whole.index_copy(0, micro_batch.counted, value))
        return loss

    def _read_out(
        self, micro_batch: MicroBatch, hidden: Tensor, token: Tensor, divergence: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, log p(token) [N], entropy [N] (only where nothing is trained) and divergence from the teacher [N];
        `token`, `divergence`: weights [N]."""
        assert self.head is not None
        ids, against = micro_batch.labels.unsqueeze(-1), None
        stored = micro_batch.teacher_logprobs if self.stored else None
        if stored is not None:
            assert micro_batch.teacher_ids is not None
            ids = torch.cat([micro_batch.teacher_ids, ids], dim=-1)
        if self.compared is not None:
            against = Against(*self.compared, divergence, self.direction)

        # Chunk by chunk, in their order.
        stored_kl: list[Tensor] = []

        def loss_of(log_probs: Tensor, at: slice) -> Tensor:
            loss = -(token[at] * log_probs[:, -1]).sum()
            if stored is None:
                return loss
            compared = lumped_kl(log_probs[:, :-1], stored[at], self.direction)
            stored_kl.append(compared.detach())
            return loss + (divergence[at] * compared).sum()

        if self.train:
            loss, log_probs, kl = self.head(hidden, ids, loss_of, against)
            entropy = torch.zeros_like(token)
        else:
            log_probs, entropy, kl = self.head(hidden, ids, None, against)
            loss = loss_of(log_probs, slice(None)) + (divergence * kl).sum()
        return loss, log_probs[:, -1], entropy, torch.cat(stored_kl) if stored_kl else kl

    def stacked(self) -> Tensor:
        """This rank's share of every score [5 + M, slots of all micro-batches], in the order of `Scores`."""
        logprobs, entropy = torch.cat(self.exit_logprobs), torch.cat(self.exit_entropy)
        last = bool(self.token_logprobs)
        tokens, kl, token_entropy = (
            torch.cat(parts) if last else torch.zeros_like(logprobs)
            for parts in (self.token_logprobs, self.kl, self.token_entropy)
        )
        hazards = torch.cat(self.hazards, dim=1)
        return torch.cat([torch.stack([tokens, logprobs, kl, token_entropy, entropy]), hazards])


def run_schedule(
    model: EarlyExitGPT,
    micro_batches: Sequence[Part],
    forward: Callable[[EarlyExitGPT, Part], Tensor],
    loss: Callable[[Part, Tensor], Tensor],
    *,
    slots: int,
    train: bool,
) -> None:
    """Run every micro-batch forward and, if `train`, backward; gradients accumulate on the parameters.

    forward(stage, micro_batch) runs on every stage and returns its output [slots, 1, D]; loss(micro_batch, output) runs
    on the last stage and returns a scalar that is summed over micro-batches, undivided. With more than one stage all
    micro-batches have `slots` slots. Raises whatever the callables raise.
    """

    def forward_step(iterator: Any, stage: EarlyExitGPT):
        micro_batch = next(iterator)
        return forward(stage, micro_batch), partial(_loss, micro_batch)

    def _loss(micro_batch: Part, output: Tensor):
        # A clone: the schedule works in place on what it gets.
        value = loss(micro_batch, output).clone()
        return value, torch.zeros((), dtype=torch.int, device=value.device), {}

    with torch.set_grad_enabled(train):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches)],
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=slots,
            micro_batch_size=1,
            forward_only=not train,
        )
