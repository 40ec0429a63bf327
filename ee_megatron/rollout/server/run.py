"""Runs the server until it is told to stop, then lets running requests finish."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Annotated, Any

import uvicorn
from pydantic import Field, StringConstraints, ValidationError
from pydantic.dataclasses import dataclass

from ...exit_rules import ExitRule
from ..engine.decoder import Decoder
from ..engine.prompts import load_tokenizer
from ..pool.ray_cluster import is_loopback
from .app import Limits, Service, Tokenization, make_app
from .memory import plan_memory
from .middleware import Access, Connection
from .protocol import first_error
from .worker import ServingEngine

# Seconds beyond the grace, in which streams that have been told to end are written out.
LAST_WORDS_S = 5
MAX_CONNECTIONS = 500
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/]+/?)$")]


@dataclass(frozen=True)
class ServerSettings:
    """As `ee-megatron serve --help` has them; port 0: a free one; max_length 0: as many positions as the model and the
    cache have; grace: seconds; cache_gib 0: what is free. `of` checks them."""

    host: str = "127.0.0.1"
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
        """From a mapping that may hold more. Raises ValueError with one line."""
        try:
            return cls(**{one.name: given[one.name] for one in fields(cls) if one.name in given})
        except ValidationError as error:
            raise ValueError(first_error(error)[1].replace("_", "-")) from None

    def bind(self) -> socket.socket:
        """A socket at the address, not listening yet. Raises ValueError for one that can't be had."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            raise ValueError(f"host {self.host!r} is unknown ({error}); give an address of this machine") from None
        family, kind, number, _, address = found[0]
        made = socket.socket(family, kind, number)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError as error:
            made.close()
            raise ValueError(f"port {self.port} on {self.host}: {error.strerror}; give another, or 0") from None
        return made


def run(
    decoder: Decoder,
    model_path: str,
    name: str,
    exits: ExitRule,
    settings: ServerSettings,
    listening: socket.socket,
    api_key: str | None = None,
) -> None:
    """Serve at a bound socket until SIGTERM or SIGINT. Raises ValueError for settings that the model can't follow."""
    exits.check(decoder.layout, decoder.gates is not None)
    budget = plan_memory(decoder, settings.rows, settings.max_length, settings.cache_gib)
    # Where not all rows can have the longest request, short ones pass those that wait for room.
    scarce = budget.positions < settings.rows * budget.longest
    tokenizer = load_tokenizer(model_path)
    engine = ServingEngine(decoder, tokenizer, settings.rows, settings.queue, budget.positions, budget.prefill, scarce)
    local = is_loopback(settings.host)
    if api_key is None and not local:
        print(f"warning: {settings.host} is open to others and EE_API_KEY is not set", file=sys.stderr)
    service = Service(
        engine,
        Tokenization(load_tokenizer(model_path), budget.longest),
        name,
        exits,
        Limits(budget.longest, budget.longest_prompt, default_tokens=settings.max_new_tokens),
        Access(local, settings.host, frozenset(o.rstrip("/").lower() for o in settings.allow_origin), api_key),
    )
    config = uvicorn.Config(
        make_app(service),
        http=Connection,
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
    """Says where it listens once it does, and at the end of the grace tells those who still wait."""

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
        self._service.stopping = True
        asyncio.get_running_loop().call_later(self._grace_s, self._service.end)
        await super().shutdown(sockets)
