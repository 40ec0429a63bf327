"""How much memory there is for the key-value cache and for reading prompts, counted once, before the first request."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...config.derive import position_bytes
from ...families import ModelDims
from ..engine.cache import PAGE
from ..engine.decoder import Decoder
from ..engine.model_runner import PREFILL_POSITIONS

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# Left to the interpreter, threads, and bodies that the HTTP side reads.
MARGIN = 256 << 20
# Of a limit on addresses: threads reserve more of them than they use memory.
ADDRESSES = 384 << 20
# Of what is free then, the most that reading prompts may take; and what is left alone of the rest.
READING_SHARE, SPARE_SHARE = 0.4, 0.1
# float32 copies of a row's logits while a token is chosen.
LOGITS_COPIES = 4


@dataclass(frozen=True)
class Free:
    """Bytes that this process may still take, and what says so."""

    bytes: int
    limit: str


@dataclass(frozen=True)
class Budget:
    """positions that the cache holds; positions of the longest prompt that can be read; positions that are read
    together; bytes of the cache at most; where the number comes from."""

    positions: int
    longest_prompt: int
    reading: int
    cache_bytes: int
    limit: str


def free_memory(device: torch.device) -> Free:
    """The least that the device, the machine, the control group and the process's own limits leave."""
    if device.type == "cuda":
        return Free(torch.cuda.mem_get_info(device)[0], f"{device}'s free memory")
    return min(_limits(), key=lambda free: free.bytes)


def _limits() -> Iterator[Free]:
    if not (PROC / "meminfo").is_file():
        yield Free(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, "half the machine's memory")
        return
    yield Free(_kib(PROC / "meminfo", "MemAvailable"), "the machine's free memory")
    for which, field, name in (
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
    ):
        limit = resource.getrlimit(which)[0]
        if limit != resource.RLIM_INFINITY:
            yield Free(max(0, limit - _kib(PROC / "self" / "status", field) - ADDRESSES), name)
    for group, most, now, cached in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = (int((group / file).read_text()) for file in (most, now))
            # Files that the kernel keeps while nobody wants the memory.
            kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())[cached]
        except (OSError, ValueError, KeyError):
            # Not there, or "max".
            continue
        yield Free(max(0, limit - used + int(kept)), "the control group's limit")


def _kib(file: Path, name: str) -> int:
    """Bytes that a line `name: n kB` states."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"{file}: no line {name}")


def reading_bytes(dims: ModelDims, item: int) -> int:
    """Of one position of a prompt while it is read: keys and values of all layers twice (as they are made, and as they
    go into the cache), and what one layer computes."""
    heads = (dims.heads + 2 * dims.kv_heads) * dims.head_dim
    layer = 4 * dims.hidden + 3 * heads + 3 * dims.intermediate
    return 2 * position_bytes(dims, item) + 4 * layer


def plan_memory(decoder: Decoder, rows: int, longest: int, cache_gib: float, free: Free | None = None) -> Budget:
    """What of the free memory the cache gets: `cache_gib`, or for 0 all that `rows` requests of `longest` positions can
    use and that is there beside prompts being read. Raises ValueError if that isn't enough for a page."""
    dims, item = decoder.dims, decoder.dtype.itemsize
    free = free_memory(decoder.device) if free is None else free
    there = free.bytes - MARGIN - LOGITS_COPIES * 4 * dims.vocab * rows
    position, read = position_bytes(dims, item), reading_bytes(dims, item)
    if cache_gib:
        wanted, limit = int(cache_gib * 2**30), "--cache-gib"
        if wanted > there:
            raise ValueError(
                f"cache-gib {cache_gib:g}: {free.limit} leaves {max(0, there) / 2**30:.2f} GiB for it; lower it"
            )
        reading = there - wanted
    else:
        reading = min(int(there * READING_SHARE), read * max(longest, PREFILL_POSITIONS))
        wanted, limit = int((there - reading) * (1 - SPARE_SHARE)), free.limit
        most = rows * -(-longest // PAGE) * PAGE * position
        if most < wanted:
            wanted, limit = most, f"what {rows} requests can take"
    pages, prompt = wanted // (PAGE * position), reading // read
    if pages < 1 or prompt < PAGE:
        kept = free.bytes - there
        least = kept + PAGE * max(read / READING_SHARE, position / ((1 - READING_SHARE) * (1 - SPARE_SHARE)))
        raise ValueError(
            f"{free.limit} leaves {max(0, free.bytes) / 2**20:.0f} MiB beside the model; a request of {PAGE} tokens "
            f"needs {math.ceil(least / 2**20)}, {kept / 2**20:.0f} of them for bodies, threads and the logits of "
            f"{rows} rows; free memory, lower --rows, or take a smaller model"
        )
    longest_prompt = min(longest, prompt, pages * PAGE)
    return Budget(pages * PAGE, longest_prompt, min(PREFILL_POSITIONS, prompt), pages * PAGE * position, limit)
