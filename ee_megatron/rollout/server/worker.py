"""The engine's thread, which owns the scheduler: other threads submit and cancel requests."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from transformers import PreTrainedTokenizerBase

from ..engine.decoder import Decoder
from ..engine.model_runner import PREFILL_POSITIONS
from ..engine.request import Event, Request
from ..engine.scheduler import Scheduler
from .protocol import BadRequest

log = logging.getLogger(__name__)
STOPPING = BadRequest("the server is stopping; ask again when it is back", 503, "stopping")
OUTCOMES = ("answered", "cancelled", "refused", "failed")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServerMetrics:
    """Metrics of a server for Prometheus; can be used from any thread."""

    def __init__(self, depths: tuple[int, ...]):
        self.registry = CollectorRegistry()
        about: dict[str, Any] = {"namespace": "ee_megatron", "registry": self.registry}
        self.requests = Counter("requests", "Answers, by what became of them.", ["outcome"], **about)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **about)
        self.tokens = Counter("generation_tokens", "Tokens generated.", **about)
        self.depths = Counter("exit_depth_tokens", "Tokens generated, by the layers they ran.", ["depth"], **about)
        self.layers = Counter("layers_run", "Layers that generated tokens ran.", **about)
        about["buckets"] = SECONDS
        self.first = Histogram("time_to_first_token_seconds", "From a request to its first token.", **about)
        self.next = Histogram("time_per_output_token_seconds", "From one token of an answer to the next.", **about)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for depth in depths:
            self.depths.labels(str(depth))

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        Gauge(name, about, namespace="ee_megatron", registry=self.registry).set_function(value)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"ee_megatron_{name}", labels) or 0.0


@dataclass(eq=False)
class Ticket:
    """A request in the engine. `tell` is called in the engine's thread with each token of the answer, or with the error
    that ended it; `id` is the scheduler's; `at`: when the request or its last token came, by `time.monotonic`."""

    request: Request
    tell: Callable[[Event | Exception], None]
    id: int = -1
    begun: bool = False
    cancelled: bool = False
    at: float = 0.0


