"""The rollout engine: requests join and leave at any time, rows advance independently, every segment runs many rows.

A row is a request that has a cache slot. It waits before the next segment between exits; `Scheduler.advance` runs one
segment for the rows that wait there, or the readout for rows that took an exit, or prefills prompts for free slots. The
answers do not depend on that order: each has random numbers of its own.

Reading a segment's weights costs as much as about 25 rows (CPU, float32), so rows should run together. Going through
the segments by depth, without the nearly empty ones, reached 0.79 of the ceiling (32 rows, mean depth 0.5); the fullest
segment first 0.69, since rows fall into cohorts. With several times as many rows as a batch holds some segment is
always full, and nothing is left to gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from ...exit_rules import Speculate
from ...types import Rollout
from .cache import PAGE, KVCache, Slots, common_pages, pages_for
from .decoder import Decoder
from .model_runner import ModelRunner, Prefiller
from .request import Event, Request, RequestValidator, Row
from .speculation import Speculation

# Called with the id of a request that fails by itself, and why.
Failed = Callable[[int, Exception], None]
# If short requests pass long ones: a long one can come to need more than this share of the cache, and all of them that
# run together no more than their share, unless it is a single one.
LONG, SHARE_OF_LONG = 1 / 16, 1 / 2
# Share of the rows in flight below which a segment is skipped, as long as some other isn't.
HOLD = 0.1


class SegmentQueues:
    """Queues of rows, by the segment that each runs next, then the readout and speculation. `batch` rows run at
    most."""

    def __init__(self, count: int, batch: int):
        self.queues: list[list[Row]] = [[] for _ in range(count)]
        self.batch = batch
        self._next = 0

    def __len__(self) -> int:
        return sum(map(len, self.queues))

    def __iter__(self) -> Iterator[Row]:
        return (row for queue in self.queues for row in queue)

    def put(self, queue: int, row: Row) -> None:
        """Append a row to its queue."""
        self.queues[queue].append(row)

    def remove(self, row: Row) -> None:
        """Remove a row from its queue."""
        for queue in self.queues:
            if row in queue:
                queue.remove(row)

    def pick(self) -> tuple[int, list[Row]]:
        """Choose the queue to run now and its rows, oldest first, which stay in it. Some row must be waiting."""
        number = self._choose()
        return number, self.queues[number][: self.batch]

    def _choose(self) -> int:
        sizes = [len(queue) for queue in self.queues]
        # With more rows in flight than fit a batch there is always a well-filled queue: the deepest full one first.
        full = [number for number, size in enumerate(sizes) if size >= self.batch]
        if full and sum(sizes) > self.batch:
            return full[-1]
        enough = min(self.batch, max(1.0, HOLD * sum(sizes)))
        for _ in sizes:
            number, self._next = self._next, (self._next + 1) % len(sizes)
            if sizes[number] >= enough:
                return number
        return sizes.index(max(sizes))


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
        self.waiting: list[Row] = []
        self.passing = passing
        self.prefiller = Prefiller(decoder, reading)
        self.slots = Slots(self.cache, in_flight)
        # One per segment, then the readout, then rows that speculate.
        self.readout_queue = len(decoder.layout.outcomes)
        self.queues = SegmentQueues(self.readout_queue + 2, batch)
        self.runner = ModelRunner(decoder, self.slots, in_flight)
        self.speculation = Speculation(self.runner)
        self.finished_rows: dict[int, Row] = {}
        self.row_layers = 0
        self._validator = RequestValidator(tokenizer, decoder.eos_ids, decoder.layout, decoder.dims.max_positions)
        self._failed = failed
        self._next_id = 0

    # ---- requests ----

    def add(self, request: Request) -> int:
        """Queue a request and return its id. Raises ValueError for what this decoder can't answer."""
        row = self._validator.begin(self._next_id, request, self.decoder.gates is not None)
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
        """Drop a request in any state; False if it is unknown (or no longer known)."""
        if self.finished_rows.pop(request, None) is not None:
            return True
        for row in self.waiting:
            if row.id == request:
                self.waiting.remove(row)
                self.prefiller.forget(self.waiting)
                return True
        for row in self.queues:
            if row.id == request:
                self.queues.remove(row)
                self.slots.leave(row)
                return True
        return False

    def take(self, request: int, version: int) -> Rollout:
        """Return a finished answer and forget it. Raises KeyError for one that isn't finished."""
        return self.finished_rows.pop(request).rollout(version)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or len(self.queues))

    @property
    def free(self) -> int:
        """Number of slots without a request."""
        return self.slots.free

    def share_prefix(self, tokens: Sequence[int]) -> None:
        """Prefill a common beginning once; prompts that continue it start from there."""
        self.prefiller.share_prefix(tokens)

    # ---- one piece of work ----

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        """Do one piece of work: prompts enter free slots, or a segment or the readout runs. An event per new token.

        Exception-safe: a request that fails may be cancelled, the others continue.
        """
        entering = self._admissible()
        started = self._attempt(entering, self._start) if entering else []
        # No row is running here: pages may move.
        self.cache.trim()
        if started or not len(self.queues):
            return started
        return self._run(*self.queues.pick())

    def _run(self, queue: int, rows: list[Row]) -> list[Event]:
        """The first rows of a queue."""
        if queue > self.readout_queue:
            # Those that draft by the same exit as the first.
            return self._attempt([row for row in rows if row.request.exits == rows[0].request.exits], self._speculate)
        return self._attempt(rows, self._readout if queue == self.readout_queue else partial(self._segment, queue))

    def _attempt(self, rows: list[Row], work: Callable[[list[Row]], list[Event]]) -> list[Event]:
        """Work on rows together; if that fails and failures are reported, on each by itself."""
        try:
            return work(rows)
        except Exception as error:
            if self._failed is None:
                raise
            if len(rows) == 1:
                self.cancel(rows[0].id)
                self._failed(rows[0].id, error)
                return []
        return [event for row in rows for event in self._attempt([row], work)]

    # ---- admission ----

    def _admissible(self) -> list[Row]:
        """Who is admitted now; nothing changes yet."""
        free, rows = self.slots.free, list[Row]()
        if not free or not self.waiting:
            return rows
        # Prefilling prompts one by one wastes the batch: wait for a few free slots unless the next prompt is there.
        if self.prefiller.lacks(self.waiting[0]) and len(self.queues) and free < self.in_flight // 8:
            return rows
        room, held, reading = self.slots.room(self.queues), set(self.slots.together), dict[tuple[int, ...], int]()
        blocked = set[bool]()
        for row in self.waiting:
            long = self._is_long(row)
            if long in blocked:
                continue
            needed = pages_for(row.longest) - (common_pages(row) if row.read in held else 0)
            if needed > (min(room, self._room_of_long(chain(self.queues, rows))) if long else room):
                blocked.add(long)
                if not self.passing or len(blocked) == 2:
                    break
                continue
            if self.prefiller.lacks(row) and row.read not in reading:
                if reading and len(row.read) + sum(reading.values()) > self.prefiller.positions:
                    break
                reading[row.read] = len(row.read)
            room -= needed
            held.add(row.read)
            rows.append(row)
            if len(rows) == free:
                break
        return rows

    def _is_long(self, row: Row) -> bool:
        return self.passing and self.cache.limit is not None and pages_for(row.longest) > LONG * self.cache.limit

    def _room_of_long(self, inside: Iterable[Row]) -> float:
        taken = sum(pages_for(row.longest) for row in inside if self._is_long(row))
        return SHARE_OF_LONG * (self.cache.limit or 0) - taken if taken else math.inf

    def _start(self, rows: list[Row]) -> list[Event]:
        """Give rows slots and, where prompt positions never exit, sample their first tokens. Exception-safe: rows that
        didn't get in wait as before."""
        try:
            self.prefiller.prefill(dict.fromkeys(row.read for row in rows if self.prefiller.lacks(row)))
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
        entered = {row.id for row in rows}
        self.waiting = [row for row in self.waiting if row.id not in entered]
        self.prefiller.forget(self.waiting)
        if self.decoder.layout.first_token:
            self._continue(rows)
        return self._append(rows, new) if new else []

    # ---- running ----

    def _segment(self, segment: int, rows: list[Row]) -> list[Event]:
        """One segment, then its gate: each row moves to the readout or to the next segment. No new tokens."""
        leave = self.runner.segment(segment, rows)
        del self.queues.queues[segment][: len(rows)]
        bounds = (0, *self.decoder.layout.outcomes)
        self.row_layers += len(rows) * (bounds[segment + 1] - bounds[segment])
        for row, gone in zip(rows, leave, strict=True):
            self.queues.put(self.readout_queue if gone else segment + 1, row)
        return []

    def _speculate(self, rows: list[Row]) -> list[Event]:
        """Next tokens, drafted and checked: one or more of each row."""
        before = self.speculation.row_layers
        events = self.speculation.advance(rows)
        self.row_layers += self.speculation.row_layers - before
        for row in rows:
            self.queues.remove(row)
        self._continue(rows)
        return events

    def _readout(self, rows: list[Row]) -> list[Event]:
        """Next tokens."""
        ordered = sorted(rows, key=lambda row: row.segment)
        new = self.runner.readout(ordered)
        del self.queues.queues[self.readout_queue][: len(rows)]
        events = self._append(ordered, new)
        if not self.waiting:
            self.cache.trim()
        return events

    def _append(self, rows: list[Row], new: list[Event]) -> list[Event]:
        """Give rows their tokens, which can't be undone."""
        events = [row.append(token) for row, token in zip(rows, new, strict=True)]
        self._continue(rows)
        return events

    def _continue(self, rows: list[Row]) -> None:
        """Rows that aren't finished start the next token, the slots of the others are free."""
        for row in rows:
            if row.finished is None:
                self.queues.put(self.readout_queue + 1 if isinstance(row.request.exits, Speculate) else 0, row)
                continue
            if row.slot >= 0:
                self.slots.leave(row)
            self.finished_rows[row.id] = row
