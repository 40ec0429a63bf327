"""One step of vLLM's model runner with exits: what the model must know of each token before it runs, the sampling of
the next tokens with this package's random numbers, and what comes back of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.outputs import SamplerOutput

from ...exit_rules import NEVER, ExitRule, Tokens
from ..engine.sampling import SamplingParams, sample_tokens
from ..engine.scheduler import prescribe
from .asked import EXTRA, Asked


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


class Steps(nn.Module):
    """Stands in place of the runner's sampler, and before its forward pass. Requests without `EXTRA` never exit and are
    sampled by vLLM."""

    def __init__(self, runner: Any, depths: Sequence[int], num_layers: int):
        super().__init__()
        self.runner, self.exit_depths, self.num_layers = runner, tuple(depths), num_layers
        self.plain = runner.sampler
        self.step: Step | None = None
        self.made: list[Made] = []
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
        tokens = torch.zeros(len(names), dtype=torch.int64, device=logits.device)
        others = None
        if not all(asked):
            others = self.plain(logits=logits.clone(), sampling_metadata=sampling_metadata, **options)
            tokens.copy_(others.sampled_token_ids[:, 0])
        # Rows in the middle of a prompt have logits too, which nobody wants.
        unwanted = self.runner.discard_request_mask.np[: len(names)]
        kinds: dict[SamplingParams, list[int]] = {}
        for i, one in enumerate(asked):
            if one is not None and not unwanted[i]:
                kinds.setdefault(one.sampling, []).append(i)
        depths, exits = self._exits(len(names))
        for params, rows in kinds.items():
            which = torch.tensor(rows, device=logits.device)
            chosen = [one for i in rows if (one := asked[i]) is not None]
            drawn = [one.uniform(len(one.depths), len(one.depths) + 1, len(self.exit_depths)) for one in chosen]
            uniform = torch.from_numpy(np.concatenate(drawn)[:, -1]).to(logits.device)
            wide = logits[which].float()
            sampled = sample_tokens(wide, params, uniform)
            given = [
                (j, one.given[len(one.depths)]) for j, one in enumerate(chosen) if len(one.depths) < len(one.given)
            ]
            if given:
                sampled = prescribe(wide, params, sampled, given)
            tokens[which] = sampled[0]
            columns = (column.tolist() for column in sampled)
            for i, one, token, logprob, full in zip(rows, chosen, *columns, strict=True):
                self.made.append(Made(one.name, token, depths[i], logprob, full, exits[i]))
                one.depths.append(depths[i])
        logprobs = None if others is None else others.logprobs_tensors
        return SamplerOutput(sampled_token_ids=tokens.to(torch.int32).unsqueeze(-1), logprobs_tensors=logprobs)

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
