"""A Ray cluster is joined with a token, waited for with an end, and its nodes that don't answer aren't counted on."""

from __future__ import annotations

import os
import socket
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from ee_megatron.rollout.pool import ray_cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing of Ray's is set; what a call sets is taken back after the test."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED",
                 "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_worker_niceness"):  # fmt: skip
        # Set first: what is absent is else not taken note of.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


@pytest.mark.parametrize(
    "address", ["127.0.0.1:6379", "auto", "local", "localhost:6379", "[::1]:6379", "ray://[::1]:1"]
)
def test_a_cluster_of_this_machine_needs_no_token(address: str, clean: pytest.MonkeyPatch) -> None:
    clean.setenv("RAY_ADDRESS", address)
    ray_cluster.prepare_environment()
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "head-node:6379", "ray://head:10001"])
def test_a_cluster_on_other_machines_is_joined_with_a_token_only(
    address: str, clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match="RAY_AUTH_TOKEN"):
        ray_cluster.prepare_environment()
    (tmp_path / "token").write_text("secret")
    clean.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    ray_cluster.prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    clean.setattr(metadata, "version", lambda name: "2.51.2")
    with pytest.raises(ValueError, match=r"2\.51\.2.*2\.52"):
        ray_cluster.prepare_environment()
    for version in ("2.52.0", "2.60.0", "3.0.0.dev0"):
        clean.setattr(metadata, "version", lambda name, version=version: version)
        ray_cluster.prepare_environment()


def test_a_head_that_never_answers_is_an_error_that_names_it() -> None:
    port = free_port()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=f"RAY_ADDRESS=127.0.0.1:{port}.*0.2 s"):
        ray_cluster.await_head(f"127.0.0.1:{port}", 0.2)
    assert time.monotonic() - begun < 5
    # Names that Ray resolves itself are left to it.
    for address in ("auto", "local", "ray://nowhere:10001"):
        ray_cluster.await_head(address, 0)


def test_a_head_that_comes_late_is_waited_for() -> None:
    port = free_port()
    late = threading.Timer(0.3, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    servers: list[socket.socket] = []
    late.start()
    try:
        assert not ray_cluster.accepts("127.0.0.1", port)
        ray_cluster.await_head(f"127.0.0.1:{port}", 30)
        assert ray_cluster.accepts("127.0.0.1", port)
    finally:
        late.join()
        for server in servers:
            server.close()


def test_room_is_counted_in_whole_actors_on_nodes_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, gpus: int, alive: bool = True) -> dict:
        resources = {"CPU": 8.0, "GPU": float(gpus)}
        return {
            "NodeID": name,
            "Alive": alive,
            "NodeManagerAddress": name,
            "NodeManagerPort": 1,
            "Resources": resources,
        }

    nodes = [node("a", 2), node("b", 2), node("c", 8), node("left", 8, alive=False), node("silent", 8)]
    monkeypatch.setattr(ray_cluster, "accepts", lambda host, port: host != "silent")
    ray = SimpleNamespace(nodes=lambda: nodes)
    # Two actors of four GPUs have room on a node of eight, none on nodes of two.
    assert [ray_cluster.RayNodes(ray, {"CPU": 1.0, "GPU": share}).room() for share in (4.0, 1.0, 0.5)] == [2, 12, 16]
    cpus = ray_cluster.RayNodes(ray, {"CPU": 0.5, "GPU": 0.0})
    assert cpus.room() == 48
    assert [cpus.is_gone(name) for name in ("a", "left", "silent", "other")] == [False, True, True, True]


def test_a_start_that_takes_longer_than_rays_own_deadline_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    calls: list[dict] = []

    def init(**options: object) -> None:
        calls.append(options)
        if len(calls) < 3:
            raise Exception("The current node timed out during startup. This could happen because ...")

    ray_cluster.start_ray(SimpleNamespace(init=init), 2, 1.0, 0, 60.0)
    assert [call["address"] for call in calls] == ["local"] * 3
    calls.clear()
    with pytest.raises(RuntimeError, match=r"^Ray did not start within -1 s"):
        ray_cluster.start_ray(SimpleNamespace(init=init), 2, 1.0, 0, -1.0)
    with pytest.raises(KeyError):
        ray_cluster.start_ray(SimpleNamespace(init=lambda **_: {}["other"]), 2, 1.0, 0, 60.0)
