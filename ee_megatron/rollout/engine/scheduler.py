"""The rollout engine: requests come and go at any time, rows advance independently, and every segment runs many rows.

A row is a request that has a cache slot. It waits before the next segment between exits; `Scheduler.advance` runs one
segment for the rows that wait there (stations.py says which), or the readout for rows that took an exit, or reads
prompts for free slots. What comes out does not depend on that order: each answer has random numbers of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...exit_rules import RULES, AtExit, ExitRule
from ...exits import gate_log_term
from ...types import Prompt, Rollout
from .cache import PAGE, KVCache, pages_for
from .decoder import Decoder, Prefilled
from .intake import Intake
from .ops import Rows
from .prompts import common_beginning, encode_continuation, encode_text, pad
from .request import Event, GenerationRequest, Request, Row
from .sampling import SamplingParams, log_prob, most_probable, sample_tokens, uniforms
from .stations import Stations

# Prompt positions read in one parallel forward, padding included, and before rows start: bounds a prefill's memory.
PREFILL_POSITIONS = 8192
# A shorter common beginning isn't worth a forward of its own.
SHORTEST_PREFIX = 8
# Where short requests pass long ones: a long one can come to need more than so much of the cache, and all of them that
# run together no more than their share, unless it is a single one.
LONG, SHARE_OF_LONG = 1 / 16, 1 / 2

Progress = Callable[[int, int], None]
# Told of a request by its id that it alone can't go on, and why.
Failed = Callable[[int, Exception], None]


class Scheduler:
    """At most `in_flight` requests at a time have a slot, at most `batch` (default: all) run together.

    `positions` bounds the cache (None: it takes what the rows need). Requests wait until what they can come to need
    fits beside what those in flight can: no row that has begun is ever short of a page, or put back to make room.

    With `passing` short requests don't wait for long ones that the cache has no room for; each kind keeps its order.
    Prompts are read `reading` positions (None: PREFILL_POSITIONS) at a time, longer ones alone. With `failed` a piece
    of work that can't be done for several requests is tried for each by itself; only who fails then is forgotten, and
    told of.

    `add` requests at any time, `advance` while `busy`, `take` finished answers. Not thread-safe: one owner.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        in_flight: int,
        batch: int | None = None,
        positions: int | None = None,
        reading: int | None = None,
        passing: bool = False,
        failed: Failed | None = None,
    ):
        batch = in_flight if batch is None else batch
        if in_flight < 1 or batch < 1:
            raise ValueError(f"in_flight={in_flight}, batch={batch}: both must be at least 1")
        self.decoder, self.tokenizer, self.in_flight = decoder, tokenizer, in_flight
        self._reading, self._passing, self._failed = reading or PREFILL_POSITIONS, passing, failed
        self._entering: list[Row] = []
        if positions is not None and positions < PAGE:
            raise ValueError(f"positions={positions}: the cache must have room for at least a page, {PAGE} positions")
        limit = None if positions is None else positions // PAGE
        self.cache = KVCache(decoder.dims, in_flight, decoder.dtype, decoder.device, limit)
        # One per segment, then the readout.
        self.stations = Stations(len(decoder.layout.outcomes) + 1, batch)
        self.waiting: deque[Row] = deque()
        self.finished: dict[int, Row] = {}
        self.row_layers = 0
        self._free = list(range(in_flight))[::-1]
        self._next_id = 0
        # What of prompts has been read, and the logits [V] at its end.
        self._read: dict[tuple[int, ...], tuple[Prefilled, Tensor]] = {}
        # Slots of rows in flight that hold whole pages of what was read of their prompts together, by what that is.
        self._together: dict[tuple[int, ...], list[int]] = {}
        self._intake = Intake(tokenizer, decoder.eos_ids, decoder.layout, decoder.dims.max_positions)
        self._prefix: tuple[tuple[int, ...], Prefilled] | None = None
        device, M = decoder.device, len(decoder.layout.depths)
        self._hidden = torch.zeros(in_flight, decoder.dims.hidden, dtype=decoder.dtype, device=device)
        self._uniform = torch.zeros(in_flight, M + 1, dtype=torch.float64, device=device)
        self._exit_logprob = torch.zeros(in_flight, device=device)
        most = max(rule.notes for rule in RULES.values())
        self._notes = torch.zeros(in_flight, most, dtype=torch.float64, device=device)

    # ---- requests ----

    def add(self, request: Request) -> int:
        """Queue a request; its id. Raises ValueError for what this decoder can't answer."""
        row = self._intake.begin(self._next_id, request, self.decoder.gates is not None)
        limit = self.cache.limit
        if limit is not None and pages_for(row.longest) > limit:
            raise ValueError(
                f"prompt and answer take up to {row.longest} positions, the cache has {limit * PAGE}; "
                "enlarge it, shorten the prompts or lower max_new_tokens"
            )
        self._next_id += 1
        self.waiting.append(row)
        return row.id

    def cancel(self, request: int) -> bool:
        """Forget a request, in whatever state; False if it is not known (any more)."""
        if self.finished.pop(request, None) is not None:
            return True
        for row in self.waiting:
            if row.id == request:
                self.waiting.remove(row)
                self._forget_unneeded()
                return True
        for row in self.stations:
            if row.id == request:
                self.stations.remove(row)
                self._give_back(row)
                return True
        return False

    def take(self, request: int, version: int) -> Rollout:
        """A finished answer, which is forgotten. Raises KeyError for one that isn't finished."""
        return self.finished.pop(request).rollout(version)

    def take_unfinished(self, request: int, version: int) -> Rollout:
        """An answer as far as it has come, without a token if it has not begun; it is forgotten. Raises KeyError.

        What it lacks can be had from any scheduler, under any weights, by another request with this as `begun`.
        """
        for row in [*self.finished.values(), *self.waiting, *self.stations]:
            if row.id == request:
                self.cancel(request)
                return row.rollout(version)
        raise KeyError(request)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or len(self.stations))

    @property
    def free(self) -> int:
        """Slots that no request has."""
        return len(self._free)

    def share_prefix(self, tokens: Sequence[int]) -> None:
        """Read a common beginning once; prompts that begin with it and go on are read from there."""
        self._prefix = None
        if len(tokens) >= SHORTEST_PREFIX:
            row = torch.tensor([list(tokens)], device=self.decoder.device)
            self._prefix = tuple(tokens), self.decoder.prefill(row, torch.tensor([len(tokens)]))[0]

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        """One piece of work: prompts enter free slots, or one station runs. Returns an event per new token.

        Where it raises, nothing of it is kept: whoever asked for what can't be done may be cancelled, the others go on.
        """
        started = self._admit_all()
        # No row is under way here: pages may move.
        self.cache.trim()
        if started or not len(self.stations):
            return started
        return self._run_all(*self.stations.take())

    def _run_all(self, station: int, rows: list[Row]) -> list[Event]:
        """A station's rows together; where that fails and someone is to be told, each by itself."""
        work = self._readout if station == len(self.stations.queues) - 1 else partial(self._run, station)
        try:
            return work(rows)
        except Exception as error:
            if self._failed is None or len(rows) == 1:
                self.stations.queues[station][:0] = rows
            if self._failed is None:
                raise
            if len(rows) == 1:
                self._give_up(rows[0], error)
                return []
        return [event for row in rows for event in self._run_all(station, [row])]

    def _admit_all(self) -> list[Event]:
        """New rows together; where that fails and someone is to be told, each by itself."""
        waiting = len(self.waiting)
        try:
            return self._admit(waiting)
        except Exception:
            if self._failed is None:
                raise
        events: list[Event] = []
        for _ in range(waiting):
            left = len(self.waiting)
            try:
                events += self._admit(1)
            except Exception as error:
                self._give_up(self._entering[0], error)
            if len(self.waiting) == left:
                break
        return events

    def _give_up(self, row: Row, error: Exception) -> None:
        assert self._failed is not None
        self.cancel(row.id)
        self._failed(row.id, error)

    # ---- entering ----

    def _admit(self, most: int) -> list[Event]:
        """Let rows in, `most` at most. Where it raises they wait as before."""
        free = min(most, len(self._free))
        if not free or not self.waiting:
            return []
        # Reading prompts one by one wastes the batch: wait for a few free slots unless the next prompt is read.
        if self._unread(self.waiting[0]) and len(self.stations) and len(self._free) < self.in_flight // 8:
            return []
        chosen: list[Row] = []
        begun: list[Row] = []
        unread: dict[tuple[int, ...], None] = {}
        room, held = self._room(), set(self._together)
        while len(chosen) + len(begun) < free and (found := self._next(room, [*chosen, *begun], held)):
            row, needed = found
            room -= needed
            if row.tokens:
                self.waiting.remove(row)
                begun.append(row)
                continue
            if self._unread(row) and row.read not in unread:
                if unread and len(row.read) + sum(map(len, unread)) > self._reading:
                    break
                unread[row.read] = None
            held.add(row.read)
            self.waiting.remove(row)
            chosen.append(row)
        self._entering = [*begun, *chosen]
        try:
            self._go_on(sorted(begun, key=lambda row: -row.length))
            self._read_prompts(sorted(unread, key=len, reverse=True))
            events = self._start(chosen) if chosen else []
        except Exception:
            inside = set(self.stations)
            self._put_back([row for row in self._entering if row not in inside])
            raise
        self._forget_unneeded()
        return events

    def _next(self, room: float, coming: list[Row], held: set[tuple[int, ...]]) -> tuple[Row, int] | None:
        """The row that comes in next, beside those that are `coming`, and the pages that it needs; None: there is no
        room for it."""
        kinds = set[bool]()
        for row in self.waiting:
            long = self._is_long(row)
            if long in kinds:
                continue
            kinds.add(long)
            needed = pages_for(row.longest) - (_common_pages(row) if row.read in held else 0)
            if needed <= (min(room, self._room_of_long(coming)) if long else room):
                return row, needed
            if not self._passing or len(kinds) == 2:
                return None
        return None

    def _is_long(self, row: Row) -> bool:
        limit = self.cache.limit
        return self._passing and limit is not None and pages_for(row.longest) > LONG * limit

    def _room_of_long(self, coming: list[Row]) -> float:
        taken = sum(pages_for(row.longest) for row in (*self.stations, *coming) if self._is_long(row))
        return SHARE_OF_LONG * (self.cache.limit or 0) - taken if taken else math.inf

    def _put_back(self, rows: list[Row]) -> None:
        """Rows that didn't get in wait again, as they came."""
        for row in rows:
            if row.slot >= 0:
                self._give_back(row)
                row.slot = -1
        self.waiting.extendleft(sorted(rows, key=lambda row: -row.id))

    def _unread(self, row: Row) -> bool:
        return bool(row.read) and row.read not in self._read

    def _room(self) -> float:
        """Pages that no row in flight can come to need."""
        if self.cache.limit is None:
            return math.inf
        own = sum(pages_for(row.longest) - _common_pages(row) for row in self.stations)
        return self.cache.limit - own - sum(len(read) // PAGE for read in self._together)

    def _forget_unneeded(self) -> None:
        """Keep what waiting rows need, the next ones' first, up to what is read at a time: it lies beside the cache."""
        needed, room = set[tuple[int, ...]](), self._reading
        for row in self.waiting if self._read else ():
            if row.read in self._read and row.read not in needed and len(row.read) <= room:
                needed.add(row.read)
                room -= len(row.read)
        self._read = {tokens: read for tokens, read in self._read.items() if tokens in needed}

    def _read_prompts(self, prompts: list[tuple[int, ...]]) -> None:
        """Prompts, the longest first: those of like length are read together and pad each other least."""
        head, prefix = self._prefix or ((), None)
        inside = [p for p in prompts if prefix and len(p) > len(head) and p[: len(head)] == head]
        outside = [p for p in prompts if p not in set(inside)]
        for group, past in ((inside, prefix), (outside, None)):
            start = len(head) if past else 0
            while group:
                count = max(1, self._reading // (len(group[0]) - start))
                part, group = group[:count], group[count:]
                tokens, lengths = pad([p[start:] for p in part], self.decoder.device)
                prefilled = self.decoder.prefill(tokens, lengths, past)
                logits = self.decoder.readout(torch.stack([p.hidden for p in prefilled]))
                self._read.update(zip(part, zip(prefilled, logits, strict=True), strict=True))

    def _start(self, rows: list[Row]) -> list[Event]:
        """Sample first tokens, where prompt positions never exit, and give unfinished answers a cache slot."""
        if self.decoder.layout.first_token:
            self._enter([(row, self._read[row.read][0] if row.read else None) for row in rows])
            self._wait_first(rows)
            return []
        prefilled, logits = zip(*(self._read[row.read] for row in rows), strict=True)
        self._enter(list(zip(rows, prefilled, strict=True)), coming=1)
        uniform = self._draw(rows)[:, -1]
        depths = [self.decoder.dims.num_layers] * len(rows)
        events = self._sample(rows, torch.stack(logits), uniform, depths, [0.0] * len(rows))
        self._wait_first([row for row in rows if not self._retire(row)])
        return events

    def _wait_first(self, rows: list[Row]) -> None:
        for row in rows:
            self.stations.put(0, row)

    def _go_on(self, rows: list[Row]) -> None:
        """Give begun answers, the longest first, a cache slot: all but their last token is read at its own exits."""
        decoder = self.decoder
        while rows:
            count = max(1, self._reading // rows[0].length)
            part, rows = rows[:count], rows[count:]
            tokens, lengths = pad([[*row.prompt_tokens, *row.tokens[:-1]] for row in part], decoder.device)
            depths = torch.full(tokens.shape, decoder.dims.num_layers, dtype=torch.int64)
            for b, row in enumerate(part):
                first = len(row.prompt_tokens) - 1
                depths[b, first : first + len(row.tokens)] = torch.tensor(row.exit_depths)
            prefilled = decoder.prefill(tokens, lengths, exit_depths=depths.to(decoder.device))
            self._enter(list(zip(part, prefilled, strict=True)))
            self._wait_first(part)

    def _enter(self, entering: Sequence[tuple[Row, Prefilled | None]], coming: int = 0) -> None:
        """Give rows a cache slot with what has been read of them (None: nothing), and pages for `coming` more."""
        first: list[Row] = []
        others: list[Row] = []
        for row, _ in entering:
            row.slot = self._free.pop()
            alike = self._together.setdefault(row.read, []) if _common_pages(row) else []
            (others if alike else first).append(row)
            alike.append(row.slot)
        self._hold(first, coming)
        for row in others:
            self.cache.share(self._together[row.read][0], row.slot, _common_pages(row))
        self._hold(others, coming)
        shared = {row.slot: PAGE * _common_pages(row) for row in others}
        for row, prefilled in entering:
            parts = [] if prefilled is None else [prefilled]
            if prefilled is not None and prefilled.start:
                assert self._prefix is not None
                parts.insert(0, self._prefix[1])
            for part in parts:
                there = max(0, shared.get(row.slot, 0) - part.start)
                if there < part.keys.shape[1]:
                    self.cache.fill(row.slot, part.start + there, part.keys[:, there:], part.values[:, there:])

    def _hold(self, rows: list[Row], coming: int = 0) -> None:
        """Give rows the pages of what they have: the last token's keys and values are made next."""
        self.cache.hold([row.slot for row in rows], [row.length + coming for row in rows])

    # ---- a station ----

    def _run(self, segment: int, rows: list[Row]) -> list[Event]:
        """One segment, then its gate: each row goes on to the readout or to the next segment. Nobody gets a token."""
        decoder, device = self.decoder, self.decoder.device
        if segment == 0:
            self._hold(rows)
        at = self._at(rows)
        slots = at.slots
        if segment == 0:
            hidden = decoder.weights.embedding[torch.tensor([row.last for row in rows], device=device)]
            self._uniform[slots] = self._draw(rows)
            self._exit_logprob[slots] = 0.0
            self._notes[slots] = 0.0
        else:
            hidden = self._hidden[slots]
        hidden = decoder.run_segment(segment, hidden, self.cache, at)
        bounds, last = (0, *decoder.layout.outcomes), len(decoder.layout.depths)
        leave = [True] * len(rows) if segment == last else self._leave(segment, rows, hidden, slots)
        self._hidden[slots] = hidden
        self.row_layers += len(rows) * (bounds[segment + 1] - bounds[segment])
        for row, gone in zip(rows, leave, strict=True):
            row.segment = segment
            self.stations.put(last + 1 if gone else segment + 1, row)
        return []

    def _at(self, rows: list[Row]) -> Rows:
        return self.decoder.rows(self.cache, [row.slot for row in rows], [row.length - 1 for row in rows])

    def _leave(self, exit_index: int, rows: list[Row], hidden: Tensor, slots: Tensor) -> list[bool]:
        """Ask the exit rule of each row; keeps the exits' log-probabilities where there are gates."""
        decoder, depth = self.decoder, self.decoder.layout.depths[exit_index]
        gated = decoder.gates is not None
        logit = decoder.gate_logit(exit_index, hidden) if gated else torch.zeros(len(rows), device=decoder.device)
        rules: dict[ExitRule, list[int]] = {}
        for i, row in enumerate(rows):
            rules.setdefault(row.request.exits, []).append(i)
        leave = [False] * len(rows)
        noted: list[tuple[Tensor, Tensor]] = []
        for rule, members in rules.items():
            which = slice(None) if len(rules) == 1 else torch.tensor(members, device=decoder.device)
            at = self._at_exit(exit_index, rule, [rows[i] for i in members], hidden[which], logit[which], slots[which])
            for i, gone in zip(members, rule.fires(at).tolist(), strict=True):
                leave[i] = gone
            noted.append((slots[which], at.notes))
        # Once all rules have answered: where one can't, the rows come here again.
        for places, notes in noted:
            self._notes[places, : notes.shape[1]] = notes
        if gated:
            taken = torch.tensor([depth if gone else depth + 1 for gone in leave], device=decoder.device)
            self._exit_logprob[slots] += gate_log_term(logit, taken, depth)
        return leave

    def _at_exit(
        self, exit_index: int, rule: ExitRule, rows: list[Row], hidden: Tensor, logit: Tensor, slots: Tensor
    ) -> AtExit:
        return AtExit(
            exit_index,
            self.decoder.layout.depths[exit_index],
            logit,
            readout=lambda: self.decoder.readout(hidden),
            uniform=lambda i: self._uniform[slots, i],
            tokens=lambda: [(row.request.prompt_id, row.request.sample, len(row.tokens)) for row in rows],
            notes=self._notes[slots, : rule.notes],
        )

    def _readout(self, rows: list[Row]) -> list[Event]:
        """Write the keys and values that rows skipped, and sample their next tokens, which can't be taken back."""
        rows.sort(key=lambda row: row.segment)
        at = self._at(rows)
        slots = at.slots
        hidden = self._hidden[slots]
        depths = [self.decoder.layout.outcomes[row.segment] for row in rows]
        exits = self._exit_logprob[slots].tolist()
        self.decoder.write_skipped(hidden, [row.segment for row in rows], self.cache, at)
        events = self._sample(rows, self.decoder.readout(hidden), self._uniform[slots, -1], depths, exits)
        for row in rows:
            if not self._retire(row):
                self.stations.put(0, row)
        if not self.waiting:
            self.cache.trim()
        return events

    def _sample(
        self, rows: list[Row], logits: Tensor, uniform: Tensor, depths: list[int], exits: list[float]
    ) -> list[Event]:
        """Tokens from logits [R, V] by each row's own sampling parameters; appends them, once all are drawn."""
        kinds: dict[SamplingParams, list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault(row.request.sampling.distribution, []).append(i)
        found: dict[int, tuple] = {}
        for params, members in kinds.items():
            which = slice(None) if len(kinds) == 1 else torch.tensor(members, device=logits.device)
            drawn = sample_tokens(logits[which], params, uniform[which])
            given = [(j, token) for j, i in enumerate(members) if (token := rows[i].given) is not None]
            if given:
                drawn = prescribe(logits[which], params, drawn, given)
            best = most_probable(logits[which], params, [rows[i].request.top_logprobs for i in members])
            columns = (*(column.tolist() for column in drawn), best)
            found.update(zip(members, zip(*columns, strict=True), strict=True))
        return [
            row.append(token, depths[i], logprob, full, exits[i], top)
            for i, row in enumerate(rows)
            for token, logprob, full, top in [found[i]]
        ]

    def _retire(self, row: Row) -> bool:
        """Whether a row has finished; its slot is free then."""
        if row.finished is None:
            return False
        if row.slot >= 0:
            self._give_back(row)
        self.finished[row.id] = row
        return True

    def _give_back(self, row: Row) -> None:
        self._free.append(row.slot)
        self.cache.release(row.slot)
        if _common_pages(row):
            alike = self._together[row.read]
            alike.remove(row.slot)
            if not alike:
                del self._together[row.read]

    def _draw(self, rows: list[Row]) -> Tensor:
        """float64 [R, M+1]: one number per gate and one for the token that each row generates next."""
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        at = np.array([len(row.tokens) for row in rows])
        draws = len(self.decoder.layout.depths) + 1
        return torch.from_numpy(uniforms(keys, at, draws)).to(self.decoder.device)


def _common_pages(row: Row) -> int:
    """Whole pages of what was read of a prompt, which nothing is written to afterwards. Those of an answer that goes
    on are its own: it was read with it."""
    return 0 if row.request.begun is not None else len(row.read) // PAGE


def prescribe(
    logits: Tensor, params: SamplingParams, drawn: tuple[Tensor, Tensor, Tensor], given: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `sample_tokens` drew from logits [R, V], with the (row, token) pairs `given` in place of these rows' own."""
    rows, tokens = (torch.tensor(column, device=logits.device) for column in zip(*given, strict=True))
    taken, logprobs, full = (column.clone() for column in drawn)
    taken[rows] = tokens.to(taken)
    scores = log_prob(logits[rows] / (params.temperature or 1.0), tokens)
    logprobs[rows] = full[rows] = scores.to(full)
    return taken, logprobs, full


def generate(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    version: int,
    progress: Progress | None = None,
    rows: int = 64,
    begun: Sequence[Sequence[Rollout]] = (),
    stop: Callable[[], bool] = lambda: False,
    positions: int | None = None,
) -> list[list[Rollout]]:
    """The answers to every prompt, in the prompts' order, with up to `rows` in flight and as many as fit `positions`.

    A seed gives the same answers whatever `rows` is: to the bit where the decoder's products are its own (linear.py),
    elsewhere up to rounding: another batch may change the last bits of a logit, and with them a choice that hangs on
    these bits. `progress(done, total)` counts answers. Raises ValueError for impossible settings and for prompts
    that do not fit the model.

    Once `stop()` holds, what there is is returned as it is: answers may be unfinished or without a token. As `begun` of
    another call, under these weights or newer ones, such answers go on and finished ones are returned as they are.
    """
    if request.samples < 1 or rows < 1:
        raise ValueError(f"samples={request.samples}, rows={rows}: both must be at least 1")
    scheduler = Scheduler(decoder, tokenizer, min(rows, max(1, request.answers)), positions=positions)
    return answer(scheduler, tokenizer, request, version, progress, begun, stop)


class Engine(Protocol):
    """What `answer` asks of whatever makes the tokens."""

    finished: dict[int, Row]

    def add(self, request: Request) -> int: ...
    def share_prefix(self, tokens: Sequence[int]) -> None: ...
    def advance(self) -> list[Event]: ...
    @property
    def busy(self) -> bool: ...
    def take_unfinished(self, request: int, version: int) -> Rollout: ...


def answer(
    scheduler: Engine,
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    version: int,
    progress: Progress | None = None,
    begun: Sequence[Sequence[Rollout]] = (),
    stop: Callable[[], bool] = lambda: False,
) -> list[list[Rollout]]:
    """`generate` by an engine that has nothing else to do."""
    prompts, samples, total = request.prompts, request.samples, request.answers
    sampling, exits, seed = request.sampling, request.exits, request.seed
    encoded = [encode_text(tokenizer, prompt.text) for prompt in prompts]
    prefills = [encode_continuation(tokenizer, p.prefill) if p.prefill else [] for p in prompts]
    ids: dict[tuple[int, int], int] = {}
    # The longest prompts first, so that rows of like length are read together.
    for p in sorted(range(len(prompts)), key=lambda i: -len(encoded[i])):
        for k in range(samples):
            first = begun[p][k] if begun else None
            if first is None or not is_whole(first, sampling):
                first = first if first is not None and first.length else None
                ids[p, k] = scheduler.add(
                    Request(encoded[p], sampling, exits, seed, prompts[p].id, k, prefill=prefills[p], begun=first)
                )
    scheduler.share_prefix(common_beginning(encoded))
    reported = 0
    while scheduler.busy and not stop():
        scheduler.advance()
        if progress and len(scheduler.finished) > reported:
            reported = len(scheduler.finished)
            progress(reported, total)
    return [
        [scheduler.take_unfinished(ids[p, k], version) if (p, k) in ids else begun[p][k] for k in range(samples)]
        for p in range(len(prompts))
    ]


def is_whole(answer: Rollout, sampling: SamplingParams) -> bool:
    """Whether an answer has ended, by its own doing or at the limit."""
    return answer.finished or answer.length >= sampling.max_new_tokens


def stream(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sampling: SamplingParams,
    exits: ExitRule,
    seed: int = 0,
) -> Iterator[Event]:
    """Sample 0 of `generate`, token by token; the texts concatenate to the rollout's."""
    scheduler = Scheduler(decoder, tokenizer, in_flight=1)
    prefill = encode_continuation(tokenizer, prompt.prefill) if prompt.prefill else []
    scheduler.add(Request(prompt.text, sampling, exits, seed, prompt.id, stream=True, prefill=prefill))
    while scheduler.busy:
        yield from scheduler.advance()
