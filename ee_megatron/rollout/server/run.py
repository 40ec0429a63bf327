"""Runs the server until it is told to stop, then lets running requests finish."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import uvicorn

from ...exit_rules import ExitRule
from ..engine.cache import PAGE, pages_in
from ..engine.decoder import Decoder
from ..engine.prompts import load_tokenizer
from ..pool.ray_nodes import is_loopback
from .app import Limits, Service, make_app
from .guard import Access, Connection
from .memory import Budget, plan_memory
from .texts import Texts
from .worker import Engine

# Beyond the grace: streams that have been told to end are written out.
LAST_WORDS_S = 5


@dataclass(frozen=True)
class ServerSettings:
    """host, port (0: a free one); rows that run together, requests that may wait; positions of a request (0: as many as
    the model and the cache have); new tokens of one that doesn't say; seconds that running requests get at the end;
    memory of the cache, GiB (0: what is free); web pages that may ask, as origins."""

    host: str = "127.0.0.1"
    port: int = 8000
    rows: int = 32
    queue: int = 256
    max_length: int = 0
    default_tokens: int = 256
    grace_s: float = 30.0
    cache_gib: float = 0.0
    origins: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port {self.port}: expected 0 to 65535")
        for name in ("rows", "queue", "default_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("max_length", "grace_s", "cache_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = name.removesuffix("_s").replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: expected a number >= 0")
        for origin in self.origins:
            parts = urlsplit(origin)
            if origin != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/")):
                raise ValueError(f"allow-origin {origin!r}: expected a page's origin, https://chat.example.org, or *")

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
            raise ValueError(
                f"port {self.port} on {self.host}: {error.strerror}; give another one, or 0 for a free one"
            ) from None
        return made


def plan(decoder: Decoder, settings: ServerSettings) -> tuple[Budget, int]:
    """The cache's budget, and positions of the longest request. Raises ValueError for settings that can't be met."""
    positions = decoder.dims.max_positions
    if settings.max_length > positions:
        raise ValueError(f"max-length {settings.max_length}: the model has {positions} positions; lower it")
    if settings.cache_gib:
        held = pages_in(settings.cache_gib, decoder.dims, decoder.dtype.itemsize) * PAGE
        if min(positions, held) < max(2, settings.max_length):
            raise ValueError(
                f"cache-gib {settings.cache_gib:g}: holds {held} positions, a request takes up to "
                f"{settings.max_length or 'its tokens'}; raise it or lower max-length"
            )
    budget = plan_memory(decoder, settings.rows, settings.max_length or positions, settings.cache_gib)
    if budget.positions < settings.max_length:
        raise ValueError(
            f"max-length {settings.max_length}: {budget.limit} leaves room for {budget.positions} positions; lower it, "
            "or free memory"
        )
    return budget, settings.max_length or min(positions, budget.positions)


def run(
    decoder: Decoder,
    model_path: str,
    name: str,
    exits: ExitRule,
    settings: ServerSettings,
    listening: socket.socket,
    api_key: str | None = None,
    describe: dict | None = None,
) -> None:
    """Serve at a bound socket until SIGTERM or SIGINT. Raises ValueError for settings that the model can't follow."""
    exits.check(decoder.layout, decoder.gates is not None)
    budget, longest = plan(decoder, settings)
    tokenizers = [load_tokenizer(model_path) for _ in range(3)]
    scarce = budget.positions < settings.rows * longest
    engine = Engine(decoder, tokenizers[0], settings.rows, settings.queue, budget.positions, budget.reading, scarce)
    longest_prompt = min(longest, budget.longest_prompt)
    limits = Limits(longest, longest_prompt, default_tokens=settings.default_tokens)
    about = {"layers": decoder.dims.num_layers, "exits": list(decoder.layout.depths), "exit_policy": exits.kind}
    about |= {"max_length": longest, "cache_bytes": budget.cache_bytes, "cache_positions": budget.positions}
    local = is_loopback(settings.host)
    access = Access(local, settings.host, frozenset(o.rstrip("/").lower() for o in settings.origins), api_key)
    texts = Texts(tokenizers[1], tokenizers[2], longest)
    service = Service(engine, texts, name, exits, limits, access, {**about, **(describe or {})})
    if api_key is None and not local:
        print(f"warning: {settings.host} is open to others and EE_API_KEY is not set", file=sys.stderr)
    config = uvicorn.Config(
        make_app(service),
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.grace_s) + LAST_WORDS_S,
    )
    said = f"(cache: {budget.cache_bytes / 2**20:.0f} MiB by {budget.limit}, {budget.positions} tokens; "
    said += f"a request: {longest}, its prompt {longest_prompt})"
    # uvicorn raises the signal that stopped it once more when it is done: by then that is no news.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        Announcing(config, service, settings.grace_s, said).run([listening])
    finally:
        engine.close()
        texts.close()
        signal.signal(signal.SIGTERM, before)


class Announcing(uvicorn.Server):
    """Says where it listens once it does, and at the end tells those who still wait."""

    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float, said: str):
        super().__init__(config)
        self._service, self._grace_s, self._said = service, grace_s, said

    async def startup(self, sockets: list | None = None) -> None:
        # Each thread takes address space, and there may be little.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2, "replies"))
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            where = f"[{host}]" if ":" in host else host
            print(f"serving {self._service.name} on http://{where}:{port}/v1 {self._said}", flush=True)

    async def shutdown(self, sockets: list | None = None) -> None:
        self._service.stopping = True
        asyncio.get_running_loop().call_later(self._grace_s, self._service.end)
        await super().shutdown(sockets)
