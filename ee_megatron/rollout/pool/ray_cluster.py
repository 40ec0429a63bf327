"""A Ray cluster: join or start it, wait for its nodes, and count the actors that they have room for."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...config.cluster import require_ray_tokens

log = logging.getLogger(__name__)

EXPECTED = "EE_RAY_NODES"
"""Environment variable: how many nodes the cluster of RAY_ADDRESS will have, set by who starts them."""
# How long a node may take to accept a connection, and a wait sleeps between two looks, seconds.
PROBE_S, POLL_S = 3.0, 0.5


def prepare_environment() -> None:
    """Set environment variables that Ray reads when it is imported or started: without RAY_ADDRESS it stays on the
    loopback interface (the variable's name speaks of other systems, but it decides which address a single node takes),
    a cluster on other machines is joined with a token only."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts workers at nice 15, where they starve beside other work; learner and pool take turns anyway.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    elif is_remote(address) and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        require_ray_tokens()
        path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        if not (os.environ.get("RAY_AUTH_TOKEN") or Path(path).is_file()):
            raise ValueError(
                f"RAY_ADDRESS={address} is another machine and has no token here; start its cluster with "
                "RAY_AUTH_MODE=token and set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH here (docs/serving.md)"
            )


def is_remote(address: str) -> bool:
    """Whether a Ray address, with or without scheme and port, is outside the loopback interface."""
    host = address.split("://")[-1].rsplit(":", 1)[0].strip("[]")
    return host not in ("local", "auto") and not is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def start_ray(ray: Any, actors: int, device_share: float, policy_bytes: int, timeout_s: float) -> None:
    """Join the cluster of RAY_ADDRESS, waiting up to `timeout_s` for its head and for its nodes, or start one of this
    machine only: loopback, no dashboard, no usage reports. Raises RuntimeError if it isn't there in that time."""
    init = partial(ray.init, namespace=f"ee-megatron-{os.getpid()}", log_to_driver=False, logging_level="ERROR")
    if address := os.environ.get("RAY_ADDRESS"):
        await_head(address, timeout_s)
        init(address=address)
        await_nodes(ray, timeout_s)
        return
    end = time.monotonic() + timeout_s
    while True:
        try:
            init(
                # Without this Ray joins whatever cluster somebody else has left running on the machine.
                address="local",
                num_cpus=max(2, 1 + actors * math.ceil(device_share)),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                # Room for two versions of the weights on their way and the rollouts of a batch.
                object_store_memory=max(1 << 27, 3 * policy_bytes),
            )
            return
        except Exception as error:
            # Ray's own deadline is 30 s, too little on a busy machine; what did start ends with this process.
            if "timed out during startup" not in str(error):
                raise
            if time.monotonic() > end:
                raise RuntimeError(
                    f"Ray did not start within {timeout_s:g} s; the machine is busy, or see Ray's logs"
                ) from None


def await_head(address: str, timeout_s: float) -> None:
    """Return once something listens at a Ray address (host:port; other forms are left to Ray). Raises RuntimeError
    after `timeout_s`."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        _wait(lambda: accepts(host.strip("[]"), int(port)), timeout_s, RuntimeError(
            f"RAY_ADDRESS={address}: nothing answered there within {timeout_s:g} s; look at the log of Ray's head"
        ))  # fmt: skip


def await_nodes(ray: Any, timeout_s: float) -> None:
    """Wait for all nodes that EE_RAY_NODES announces. After `timeout_s` a warning says that some are missing, and the
    pool starts with those that are there."""
    expected = int(os.environ.get(EXPECTED, "0"))

    def joined() -> int:
        return sum(node["Alive"] for node in ray.nodes())

    try:
        _wait(lambda: joined() >= expected, timeout_s, TimeoutError())
    except TimeoutError:
        log.warning("%d of %d Ray nodes joined within %g s; continuing with these", joined(), expected, timeout_s)


def _wait(what: Callable[[], bool], timeout_s: float, error: Exception) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            raise error
        time.sleep(POLL_S)


def accepts(host: str, port: int) -> bool:
    """Whether a server listens at this address."""
    try:
        with socket.create_connection((host, port), timeout=PROBE_S):
            return True
    except OSError:
        return False


class RayNodes:
    """Room in the cluster for actors of one kind. `needs`: resources of one actor, e.g. {"CPU": 1, "GPU": 0.5}."""

    def __init__(self, ray: Any, needs: dict[str, float]):
        self._ray, self._needs = ray, {name: amount for name, amount in needs.items() if amount > 0}

    def room(self) -> int:
        """Number of actors that fit on the nodes that answer, if these were empty."""
        return sum(
            min(int(node["Resources"].get(name, 0.0) / amount + 1e-9) for name, amount in self._needs.items())
            for node in self._ray.nodes()
            if self._answers(node)
        )

    def is_gone(self, node_id: str) -> bool:
        """Whether a node, by its id, has left or no longer answers. Ray itself takes half a minute to notice a machine
        that lost its power."""
        return not any(node["NodeID"] == node_id and self._answers(node) for node in self._ray.nodes())

    def _answers(self, node: dict[str, Any]) -> bool:
        return bool(node["Alive"]) and accepts(node["NodeManagerAddress"], int(node["NodeManagerPort"]))
