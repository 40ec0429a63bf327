"""Self-speculation: shallow exits draft tokens, the layers behind them check the drafts together, and the answer is
full depth's (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710).

A draft leaves at the first exit whose gate would let it, but nothing of it is frozen: when a later position goes
deeper, the positions before it go along in the same batch, which reads the weights once for all. So all that drafting
computes is the full model's own, and the check only goes on. A token is sampled from full depth's distribution with the
random number that its place has anyway, and a draft stands where it is that token. So a seed gives the answer that it
gives without drafts, token by token, which is more than the same distribution (Leviathan et al. 2023, arXiv 2211.17192,
accept more often).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...exit_rules import Speculate
from ...tensors import to_device, to_host
from .decoder import Decoder
from .linear import WideLinear
from .model_runner import ModelRunner, alike
from .request import Event, Row, check_logits
from .sampling import SamplingParams, sample_tokens

# Tokens drafted at most before a check.
FURTHEST = 16
# Hazard above which a draft leaves.
CERTAIN = 0.5
# Share of the vocabulary that drafts choose among at most, and the size below which the whole is no cost.
DRAFT_SHARE, SMALL_VOCABULARY = 1 / 8, 4096


@dataclass(eq=False)
class Position:
    """A position of a row whose token may still be thrown away: the stream [D] behind its first `segments` segments."""

    row: Row
    offset: int
    stream: Tensor
    segments: int = 0


class DraftHead:
    """Readout over the tokens that were seen lately in prompts and answers: in a small model the whole head is a fifth
    of the weights, which every draft would read (FR-Spec, Zhao et al. 2025, arXiv 2502.14856)."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.size = decoder, int(decoder.dims.vocab * DRAFT_SHARE)
        self._seen: dict[int, None] = {}
        self._head: tuple[Tensor, WideLinear] | None = None

    def see(self, tokens: Iterable[int]) -> None:
        """Let drafts choose these tokens from now on, and forget the oldest where there are too many."""
        new = [token for token in tokens if token not in self._seen]
        if new:
            self._seen.update(dict.fromkeys(new))
            while len(self._seen) > self.size:
                del self._seen[next(iter(self._seen))]
            self._head = None

    def __call__(self, stream: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
        """Logits float32 [A, n] of streams [A, D], and the tokens int64 [n] that they are of; None: of all."""
        decoder = self.decoder
        if decoder.dims.vocab <= SMALL_VOCABULARY or params.is_penalised:
            return decoder.readout(stream), None
        if self._head is None:
            tokens = torch.tensor(sorted(self._seen), device=decoder.device)
            self._head = tokens, decoder.weights.head_of(tokens)
        tokens, head = self._head
        return head(decoder.norm(stream, decoder.weights.final_norm)), tokens


class Speculation:
    """Drafts and checks for rows with slots. Counts over its life: checks of a row (`passes`), tokens `drafted` and
    `accepted`, layers times positions (`row_layers`), how often each segment's weights were read (`reads`)."""

    def __init__(self, runner: ModelRunner):
        self.runner, self.decoder, self.cache = runner, runner.decoder, runner.slots.cache
        self.head = DraftHead(runner.decoder)
        self.passes = self.drafted = self.accepted = self.row_layers = 0
        self.reads = [0] * len(self.decoder.layout.outcomes)

    def advance(self, rows: list[Row]) -> list[Event]:
        """Draft for rows of one rule, check, and append the tokens that full depth makes: one or more to each row.
        After an exception the rows are as before."""
        rule = rows[0].request.exits
        assert isinstance(rule, Speculate)
        for row in rows:
            # All of a row that begins, later what its last check can have added.
            self.head.see(row.tokens[-FURTHEST - 1 :] if len(row.tokens) > 1 else (*row.prompt_tokens, *row.tokens))
        outcomes = self.decoder.layout.outcomes
        drafts, ran = self._draft(rows, 1 + outcomes.index(int(rule.value)))
        positions = [position for of_row in ran for position in of_row]
        for segment in range(len(outcomes)):
            self._climb(positions, segment)
        logits = self.decoder.readout(torch.stack([position.stream for position in positions]))
        # Before any row takes a token.
        check_logits(to_host(logits.sum(-1))[0].tolist())
        self.passes += len(rows)
        self.drafted += sum(map(len, drafts))
        self.row_layers += len(positions) * outcomes[-1]
        return self._accept(rows, drafts, logits.split(list(map(len, ran))))

    def _draft(self, rows: list[Row], deepest: int) -> tuple[list[list[int]], list[list[Position]]]:
        """Each row's drafts, which leave within the first `deepest` segments, and the positions that run: the last
        token's, then those of the drafts; not that of a draft which would end the answer."""
        budgets = [self._budget(row) for row in rows]
        self.cache.hold([row.slot for row in rows], [row.length + n for row, n in zip(rows, budgets, strict=True)])
        drafts: list[list[int]] = [[] for _ in rows]
        ran: list[list[Position]] = [[] for _ in rows]
        running = list(range(len(rows)))
        while running:
            last = [drafts[i][-1] if drafts[i] else rows[i].last for i in running]
            embedded = self.decoder.weights.embedding[to_device(torch.tensor(last), self.decoder.device)]
            for i, stream in zip(running, embedded, strict=True):
                ran[i].append(Position(rows[i], len(drafts[i]), stream))
            climbing = [i for i in running if len(drafts[i]) < budgets[i]]
            running = []
            for segment in range(deepest):
                self._climb([position for i in climbing for position in ran[i]], segment)
                leaving = self._leaving([ran[i][-1] for i in climbing], segment, segment + 1 == deepest)
                gone = [i for i, leaves in zip(climbing, leaving, strict=True) if leaves]
                climbing = [i for i, leaves in zip(climbing, leaving, strict=True) if not leaves]
                for i, token in zip(
                    gone, self._propose([ran[i][-1] for i in gone], [drafts[i] for i in gone]), strict=True
                ):
                    drafts[i].append(token)
                    if token not in rows[i].stopping.end_ids:
                        running.append(i)
                if not climbing:
                    break
        return drafts, ran

    def _climb(self, positions: Sequence[Position], segment: int) -> None:
        """Run a segment for those positions that come to it next."""
        here = [position for position in positions if position.segments == segment]
        if not here:
            return
        self.reads[segment] += 1
        places = [position.row.length - 1 + position.offset for position in here]
        at = self.decoder.rows(self.cache, [position.row.slot for position in here], places)
        streams = torch.stack([position.stream for position in here])
        for position, stream in zip(here, self.decoder.run_segment(segment, streams, self.cache, at), strict=True):
            position.stream, position.segments = stream, segment + 1

    def _leaving(self, positions: list[Position], exit_index: int, last: bool) -> list[bool]:
        """Which positions draft at this exit: by its gate; where there are no gates, all at the last."""
        if self.decoder.gates is None or not positions:
            return [last] * len(positions)
        logit = self.decoder.gate_logit(exit_index, torch.stack([position.stream for position in positions]))
        return to_host(logit.sigmoid() > CERTAIN)[0].tolist()

    def _propose(self, positions: list[Position], drafts: list[list[int]]) -> list[int]:
        """Tokens that would follow if the positions left here."""
        tokens, rows = [0] * len(positions), [position.row for position in positions]
        if not positions:
            return tokens
        uniform = self.runner.draw(rows, [len(draft) for draft in drafts])[:, -1]
        streams = torch.stack([position.stream for position in positions])
        for params, members, which in alike([row.request.sampling.distribution for row in rows], streams.device):
            logits, names = self.head(streams[which], params)
            histories = [(rows[i].prompt_tokens, [*rows[i].tokens, *drafts[i]]) for i in members]
            drawn = sample_tokens(logits, params, uniform[which], histories if params.is_penalised else ())[0]
            for i, token in zip(members, to_host(drawn if names is None else names[drawn])[0].tolist(), strict=True):
                tokens[i] = token
        return tokens

    def _accept(self, rows: list[Row], drafts: list[list[int]], logits: Sequence[Tensor]) -> list[Event]:
        """Append full depth's tokens, from each row's logits [its positions, V], for as long as the drafts are these
        tokens."""
        events, going, j = list[Event](), list(range(len(rows))), 0
        while going := [i for i in going if j < len(logits[i])]:
            now = [rows[i] for i in going]
            depths = [self.decoder.dims.num_layers] * len(now)
            here = torch.stack([logits[i][j] for i in going])
            new = self.runner.sample(now, here, self.runner.draw(now)[:, -1], depths, [0.0] * len(now))
            remaining = []
            for i, event in zip(going, new, strict=True):
                right = j < len(drafts[i]) and drafts[i][j] == event.token
                self.accepted += right
                events.append(rows[i].append(event._replace(drafted=right)))
                if right and rows[i].finished is None:
                    remaining.append(i)
                else:
                    rows[i].ahead = self._next_budget(rows[i].ahead, len(drafts[i]), j + right)
            going, j = remaining, j + 1
        return events

    @staticmethod
    def _budget(row: Row) -> int:
        """How many tokens to draft: none where the next one is prescribed, and none behind the answer's end."""
        if row.given is not None:
            return 0
        return min(row.ahead, row.request.sampling.max_new_tokens - len(row.tokens) - 1)

    @staticmethod
    def _next_budget(ahead: int, drafted: int, accepted: int) -> int:
        """Two more where all stood, else one less, as assisted generation in transformers has it."""
        return min(ahead + 2, FURTHEST) if accepted >= drafted else max(1, ahead - 1)