class ServingEngine:
    """Runs up to `rows` requests together, as many as fit `positions` of the cache (None: any number), and queues up to
    `queue_limit` more. `reading` and `passing` are the scheduler's."""

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
        self.decoder, self.rows, self.queue_limit = decoder, rows, queue_limit
        self._scheduler = Scheduler(
            decoder, tokenizer, rows, positions=positions, reading=reading, passing=passing, failed=self._failed
        )
        if positions is not None:
            self._scheduler.cache.reserve()
        # What to do between two steps; true of what took a while.
        self._inbox: queue.SimpleQueue[Callable[[], bool | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Ticket | Future] = set()
        self._by_id: dict[int, Ticket] = {}
        self._stopping = False
        self.metrics = ServerMetrics(decoder.layout.outcomes)
        cache, gauge = self._scheduler.cache, self.metrics.gauge
        gauge("requests_running", "Answers that have a place in the batch.", lambda: self.running)
        gauge("requests_queued", "Answers that wait for one.", lambda: self.queued)
        gauge("cache_used_bytes", "Key-value cache held by answers.", lambda: cache.used * cache.page_bytes)
        gauge("cache_allocated_bytes", "Key-value cache allocated.", lambda: cache.pages * cache.page_bytes)
        gauge("cache_limit_bytes", "Key-value cache at most.", lambda: (cache.limit or 0) * cache.page_bytes)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return self._scheduler.in_flight - self._scheduler.free

    @property
    def queued(self) -> int:
        return max(0, len(self._open) - self.running)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, tickets: list[Ticket]) -> None:
        """Queue requests that belong together. Raises BadRequest if there is no room for all, or the engine stopped."""
        for ticket in tickets:
            ticket.at = time.monotonic()
        # Together, so that equal prompts are read once.
        self._enter(tickets, lambda: self._add(tickets))

    def call(self, work: Callable[[], Any]) -> Future:
        """Run `work` in the engine's thread, between two steps; returns its result. Raises as `submit` does."""
        result: Future = Future()

        def run() -> bool:
            if not result.set_running_or_notify_cancel():
                return False
            try:
                result.set_result(work())
            except Exception as error:
                result.set_exception(error)
            return True

        result.add_done_callback(self._leave)
        self._enter([result], run)
        return result

    def cancel(self, tickets: list[Ticket]) -> None:
        """Cancel those of these requests that have not finished; they send no more events."""
        for ticket in tickets:
            ticket.cancelled = True
        self._inbox.put(lambda: self._drop(tickets))

    def health(self) -> dict:
        """Counts since the start; `mean_depth`: share of the layers that generated tokens ran, None before any."""
        value = self.metrics.value
        tokens, layers = value("generation_tokens_total"), value("layers_run_total")
        return {
            "running": self.running,
            "queue": self.queued,
            "mean_depth": layers / tokens / self.decoder.dims.num_layers if tokens else None,
            **{outcome: int(value("requests_total", outcome=outcome)) for outcome in OUTCOMES},
        }

    def stop(self) -> None:
        """Accept no more requests; running ones get an error event and are cancelled after the current step."""
        with self._lock:
            self._stopping = True
        self._inbox.put(lambda: None)

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread."""
        self.stop()
        self._thread.join(timeout_s)

    def _enter(self, items: Sequence[Ticket | Future], work: Callable[[], bool | None]) -> None:
        with self._lock:
            if self._stopping or not self.alive:
                raise STOPPING
            if len(self._open) + len(items) > self.rows + self.queue_limit:
                self.metrics.requests.labels("refused").inc(len(items))
                raise BadRequest(
                    f"{len(self._open)} requests are running or waiting, at most {self.rows} run and "
                    f"{self.queue_limit} wait; try again later or with a smaller n",
                    429,
                    "queue_full",
                )
            self._open.update(items)
        self._inbox.put(work)

    def _leave(self, item: Ticket | Future) -> None:
        with self._lock:
            self._open.discard(item)

    # ---- in the thread ----

    def _run(self) -> None:
        while not self._stopping:
            # Waits for something to do if nothing runs; what computes goes one piece at a time.
            block = not self._scheduler.busy
            with suppress(queue.Empty):
                while not self._inbox.get(block=block)():
                    block = False
            if not self._scheduler.busy:
                continue
            try:
                self._report(self._scheduler.advance())
            except Exception as error:
                # Whose request it was is not known.
                log.exception("the engine failed; %d requests are given up", len(self._by_id))
                for ticket in list(self._by_id.values()):
                    self._scheduler.cancel(ticket.id)
                    self._end(ticket, "failed", error)
        for item in list(self._open):
            if isinstance(item, Ticket):
                self._end(item, "cancelled", STOPPING)
            elif item.set_running_or_notify_cancel():
                item.set_exception(STOPPING)

    def _add(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket.cancelled:
                continue
            self.metrics.prompt_tokens.inc(len(ticket.request.prompt))
            try:
                ticket.id = self._scheduler.add(ticket.request)
                self._by_id[ticket.id] = ticket
            except Exception as error:
                self._end(ticket, "failed", error)

    def _drop(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket in self._open:
                self._scheduler.cancel(ticket.id)
                self._end(ticket, "cancelled", STOPPING)

    def _end(self, ticket: Ticket, outcome: str, last: Event | Exception) -> None:
        """Forget a ticket and tell its owner the last thing."""
        self._by_id.pop(ticket.id, None)
        self._leave(ticket)
        self.metrics.requests.labels(outcome).inc()
        if not ticket.cancelled:
            ticket.tell(last)

    def _report(self, events: list[Event]) -> None:
        now, metrics = time.monotonic(), self.metrics
        # Counted before the events are sent, since a client may read the counts at once.
        metrics.tokens.inc(len(events))
        metrics.layers.inc(sum(event.depth for event in events))
        for event in events:
            ticket = self._by_id[event.request]
            metrics.depths.labels(str(event.depth)).inc()
            (metrics.next if ticket.begun else metrics.first).observe(now - ticket.at)
            ticket.at, ticket.begun = now, True
        for event in events:
            ticket = self._by_id[event.request]
            if event.finished is not None:
                self._scheduler.cancel(event.request)
                self._end(ticket, "answered", event)
            elif not ticket.cancelled:
                ticket.tell(event)

    def _failed(self, request: int, error: Exception) -> None:
        """The scheduler dropped one request, which alone can't continue."""
        log.warning("request %d failed: %s", request, error)
        self._end(self._by_id[request], "failed", error)
