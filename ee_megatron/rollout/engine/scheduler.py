"""The rollout engine: requests come and go at any time, rows advance independently, and every segment runs many rows.

A row is a request that has a cache slot. It waits before the next segment between exits; `Scheduler.advance` runs one
segment for the rows that wait there, or the readout for rows that took an exit, or prefills prompts for free slots. The
answers do not depend on that order: each has random numbers of its own.

Running a segment costs a + b * rows, a being the reading of its weights: on a CPU in float32 a is worth about 25 rows.
So rows should run together. Of the orders that were simulated, going through the
segments by depth and skipping those that are nearly empty is the best as long as all rows in flight fit one batch:
the fullest segment first splits the rows into cohorts out of phase (32 rows, mean depth 0.5: 0.69 of the ceiling
against 0.79). With several times as many rows some segment is always full, and nothing is left to gain.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from ...types import Rollout
from .cache import PAGE, KVCache, Slots, common_pages, pages_for
from .decoder import Decoder
from .model_runner import ModelRunner, Prefiller
from .request import Event, Request, RequestValidator, Row

# Called with the id of a request that fails by itself, and why.
Failed = Callable[[int, Exception], None]
# If short requests pass long ones: a long one can come to need more than this share of the cache, and all of them that
# run together no more than their share, unless it is a single one.
LONG, SHARE_OF_LONG = 1 / 16, 1 / 2
# Share of the rows in flight below which a segment is skipped, as long as some other isn't.
HOLD = 0.1


class WaitingQueue:
    """Rows in the order of their ids. `limit`: pages of the cache (None: as many as are asked for).

    With `passing` short rows don't wait for long ones that there is no room for; each kind keeps its order.
    """

    def __init__(self, limit: int | None, passing: bool):
        self.limit, self.passing = limit, passing
        self._rows: deque[Row] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    def first(self) -> Row:
        """Who has waited longest. There must be some row."""
        return self._rows[0]

    def put(self, row: Row) -> None:
        """Let a row wait, behind the others."""
        self._rows.append(row)

    def remove(self, rows: Sequence[Row]) -> None:
        """Take rows out."""
        gone = {row.id for row in rows}
        self._rows = deque(row for row in self._rows if row.id not in gone)

    def next(
        self, room: float, inside: Iterable[Row], read: Set[tuple[int, ...]], chosen: Set[int] = frozenset()
    ) -> tuple[Row, int] | None:
        """The row to admit next, `chosen` ids apart, if `room` pages are left beside the rows `inside`, and the pages
        that it needs (whole ones of a prompt in `read` are there); None: there is no room for it."""
        kinds = set[bool]()
        for row in self._rows:
            if row.id in chosen:
                continue
            long = self._is_long(row)
            if long in kinds:
                continue
            kinds.add(long)
            needed = pages_for(row.longest) - (common_pages(row) if row.read in read else 0)
            if needed <= (min(room, self._room_of_long(inside)) if long else room):
                return row, needed
            if not self.passing or len(kinds) == 2:
                return None
        return None

    def _is_long(self, row: Row) -> bool:
        return self.passing and self.limit is not None and pages_for(row.longest) > LONG * self.limit

    def _room_of_long(self, inside: Iterable[Row]) -> float:
        taken = sum(pages_for(row.longest) for row in inside if self._is_long(row))
        return SHARE_OF_LONG * (self.limit or 0) - taken if taken else math.inf


class SegmentQueues:
    """Queues of rows, by the segment that each has to run next; the last is the readout. `batch` rows run at most."""

    def __init__(self, count: int, batch: int, hold: float = HOLD):
        self.queues: list[list[Row]] = [[] for _ in range(count)]
        self.batch, self.hold = batch, hold
        self._next = 0

    def __len__(self) -> int:
        return sum(map(len, self.queues))

    def __iter__(self) -> Iterator[Row]:
        return (row for queue in self.queues for row in queue)

    def put(self, queue: int, row: Row) -> None:
        """Let a row wait."""
        self.queues[queue].append(row)

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it waits."""
        for queue in self.queues:
            if row in queue:
                queue.remove(row)

    def take(self) -> tuple[int, list[Row]]:
        """The queue to run now and its rows, oldest first, which leave the queue. There must be some row."""
        number = self._pick()
        queue = self.queues[number]
        rows, self.queues[number] = queue[: self.batch], queue[self.batch :]
        return number, rows

    def _pick(self) -> int:
        count = len(self.queues)
        # With more rows in flight than fit a batch there is always a well-filled queue: the deepest full one first.
        full = [s for s in range(count) if len(self.queues[s]) >= self.batch]
        if full and len(self) > self.batch:
            return full[-1]
        enough = min(self.batch, max(1.0, self.hold * len(self)))
        for _ in range(count):
            queue, self._next = self._next, (self._next + 1) % count
            if len(self.queues[queue]) >= enough:
                return queue
        return max(range(count), key=lambda s: len(self.queues[s]))


