"""Drives the actors of a pool from a thread of its own: gives out chunks of work in order, replaces who dies.

A node that is lost takes all its actors along and counts as one loss; where the nodes that are left have no room, the
pool works with fewer actors and takes up others when there is room again.

A request is cut into chunks by the caller, from the request alone: an answer's last bits depend on what is computed
beside it, so a chunk that an actor lost is computed again whole and gives the same bits. Which actor takes a chunk, and
when, changes nothing. Chunks that were answered are never asked again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...config.schema import RolloutConfig
from ..engine.request import Progress
from .ray_nodes import RayNodes

# How long a wait may sleep before new requests and deadlines are looked at, seconds.
POLL_S = 0.1
# How often a pool that lacks actors looks for room, seconds.
LOOK_S = 5.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """One version of the weights in the object store: (version, digest) and its chunks; None: the teacher."""

    identity: tuple[int, str]
    chunks: tuple[Any, ...] | None


@dataclass(eq=False)
class Work:
    """A request: chunks of arguments and their sizes, to be answered under `weights`, and what came of it.

    Without chunks it is done once every actor holds the weights. Fields below are the driver's; `given` counts the
    chunks it has handed to actors, again after a loss.
    """

    weights: Sent
    method: str = ""
    arguments: list[tuple] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    pending: deque[int] = field(default_factory=deque)
    given: int = 0
    results: dict[int, list] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.pending.extend(range(len(self.arguments)))

    def finish(self, error: Exception | None = None) -> None:
        """Wake whoever waits, with an error if there is one."""
        self.error = error
        self.done.set()

    def count(self) -> int:
        """Items whose results are there."""
        return sum(self.sizes[i] for i in list(self.results))


@dataclass(eq=False)
class Actor:
    """An actor and the one call it has in flight: a chunk of some work, or a load of weights (`loading`)."""

    handle: Any
    started: bool = False
    held: tuple[int, str] | None = None
    pid: int = 0
    node: str = ""
    call: Any = None
    loading: tuple[int, str] | None = None
    work: Work | None = None
    chunk: int = -1
    deadline: float = 0.0


class Driver:
    """Owns `rollout.actors` actors. `submit` works, `wait` for them; works are served in the order of their arrival.

    Every call has a deadline: `start_s` for an actor's first load, `rollout.timeout_s`, which is above 0 here, for any
    other. An actor that dies or misses one is replaced where there is room; loss number `failure_budget` fails whatever
    is asked from then on, and so does a pool without any actor for `start_s`.
    """

    def __init__(self, ray: Any, create: Callable[[], Any], nodes: RayNodes, rollout: RolloutConfig, start_s: float):
        self._ray, self._create, self._nodes, self._count = ray, create, nodes, rollout.actors
        self._start_s, self._timeout_s = start_s, rollout.timeout_s
        self._budget = rollout.failure_budget
        self.deaths, self.last_death = 0, ""
        self.actors: list[Actor] = []
        self._looked = self._manned = time.monotonic()
        self._fill()
        self._works: list[Work] = []
        self._broken: Exception | None = None
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rollout-pool", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> Work:
        with self._wake:
            if self._broken is not None:
                work.finish(self._broken)
            elif not self._thread.is_alive():
                work.finish(RuntimeError("the rollout pool is closed; make a new one"))
            else:
                self._works.append(work)
                self._wake.notify()
        return work

    def wait(self, work: Work, progress: Progress | None = None) -> list:
        """Results in the chunks' order. Raises what went wrong. Leaving early (interrupted) gives the work up."""
        reported, total = 0, sum(work.sizes)
        try:
            while not work.done.wait(POLL_S):
                if not self._thread.is_alive():
                    raise RuntimeError("the rollout pool was closed while it worked")
                if progress and work.count() > reported:
                    reported = work.count()
                    progress(reported, total)
        except BaseException:
            self._withdraw(work)
            raise
        if work.error is not None:
            raise work.error
        if progress and total > reported:
            progress(total, total)
        return [entry for i in range(len(work.sizes)) for entry in work.results[i]]

    def close(self) -> None:
        """Fail what is under way and end the actors."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=100 * POLL_S)
        for actor in self.actors:
            self._ray.kill(actor.handle)
        self.actors = []

    # ---- the thread ----

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._works and not self._closing:
                    self._wake.wait()
                    self._manned = time.monotonic()
                if self._closing:
                    return self._fail_all(RuntimeError("the rollout pool was closed while it worked"))
            try:
                self._turn()
            except Exception as error:
                with self._wake:
                    self._broken = error
                    self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        for work in self._works:
            work.finish(error)
        self._works.clear()

    def _withdraw(self, work: Work) -> None:
        with self._wake:
            if work in self._works:
                self._works.remove(work)

    def _turn(self) -> None:
        with self._wake:
            works = list(self._works)
        if len(self.actors) < self._count and time.monotonic() > self._looked + LOOK_S:
            self._fill()
        for actor in self.actors:
            if actor.call is None:
                self._assign(actor, works)
        self._collect()
        for work in works:
            if not work.done.is_set() and self._complete(work):
                self._withdraw(work)
                work.finish()

    def _complete(self, work: Work) -> bool:
        if work.arguments:
            return len(work.results) == len(work.arguments)
        return bool(self.actors) and all(actor.held == work.weights.identity for actor in self.actors)

    def _assign(self, actor: Actor, works: list[Work]) -> None:
        """Give an idle actor the first chunk that waits, or first the weights that it asks for."""
        for work in works:
            if work.done.is_set() or (work.arguments and not work.pending):
                continue
            wanted = work.weights.identity
            if actor.held != wanted:
                actor.held, actor.loading = None, wanted
                limit = self._timeout_s if actor.started else self._start_s
                # The work is kept with the call so that its error, if it is one, is told to whoever asked.
                actor.work, actor.chunk = work, -1
                actor.call = actor.handle.load.remote(wanted, work.weights.chunks, limit)
            elif work.pending:
                actor.work, actor.chunk, limit = work, work.pending.popleft(), self._timeout_s
                work.given += 1
                actor.call = actor.handle.call.remote(wanted, work.method, work.arguments[actor.chunk])
            else:
                # This load waits for others: later works must not take the weights away from under it.
                return
            actor.deadline = time.monotonic() + limit
            return

    def _collect(self) -> None:
        """Wait for some call to end and take in what did; replace actors that died or are overdue."""
        busy = [actor for actor in self.actors if actor.call is not None]
        if not busy:
            if not self.actors:
                self._await_room()
            return
        self._manned = time.monotonic()
        nearest = min(actor.deadline for actor in busy) - time.monotonic()
        timeout = min(POLL_S, max(0.0, nearest))
        ended, _ = self._ray.wait([a.call for a in busy], num_returns=1, timeout=timeout)
        for actor in busy:
            if actor not in self.actors:
                continue
            if actor.call in ended:
                self._take(actor)
            elif time.monotonic() > actor.deadline:
                limit, what = (self._timeout_s, "answer") if actor.started else (self._start_s, "start")
                self._replace(actor, f"it did not {what} within {limit:.4g} s")

    def _take(self, actor: Actor) -> None:
        errors, work = self._ray.exceptions, actor.work
        assert work is not None
        try:
            result = self._ray.get(actor.call, timeout=self._timeout_s)
        except errors.RayTaskError as error:
            result = error.cause if isinstance(error.cause, Exception) else error
        except errors.RayError as error:
            return self._replace(actor, str(error).strip().splitlines()[0])
        if isinstance(result, Exception):
            self._withdraw(work)
            work.finish(result)
        elif actor.loading is not None:
            actor.held, actor.pid, actor.node = result
            actor.started = True
        else:
            work.results[actor.chunk] = result
        actor.call, actor.loading, actor.work = None, None, None
        return None

    def _replace(self, actor: Actor, reason: str) -> None:
        """Take up a new actor for a lost one, or for all of a lost node, and put their chunks back at the front. Raises
        RuntimeError once the budget is spent."""
        lost = [actor]
        if actor.node and self._nodes.is_gone(actor.node):
            lost = [other for other in self.actors if other.node == actor.node]
            reason = f"its node is gone, with {len(lost)} actor(s) ({reason})"
        self.deaths += 1
        self.last_death = reason
        log.warning("rollout actor %d (process %d) was lost: %s", self.actors.index(actor), actor.pid, reason)
        for gone in lost:
            self._retire(gone)
        if self.deaths >= self._budget:
            raise RuntimeError(
                f"rollout pool: {self.deaths} actors lost, rollout.failure_budget is {self._budget}; "
                f"the last: {reason}. Look for memory limits or lower rollout.max_num_seqs"
            )
        self._fill(lost)

    def _retire(self, actor: Actor) -> None:
        if actor.loading is None and actor.work is not None:
            actor.work.pending.appendleft(actor.chunk)
        self._ray.kill(actor.handle)
        actor.call, actor.held = None, None

    def _fill(self, lost: Sequence[Actor] = ()) -> None:
        """Put new actors into the places of lost ones and into empty ones, as far as there is room; those that wait for
        a place on a node that is gone give up waiting. The list of actors changes in one go: others read it."""
        self._looked = time.monotonic()
        room, kept = self._nodes.room(), [actor for actor in self.actors if actor not in lost]
        for actor in [actor for actor in kept if not actor.started][: max(0, len(kept) - room)]:
            self._retire(actor)
            kept.remove(actor)
        fresh = [Actor(self._create()) for _ in range(min(self._count, room) - len(kept))]
        missing = self._count - len(kept) - len(fresh)
        if missing and len(kept) + len(fresh) != len(self.actors):
            log.warning("no node has room for %d of %d rollout actors; going on without them", missing, self._count)
        self.actors = kept + fresh

    def _await_room(self) -> None:
        """There is nobody to do the work. Raises RuntimeError once that has been so for too long."""
        waited = time.monotonic() - self._manned
        if waited > self._start_s:
            raise RuntimeError(
                f"rollout pool: for {waited:.0f} s no node has had room for an actor (last loss: "
                f"{self.last_death or 'none'}). Look at the logs of the rollout nodes, or lower rollout.device_share"
            )
        with self._wake:
            self._wake.wait(POLL_S)
