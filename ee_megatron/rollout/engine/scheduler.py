"""The rollout engine: requests come and go at any time, rows advance independently, and every segment runs many rows.

A row is a request that has a cache slot. It waits before the next segment between exits; `Scheduler.advance` runs one
segment for the rows that wait there (stations.py says which), or the readout for rows that took an exit, or reads
prompts for free slots. What comes out does not depend on that order: each answer has random numbers of its own.

Here is the order of things and what happens when one fails. Who comes in next: waiting.py; reading prompts: reading.py;
slots and pages: slots.py; the work itself: steps.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from ...types import Rollout
from .cache import PAGE, KVCache, pages_for
from .decoder import Decoder
from .intake import Intake
from .reading import Reader
from .request import Event, NextToken, Request, Row
from .slots import Slots
from .stations import Stations
from .steps import Steps
from .waiting import Waiting

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
        if positions is not None and positions < PAGE:
            raise ValueError(f"positions={positions}: the cache must have room for at least a page, {PAGE} positions")
        self.decoder, self.tokenizer, self.in_flight = decoder, tokenizer, in_flight
        limit = None if positions is None else positions // PAGE
        self.cache = KVCache(decoder.dims, in_flight, decoder.dtype, decoder.device, limit)
        self.waiting = Waiting(limit, passing)
        self.reader = Reader(decoder, reading)
        self.slots = Slots(self.cache, in_flight)
        # One per segment, then the readout.
        self.stations = Stations(len(decoder.layout.outcomes) + 1, batch)
        self.steps = Steps(decoder, self.slots, in_flight)
        self.finished: dict[int, Row] = {}
        self.row_layers = 0
        self._intake = Intake(tokenizer, decoder.eos_ids, decoder.layout, decoder.dims.max_positions)
        self._failed = failed
        self._entering: list[Row] = []
        self._next_id = 0

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
        self.waiting.put(row)
        return row.id

    def cancel(self, request: int) -> bool:
        """Forget a request, in whatever state; False if it is not known (any more)."""
        if self.finished.pop(request, None) is not None:
            return True
        for row in self.waiting:
            if row.id == request:
                self.waiting.remove(row)
                self.reader.forget(self.waiting)
                return True
        for row in self.stations:
            if row.id == request:
                self.stations.remove(row)
                self.slots.leave(row)
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
        return bool(len(self.waiting) or len(self.stations))

    @property
    def free(self) -> int:
        """Slots that no request has."""
        return self.slots.free

    def share_prefix(self, tokens: Sequence[int]) -> None:
        """Read a common beginning once; prompts that begin with it and go on are read from there."""
        self.reader.share_prefix(tokens)

    # ---- one piece of work ----

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
        free = min(most, self.slots.free)
        if not free or not len(self.waiting):
            return []
        # Reading prompts one by one wastes the batch: wait for a few free slots unless the next prompt is read.
        if self.reader.lacks(self.waiting.first) and len(self.stations) and self.slots.free < self.in_flight // 8:
            return []
        chosen: list[Row] = []
        begun: list[Row] = []
        unread: dict[tuple[int, ...], None] = {}
        room, held = self.slots.room(self.stations), set(self.slots.together)
        while len(chosen) + len(begun) < free and (
            found := self.waiting.next(room, chain(self.stations, chosen, begun), held)
        ):
            row, needed = found
            room -= needed
            if row.tokens:
                self.waiting.remove(row)
                begun.append(row)
                continue
            if self.reader.lacks(row) and row.read not in unread:
                if unread and len(row.read) + sum(map(len, unread)) > self.reader.positions:
                    break
                unread[row.read] = None
            held.add(row.read)
            self.waiting.remove(row)
            chosen.append(row)
        self._entering = [*begun, *chosen]
        try:
            self._go_on(sorted(begun, key=lambda row: -row.length))
            self.reader.read(sorted(unread, key=len, reverse=True))
            events = self._start(chosen) if chosen else []
        except Exception:
            inside = set(self.stations)
            self._put_back([row for row in self._entering if row not in inside])
            raise
        self.reader.forget(self.waiting)
        return events

    def _go_on(self, rows: list[Row]) -> None:
        """Give begun answers, the longest first, a cache slot."""
        for part, read in self.reader.begun(rows):
            self.slots.enter([(row, [own]) for row, own in zip(part, read, strict=True)])
            self._wait_first(part)

    def _start(self, rows: list[Row]) -> list[Event]:
        """Sample first tokens, where prompt positions never exit, and give answers that go on a cache slot."""
        if self.decoder.layout.first_token:
            self.slots.enter([(row, self.reader.parts(row)) for row in rows])
            self._wait_first(rows)
            return []
        new = self.steps.first(rows, [self.reader.of(row).logits for row in rows])
        going = [row for row, token in zip(rows, new, strict=True) if token.finished is None]
        self.slots.enter([(row, self.reader.parts(row)) for row in going], coming=1)
        return self._append(rows, new)

    def _put_back(self, rows: list[Row]) -> None:
        """Rows that didn't get in wait again, as they came."""
        for row in rows:
            if row.slot >= 0:
                self.slots.leave(row)
        self.waiting.put_back(rows)

    def _wait_first(self, rows: list[Row]) -> None:
        for row in rows:
            self.stations.put(0, row)

    # ---- a station ----

    def _run(self, segment: int, rows: list[Row]) -> list[Event]:
        """One segment, then its gate: each row goes on to the readout or to the next segment. Nobody gets a token."""
        leave = self.steps.segment(segment, rows)
        bounds = (0, *self.decoder.layout.outcomes)
        self.row_layers += len(rows) * (bounds[segment + 1] - bounds[segment])
        for row, gone in zip(rows, leave, strict=True):
            self.stations.put(len(self.stations.queues) - 1 if gone else segment + 1, row)
        return []

    def _readout(self, rows: list[Row]) -> list[Event]:
        """Next tokens, by the order that the readout puts the rows in."""
        new = self.steps.readout(rows)
        events = self._append(rows, new)
        if not len(self.waiting):
            self.cache.trim()
        return events

    def _append(self, rows: list[Row], new: list[NextToken]) -> list[Event]:
        """Give rows their tokens, which can't be taken back: those that go on begin with the next one, the slots of the
        others are free."""
        events = [row.append(token) for row, token in zip(rows, new, strict=True)]
        for row in rows:
            if row.finished is None:
                self.stations.put(0, row)
                continue
            if row.slot >= 0:
                self.slots.leave(row)
            self.finished[row.id] = row
        return events
