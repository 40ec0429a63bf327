"""Deadlines that cannot contradict each other: ranks wait for their leader's rollouts for as long as it lives."""

from __future__ import annotations

import re
import socket

import pytest
from ranks import Ranks

from tests.covering import EXTENDED, SLOW
from tests.tiny import tiny_hf

pytestmark = EXTENDED


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory):
    return tiny_hf("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    with Ranks(2, tmp_path_factory.mktemp("ranks")) as running:
        running.call("deadline_cases:ready")
        yield running


@SLOW
@pytest.mark.timeout(300)
def test_an_actor_slower_than_any_collective_may_be_ends_no_rank(path, ranks: Ranks, tmp_path):
    settings = [
        f"model.path={path}", f"runs={tmp_path}", "name=x", "device=cpu", "model.dtype=float32", "parallel.data=2",
        "parallel.timeout_s=10", "rollout.actors=1", "rollout.threads=1",
    ]  # fmt: skip
    found = ranks.call("deadline_cases:slow_actor", settings=settings, port=free_port(), asleep_s=22.0)
    assert [answers for answers, _ in found] == [4, 4]
    assert all(waited > 22 for _, waited in found), found


def test_a_leader_that_gives_no_sign_of_life_is_given_up(ranks: Ranks):
    """Also where it holds the store, whose answers stop with it."""
    (_, _), (said, waited) = ranks.call("deadline_cases:frozen_leader", port=free_port(), silence_s=2.0)
    assert re.search(r"rank 0\b.*\b2 s\b.*parallel\.timeout_s", said), said
    assert 2 <= waited < 20


def test_the_leader_keeps_the_store_until_no_rank_needs_it(path, ranks: Ranks, tmp_path):
    settings = [
        f"model.path={path}", f"runs={tmp_path}", "name=x", "device=cpu", "model.dtype=float32", "parallel.data=2",
    ]  # fmt: skip
    leader, _ = ranks.call("deadline_cases:leader_leaves_last", settings=settings, port=free_port(), asleep_s=2.0)
    assert 1.5 < leader < 60


def test_no_group_of_ranks_has_a_shorter_deadline_than_all_of_them(ranks: Ranks):
    assert min(ranks.call("deadline_cases:group_deadline", port=free_port(), timeout_s=90)) >= 90
