"""How much memory there is for the key-value cache and for prefill, counted once, before the first request."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from ...config.derive import position_bytes
from ...families import ModelDims
from ..engine.cache import PAGE
from ..engine.decoder import Decoder
from ..engine.model_runner import PREFILL_POSITIONS

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# Bytes left to the interpreter, threads and bodies; of a limit on addresses, which threads reserve without using them.
MARGIN, ADDRESSES = 256 << 20, 384 << 20
# Of what is free then: at most so much for prefill; and of the rest so much stays free.
PREFILL_SHARE, SPARE_SHARE = 0.4, 0.1
# float32 copies of a row's logits while a token is sampled.
LOGITS_COPIES = 4


@dataclass(frozen=True)
class MemoryBudget:
    """positions: of the cache; longest: of a request, longest_prompt: of a prompt that can be read; prefill: that are
    read together; cache_bytes; limit: what sets the size of the cache."""

    positions: int
    longest: int
    longest_prompt: int
    prefill: int
    cache_bytes: int
    limit: str


def free_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that this process may still take, and what limits it: the device, the machine, ulimit, a control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"{device}'s free memory"
    if not (PROC / "meminfo").is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, "half the machine's memory"
    found = [(_kib("meminfo", "MemAvailable"), "the machine's free memory")]
    for kind, used, name in ((resource.RLIMIT_AS, "VmSize", "-v"), (resource.RLIMIT_DATA, "VmData", "-d")):
        if (most := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            found.append((most - _kib("self/status", used) - ADDRESSES, f"ulimit {name}"))
    try:
        most, now = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # Files that the kernel caches until somebody wants the memory.
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        found.append((most - now + int(cached), "the control group's limit"))
    except (OSError, ValueError, KeyError):
        # Not there, or "max".
        pass
    least, limit = min(found)
    return max(0, least), limit


def _kib(file: str, name: str) -> int:
    """Bytes that a line `name: n kB` states."""
    lines = dict(line.split(":", 1) for line in (PROC / file).read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) << 10


def prefill_bytes(dims: ModelDims, item: int) -> int:
    """Of one position of a prompt while it is read: keys and values of all layers twice (as they are made, and as they
    go into the cache), and what one layer computes."""
    heads = (dims.heads + 2 * dims.kv_heads) * dims.head_dim
    return 2 * position_bytes(dims, item) + 4 * (4 * dims.hidden + 3 * heads + 3 * dims.intermediate)


def plan_memory(
    decoder: Decoder, rows: int, max_length: int, cache_gib: float, free: tuple[int, str] | None = None
) -> MemoryBudget:
    """What of the free memory the cache gets: `cache_gib`, or for 0 all that `rows` requests of `max_length` positions
    (0: as many as the model has) can use and that is there beside prefill. Raises ValueError for what can't be met."""
    dims, item = decoder.dims, decoder.dtype.itemsize
    if max_length > dims.max_positions:
        raise ValueError(f"max-length {max_length}: the model has {dims.max_positions} positions; lower it")
    longest = max_length or dims.max_positions
    there, limit = free or free_memory(decoder.device)
    rest = max(0, there - MARGIN - LOGITS_COPIES * 4 * dims.vocab * rows)
    page, read = PAGE * position_bytes(dims, item), prefill_bytes(dims, item)
    if cache_gib:
        cache, limit = int(cache_gib * 2**30), "--cache-gib"
        prefill = rest - cache
    else:
        prefill = min(int(rest * PREFILL_SHARE), read * max(longest, PREFILL_POSITIONS))
        cache = int((rest - prefill) * (1 - SPARE_SHARE))
        if (most := rows * -(-longest // PAGE) * page) < cache:
            cache, limit = most, f"what {rows} requests can take"
    positions, prompt = cache // page * PAGE, prefill // read
    if positions < max(PAGE, max_length) or prompt < PAGE:
        raise ValueError(
            f"{limit} and {there / 2**20:.0f} MiB of free memory leave a cache of {positions} positions and prompts of "
            f"{max(0, prompt)}; a request takes up to {max_length or PAGE}; free memory, change --cache-gib or "
            "--max-length, lower --rows, or take a smaller model"
        )
    longest = min(longest, positions)
    return MemoryBudget(
        positions, longest, min(longest, prompt), min(PREFILL_POSITIONS, prompt), cache // page * page, limit
    )
