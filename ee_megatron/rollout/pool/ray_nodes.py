"""The nodes of a Ray cluster: waiting until they are there, how many actors they have room for, which are gone."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import time
from typing import Any

log = logging.getLogger(__name__)

EXPECTED = "EE_RAY_NODES"
"""Environment variable: how many nodes the cluster of RAY_ADDRESS will have, set by who starts them."""
# How long a node may take to accept a connection, and a wait sleeps between two looks, seconds.
PROBE_S, POLL_S = 3.0, 0.5


def await_head(address: str, timeout_s: float) -> None:
    """Return once something listens at a Ray address (host:port; ray:// and names that Ray resolves are not looked
    at). Raises RuntimeError after `timeout_s`."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    deadline = time.monotonic() + timeout_s
    while not accepts(host.strip("[]"), int(port)):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"RAY_ADDRESS={address}: nothing answered there within {timeout_s:g} s; look at the log of Ray's head"
            )
        time.sleep(POLL_S)


def await_nodes(ray: Any, timeout_s: float) -> None:
    """Return once all nodes are there that EE_RAY_NODES announces. After `timeout_s` a warning says how many are
    missing, and the pool does with what there is."""
    expected = int(os.environ.get(EXPECTED, "0"))
    deadline = time.monotonic() + timeout_s
    while (found := sum(node["Alive"] for node in ray.nodes())) < expected:
        if time.monotonic() > deadline:
            log.warning("%d of %d Ray nodes joined within %g s; going on with these", found, expected, timeout_s)
            return
        time.sleep(POLL_S)


def accepts(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=PROBE_S):
            return True
    except OSError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RayNodes:
    """What the cluster has for actors of one kind. `needs`: resources of one actor, e.g. {"CPU": 1, "GPU": 0.5}."""

    def __init__(self, ray: Any, needs: dict[str, float]):
        self._ray, self._needs = ray, {name: amount for name, amount in needs.items() if amount > 0}

    def room(self) -> int:
        """Actors that fit on the nodes that are there, on empty ones."""
        return sum(self._fit(node["Resources"]) for node in self._ray.nodes() if self._answers(node))

    def is_gone(self, node_id: str) -> bool:
        """Whether a node, by its id, has left or no longer answers. Ray itself takes half a minute to notice a machine
        that lost its power."""
        return not any(node["NodeID"] == node_id and self._answers(node) for node in self._ray.nodes())

    def _fit(self, resources: dict[str, float]) -> int:
        return min(int(resources.get(name, 0.0) / amount + 1e-9) for name, amount in self._needs.items())

    def _answers(self, node: dict[str, Any]) -> bool:
        return bool(node["Alive"]) and accepts(node["NodeManagerAddress"], int(node["NodeManagerPort"]))
