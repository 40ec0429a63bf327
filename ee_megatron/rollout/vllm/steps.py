"""One step of vLLM's model runner with exits: what the model must know of each token before it runs, the sampling of
the next tokens with this package's random numbers, and what comes back of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed.aux_output_connector.connector import AuxRequestOutput
from vllm.v1.outputs import SamplerOutput

from ...exit_rules import NEVER, ExitRule, Tokens
from ..engine.sampling import SamplingParams, inverse_cdf, log_prob, sample_tokens, truncate
from ..engine.scheduler import prescribe
from .asked import EXTRA, Asked

# vLLM's: temperatures below are greedy.
GREEDY = 1e-5


@dataclass
class Watched:
    """Tokens of a step whose rule has to see readouts: their places int64 [R], names and random numbers [R, M+1]."""

    rule: ExitRule
    places: Tensor
    tokens: Tokens
    uniform: Tensor
    notes: Tensor


@dataclass
class Step:
    """T tokens. `free` int64 [F]: those that may exit; bounds float64 [F, M], fine bool [F]: as `ExitRule.ahead` has
    them. The model leaves `depths` int64 [F] and `logprobs` float32 [F]: the exits taken, and their log-probability."""

    free: Tensor
    bounds: Tensor
    fine: Tensor
    watched: list[Watched]
    last: np.ndarray
    depths: Tensor | None = None
    logprobs: Tensor | None = None


@dataclass(frozen=True)
class Made:
    """A token that was sampled, as `Rollout` has it; `name` is its request's."""

    name: int
    token: int
    depth: int
    logprob: float
    full_logprob: float
    exit_logprob: float


