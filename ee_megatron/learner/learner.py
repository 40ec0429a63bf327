"""Scoring and learning on a batch whose exits are prescribed. Every rank calls every method with the same arguments."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ..checkpoint.mapping import load_base
from ..checkpoint.policy_shards import gather_policy_tensors, load_policy_tensors, policy_pieces
from ..exits import gate_log_term
from ..families.hf_directory import HFDirectory
from ..model.config import megatron_config
from ..model.gpt import EarlyExitGPT, RankModel, build_model
from ..model.layer import WEIGHT
from ..parallel.groups import Degrees
from ..parallel.schedule import run_schedule
from ..parallel.vocabulary import Head, lumped_kl
from ..policy import PolicySpec
from .batch import ReplayBatch
from .engine import (
    Trainable,
    fill_missing_gradients,
    make_engine,
    split_groups,
    sum_replicated_gradients,
    sum_tied_gradients,
)


@dataclass
class Scores:
    """Per position, fp32 [B, S] on the CPU, 0 where nothing was computed, the same on every rank.

    token_logprobs: log p(next token) at the prescribed exits; exit_logprobs: log q(prescribed exit);
    kl: divergence from the teacher's distribution where the batch brings one, else 0.
    """

    token_logprobs: Tensor
    exit_logprobs: Tensor
    kl: Tensor


class Learner:
    """A Megatron model under one layout with its DeepSpeed engine.

    `stage_sizes`: layers per stage, `degrees.virtual` stages on each pipeline rank. `policy`: whole tensors (policy.py)
    to start from. The reference is the base in `source`: under adapters the same weights with adapters off, under full
    fine-tuning a second, frozen model, built when it is first asked for.
    """

    def __init__(
        self,
        source: HFDirectory,
        spec: PolicySpec,
        policy: dict[str, Tensor],
        degrees: Degrees,
        stage_sizes: tuple[int, ...],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        sequence_parallel: bool = False,
        recompute: bool = False,
        micro_batch_size: int = 8,
        zero_stage: int = 1,
        gradient_clipping: float = 1.0,
        adapter_dropout: float = 0.0,
        kl_direction: str = "student_teacher",
        temperature: float = 1.0,
    ):
        self.spec, self.dims, self.degrees = spec, source.dims, degrees
        self.micro_batch_size, self.device = micro_batch_size, device
        self.kl_direction, self.temperature = kl_direction, temperature
        self.config = megatron_config(
            source.dims,
            spec,
            stage_sizes,
            tensor=degrees.tensor,
            virtual=degrees.virtual,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            dtype=dtype,
            on_cpu=device.type == "cpu",
            adapter_dropout=adapter_dropout,
        )
        self._base_directory = source.path
        self.model = self._base_model(source)
        self._reference: RankModel | None = None
        self.pieces = policy_pieces(self.model)
        load_policy_tensors(self.pieces, policy)
        for piece in self.pieces:
            piece.parameter.requires_grad_()
        self.engine = make_engine(
            Trainable(split_groups(self.pieces)),
            zero_stage=zero_stage,
            gradient_clipping=gradient_clipping,
            on_cpu=device.type == "cpu",
        )

    def _base_model(self, source: HFDirectory) -> RankModel:
        model = build_model(self.config).to(self.device)
        for stage in model:
            load_base(stage, source)
        source.close()
        return model.requires_grad_(False)

    # -- what the loops call ------------------------------------------------------------------------------------------

    def score(self, batch: ReplayBatch, *, reference: bool = False, objective: str = "likelihood") -> Scores:
        """Scores without gradients. `reference`: the base at full depth, without exits (the teacher). With the
        objective "distill" they include the divergence from the batch's teacher."""
        if reference and self.spec.full:
            if self._reference is None:
                self._reference = self._base_model(HFDirectory(self._base_directory))
            return self._run(batch, train=False, exits=False, model=self._reference)
        if reference:
            with self.model.adapters_off():
                return self._run(batch, train=False, exits=False)
        return self._run(batch, train=False, exits=True, objective=objective)

    def step(self, batch: ReplayBatch, *, adapter_lr: float, gate_lr: float, objective: str) -> tuple[Scores, float]:
        """One optimizer update; returns the scores seen on the way and the gradient norm before clipping.

        objective "likelihood": loss = - sum token_weight * log p(token); "distill": + sum token_weight * KL to the
        teacher. Both: - sum exit_weight * log q(exit) (or its soft-target form).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = gate_lr if group.get("name") == "gates" else adapter_lr
        self.model.train()
        with self.engine.coalesce_grad_reduction():
            scores = self._run(batch, train=True, exits=True, objective=objective)
            self.complete_gradients()
        self.engine.step()
        self.model.eval()
        return scores, float(self.engine.get_global_grad_norm() or 0.0)

    def complete_gradients(self) -> None:
        """After a backward pass: sums what ranks hold in parts, so that each holds the gradient of the loss."""
        fill_missing_gradients(self.engine.module.parameters())
        sum_replicated_gradients(self.model.parameters())
        sum_tied_gradients(self.pieces)

    def export_policy(self) -> dict[str, Tensor]:
        """The whole policy, fp32, on every rank."""
        return gather_policy_tensors(self.pieces)

    def save(self, directory: Path) -> None:
        """This rank's share of the optimizer state into an existing directory; the policy is saved by the caller."""
        zero = self.engine.optimizer
        state = {"adam": zero.optimizer.state_dict(), "master": list(zero.single_partition_of_fp32_groups)}
        torch.save(state, directory / f"optimizer_rank{dist.get_rank()}.pt")

    def load(self, directory: Path) -> None:
        """The inverse of `save` under the same layout (the policy is loaded before, by the constructor).

        Raises FileNotFoundError when the directory was written by another number of ranks.
        """
        file = directory / f"optimizer_rank{dist.get_rank()}.pt"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no optimizer state of this rank; resume with the layout that saved it")
        state = torch.load(file, map_location=self.device, weights_only=True)
        zero = self.engine.optimizer
        zero.optimizer.load_state_dict(state["adam"])
        for mine, saved in zip(zero.single_partition_of_fp32_groups, state["master"], strict=True):
            mine.data.copy_(saved)

    # -- one pass -----------------------------------------------------------------------------------------------------

    def _run(
        self,
        batch: ReplayBatch,
        *,
        train: bool,
        exits: bool,
        objective: str = "likelihood",
        model: RankModel | None = None,
    ) -> Scores:
        model = model or self.model
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        block = self.micro_batch_size * ranks
        if self.degrees.virtual > 1:
            # The interleaved schedule deals micro-batches out in groups of one per pipeline rank.
            block *= self.degrees.pipeline
        rows = -(-batch.rows // block) * block
        padded = batch.pad_rows(rows)
        share = rows // ranks
        local = padded.select(slice(rank * share, (rank + 1) * share)).to(self.device)
        micro_batches = [
            local.select(slice(i, i + self.micro_batch_size)) for i in range(0, share, self.micro_batch_size)
        ]
        passes = _Pass(self, model, exits=exits, objective=objective, scale=float(ranks))
        with model.recording_gates() if exits else contextlib.nullcontext():
            run_schedule(
                model,
                micro_batches,
                passes.forward,
                passes.loss,
                sequence=batch.tokens.size(1),
                rows=self.micro_batch_size,
                train=train,
            )
        return self._collect(passes, batch.rows)

    def _collect(self, passes: _Pass, wanted: int) -> Scores:
        """Put the stages' parts together (a sum: each part is 0 where another stage owns it), then the data ranks'."""
        exit_logprobs = passes.summed_exit_logprobs()
        last = bool(passes.token_logprobs)
        empty = [torch.zeros_like(exit_logprobs)]
        parts = torch.stack(
            [
                torch.cat(passes.token_logprobs if last else empty),
                exit_logprobs,
                torch.cat(passes.kl if last else empty),
            ]
        )
        dist.all_reduce(parts, group=parallel_state.get_pipeline_model_parallel_group())
        group = parallel_state.get_data_parallel_group()
        if dist.get_world_size(group) > 1:
            gathered = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, parts, group=group)
            parts = torch.cat(gathered, dim=1)
        parts = parts[:, :wanted].cpu()
        return Scores(parts[0], parts[1], parts[2])


