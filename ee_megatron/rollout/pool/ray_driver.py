"""Drives the actors of a pool: one thread per place takes chunks of work in order and replaces its actor if that dies.

A request is cut into chunks by the caller, from the request alone: an answer's last bits depend on what is computed
beside it, so a chunk that an actor lost is computed again whole and gives the same bits. Which actor takes a chunk, and
when, changes nothing. Completed chunks are never sent again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...config.schema import RolloutConfig
from ..engine.request import Progress
from .ray_cluster import RayNodes

# How long a wait may sleep before progress and the end of the pool are looked at, seconds.
POLL_S = 0.1
# How often a place without an actor looks for room, seconds.
LOOK_S = 5.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """One version of the weights in the object store: (version, digest) and its chunks; None: the teacher."""

    identity: tuple[int, str]
    chunks: tuple[Any, ...] | None


@dataclass(eq=False)
class Work:
    """A request to the actors: chunks of arguments and their sizes, to be answered under `weights`, and the results.
    Without chunks it is done once every actor has loaded the weights."""

    weights: Sent
    method: str = ""
    arguments: list[tuple] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    pending: deque[int] = field(init=False)
    results: dict[int, list] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    driver: Driver = field(init=False)

    def __post_init__(self) -> None:
        self.pending = deque(range(len(self.arguments)))

    def finish(self, error: Exception | None = None) -> None:
        """Wake the waiting caller, with an error if there is one."""
        self.error = error
        self.done.set()

    def result(self, progress: Progress | None = None) -> list:
        """Wait for results, in the chunks' order. Raises the work's error. An interrupted wait withdraws the work."""
        reported, total = 0, sum(self.sizes)
        try:
            while not self.done.wait(POLL_S):
                count = sum(self.sizes[i] for i in list(self.results))
                if progress and count > reported:
                    reported = count
                    progress(reported, total)
        finally:
            self.driver.withdraw(self)
        if self.error is not None:
            raise self.error
        if progress and total > reported:
            progress(total, total)
        return [entry for i in range(len(self.sizes)) for entry in self.results[i]]


@dataclass(eq=False)
class Place:
    """Place of one actor or its successor. `handle` None: no actor now, `no_room`: and no node has room for one.
    `held`: weights that it has loaded, None while it loads; `pid` and `node`: set once the first are loaded."""

    handle: Any = None
    no_room: bool = False
    held: tuple[int, str] | None = None
    pid: int = 0
    node: str = ""

    def clear(self) -> None:
        self.handle, self.held, self.pid, self.node = None, None, 0, ""


class ActorLost(Exception):
    """Raised when an actor died, or missed a deadline."""


class Driver:
    """Owns `rollout.actors` places and runs submitted works in order of arrival.

    Every call has a deadline: `start_s` for an actor's first load, `rollout.timeout_s`, which is above 0 here, for any
    other. An actor that dies or misses one is replaced where the nodes have room; where they have none the pool works
    with fewer, and looks for room again. A lost node counts as one loss. Loss number `failure_budget` fails every call
    from then on, and so does a pool without any actor for `start_s`.
    """

    def __init__(self, ray: Any, create: Callable[[], Any], nodes: RayNodes, rollout: RolloutConfig, start_s: float):
        self._ray, self._create, self._nodes = ray, create, nodes
        self._start_s, self._timeout_s, self._budget = start_s, rollout.timeout_s, rollout.failure_budget
        self.deaths, self.last_death = 0, ""
        self.places = [Place() for _ in range(rollout.actors)]
        self._works: list[Work] = []
        self._lost_nodes: set[str] = set()
        self._broken: Exception | None = None
        self._manned = time.monotonic()
        self._changed = threading.Condition()
        self._creating = threading.Lock()
        self._threads = [
            threading.Thread(target=self._serve, args=(place,), name=f"rollout-actor-{i}", daemon=True)
            for i, place in enumerate(self.places)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work) -> Work:
        """Start a work and return it; wait for its `result`."""
        work.driver = self
        with self._changed:
            if self._broken is not None:
                work.finish(self._broken)
            else:
                if not self._works:
                    self._manned = time.monotonic()
                self._works.append(work)
                self._finish()
        return work

    def withdraw(self, work: Work) -> None:
        """Begin no further chunk of this work."""
        with self._changed:
            self._remove(work)

    def close(self) -> None:
        """Fail running works and end the actors."""
        self._break(RuntimeError("the rollout pool is closed; make a new one"))
        for _ in range(2):
            for place in self.places:
                if place.handle is not None:
                    self._ray.kill(place.handle)
            # Meanwhile one may have been created.
            for thread in self._threads:
                thread.join(timeout=100 * POLL_S)

    # ---- in the places' threads ----

    def _serve(self, place: Place) -> None:
        while self._broken is None:
            try:
                if place.handle is None and not self._create_actor(place):
                    continue
                with self._changed:
                    task = self._next(place)
                    if task is None and self._broken is None:
                        self._changed.wait()
                if task is not None:
                    self._answer(place, *task)
            except Exception as error:
                log.exception("the rollout pool failed")
                self._break(error)

    def _next(self, place: Place) -> tuple[Work, int] | None:
        """The first work with a chunk to answer (its number) or with weights to take up (-1)."""
        for work in self._works:
            if work.pending:
                return work, work.pending.popleft()
            if not work.arguments:
                # Later works must not take the weights away until every actor has loaded them.
                return (work, -1) if place.held != work.weights.identity else None
        return None

    def _answer(self, place: Place, work: Work, chunk: int) -> None:
        weights = work.weights
        try:
            if place.held != weights.identity:
                limit = self._timeout_s if place.pid else self._start_s
                place.held = None
                call = place.handle.load.remote(weights.identity, weights.chunks, limit)
                place.held, place.pid, place.node = self._result(place, call, limit)
            if chunk >= 0:
                call = place.handle.call.remote(weights.identity, work.method, work.arguments[chunk])
                work.results[chunk] = self._result(place, call, self._timeout_s)
        except ActorLost as lost:
            with self._changed:
                if chunk >= 0:
                    work.pending.appendleft(chunk)
            self._replace(place, str(lost))
        except Exception as error:
            with self._changed:
                self._remove(work)
                work.finish(error)
        with self._changed:
            self._finish()

    def _result(self, place: Place, call: Any, limit: float) -> Any:
        """What a call returns. Raises what it raised, or ActorLost."""
        errors, deadline = self._ray.exceptions, time.monotonic() + limit
        try:
            while not self._ray.wait([call], timeout=max(0.0, min(LOOK_S, deadline - time.monotonic())))[0]:
                if time.monotonic() >= deadline:
                    raise ActorLost(f"it did not {'answer' if place.pid else 'start'} within {limit:.4g} s")
                if not place.pid and self._nodes.room() < self._occupied():
                    raise ActorLost("")
            return self._ray.get(call, timeout=self._timeout_s)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except errors.RayError as error:
            raise ActorLost(str(error).strip().splitlines()[0]) from None

    def _replace(self, place: Place, reason: str) -> None:
        """Count a loss and free the place. Without a reason it is none: the actor waited on a node that is gone."""
        pid, node = place.pid, place.node
        self._ray.kill(place.handle)
        place.clear()
        if not reason or self._broken is not None:
            return
        gone = bool(node) and self._nodes.is_gone(node)
        with self._changed:
            if node in self._lost_nodes:
                return
            if gone:
                self._lost_nodes.add(node)
                reason = f"its node is gone ({reason})"
            self.deaths += 1
            self.last_death = reason
        log.warning("a rollout actor (process %d) was lost: %s", pid, reason)
        if self.deaths >= self._budget:
            self._break(RuntimeError(
                f"rollout pool: {self.deaths} actors lost, rollout.failure_budget is {self._budget}; "
                f"the last: {reason}. Look for memory limits or lower rollout.max_num_seqs"
            ))  # fmt: skip

    def _create_actor(self, place: Place) -> bool:
        """Fill a place if a node has room, else wait a little. A pool without any actor for too long fails."""
        with self._creating:
            room, occupied = self._nodes.room(), self._occupied()
            if room > occupied:
                place.handle, place.no_room = self._create(), False
                return True
        with self._changed:
            if not place.no_room:
                actors = len(self.places)
                log.warning("no node has room for %d of %d rollout actors", actors - occupied, actors)
            place.no_room = True
            self._finish()
            if occupied or not self._works:
                self._manned = time.monotonic()
            waited = time.monotonic() - self._manned
            if waited <= self._start_s:
                self._changed.wait(LOOK_S if self._works else None)
                return False
        raise RuntimeError(
            f"rollout pool: for {waited:.0f} s no node has had room for an actor (last loss: "
            f"{self.last_death or 'none'}). Look at the logs of the rollout nodes, or lower rollout.device_share"
        )

    def _occupied(self) -> int:
        return sum(place.handle is not None for place in self.places)

    def _finish(self) -> None:
        """End the works that are done, and wake the places' threads. Under the lock."""
        actors = [place for place in self.places if not place.no_room]
        for work in list(self._works):
            if work.arguments:
                done = len(work.results) == len(work.arguments)
            else:
                done = bool(actors) and all(place.held == work.weights.identity for place in actors)
            if done:
                self._remove(work)
                work.finish()
        self._changed.notify_all()

    def _remove(self, work: Work) -> None:
        if work in self._works:
            self._works.remove(work)
            self._changed.notify_all()

    def _break(self, error: Exception) -> None:
        """Fail every request, pending and future."""
        with self._changed:
            self._broken = self._broken or error
            for work in self._works:
                work.finish(self._broken)
            self._works.clear()
            self._changed.notify_all()
