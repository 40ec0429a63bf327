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
from ..engine.model_runner import PREFILL_POSITIONS
from ..engine.request import Event, Request
from ..engine.scheduler import Scheduler
from ..engine.scoring import PromptScore, score_prompts
from .metrics import Metrics

# Over how many seconds the rate of tokens is taken, and over how many tokens their mean depth.
RATE_WINDOW_S = 10.0
DEPTH_WINDOW = 1000
log = logging.getLogger(__name__)

# Prompt positions, padding included, that are scored in one go between two pieces of the scheduler's work.
SCORE_POSITIONS = 2048

# Told, in the engine's thread, of what a prompt's tokens score if that was wanted, then of each token of the answer, or
# of the error that ended it.
Told = PromptScore | Event | Exception
Sink = Callable[[Told], None]


class Busy(Exception):
    """The queue is full."""


@dataclass(eq=False)
class Ticket:
    """A request in the engine; `id` is the scheduler's once it has it.

    - score: None, or that the prompt's own tokens are to be scored first, with so many of the most probable ones
    - generate: False: that was all
    - at: when it came, then when its last token did, by `time.monotonic`
    """

    request: Request
    sink: Sink
    score: int | None = None
    generate: bool = True
    id: int = -1
    begun: bool = False
    cancelled: bool = False
    at: float = 0.0