class _Pass:
    """The two callables of one schedule run and what they leave behind, per micro-batch in order."""

    def __init__(self, learner: Learner, model: RankModel, *, exits: bool, objective: str, scale: float):
        self.learner, self.model, self.exits, self.objective = learner, model, exits, objective
        # DeepSpeed averages gradients over data-parallel ranks; the weights are normalised over all of them already.
        self.scale = scale
        self.token_logprobs: list[Tensor] = []
        self.exit_logprobs: list[list[Tensor]] = [[] for _ in model]
        self.kl: list[Tensor] = []

    def forward(self, stage: EarlyExitGPT, batch: ReplayBatch) -> Tensor:
        control = (batch if self.exits else batch.at_full_depth(self.learner.dims.num_layers)).control()
        control[..., WEIGHT] *= self.scale
        output = stage(batch.tokens, control)
        total = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        for depth, logit in stage.take_gates().items() if self.exits else ():
            total += gate_log_term(logit.transpose(0, 1), batch.depths, depth)
        self.exit_logprobs[stage.vp_stage or 0].append(torch.where(batch.asked, total, torch.zeros_like(total)))
        return output

    def summed_exit_logprobs(self) -> Tensor:
        """This rank's share of log q(prescribed exit) [micro-batches * rows, S]."""
        return torch.stack([torch.cat(parts) for parts in self.exit_logprobs]).sum(0)

    def loss(self, batch: ReplayBatch, output: Tensor) -> Tensor:
        learner = self.learner
        # The last stage returns [S, B, D]; only positions that predict a generated token are read out.
        hidden = output.transpose(0, 1)[batch.counts]
        head = Head(
            self.model.last.readout_weight(),
            learner.dims.vocab,
            replicated_input=not learner.config.sequence_parallel,
            temperature=learner.temperature,
        )
        weight = batch.token_weight[batch.counts] * self.scale
        labels = batch.labels()[batch.counts].unsqueeze(-1)
        if self.objective == "distill":
            assert batch.teacher_ids is not None and batch.teacher_logprobs is not None
            teacher, kl = batch.teacher_logprobs[batch.counts], torch.zeros_like(weight)

            def distill(log_probs: Tensor, at: slice) -> Tensor:
                divergence = lumped_kl(log_probs[:, :-1], teacher[at], learner.kl_direction)
                kl[at] = divergence.detach()
                return (weight[at] * divergence).sum()

            loss, found = head.loss(hidden, torch.cat([batch.teacher_ids[batch.counts], labels], dim=-1), distill)
        else:
            kl = torch.zeros_like(weight)
            loss, found = head.loss(hidden, labels, lambda log_probs, at: -(weight[at] * log_probs[:, 0]).sum())
        logprobs = found[:, -1]
        for store, value in ((self.token_logprobs, logprobs), (self.kl, kl)):
            whole = torch.zeros(batch.tokens.shape, device=output.device)
            whole[batch.counts] = value
            store.append(whole)
        return loss
