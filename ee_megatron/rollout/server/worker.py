"""One thread that owns the scheduler; requests join it and leave it from any other thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..engine.decoder import Decoder
from ..engine.request import Event, Request
from ..engine.scheduler import Scheduler

# Over how many seconds the rate of tokens is taken, and over how many tokens their mean depth.
RATE_WINDOW_S = 10.0
DEPTH_WINDOW = 1000
log = logging.getLogger(__name__)

# Told, in the engine's thread, of each token of a request, or of the error that ended it.
Sink = Callable[[Event | Exception], None]


class Busy(Exception):
    """The queue is full."""


@dataclass(eq=False)
class Ticket:
    """A request in the engine; `id` is the scheduler's once it has it."""

    request: Request
    sink: Sink
    id: int = -1
    cancelled: bool = False


class Engine:
    """At most `rows` requests run at a time, and as many as fit `positions` (None: any number), and `queue_limit` wait;
    `submit` refuses more."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        queue_limit: int,
        positions: int | None = None,
    ):
        self.rows, self.queue_limit, self.num_layers = rows, queue_limit, decoder.dims.num_layers
        self.vocab = decoder.dims.vocab
        self._decoder, self._tokenizer, self._positions = decoder, tokenizer, positions
        self._scheduler = Scheduler(decoder, tokenizer, rows, positions=positions)
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Ticket] = set()
        self._by_id: dict[int, Ticket] = {}
        self._rates: deque[tuple[float, int]] = deque()
        self._depths: deque[int] = deque(maxlen=DEPTH_WINDOW)
        self._counts = {"answered": 0, "cancelled": 0, "refused": 0, "failed": 0}
        self._closing = False
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raises ValueError if this model can't follow the request's exit policy."""
        request.exits.check(self._decoder.layout, self._decoder.gates is not None)

    def submit(self, requests: list[tuple[Request, Sink]]) -> list[Ticket]:
        """Queue requests that belong together: all of them or, raising Busy, none."""
        tickets = [Ticket(request, sink) for request, sink in requests]
        with self._lock:
            if self._closing or not self._thread.is_alive():
                raise RuntimeError("the engine has stopped; start the server again")
            if len(self._open) + len(tickets) > self.rows + self.queue_limit:
                self._counts["refused"] += len(tickets)
                raise Busy(
                    f"{len(self._open)} requests are running or waiting, at most {self.rows} run and "
                    f"{self.queue_limit} wait; try again later or with a smaller n"
                )
            self._open.update(tickets)
        for ticket in tickets:
            self._inbox.put(ticket)
        return tickets

    def cancel(self, tickets: list[Ticket]) -> None:
        """Give up what of these has not finished; nothing more is told of them."""
        for ticket in tickets:
            with self._lock:
                running = ticket in self._open and not ticket.cancelled
                ticket.cancelled = ticket.cancelled or running
            if running:
                self._inbox.put(ticket)

    def health(self) -> dict:
        """Counts now, rates over the last seconds; `mean_depth` is a share of the layers, None before any token."""
        with self._lock:
            now, depths = time.monotonic(), list(self._depths)
            recent = sum(count for at, count in self._rates if now - at <= RATE_WINDOW_S)
            running = sum(ticket.id in self._by_id for ticket in self._open)
            waiting = max(0, running - self.rows) + len(self._open) - running
            return {
                "running": min(running, self.rows),
                "queue": waiting,
                "rows": self.rows,
                "queue_limit": self.queue_limit,
                "tokens_per_s": recent / min(RATE_WINDOW_S, max(1.0, now - self._begun)),
                "mean_depth": sum(depths) / len(depths) / self.num_layers if depths else None,
                **self._counts,
                "uptime_s": now - self._begun,
            }

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread; whatever still runs is given up."""
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        self._thread.join(timeout_s)

    # ---- the thread ----

    def _run(self) -> None:
        while self._receive(block=not self._scheduler.busy):
            if not self._scheduler.busy:
                continue
            try:
                events = self._scheduler.advance()
            except Exception as error:
                log.exception("the engine failed; %d requests are given up", len(self._by_id))
                self._give_up(error)
                continue
            if events:
                self._report(events)

    def _receive(self, block: bool) -> bool:
        """Take in what has come, after waiting for it if told to; False if the engine is to end."""
        while True:
            try:
                ticket = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            block = False
            if ticket.cancelled:
                self._drop(ticket)
            elif ticket.id < 0:
                self._add(ticket)

    def _add(self, ticket: Ticket) -> None:
        try:
            ticket.id = self._scheduler.add(ticket.request)
        except Exception as error:
            with self._lock:
                self._open.discard(ticket)
                self._counts["failed"] += 1
            ticket.sink(error)
            return
        with self._lock:
            self._by_id[ticket.id] = ticket

    def _drop(self, ticket: Ticket) -> None:
        known = self._by_id.get(ticket.id) is ticket
        if known:
            self._scheduler.cancel(ticket.id)
        with self._lock:
            if known:
                self._by_id.pop(ticket.id)
            if ticket in self._open:
                self._open.discard(ticket)
                self._counts["cancelled"] += 1

    def _report(self, events: list[Event]) -> None:
        now = time.monotonic()
        with self._lock:
            self._rates.append((now, len(events)))
            while now - self._rates[0][0] > RATE_WINDOW_S:
                self._rates.popleft()
            self._depths.extend(event.depth for event in events)
        for event in events:
            ticket = self._by_id[event.request]
            if event.finished is not None:
                self._scheduler.cancel(event.request)
                with self._lock:
                    self._by_id.pop(event.request)
                    self._open.discard(ticket)
                    self._counts["answered"] += 1
            if not ticket.cancelled:
                ticket.sink(event)

    def _give_up(self, error: Exception) -> None:
        """Tell everyone and begin with an empty scheduler: what state the failure left the old one in is not known."""
        self._scheduler = Scheduler(self._decoder, self._tokenizer, self.rows, positions=self._positions)
        with self._lock:
            lost = list(self._by_id.values())
            self._by_id.clear()
            self._open.difference_update(lost)
            self._counts["failed"] += len(lost)
        for ticket in lost:
            if not ticket.cancelled:
                ticket.sink(error)
