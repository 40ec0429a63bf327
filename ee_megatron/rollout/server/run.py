"""Runs the server until it is told to stop, then lets running requests finish."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass

import uvicorn

from ...exit_rules import ExitRule
from ..engine.cache import PAGE, pages_in
from ..engine.decoder import Decoder
from ..engine.prompts import load_tokenizer
from ..pool.ray_nodes import is_loopback
from .app import Limits, Service, make_app
from .worker import Engine


@dataclass(frozen=True)
class ServerSettings:
    """host, port (0: a free one); rows that run together, requests that may wait; positions of a request (0: as many as
    the model and the cache have); new tokens of one that doesn't say; seconds that running requests get at the end;
    memory of the cache, GiB (0: as much as the requests take)."""

    host: str = "127.0.0.1"
    port: int = 8000
    rows: int = 32
    queue: int = 256
    max_length: int = 0
    default_tokens: int = 256
    grace_s: float = 30.0
    cache_gib: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port {self.port}: expected 0 to 65535")
        for name in ("rows", "queue", "default_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("max_length", "grace_s", "cache_gib"):
            if not 0 <= getattr(self, name) < float("inf"):
                flag = name.removesuffix("_s").replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: expected a number >= 0")


def run(
    decoder: Decoder,
    model_path: str,
    name: str,
    exits: ExitRule,
    settings: ServerSettings,
    api_key: str | None = None,
    describe: dict | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Raises ValueError for settings that the model can't follow."""
    exits.check(decoder.layout, decoder.gates is not None)
    positions = decoder.dims.max_positions
    if settings.max_length > positions:
        raise ValueError(f"max-length {settings.max_length}: the model has {positions} positions; lower it")
    held = None
    if settings.cache_gib:
        held = pages_in(settings.cache_gib, decoder.dims, decoder.dtype.itemsize) * PAGE
        positions = min(positions, held)
        if positions < max(2, settings.max_length):
            raise ValueError(
                f"cache-gib {settings.cache_gib:g}: holds {held} positions, a request takes up to "
                f"{settings.max_length or 'its tokens'}; raise it or lower max-length"
            )
    tokenizers = [load_tokenizer(model_path) for _ in range(2)]
    engine = Engine(decoder, tokenizers[0], settings.rows, settings.queue, held)
    limits = Limits(settings.max_length or positions, default_tokens=settings.default_tokens)
    about = {"layers": decoder.dims.num_layers, "exits": list(decoder.layout.depths), "exit_policy": exits.kind}
    service = Service(engine, tokenizers[1], name, exits, limits, api_key, {**about, **(describe or {})})
    if api_key is None and not is_loopback(settings.host):
        print(f"warning: {settings.host} is open to others and EE_API_KEY is not set", file=sys.stderr)
    config = uvicorn.Config(
        make_app(service),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.grace_s)),
    )
    # uvicorn raises the signal that stopped it once more when it is done: by then that is no news.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        Announcing(config, name).run()
    finally:
        engine.close()
        signal.signal(signal.SIGTERM, before)


class Announcing(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, name: str):
        super().__init__(config)
        self._name = name

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            where = f"[{host}]" if ":" in host else host
            print(f"serving {self._name} on http://{where}:{port}/v1", flush=True)
