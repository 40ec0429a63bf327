"""Run the server: plan its memory, serve until a stop signal, then let running requests finish."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import uvicorn
from pydantic import Field, StringConstraints, ValidationError
from pydantic.dataclasses import dataclass

from ...config.derive import position_bytes
from ...exit_rules import ExitRule
from ...families import ModelDims
from ..engine.cache import PAGE
from ..engine.decoder import Decoder
from ..engine.model_runner import PREFILL_POSITIONS
from ..engine.prompts import load_tokenizer
from ..pool.ray_cluster import is_loopback
from .app import Limits, Service, make_app
from .protocol import first_error
from .worker import ServingEngine

# Seconds beyond the grace, in which streams that were ended are written out.
LAST_WORDS_S = 5
MAX_CONNECTIONS = 500
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# Bytes left to the interpreter, threads and bodies; of a limit on addresses, which threads reserve without using them.
MARGIN, ADDRESSES = 256 << 20, 384 << 20
# Shares of the memory then free: at most so much for prefill; and so much of the rest stays free.
PREFILL_SHARE, SPARE_SHARE = 0.4, 0.1
# float32 copies of a row's logits while a token is sampled.
LOGITS_COPIES = 4
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://([^/\[\]]+|\[[0-9a-fA-F:.]+\](:\d+)?)/?)$")]


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server, as in `ee-megatron serve --help`; port 0: a free one; max_length 0: as many positions as
    the model and the cache have; grace: seconds; cache_gib 0: all that is free. `of` checks them."""

    host: Annotated[str, StringConstraints(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536)] = 8000
    rows: Annotated[int, Field(ge=1)] = 32
    queue: Annotated[int, Field(ge=1)] = 256
    max_length: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    cache_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    allow_origin: tuple[Origin, ...] = ()

    @classmethod
    def of(cls, given: dict[str, Any]) -> ServerSettings:
        """Take the settings from a mapping that may hold more. Raises ValueError with one line."""
        try:
            return cls(**{one.name: given[one.name] for one in fields(cls) if one.name in given})
        except ValidationError as error:
            raise ValueError(str(first_error(error.errors())).replace("_", "-")) from None

    def bind(self) -> socket.socket:
        """Bind a socket to the address, not listening yet. Raises ValueError if that fails."""
        made = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((self.host, self.port))
        except OSError as error:
            made.close()
            wrong = f"host {self.host!r}, port {self.port}: {error.strerror or error}"
            raise ValueError(f"{wrong}; give an address of this machine, and another port or 0") from None
        return made


class MemoryBudget(NamedTuple):
    """Planned memory. positions: of the cache; longest: of a request, longest_prompt: of a prompt that can be read;
    prefill: positions read together; cache_bytes; limit: what sets the size of the cache."""

    positions: int
    longest: int
    longest_prompt: int
    prefill: int
    cache_bytes: int
    limit: str


def free_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that this process may still allocate, and their limit: the device, the machine, ulimit, a control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"{device}'s free memory"
    if not (PROC / "meminfo").is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, "half the machine's memory"
    limits = [(_kib("meminfo", "MemAvailable"), "the machine's free memory")]
    for kind, used, name in ((resource.RLIMIT_AS, "VmSize", "-v"), (resource.RLIMIT_DATA, "VmData", "-d")):
        if (most := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            limits.append((most - _kib("self/status", used) - ADDRESSES, f"ulimit {name}"))
    try:
        most, now = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # Files that the kernel caches until memory is needed.
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        limits.append((most - now + int(cached), "the control group's limit"))
    except (OSError, ValueError, KeyError):
        # Not there, or "max".
        pass
    least, limit = min(limits)
    return max(0, least), limit


def _kib(file: str, name: str) -> int:
    """Bytes that a line `name: n kB` states."""
    lines = dict(line.split(":", 1) for line in (PROC / file).read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) << 10


def prefill_bytes(dims: ModelDims, item: int) -> int:
    """Bytes of one position of a prompt during prefill: keys and values of all layers twice (as computed, and in the
    cache), and the intermediates of one layer."""
    heads = (dims.heads + 2 * dims.kv_heads) * dims.head_dim
    return 2 * position_bytes(dims, item) + 4 * (4 * dims.hidden + 3 * heads + 3 * dims.intermediate)


def plan_memory(
    decoder: Decoder, rows: int, max_length: int, cache_gib: float, free: tuple[int, str] | None = None
) -> MemoryBudget:
    """Plan the cache's size: `cache_gib`, or for 0 all that `rows` requests of `max_length` positions (0: as many as
    the model has) can use and that is free beside prefill. Raises ValueError for impossible demands."""
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


def run(
    decoder: Decoder,
    model_path: str,
    name: str,
    exits: ExitRule,
    settings: ServerSettings,
    listening: socket.socket,
    api_key: str | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> None:
    """Serve at a bound socket until SIGTERM or SIGINT. Raises ValueError for settings that contradict the model."""
    exits.check(decoder.layout, decoder.gates is not None)
    budget = plan_memory(decoder, settings.rows, settings.max_length, settings.cache_gib)
    # If not all rows can have the longest request, short requests overtake those that wait for room.
    scarce = budget.positions < settings.rows * budget.longest
    tokenizer = load_tokenizer(model_path)
    engine = ServingEngine(decoder, tokenizer, settings.rows, settings.queue, budget.positions, budget.prefill, scarce)
    local = is_loopback(settings.host)
    if api_key is None and not local:
        print(f"warning: {settings.host} is open to others and EE_API_KEY is not set", file=sys.stderr)
    limits = Limits(budget.longest, budget.longest_prompt, default_tokens=settings.max_new_tokens)
    origins = frozenset(origin.rstrip("/").lower() for origin in settings.allow_origin)
    service = Service(
        engine, load_tokenizer(model_path), name, exits, limits, settings.host if local else None, origins, api_key,
        template_variables or {},
    )  # fmt: skip
    config = uvicorn.Config(
        make_app(service),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(settings.grace) + LAST_WORDS_S,
    )
    room = f"(cache: {budget.cache_bytes / 2**20:.0f} MiB by {budget.limit}, {budget.positions} tokens; "
    room += f"a request: {budget.longest}, its prompt {budget.longest_prompt})"
    # uvicorn raises the signal that stopped it once more when it is done.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        Server(config, service, settings.grace, room).run([listening])
    finally:
        engine.close()
        signal.signal(signal.SIGTERM, before)


class Server(uvicorn.Server):
    """uvicorn's server, which prints its address once it listens, and ends running requests after the grace period."""

    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float, room: str):
        super().__init__(config)
        self._service, self._grace_s, self._room = service, grace_s, room

    async def startup(self, sockets: list | None = None) -> None:
        # Each thread takes address space, and there may be little.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(3, "http"))
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            where = f"[{host}]" if ":" in host else host
            print(f"serving {self._service.name} on http://{where}:{port}/v1 {self._room}", flush=True)

    async def shutdown(self, sockets: list | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace_s, self._service.engine.stop)
        await super().shutdown(sockets)
