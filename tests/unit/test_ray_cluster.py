"""Waiting for a Ray cluster has an end, and a node that does not answer is not counted on."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from ee_megatron.rollout.pool import ray_cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_head_that_never_answers_is_an_error_that_names_it() -> None:
    port = free_port()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=f"RAY_ADDRESS=127.0.0.1:{port}.*0.2 s"):
        ray_cluster.await_head(f"127.0.0.1:{port}", 0.2)
    assert time.monotonic() - begun < 5


def test_a_head_that_comes_late_is_waited_for() -> None:
    port = free_port()
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def listen() -> None:
        server.bind(("127.0.0.1", port))
        server.listen()

    late = threading.Timer(0.3, listen)
    late.start()
    try:
        assert not ray_cluster.accepts("127.0.0.1", port)
        ray_cluster.await_head(f"127.0.0.1:{port}", 30)
        assert ray_cluster.accepts("127.0.0.1", port)
    finally:
        late.join()
        server.close()


@pytest.mark.parametrize("address", ["auto", "local", "ray://nowhere:10001"])
def test_names_that_ray_resolves_itself_are_left_to_it(address: str) -> None:
    ray_cluster.await_head(address, 0)


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
    assert cpus.room() == 48 and [cpus.is_gone(name) for name in ("a", "left", "silent", "other")] == [
        False,
        *[True] * 3,
    ]
