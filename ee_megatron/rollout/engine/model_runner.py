"""Runs the model for rows: prefill of their prompts, a segment of layers with its gate, sampling of the next tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...exit_rules import RULES, AtExit
from ...exits import gate_log_term
from ...tensors import to_device, to_host
from .cache import Slots
from .decoder import Decoder, Prefilled
from .layer_backends import Rows
from .prompts import pad
from .request import Event, Row, check_logits
from .sampling import most_probable, prescribe, sample_tokens, uniforms

# Prompt positions read in one parallel forward, padding included, and before rows start: bounds a prefill's memory.
PREFILL_POSITIONS = 8192
# A shorter common beginning isn't worth a forward of its own.
SHORTEST_PREFIX = 8
K = TypeVar("K")


class Read(NamedTuple):
    """The prefilled parts of a prompt in order (a common beginning may be one), and logits [V] at its end."""

    parts: tuple[Prefilled, ...]
    logits: Tensor


class Prefiller:
    """Prefills `positions` (None: PREFILL_POSITIONS) at a time, longer prompts alone; stores what waiting rows need."""

    def __init__(self, decoder: Decoder, positions: int | None):
        self.decoder, self.positions = decoder, positions or PREFILL_POSITIONS
        self._read: dict[tuple[int, ...], Read] = {}
        self._prefix: tuple[tuple[int, ...], Prefilled] | None = None

    def share_prefix(self, tokens: Sequence[int]) -> None:
        """Prefill a common beginning once; prompts that continue it start from there."""
        self._prefix = None
        if len(tokens) >= SHORTEST_PREFIX:
            row = torch.tensor([list(tokens)], device=self.decoder.device)
            self._prefix = tuple(tokens), self.decoder.prefill(row, torch.tensor([len(tokens)]))[0]

    def lacks(self, row: Row) -> bool:
        """Whether a row's prompt is still to be prefilled."""
        return bool(row.read) and row.read not in self._read

    def of(self, row: Row) -> Read:
        """The prefilled prompt of a row. Raises KeyError."""
        return self._read[row.read]

    def parts(self, row: Row) -> tuple[Prefilled, ...]:
        """Keys and values of a row's prompt; () if nothing has to be prefilled before the row runs."""
        return self._read[row.read].parts if row.read else ()

    def prefill(self, wanted: Iterable[tuple[int, ...]]) -> None:
        """Prefill prompts, grouped by length to reduce padding."""
        head, prefix = self._prefix or ((), None)
        prompts = sorted(wanted, key=len, reverse=True)
        inside = [p for p in prompts if prefix and len(p) > len(head) and p[: len(head)] == head]
        outside = [p for p in prompts if p not in set(inside)]
        for group, past in ((inside, prefix), (outside, None)):
            start = len(head) if past else 0
            before = (past,) if past else ()
            while group:
                count = max(1, self.positions // (len(group[0]) - start))
                part, group = group[:count], group[count:]
                tokens, lengths = pad([p[start:] for p in part], self.decoder.device)
                prefilled = self.decoder.prefill(tokens, lengths, past)
                logits = self.decoder.readout(torch.stack([p.hidden for p in prefilled]))
                for prompt, own, last in zip(part, prefilled, logits, strict=True):
                    self._read[prompt] = Read((*before, own), last)

    def forget(self, waiting: Iterable[Row]) -> None:
        """Keep only prompts of waiting rows, next ones first, up to `positions`: they take memory beside the cache."""
        needed, room = set[tuple[int, ...]](), self.positions
        for row in waiting if self._read else ():
            if row.read in self._read and row.read not in needed and len(row.read) <= room:
                needed.add(row.read)
                room -= len(row.read)
        self._read = {tokens: read for tokens, read in self._read.items() if tokens in needed}


class ModelRunner:
    """Runs rows that have slots; stores per slot the state of the token in progress: stream [D], random numbers float64
    [M+1], log q of its exits so far, the exit rules' state."""

    def __init__(self, decoder: Decoder, slots: Slots, count: int):
        self.decoder, self.slots = decoder, slots
        device, M = decoder.device, len(decoder.layout.depths)
        self._hidden = torch.zeros(count, decoder.dims.hidden, dtype=decoder.dtype, device=device)
        self._uniform = torch.zeros(count, M + 1, dtype=torch.float64, device=device)
        self._exit_logprob = torch.zeros(count, device=device)
        most = max(rule.state_size for rule in RULES.values())
        self._state = torch.zeros(count, most, dtype=torch.float64, device=device)

    def segment(self, index: int, rows: list[Row]) -> list[bool]:
        """Run the layers up to exit `index` and evaluate its gate; returns which rows exit. After an exception the rows
        can run this segment again."""
        decoder, device = self.decoder, self.decoder.device
        if index == 0:
            self.slots.hold(rows)
        at = self._at(rows)
        slots = at.slots
        if index == 0:
            hidden = decoder.weights.embedding[to_device(torch.tensor([row.last for row in rows]), device)]
            self._uniform[slots] = self.draw(rows)
            self._exit_logprob[slots] = 0.0
            self._state[slots] = 0.0
        else:
            hidden = self._hidden[slots]
        hidden = decoder.run_segment(index, hidden, self.slots.cache, at)
        last = index == len(decoder.layout.depths)
        leave = [True] * len(rows) if last else self.leave(index, rows, hidden, slots)
        self._hidden[slots] = hidden
        for row in rows:
            row.segment = index
        return leave

    def _at(self, rows: list[Row]) -> Rows:
        return self.decoder.rows(self.slots.cache, [row.slot for row in rows], [row.length - 1 for row in rows])

    def leave(self, exit_index: int, rows: list[Row], hidden: Tensor, slots: Tensor) -> list[bool]:
        """Evaluate the exit rule of each row; records the exits' log-probabilities if there are gates."""
        decoder, depth = self.decoder, self.decoder.layout.depths[exit_index]
        gated = decoder.gates is not None
        logit = decoder.gate_logit(exit_index, hidden) if gated else torch.zeros(len(rows), device=decoder.device)
        leave = [False] * len(rows)
        noted: list[tuple[Tensor, Tensor]] = []
        for rule, members, which in alike([row.request.exits for row in rows], decoder.device):
            streams, places = hidden[which], slots[which]
            at = AtExit(
                exit_index,
                depth,
                logit[which],
                readout=partial(decoder.readout, streams),
                uniform=partial(self._drawn, places),
                tokens=partial(_named, [rows[i] for i in members]),
                state=self._state[places, : rule.state_size],
            )
            for i, gone in zip(members, to_host(rule.should_exit(at))[0].tolist(), strict=True):
                leave[i] = gone
            noted.append((places, at.state))
        # Once all rules have answered: where one can't, the rows come here again.
        for places, state in noted:
            self._state[places, : state.shape[1]] = state
        if gated:
            taken = to_device(torch.tensor([depth if gone else depth + 1 for gone in leave]), decoder.device)
            self._exit_logprob[slots] += gate_log_term(logit, taken, depth)
        return leave

    def _drawn(self, slots: Tensor, exit_index: int) -> Tensor:
        return self._uniform[slots, exit_index]

    def readout(self, rows: list[Row]) -> list[Event]:
        """Sample the next tokens of rows, ordered by `segment`, then write the keys and values of the layers that
        they skipped. Exception-safe: rows get their tokens from the caller."""
        at = self._at(rows)
        slots = at.slots
        hidden = self._hidden[slots]
        depths = [self.decoder.layout.outcomes[row.segment] for row in rows]
        exits = to_host(self._exit_logprob[slots])[0].tolist()
        new = self.sample(rows, self.decoder.readout(hidden), self._uniform[slots, -1], depths, exits)
        self.decoder.write_skipped(hidden, [row.segment for row in rows], self.slots.cache, at)
        return new

    def first(self, rows: list[Row], logits: list[Tensor]) -> list[Event]:
        """Sample first tokens from logits [V] at the end of each prompt, where positions don't exit."""
        depths = [self.decoder.dims.num_layers] * len(rows)
        return self.sample(rows, torch.stack(logits), self.draw(rows)[:, -1], depths, [0.0] * len(rows))

    def sample(
        self, rows: list[Row], logits: Tensor, uniform: Tensor, depths: list[int], exits: list[float]
    ) -> list[Event]:
        """Tokens from logits [R, V] by each row's own sampling parameters. Raises ValueError for NaN among them."""
        sampled: list[tuple] = [()] * len(rows)
        for params, members, which in alike([row.request.sampling.distribution for row in rows], logits.device):
            histories = [(rows[i].prompt_tokens, rows[i].tokens) for i in members] if params.is_penalised else ()
            drawn = sample_tokens(logits[which], params, uniform[which], histories)
            given = [(j, token) for j, i in enumerate(members) if (token := rows[i].given) is not None]
            if given:
                drawn = prescribe(logits[which], params, drawn, given)
            tokens, logprobs, full = (column.tolist() for column in to_host(*drawn))
            check_logits(full)
            best = most_probable(logits[which], params, [rows[i].request.top_logprobs for i in members])
            for i, *made in zip(members, tokens, logprobs, full, best, strict=True):
                sampled[i] = tuple(made)
        return [
            Event(row.id, token, depth, logprob, full, exit_logprob, row.ending(token), top)
            for row, depth, exit_logprob, (token, logprob, full, top) in zip(rows, depths, exits, sampled, strict=True)
        ]

    def draw(self, rows: list[Row], ahead: Sequence[int] = ()) -> Tensor:
        """Random numbers float64 [R, M+1]: one per gate and one for the token that each row generates next, or for the
        one so many places `ahead`."""
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        at = np.array([len(row.tokens) for row in rows]) + np.array(ahead or [0])
        draws = len(self.decoder.layout.depths) + 1
        return to_device(torch.from_numpy(uniforms(keys, at, draws)), self.decoder.device)


def alike(kinds: Sequence[K], device: torch.device) -> Iterator[tuple[K, list[int], slice | Tensor]]:
    """Each kind, at which places it stands, and the same as an index."""
    places: dict[K, list[int]] = {}
    for i, kind in enumerate(kinds):
        places.setdefault(kind, []).append(i)
    for kind, members in places.items():
        yield kind, members, slice(None) if len(places) == 1 else to_device(torch.tensor(members), device)


def _named(rows: list[Row]) -> list[tuple[str, int, int]]:
    return [(row.request.prompt_id, row.request.sample, len(row.tokens)) for row in rows]
