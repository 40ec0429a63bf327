"""What stands before the routes: who may ask and from where, sizes and deadlines, and that every error is JSON."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import resource
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .metrics import Metrics
from .protocol import BROKEN, BadRequest

log = logging.getLogger(__name__)
# Seconds: until a connection has sent a request's head; until its body is there; that a reader may take none of what
# waits for it.
HEAD_S, BODY_S, STALLED_S = 10.0, 20.0, 20.0
# Bytes of a body, and of all bodies that are being read; connections.
MAX_BODY, MAX_BODIES, MAX_CONNECTIONS = 4 << 20, 32 << 20, 1000
# Bytes that the system keeps of what a client hasn't taken yet.
SEND_BUFFER = 1 << 17


def refusal(error: BadRequest) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status in (408, 413):
        # The rest of the body may still be on its way.
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


@dataclass(frozen=True)
class Access:
    """Who may ask. `local`: the server listens on this machine alone, so only its own names can be meant; `origins`:
    web pages from there may ask ("*": from anywhere), and their hosts may be named; `key`: what clients send, if any.
    """

    local: bool = True
    host: str = "127.0.0.1"
    origins: frozenset[str] = frozenset()
    key: str | None = None

    def check(self, request: Request) -> None:
        """Raises BadRequest, 403 or 415, for what a foreign web page could send by a visitor's browser."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.local and not self._own(host):
            raise BadRequest(
                f"Host {host[:100]!r} is not this server's; ask for {self.host}, or name it by --allow-origin",
                403,
                "foreign_host",
            )
        if origin is not None and not self.allows(origin) and urlsplit(origin).netloc != host:
            raise BadRequest(
                f"Origin {origin[:100]!r} may not ask here; start the server with --allow-origin {origin[:100]}",
                403,
                "foreign_origin",
            )
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json" and not kind.endswith("+json"):
            raise BadRequest(
                f"Content-Type is {kind[:60]!r}; send the body as 'Content-Type: application/json'", 415, "content_type"
            )

    def check_key(self, request: Request) -> None:
        if not self.knows(request):
            raise BadRequest(
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'", 401, "invalid_api_key"
            )

    def knows(self, request: Request) -> bool:
        """Whether the client has the key, or needs none."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self.key is None:
            return True
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode())

    def allows(self, origin: str) -> bool:
        return "*" in self.origins or origin.rstrip("/").lower() in self.origins

    def _own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in {"localhost", self.host} or name in {urlsplit(origin).hostname for origin in self.origins}:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


@dataclass
class Bodies:
    """Bodies of requests, read no further than their limits and no longer than their deadline."""

    longest: int = MAX_BODY
    together: int = MAX_BODIES
    deadline_s: float = BODY_S
    _held: int = field(default=0, init=False)

    async def read(self, request: Request) -> bytearray:
        """Raises BadRequest: 413, 408, or 503 where all bodies together are too much."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.deadline_s):
                async for part in request.stream():
                    body += part
                    self._held += len(part)
                    if len(body) > self.longest:
                        raise BadRequest(f"the body is larger than {self.longest} bytes; shorten the prompt", 413)
                    if self._held > self.together:
                        raise BadRequest("too many long requests are being read; try again later", 503)
        except TimeoutError:
            raise BadRequest(f"the body wasn't there after {self.deadline_s:g} s; send it faster", 408) from None
        finally:
            self._held -= len(body)
        return body


class Guard:
    """The outermost layer: checks access, answers preflights, counts responses, and makes what nobody expected a JSON
    error without its details."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics):
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, begun = Request(scope, receive), False
        origin = request.headers.get("origin")
        allowed = origin if origin is not None and self._access.allows(origin) else None

        async def tell(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._metrics.replied(message["status"])
                if allowed is not None:
                    extra = [(b"access-control-allow-origin", allowed.encode()), (b"vary", b"Origin")]
                    message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            self._access.check(request)
            if request.method == "OPTIONS" and allowed is not None:
                await PREFLIGHT(scope, receive, tell)
            else:
                await self._app(scope, receive, tell)
        except BadRequest as error:
            await refusal(error)(scope, receive, tell)
        except Exception:
            # The routes' own layer has answered what failed there, and hands it on to be logged.
            if begun:
                raise
            log.exception("%s %s failed", request.method, request.url.path)
            await refusal(BROKEN)(scope, receive, tell)


PREFLIGHT = Response(
    status_code=204,
    headers={
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "Authorization, Content-Type",
        "Access-Control-Max-Age": "600",
    },
)


class Connection(H11Protocol):
    """uvicorn's connection with deadlines of ours: for a request's head, and for a reader who doesn't read."""

    _overdue: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.abort()
            return
        # The system's own buffer would grow to megabytes before a reader who doesn't read is noticed.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()
        elif self._overdue is None:
            self._arm()

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[no-untyped-call]
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[no-untyped-call]
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._say_and_close(BadRequest(f"this is not HTTP/1.1: {msg}"))

    def _arm(self) -> None:
        self._overdue = self.loop.call_later(HEAD_S, self._too_late)

    def _disarm(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _too_late(self) -> None:
        self._overdue = None
        if self.cycle is None or self.cycle.response_complete:
            self._say_and_close(BadRequest(f"no request after {HEAD_S:g} s; send it faster", 408))

    def _say_and_close(self, error: BadRequest) -> None:
        reply = refusal(error)
        phrase = {400: b"Bad Request", 408: b"Request Timeout"}[error.status]
        head = b"".join(
            name + b": " + value + b"\r\n" for name, value in reply.raw_headers if name.lower() != b"connection"
        )
        status = str(error.status).encode()
        self.transport.write(
            b"HTTP/1.1 " + status + b" " + phrase + b"\r\n" + head + b"connection: close\r\n\r\n" + bytes(reply.body)
        )
        self.transport.close()


def most_connections() -> int:
    """Open at a time: as many as leave half of the file descriptors to others."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, limit // 2))
