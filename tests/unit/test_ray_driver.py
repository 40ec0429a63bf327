"""Chunks of work over actors that die, hang or find no room, on a stand-in for Ray whose actors are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from ee_megatron.config.schema import RolloutConfig
from ee_megatron.rollout.pool import ray_driver
from ee_megatron.rollout.pool.ray_driver import Driver, Sent, Work

OLD, NEW = Sent((1, "old"), ("chunk",)), Sent((2, "new"), ("chunk",))


class Lost(Exception):
    """Ray's RayError."""


class Failed(Lost):
    """Ray's RayTaskError."""

    def __init__(self, cause: Exception):
        self.cause = cause


class Actor:
    """Answers chunk (x,) with [(weights held, x)]. `act(actor, what)` is run before each load and call: it may raise
    `Lost`, as a death, or anything else, as an error of the request's; or take its time."""

    def __init__(self, act: Callable[[Actor, Any], None], node: str):
        self.node, self.held, self.dead, self._act = node, None, False, act
        self.waiting: list[Future] = []
        self.load, self.call = SimpleNamespace(remote=self._load), SimpleNamespace(remote=self._call)

    def _load(self, wanted: tuple, chunks: tuple, limit: float) -> Future:
        def load() -> tuple:
            self._act(self, "load")
            self.held = wanted
            return wanted, id(self), self.node

        return self._start(load)

    def _call(self, expected: tuple, method: str, arguments: tuple) -> Future:
        def call() -> list:
            self._act(self, arguments[0])
            assert self.held == expected
            return [(self.held[0], arguments[0])]

        return self._start(call)

    def _start(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()
        self.waiting.append(future)

        def run() -> None:
            with suppress(InvalidStateError):
                try:
                    future.set_result(work())
                except Lost as error:
                    self.die(error)
                except Exception as error:
                    future.set_exception(Failed(error))

        if self.dead:
            future.set_exception(Lost("dead"))
        else:
            threading.Thread(target=run, daemon=True).start()
        return future

    def die(self, error: Exception) -> None:
        self.dead = True
        for future in self.waiting:
            with suppress(InvalidStateError):
                future.set_exception(error)


class Cluster:
    """The stand-in for `ray` and for `RayNodes`: `nodes` maps a node's name to the actors that it has room for."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=Failed)

    def __init__(self, act: Callable[[Actor, Any], None], **nodes: int):
        self.act, self.nodes, self.actors = act, nodes or {"node": 9}, list[Actor]()

    def create(self) -> Actor:
        living = [actor.node for actor in self.actors if not actor.dead]
        node = next(name for name, room in self.nodes.items() if living.count(name) < room)
        self.actors.append(Actor(self.act, node))
        return self.actors[-1]

    def wait(self, futures: list[Future], timeout: float) -> tuple[list, list]:
        done = list(wait(futures, timeout).done)
        return done, []

    def get(self, future: Future, timeout: float) -> Any:
        return future.result(timeout)

    def kill(self, actor: Actor) -> None:
        actor.die(Lost("killed"))

    def room(self) -> int:
        return sum(self.nodes.values())

    def is_gone(self, node: str) -> bool:
        return node not in self.nodes


@contextmanager
def driving(
    act: Callable[[Actor, Any], None], *, start_s: float = 20.0, nodes: dict | None = None, **rollout
) -> Iterator:
    cluster = Cluster(act, **(nodes or {}))
    settings = RolloutConfig(**{"actors": 2, "timeout_s": 20.0, "failure_budget": 3, **rollout})
    driver = Driver(cluster, cluster.create, cluster, settings, start_s)
    try:
        yield driver, cluster
    finally:
        driver.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_driver, "LOOK_S", 0.02)


def work(weights: Sent, chunks: range | list[int] = range(6)) -> Work:
    return Work(weights, "generate", [(x,) for x in chunks], [1] * len(chunks))


def answers(weights: Sent, chunks: range | list[int] = range(6)) -> list:
    return [(weights.identity[0], x) for x in chunks]


def once(when: Any, error: Exception) -> Callable[[Actor, Any], None]:
    """What raises at the first `when` of all actors."""
    left = [error]

    def act(_: Actor, what: Any) -> None:
        if what == when and left:
            raise left.pop()

    return act


def idle(_: Actor, what: Any) -> None:
    """Nothing happens."""


def test_works_are_answered_in_order_each_under_its_own_weights_and_progress_counts_them():
    seen: list[tuple[int, int]] = []
    with driving(idle) as (driver, _):
        first, second = driver.submit(work(OLD)), driver.submit(work(NEW))
        assert second.result(lambda *at: seen.append(at)) == answers(NEW)
        assert first.result() == answers(OLD) and seen[-1] == (6, 6)
        for _ in range(2):
            # Also where everyone holds them already.
            assert driver.submit(Work(OLD)).result() == []
            assert [place.held for place in driver.places] == [OLD.identity] * 2


@pytest.mark.parametrize("when", ["load", 0, 3, 5])
def test_a_lost_actor_is_replaced_and_only_its_chunk_is_asked_for_again(when: Any):
    lose, calls = once(when, Lost("out of memory\nmore")), []

    def act(actor: Actor, what: Any) -> None:
        calls.append(what)
        lose(actor, what)

    with driving(act) as (driver, cluster):
        assert driver.submit(work(OLD)).result() == answers(OLD)
        assert sorted(x for x in calls if x != "load") == sorted([*range(6), *([] if when == "load" else [when])])
        assert driver.deaths == 1 and "out of memory" in driver.last_death
        driver.submit(Work(NEW)).result()
        assert len(cluster.actors) == 3 and [place.held for place in driver.places] == [NEW.identity] * 2


@pytest.mark.parametrize(("when", "limits"), [("load", {"start_s": 0.05}), (3, {"timeout_s": 0.05})])
def test_an_actor_that_misses_its_deadline_is_replaced(when: Any, limits: dict):
    hung = threading.Event()

    def act(_: Actor, what: Any) -> None:
        if what == when and not hung.is_set():
            hung.set()
            time.sleep(0.5)

    with driving(act, **limits) as (driver, _):
        assert driver.submit(work(OLD)).result() == answers(OLD)
        assert driver.deaths == 1 and "0.05 s" in driver.last_death


def test_losses_have_a_budget_and_then_whatever_is_asked_fails():
    def act(_: Actor, what: Any) -> None:
        if what == 2:
            raise Lost("again")

    with driving(act) as (driver, _):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"rollout\.failure_budget is 3.*again"):
                driver.submit(work(OLD)).result()
        assert driver.deaths == 3


@pytest.mark.parametrize("when", ["load", 1])
def test_an_error_in_one_request_is_told_to_whoever_asked_and_costs_no_actor(when: Any):
    with driving(once(when, ValueError("too long")), actors=1) as (driver, cluster):
        bad, good = driver.submit(work(OLD)), driver.submit(work(NEW))
        with pytest.raises(ValueError, match="too long"):
            bad.result()
        assert good.result() == answers(NEW) and driver.deaths == 0 and len(cluster.actors) == 1


def test_a_lost_node_is_one_loss_and_its_places_are_filled_when_there_is_room_again():
    with driving(idle, actors=4, failure_budget=2, nodes={"a": 2, "b": 2}) as (driver, cluster):
        driver.submit(Work(OLD)).result()
        del cluster.nodes["b"]
        for actor in cluster.actors:
            if actor.node == "b":
                actor.die(Lost("no sign of life"))
        assert driver.submit(work(NEW, range(40))).result() == answers(NEW, range(40))
        driver.submit(Work(OLD)).result()
        assert sum(place.held == OLD.identity for place in driver.places) == 2
        assert driver.deaths == 1 and "node" in driver.last_death
        cluster.nodes["c"] = 2
        deadline = time.monotonic() + 20
        while sum(place.held == NEW.identity for place in driver.places) < 4:
            assert time.monotonic() < deadline
            driver.submit(Work(NEW)).result()


def test_a_pool_that_no_node_has_room_for_is_an_error_within_its_deadline():
    with (
        driving(idle, start_s=0.1, nodes={"full": 0}) as (driver, _),
        pytest.raises(RuntimeError, match=r"room.*rollout\.device_share"),
    ):
        driver.submit(Work(OLD)).result()


def test_a_closed_pool_fails_what_waits_and_leaves_no_actor():
    hung = threading.Event()
    with driving(lambda _, what: what == 0 and hung.wait(5)) as (driver, cluster):
        waiting = driver.submit(work(OLD))
        closing = threading.Timer(0.1, driver.close)
        closing.start()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result()
        closing.join()
        assert all(actor.dead for actor in cluster.actors)
        hung.set()
