"""Freed memory goes back to the system, where learner and pool take turns on one machine."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest
import torch

from ee_megatron import host_memory
from ee_megatron.config.schema import RolloutConfig
from ee_megatron.rollout.pool import ray_pool
from ee_megatron.rollout.pool.interface import ReplicaSettings

# Blocks below malloc's threshold for mappings of their own, under one that is kept: nothing else gives them back.
HOLE = """
from ee_megatron.host_memory import return_freed

def resident_mib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

blocks = [bytearray(b"x") * (64 << 10) for _ in range(3200)]
kept = blocks.pop()
del blocks
before = resident_mib()
return_freed()
print(before - resident_mib())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_a_hole_below_what_is_kept_goes_back_to_the_system() -> None:
    found = subprocess.run([sys.executable, "-c", HOLE], capture_output=True, text=True, check=True, timeout=60)
    # 200 MiB were freed.
    assert float(found.stdout) > 150


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    host_memory.return_freed()


class Pool:
    """Answers one call, and fails another."""

    def health(self) -> dict[str, str]:
        return {"backend": "local"}

    def score(self) -> None:
        raise ValueError("unfit")


@pytest.mark.parametrize(("device", "times"), [("cpu", 2), ("cuda", 0)])
def test_an_actor_gives_back_what_a_call_has_freed(monkeypatch: pytest.MonkeyPatch, device: str, times: int) -> None:
    returned: list[str] = []
    monkeypatch.setattr(ray_pool, "return_freed", lambda: returned.append("freed"))
    monkeypatch.setattr(ray_pool, "require_gpus", lambda *given: None)
    monkeypatch.setattr(ray_pool.LocalPool, "of", staticmethod(lambda settings: Pool()))
    replica: Any = ray_pool.Replica(ReplicaSettings("nowhere", None, torch.float32, device, RolloutConfig()))
    replica.held = (1, "digest")
    assert replica.call((1, "digest"), "health", ()) == {"backend": "local"}
    with pytest.raises(ValueError, match="unfit"):
        replica.call((1, "digest"), "score", ())
    assert len(returned) == times