class Draws(nn.Module):
    """Stands in place of the part of vLLM's sampler that draws tokens: by the numbers that are set here, one per row,
    where there are any. Penalties, biases, grammars and log-probabilities stay vLLM's."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.plain = plain
        self.uniform: Tensor | None = None
        self.logprobs: Tensor | None = None

    def forward(
        self, logits: Tensor, generators: Any, k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """logits float32 [R, V], temperature applied, k int [R], p float [R] -> tokens int64 [R], logits or
        log-probabilities [R, V] if vLLM is to report those. `logprobs` float32 [R]: of what was drawn from."""
        if self.uniform is None:
            return self.plain(logits, generators, k, p)
        rows = len(logits)
        kinds: dict[tuple[int, float], list[int]] = {}
        for i, kind in enumerate(
            zip([0] * rows if k is None else k.tolist(), [1.0] * rows if p is None else p.tolist(), strict=True)
        ):
            kinds.setdefault(kind, []).append(i)
        kept = logits
        for (top_k, top_p), which in kinds.items():
            if 0 < top_k < logits.shape[-1] or top_p < 1:
                # A bound that keeps all is vLLM's way to say none.
                kept = kept.clone() if kept is logits else kept
                kept[which] = truncate(logits[which], top_k if top_k < logits.shape[-1] else 0, top_p)
        tokens, self.logprobs = inverse_cdf(kept, self.uniform)
        if self.plain.logprobs_mode == "processed_logits":
            return tokens, kept
        return tokens, kept.log_softmax(dim=-1) if self.plain.logprobs_mode == "processed_logprobs" else None


class Steps(nn.Module):
    """Stands in place of the runner's sampler, and before its forward pass. Requests without `EXTRA` never exit and are
    sampled by vLLM; those of users have depths here, and are sampled by vLLM with this package's random numbers."""

    def __init__(self, runner: Any, depths: Sequence[int], num_layers: int):
        super().__init__()
        self.runner, self.exit_depths, self.num_layers = runner, tuple(depths), num_layers
        self.plain = runner.sampler
        # What else the runner has of its sampler, for the log-probabilities of prompts.
        for name in ("logprobs_mode", "compute_logprobs", "gather_logprobs"):
            setattr(self, name, getattr(self.plain, name))
        self.draws = self.plain.topk_topp_sampler = Draws(self.plain.topk_topp_sampler)
        self.step: Step | None = None
        self.made: list[Made] = []
        # What goes back with users' tokens: depth, log-probabilities of token and exit, float64 [1, 3].
        self.told: dict[str, AuxRequestOutput] = {}
        self._asked: dict[str, Asked] = {}

    def asked(self, request: str) -> Asked | None:
        extra = (self.runner.requests[request].sampling_params.extra_args or {}).get(EXTRA)
        if extra is None:
            return None
        if request not in self._asked:
            self._asked[request] = Asked.of(extra)
        return self._asked[request]

    # ---- before the model runs ----

    def prepare(self) -> Step:
        """What the runner has scheduled: for each request a stretch of positions."""
        batch, exits = self.runner.input_batch, len(self.exit_depths)
        count = batch.num_reqs
        self._asked = {name: asked for name, asked in self._asked.items() if name in self.runner.requests}
        starts = self.runner.query_start_loc.np[: count + 1]
        free: list[np.ndarray] = []
        bounds: list[np.ndarray] = []
        fine: list[np.ndarray] = []
        watching: dict[ExitRule, list[tuple[int, Asked, int]]] = {}
        last = np.full(count, -1)
        for i, name in enumerate(batch.req_ids[:count]):
            asked = self.asked(name)
            if asked is None:
                continue
            computed, scheduled = int(batch.num_computed_tokens_cpu[i]), int(starts[i + 1] - starts[i])
            # Position prompt - 1 + t predicts token t; token 0 comes from the prompt, which never exits.
            begin, end = (at - asked.prompt + 1 for at in (computed, computed + scheduled))
            first = max(begin, 1)
            if end <= first:
                continue
            place = int(starts[i]) + first - begin
            found = asked.bounds(first, end, self.exit_depths)
            if found is None:
                # What it said of tokens that are there is known; the newest alone is asked.
                known = asked.bounds(first, end - 1, self.exit_depths)
                assert known is not None, "a rule that sees readouts is asked token by token"
                found = np.concatenate([known, np.full((1, exits), NEVER)])
                watching.setdefault(asked.rule, []).append((place + end - 1 - first, asked, end - 1))
            last[i] = sum(map(len, free)) + end - 1 - first
            free.append(np.arange(place, place + end - first))
            bounds.append(found)
            fine.append(np.full(end - first, asked.rule.fine))
        device = self.runner.device
        self.step = Step(
            _joined(free, np.int64, (0,), device), _joined(bounds, np.float64, (0, exits), device),
            _joined(fine, bool, (0,), device),
            [self._watched(rule, members) for rule, members in watching.items()], last,
        )  # fmt: skip
        return self.step

    def _watched(self, rule: ExitRule, members: list[tuple[int, Asked, int]]) -> Watched:
        places, asked, tokens = zip(*members, strict=True)
        exits, device = len(self.exit_depths), self.runner.device
        drawn = [a.uniform(t, t + 1, exits) for a, t in zip(asked, tokens, strict=True)]
        return Watched(
            rule, torch.tensor(places, device=device), [("", 0, t) for t in tokens],
            torch.from_numpy(np.concatenate(drawn)).to(device),
            torch.zeros(len(places), rule.notes, dtype=torch.float64, device=device),
        )  # fmt: skip

    # ---- after it ----

    def forward(self, logits: Tensor, sampling_metadata: Any, **options: Any) -> SamplerOutput:
        """Logits [requests, V] -> the next tokens, this package's where a request has `EXTRA`."""
        names = self.runner.input_batch.req_ids[: len(logits)]
        asked = [self.asked(name) for name in names]
        if not any(asked):
            return self.plain(logits=logits, sampling_metadata=sampling_metadata, **options)
        # Rows in the middle of a prompt have logits too, which nobody wants.
        unwanted = self.runner.discard_request_mask.np[: len(names)]
        wanted = [(i, one) for i, one in enumerate(asked) if one is not None and not unwanted[i]]
        rollouts = [(i, one, one.sampling) for i, one in wanted if one.sampling is not None]
        users = [(i, one) for i, one in wanted if one.sampling is None]
        depths, exits = self._exits(len(names))
        tokens = torch.zeros(len(names), dtype=torch.int64, device=logits.device)
        others = None
        if users or len(rollouts) < len(names):
            others = self._by_vllm(names, users, logits, sampling_metadata, options, depths, exits)
            tokens.copy_(others.sampled_token_ids[:, 0])
        kinds: dict[SamplingParams, list[tuple[int, Asked]]] = {}
        for i, one, sampling in rollouts:
            kinds.setdefault(sampling, []).append((i, one))
        for params, members in kinds.items():
            which = torch.tensor([i for i, _ in members], device=logits.device)
            wide = logits[which].float()
            sampled = sample_tokens(wide, params, self._uniform(members))
            given = [
                (j, one.given[len(one.depths)])
                for j, (_, one) in enumerate(members)
                if len(one.depths) < len(one.given)
            ]
            if given:
                sampled = prescribe(wide, params, sampled, given)
            tokens[which] = sampled[0]
            columns = (column.tolist() for column in sampled)
            for (i, one), token, logprob, full in zip(members, *columns, strict=True):
                self.made.append(Made(one.name, token, depths[i], logprob, full, exits[i]))
                one.depths.append(depths[i])
        logprobs = None if others is None else others.logprobs_tensors
        return SamplerOutput(sampled_token_ids=tokens.to(torch.int32).unsqueeze(-1), logprobs_tensors=logprobs)

    def _by_vllm(
        self, names: Sequence[str], users: list[tuple[int, Asked]], logits: Tensor, sampling_metadata: Any,
        options: dict[str, Any], depths: list[int], exits: list[float],
    ) -> SamplerOutput:  # fmt: skip
        """vLLM's choice for all rows; of users' the depths are kept."""
        if users:
            # Nobody asks what the others of these rows draw: they are in the middle of a prompt.
            uniform = torch.zeros(len(names), dtype=torch.float64, device=logits.device)
            uniform[[i for i, _ in users]] = self._uniform(users)
            self.draws.uniform = uniform
        try:
            found = self.plain(logits=logits.clone(), sampling_metadata=sampling_metadata, **options)
        finally:
            self.draws.uniform = None
        if not users:
            return found
        # A greedy choice has the log-probability of temperature 1.
        logprobs = log_prob(logits.float(), found.sampled_token_ids[:, 0].long())
        if not sampling_metadata.all_greedy:
            assert self.draws.logprobs is not None
            drawn = sampling_metadata.temperature >= GREEDY
            logprobs = torch.where(drawn, self.draws.logprobs, logprobs)
        for (i, one), logprob in zip(users, logprobs[[i for i, _ in users]].tolist(), strict=True):
            row = np.array([[depths[i], logprob, exits[i]]])
            self.told[names[i]] = AuxRequestOutput(len(one.depths), row)
            one.depths.append(depths[i])
        return found

    def _uniform(self, members: list[tuple[int, Asked]]) -> Tensor:
        """float64 [R]: the numbers that draw the members' next tokens."""
        exits = len(self.exit_depths)
        drawn = [one.uniform(len(one.depths), len(one.depths) + 1, exits) for _, one in members]
        return torch.from_numpy(np.concatenate(drawn)[:, -1]).to(self.runner.device)

    def _exits(self, count: int) -> tuple[list[int], list[float]]:
        """Depth and exit log-probability of each request's newest position."""
        step = self.step
        if step is None or step.depths is None or step.logprobs is None:
            return [self.num_layers] * count, [0.0] * count
        depths, logprobs = [*step.depths.tolist(), self.num_layers], [*step.logprobs.tolist(), 0.0]
        return [depths[at] for at in step.last], [logprobs[at] for at in step.last]


def _joined(parts: list[np.ndarray], dtype: Any, empty: tuple[int, ...], device: torch.device) -> Tensor:
    whole = np.concatenate(parts).astype(dtype) if parts else np.empty(empty, dtype=dtype)
    return torch.from_numpy(whole).to(device)