class Engine:
    """At most `rows` requests run at a time, and as many as fit `positions` (None: any number), and `queue_limit` wait;
    `submit` refuses more. `reading` and `passing` are the scheduler's."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        queue_limit: int,
        positions: int | None = None,
        reading: int = PREFILL_POSITIONS,
        passing: bool = False,
    ):
        self.rows, self.queue_limit, self.num_layers = rows, queue_limit, decoder.dims.num_layers
        self.vocab = decoder.dims.vocab
        self.metrics = Metrics(decoder.layout.outcomes)
        self._decoder = decoder
        self._scheduler = Scheduler(
            decoder, tokenizer, rows, positions=positions, reading=reading, passing=passing, failed=self._failed
        )
        if positions is not None:
            self._scheduler.cache.reserve()
        # What was submitted together comes together, so that a prompt is scored once for all its answers.
        self._inbox: queue.SimpleQueue[list[Ticket] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Ticket] = set()
        self._by_id: dict[int, Ticket] = {}
        self._unscored: deque[Ticket] = deque()
        self._rates: deque[tuple[float, int]] = deque()
        self._depths: deque[int] = deque(maxlen=DEPTH_WINDOW)
        self._closing = False
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raises ValueError if this model can't follow the request's exit policy."""
        request.exits.check(self._decoder.layout, self._decoder.gates is not None)

    def submit(self, tickets: list[Ticket]) -> None:
        """Queue requests that belong together: all of them or, raising Busy, none."""
        now = time.monotonic()
        with self._lock:
            if self._closing or not self._thread.is_alive():
                raise RuntimeError("the engine has stopped; start the server again")
            if len(self._open) + len(tickets) > self.rows + self.queue_limit:
                self.metrics.ended("refused", len(tickets))
                raise Busy(
                    f"{len(self._open)} requests are running or waiting, at most {self.rows} run and "
                    f"{self.queue_limit} wait; try again later or with a smaller n"
                )
            self._open.update(tickets)
        for ticket in tickets:
            ticket.at = now
        self._inbox.put(tickets)

    def cancel(self, tickets: list[Ticket]) -> None:
        """Give up what of these has not finished; nothing more is told of them."""
        for ticket in tickets:
            with self._lock:
                running = ticket in self._open and not ticket.cancelled
                ticket.cancelled = ticket.cancelled or running
            if running:
                self._inbox.put([ticket])

    def health(self) -> dict:
        """Counts now, rates over the last seconds; `mean_depth` is a share of the layers, None before any token."""
        with self._lock:
            now, depths = time.monotonic(), list(self._depths)
            recent = sum(count for at, count in self._rates if now - at <= RATE_WINDOW_S)
            running = self._scheduler.in_flight - self._scheduler.free
            return {
                "running": running,
                "queue": max(0, len(self._open) - running),
                "rows": self.rows,
                "queue_limit": self.queue_limit,
                "tokens_per_s": recent / min(RATE_WINDOW_S, max(1.0, now - self._begun)),
                "mean_depth": sum(depths) / len(depths) / self.num_layers if depths else None,
                **self.metrics.outcomes(),
                "uptime_s": now - self._begun,
            }

    def metrics_text(self) -> str:
        """Everything that is counted, for Prometheus."""
        health, cache = self.health(), self._scheduler.cache
        depth, limit = health["mean_depth"], cache.limit
        gauges = {
            "requests_running": ("Answers that have a place in the batch.", health["running"]),
            "requests_queued": ("Answers that wait for one.", health["queue"]),
            "cache_used_bytes": ("Of the key-value cache, held by answers.", cache.used * cache.page_bytes),
            "cache_allocated_bytes": ("Of the key-value cache, taken from the system.", cache.pages * cache.page_bytes),
            "uptime_seconds": ("Since the start.", health["uptime_s"]),
        }
        if limit is not None:
            gauges["cache_limit_bytes"] = ("Of the key-value cache, at most.", limit * cache.page_bytes)
        if depth is not None:
            gauges["mean_depth_share"] = ("Layers run of all, mean over the last thousand tokens.", depth)
        return self.metrics.text(gauges)

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
        while self._receive(block=not (self._scheduler.busy or self._unscored)):
            if self._unscored:
                self._score()
            if not self._scheduler.busy:
                continue
            try:
                events = self._scheduler.advance()
            except Exception as error:
                log.exception("the engine failed; %d requests are given up", len(self._by_id))
                self._begin_again(error)
                continue
            if events:
                self._report(events)

    def _receive(self, block: bool) -> bool:
        """Take in what has come, after waiting for it if told to; False if the engine is to end."""
        while True:
            try:
                tickets = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if tickets is None:
                return False
            block = False
            for ticket in tickets:
                if ticket.cancelled:
                    self._drop(ticket)
                    continue
                self.metrics.came(len(ticket.request.prompt))
                if ticket.score is not None:
                    self._unscored.append(ticket)
                else:
                    self._add(ticket)

    def _score(self) -> None:
        """Score the prompts of those that came first, as many as are read together; answers to one prompt, which come
        one after another, share what is read."""
        chosen, longest = list[list[Ticket]](), 0
        while self._unscored:
            prompt, score = self._unscored[0].request.prompt, self._unscored[0].score
            if not (chosen and chosen[-1][0].request.prompt == prompt and chosen[-1][0].score == score):
                longest = max(longest, len(prompt))
                if chosen and longest * (len(chosen) + 1) > SCORE_POSITIONS:
                    break
                chosen.append([])
            chosen[-1].append(self._unscored.popleft())
        self._score_together(chosen)

    def _score_together(self, groups: list[list[Ticket]]) -> None:
        prompts = [group[0].request.prompt for group in groups]
        try:
            scores = score_prompts(self._decoder, prompts, [group[0].score or 0 for group in groups])  # type: ignore[arg-type]
        except Exception as error:
            if len(groups) > 1:
                for group in groups:
                    self._score_together([group])
                return
            for ticket in groups[0]:
                self._end(ticket, "failed", error)
            return
        for group, score in zip(groups, scores, strict=True):
            for ticket in group:
                if ticket.generate:
                    ticket.sink(score)
                    self._add(ticket)
                else:
                    self._end(ticket, "answered", score)

    def _add(self, ticket: Ticket) -> None:
        try:
            ticket.id = self._scheduler.add(ticket.request)
        except Exception as error:
            self._end(ticket, "failed", error)
            return
        with self._lock:
            self._by_id[ticket.id] = ticket

    def _end(self, ticket: Ticket, outcome: str, last: Told) -> None:
        """Forget a ticket and tell its owner the last thing."""
        with self._lock:
            self._by_id.pop(ticket.id, None)
            self._open.discard(ticket)
        self.metrics.ended(outcome)
        if not ticket.cancelled:
            ticket.sink(last)

    def _drop(self, ticket: Ticket) -> None:
        known = self._by_id.get(ticket.id) is ticket
        if known:
            self._scheduler.cancel(ticket.id)
        elif ticket in self._unscored:
            self._unscored.remove(ticket)
        with self._lock:
            if known:
                self._by_id.pop(ticket.id)
            if ticket in self._open:
                self._open.discard(ticket)
                self.metrics.ended("cancelled")

    def _report(self, events: list[Event]) -> None:
        now = time.monotonic()
        waited: dict[bool, list[float]] = {False: [], True: []}
        for event in events:
            ticket = self._by_id[event.request]
            waited[ticket.begun].append(now - ticket.at)
            ticket.at, ticket.begun = now, True
        # Counted before anybody is told, who may look at once.
        depths = [event.depth for event in events]
        self.metrics.tokens(depths, first=waited[False], between=waited[True])
        with self._lock:
            self._rates.append((now, len(events)))
            while now - self._rates[0][0] > RATE_WINDOW_S:
                self._rates.popleft()
            self._depths.extend(depths)
        for event in events:
            ticket = self._by_id[event.request]
            if event.finished is not None:
                self._scheduler.cancel(event.request)
                self._end(ticket, "answered", event)
            elif not ticket.cancelled:
                ticket.sink(event)

    def _failed(self, request: int, error: Exception) -> None:
        """The scheduler has given up one request, which alone can't go on."""
        log.warning("request %d failed: %s", request, error)
        self._end(self._by_id[request], "failed", error)

    def _begin_again(self, error: Exception) -> None:
        """Tell everyone, and begin with an empty scheduler: whose request it was is not known."""
        for ticket in list(self._by_id.values()):
            self._scheduler.cancel(ticket.id)
            self._end(ticket, "failed", error)