@dataclass(frozen=True)
class Admission:
    """Rows that get a slot now, and the prompts among theirs that are still to be prefilled."""

    rows: list[Row]
    prompts: list[tuple[int, ...]]


class Scheduler:
    """At most `in_flight` requests at a time have a slot, at most `batch` (default: all) run together.

    `positions` bounds the cache (None: it takes what the rows need). Requests wait until what they can come to need
    fits beside what those in flight can: no row that has begun is ever short of a page, or put back to make room.

    With `passing` short requests don't wait for long ones that the cache has no room for; each kind keeps its order.
    Prompts are prefilled `reading` positions (None: PREFILL_POSITIONS) at a time, longer ones alone. With `failed` work
    that fails for several requests is tried for each by itself; a request that fails alone is cancelled and reported.

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
        self.waiting = WaitingQueue(limit, passing)
        self.prefiller = Prefiller(decoder, reading)
        self.slots = Slots(self.cache, in_flight)
        # One per segment, then the readout.
        self.queues = SegmentQueues(len(decoder.layout.outcomes) + 1, batch)
        self.runner = ModelRunner(decoder, self.slots, in_flight)
        self.finished: dict[int, Row] = {}
        self.row_layers = 0
        self._validator = RequestValidator(tokenizer, decoder.eos_ids, decoder.layout, decoder.dims.max_positions)
        self._failed = failed
        self._next_id = 0

    # ---- requests ----

    def add(self, request: Request) -> int:
        """Queue a request; its id. Raises ValueError for what this decoder can't answer."""
        row = self._validator.begin(self._next_id, request, self.decoder.gates is not None)
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
                self.waiting.remove([row])
                self.prefiller.forget(self.waiting)
                return True
        for row in self.queues:
            if row.id == request:
                self.queues.remove(row)
                self.slots.leave(row)
                return True
        return False

    def take(self, request: int, version: int) -> Rollout:
        """A finished answer, which is forgotten. Raises KeyError for one that isn't finished."""
        return self.finished.pop(request).rollout(version)

    @property
    def busy(self) -> bool:
        return bool(len(self.waiting) or len(self.queues))

    @property
    def free(self) -> int:
        """Slots that no request has."""
        return self.slots.free

    def share_prefix(self, tokens: Sequence[int]) -> None:
        """Prefill a common beginning once; prompts that continue it start from there."""
        self.prefiller.share_prefix(tokens)

    # ---- one piece of work ----

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        """One piece of work: prompts enter free slots, or one segment or the readout runs. An event per new token.

        Exception-safe: a request that fails may be cancelled, the others continue.
        """
        started = self._admit()
        # No row is running here: pages may move.
        self.cache.trim()
        if started or not len(self.queues):
            return started
        return self._run(*self.queues.take())

    def _run(self, queue: int, rows: list[Row]) -> list[Event]:
        """The rows of a queue together; if that fails and failures are reported, each by itself."""
        work = self._readout if queue == len(self.queues.queues) - 1 else partial(self._segment, queue)
        try:
            return work(rows)
        except Exception as error:
            if self._failed is None or len(rows) == 1:
                self.queues.queues[queue][:0] = rows
            if self._failed is None:
                raise
            if len(rows) == 1:
                self._give_up(rows[0], error)
                return []
        return [event for row in rows for event in self._run(queue, [row])]

    def _give_up(self, row: Row, error: Exception) -> None:
        assert self._failed is not None
        self.cancel(row.id)
        self._failed(row.id, error)

    # ---- admission ----

    def _admit(self) -> list[Event]:
        """New rows together; if that fails and failures are reported, each by itself."""
        admission = self._plan()
        if not admission.rows:
            return []
        try:
            return self._start(admission)
        except Exception:
            if self._failed is None:
                raise
        events: list[Event] = []
        for row in admission.rows:
            try:
                events += self._start(Admission([row], [row.read] if self.prefiller.lacks(row) else []))
            except Exception as error:
                self._give_up(row, error)
        return events

    def _plan(self) -> Admission:
        """Who is admitted now; nothing changes yet."""
        free, admission = self.slots.free, Admission([], [])
        if not free or not len(self.waiting):
            return admission
        # Prefilling prompts one by one wastes the batch: wait for a few free slots unless the next prompt is there.
        if self.prefiller.lacks(self.waiting.first) and len(self.queues) and free < self.in_flight // 8:
            return admission
        rows, prompts = admission.rows, admission.prompts
        room, held, chosen = self.slots.room(self.queues), set(self.slots.together), set[int]()
        while len(rows) < free and (found := self.waiting.next(room, chain(self.queues, rows), held, chosen)):
            row, needed = found
            room -= needed
            if self.prefiller.lacks(row) and row.read not in prompts:
                if prompts and len(row.read) + sum(map(len, prompts)) > self.prefiller.positions:
                    break
                prompts.append(row.read)
            held.add(row.read)
            chosen.add(row.id)
            rows.append(row)
        return admission

    def _start(self, admission: Admission) -> list[Event]:
        """Give rows slots and, where prompt positions never exit, sample their first tokens. Exception-safe: rows that
        didn't get in wait as before."""
        rows = admission.rows
        try:
            self.prefiller.prefill(sorted(admission.prompts, key=len, reverse=True))
            going, coming, new = rows, 0, list[Event]()
            if not self.decoder.layout.first_token:
                new = self.runner.first(rows, [self.prefiller.of(row).logits for row in rows])
                going, coming = [row for row, token in zip(rows, new, strict=True) if token.finished is None], 1
            self.slots.enter([(row, self.prefiller.parts(row)) for row in going], coming)
        except Exception:
            for row in rows:
                if row.slot >= 0:
                    self.slots.leave(row)
            raise
        self.waiting.remove(rows)
        self.prefiller.forget(self.waiting)
        if self.decoder.layout.first_token:
            for row in rows:
                self.queues.put(0, row)
        return self._append(rows, new) if new else []

    # ---- running ----

    def _segment(self, segment: int, rows: list[Row]) -> list[Event]:
        """One segment, then its gate: each row goes on to the readout or to the next segment. No new tokens."""
        leave = self.runner.segment(segment, rows)
        bounds = (0, *self.decoder.layout.outcomes)
        self.row_layers += len(rows) * (bounds[segment + 1] - bounds[segment])
        for row, gone in zip(rows, leave, strict=True):
            self.queues.put(len(self.queues.queues) - 1 if gone else segment + 1, row)
        return []

    def _readout(self, rows: list[Row]) -> list[Event]:
        """Next tokens, in the order in which the readout puts the rows."""
        new = self.runner.readout(rows)
        events = self._append(rows, new)
        if not len(self.waiting):
            self.cache.trim()
        return events

    def _append(self, rows: list[Row], new: list[Event]) -> list[Event]:
        """Give rows their tokens, which can't be undone: those that continue start the next one, the slots of the
        others are free."""
        events = [row.append(token) for row, token in zip(rows, new, strict=True)]
        for row in rows:
            if row.finished is None:
                self.queues.put(0, row)
                continue
            if row.slot >= 0:
                self.slots.leave(row)
            self.finished[row.id] = row
        return events
