"""Deadlines that cannot contradict each other: ranks wait for their leader's rollouts for as long as it lives, and an
actor's start may take as long as its weights take to read."""

from __future__ import annotations

import re
import socket

import pytest
import torch
from ranks import Ranks

from ee_megatron.config import derive
from ee_megatron.config.schema import RolloutConfig
from ee_megatron.exit_rules import Off
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.rollout import ReplicaSettings
from ee_megatron.rollout.engine.request import GenerationRequest
from ee_megatron.rollout.engine.sampling import SamplingParams
from ee_megatron.rollout.pool.ray_pool import RayPool
from ee_megatron.types import Prompt
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


def test_no_group_of_ranks_has_a_shorter_deadline_than_all_of_them(ranks: Ranks):
    assert min(ranks.call("deadline_cases:group_deadline", port=free_port(), timeout_s=90)) >= 90


@SLOW
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("rate", "starts"), [(1 / 200, True), (1e6, False)])
def test_an_actor_may_take_as_long_to_start_as_its_weights_to_be_read(rate, starts, path, monkeypatch):
    """Half a second is too short for the imports alone; a disk that reads the model in 200 s makes up for it."""
    monkeypatch.setattr(derive, "START_S", 0.5)
    monkeypatch.setattr(derive, "DISK_BYTES_PER_S", HFDirectory(path).size() * rate)
    settings = ReplicaSettings(str(path), None, torch.float32, "cpu", rows=2, threads=1)
    pool = RayPool(settings, RolloutConfig(actors=1, failure_budget=1, device_share=0.5))
    try:
        if starts:
            pool.load(None)
            assert pool.health()["alive"] == 1
        else:
            with pytest.raises(RuntimeError, match=r"start.*0\.5 s"):
                pool.load(None)
    finally:
        pool.close()


@SLOW
@pytest.mark.timeout(120)
def test_an_actor_without_the_gpu_that_it_was_given_is_said_at_once_and_not_tried_again(path):
    """Ray hands out what it was told there is; torch looks."""
    import ray

    ray.init(
        address="local", num_cpus=2, num_gpus=1, include_dashboard=False, _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )  # fmt: skip
    try:
        settings = ReplicaSettings(str(path), None, torch.float32, "cuda", rows=2, threads=1)
        pool = RayPool(settings, RolloutConfig(actors=1))
        with pytest.raises(ValueError, match=r"device=cuda.*torch"):
            pool.load(None)
        assert pool.health()["restarts"] == 0
        pool.close()
    finally:
        ray.shutdown()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("per_token", "answers"), [(30.0, True), (0.0, False)])
def test_a_call_may_take_as_long_as_its_answers_are_long(per_token, answers, path, monkeypatch):
    """A millisecond is too short for any; a setting of one's own is not added to."""
    monkeypatch.setattr(derive, "CALL_S", 0.001)
    monkeypatch.setattr(derive, "TOKEN_S", per_token)
    settings = ReplicaSettings(str(path), None, torch.float32, "cpu", rows=2, threads=1)
    pool = RayPool(settings, RolloutConfig(actors=1, failure_budget=1, device_share=0.5, max_new_tokens=4))
    try:
        asked = GenerationRequest([Prompt("p", "one", "", "x")], 2, SamplingParams(1.0, 4), Off(), 0)
        if answers:
            assert len(pool.generate(asked)[0]) == 2
        else:
            with pytest.raises(RuntimeError, match=r"answer.*0\.001 s"):
                pool.generate(asked)
    finally:
        pool.close()
    assert derive.call_timeout(RolloutConfig(timeout_s=7.0)) == 7.0
