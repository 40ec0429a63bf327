"""Self-speculation: a shallow exit drafts tokens, the layers behind it check them together, and the answer is full
depth's (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710).

A draft leaves the model at one depth for all positions, so nothing frozen stands in the cache and all that the draft
computed is the full model's own: the check goes on from the drafts' streams. A token is sampled from full depth's
distribution with the random number that its place has anyway, and a draft stands where it is that token. So a seed
gives the answer that it gives without drafts, token by token, which is more than the same distribution (Leviathan et
al. 2023, arXiv 2211.17192, accept more often).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ...exit_rules import Speculate
from ...tensors import to_device, to_host
from .model_runner import ModelRunner, alike
from .request import Event, Row, check_logits
from .sampling import sample_tokens

# Tokens drafted at most before a check.
FURTHEST = 16


class Speculation:
    """Drafts and checks for rows with slots. Counts over its life: `passes` of the deep layers, tokens `drafted` and
    `accepted`. `row_layers`: layers times positions of the last `advance`."""

    def __init__(self, runner: ModelRunner):
        self.runner, self.decoder, self.cache = runner, runner.decoder, runner.slots.cache
        self.passes = self.drafted = self.accepted = self.row_layers = 0

    def advance(self, rows: list[Row]) -> list[Event]:
        """Draft for rows of one rule, check, and append the tokens that full depth makes: one or more to each row.
        After an exception the rows are as before."""
        rule = rows[0].request.exits
        assert isinstance(rule, Speculate)
        depth = int(rule.value)
        drafts, streams = self._draft(rows, depth)
        counts = [len(row_streams) for row_streams in streams]
        at = self._at(
            [row for row, n in zip(rows, counts, strict=True) for _ in range(n)], [j for n in counts for j in range(n)]
        )
        hidden = torch.stack([stream for row_streams in streams for stream in row_streams])
        layers = self.decoder.dims.num_layers
        hidden = self.decoder.run_layers(depth, layers, hidden, self.cache, at)
        logits = self.decoder.readout(hidden)
        check_logits(to_host(logits.sum(-1))[0].tolist())
        self.row_layers = sum(counts) * layers
        self.passes += len(rows)
        self.drafted += sum(map(len, drafts))
        return self._accept(rows, drafts, counts, logits)

    def _draft(self, rows: list[Row], depth: int) -> tuple[list[list[int]], list[list[Tensor]]]:
        """Each row's drafts, and the streams [D] at `depth` of the positions that ran: the last token's, then those of
        the drafts; not that of a draft which would end the answer."""
        budgets = [self._budget(row) for row in rows]
        self.cache.hold([row.slot for row in rows], [row.length + n for row, n in zip(rows, budgets, strict=True)])
        drafts: list[list[int]] = [[] for _ in rows]
        streams: list[list[Tensor]] = [[] for _ in rows]
        running = list(range(len(rows)))
        while running:
            now = [rows[i] for i in running]
            last = [drafts[i][-1] if drafts[i] else rows[i].last for i in running]
            hidden = self.decoder.weights.embedding[to_device(torch.tensor(last), self.decoder.device)]
            at = self._at(now, [len(drafts[i]) for i in running])
            hidden = self.decoder.run_layers(0, depth, hidden, self.cache, at)
            for i, stream in zip(running, hidden, strict=True):
                streams[i].append(stream)
            drafting = [k for k, i in enumerate(running) if len(drafts[i]) < budgets[i]]
            running = [running[k] for k in drafting]
            if running:
                places = hidden if len(drafting) == len(hidden) else hidden[drafting]
                tokens = self._propose([rows[i] for i in running], [drafts[i] for i in running], places)
                for i, token in zip(running, tokens, strict=True):
                    drafts[i].append(token)
                running = [i for i in running if drafts[i][-1] not in rows[i].stopping.end_ids]
        return drafts, streams

    def _propose(self, rows: list[Row], drafts: list[list[int]], hidden: Tensor) -> list[int]:
        """Tokens that the streams [A, D] would be followed by if they left here."""
        logits, tokens = self.decoder.readout(hidden), [0] * len(rows)
        uniform = self.runner.draw(rows, [len(draft) for draft in drafts])[:, -1]
        for params, members, which in alike([row.request.sampling.distribution for row in rows], logits.device):
            histories = [(rows[i].prompt_tokens, [*rows[i].tokens, *drafts[i]]) for i in members]
            drawn = sample_tokens(logits[which], params, uniform[which], histories if params.is_penalised else ())
            for i, token in zip(members, to_host(drawn[0])[0].tolist(), strict=True):
                tokens[i] = token
        return tokens

    def _accept(self, rows: list[Row], drafts: list[list[int]], counts: Sequence[int], logits: Tensor) -> list[Event]:
        """Append full depth's tokens, from logits [sum of counts, V], for as long as the drafts are these tokens."""
        events, going = list[Event](), list(range(len(rows)))
        starts = [0, *accumulate(counts)]
        for j in range(max(counts)):
            going = [i for i in going if j < counts[i]]
            now = [rows[i] for i in going]
            if not now:
                break
            places = to_device(torch.tensor([starts[i] + j for i in going]), logits.device)
            depths = [self.decoder.dims.num_layers] * len(now)
            new = self.runner.sample(now, logits[places], self.runner.draw(now)[:, -1], depths, [0.0] * len(now))
            remaining = []
            for i, event in zip(going, new, strict=True):
                right = j < len(drafts[i]) and drafts[i][j] == event.token
                self.accepted += right
                events.append(rows[i].append(event._replace(drafted=right)))
                if right and rows[i].finished is None:
                    remaining.append(i)
                else:
                    rows[i].ahead = self._next_budget(rows[i].ahead, len(drafts[i]), j + right)
            going = remaining
        return events

    def _budget(self, row: Row) -> int:
        """How many tokens to draft: none where the next one is prescribed, and none behind the answer's end."""
        if row.given is not None:
            return 0
        return min(row.ahead, row.request.sampling.max_new_tokens - len(row.tokens) - 1)

    @staticmethod
    def _next_budget(ahead: int, drafted: int, accepted: int) -> int:
        """Two more where all stood, else one less, as assisted generation in transformers has it."""
        return min(ahead + 2, FURTHEST) if accepted >= drafted else max(1, ahead - 1)

    def _at(self, rows: list[Row], offsets: Sequence[int]):
        positions = [row.length - 1 + offset for row, offset in zip(rows, offsets, strict=True)]
        return self.decoder.rows(self.cache, [row.slot for row in rows], positions)
