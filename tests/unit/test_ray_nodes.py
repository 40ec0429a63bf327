"""Waiting for a Ray cluster has an end, and a node that does not answer is not counted on."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from ee_megatron.rollout.pool import ray_nodes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_head_that_never_answers_is_an_error_that_names_it() -> None:
    port = free_port()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=f"RAY_ADDRESS=127.0.0.1:{port}.*0.2 s"):
        ray_nodes.await_head(f"127.0.0.1:{port}", 0.2)
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
        assert not ray_nodes.accepts("127.0.0.1", port)
        ray_nodes.await_head(f"127.0.0.1:{port}", 30)
        assert ray_nodes.accepts("127.0.0.1", port)
    finally:
        late.join()
        server.close()


@pytest.mark.parametrize("address", ["auto", "local", "ray://nowhere:10001"])
def test_names_that_ray_resolves_itself_are_left_to_it(address: str) -> None:
    ray_nodes.await_head(address, 0)
