"""What every HTTP request passes: who may ask and from where, limits of size and time; errors as OpenAI's JSON."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .protocol import BadRequest

# Seconds: for a request's line and headers; for its body; that a client may read nothing of what waits for it.
HEAD_S, BODY_S, STALLED_S = 10.0, 20.0, 20.0
# Bytes of a body, and of all bodies that are being read.
MAX_BODY, MAX_BODIES = 4 << 20, 32 << 20
# Bytes that the kernel buffers for a client: by default megabytes, which hide that it doesn't read.
SEND_BUFFER = 1 << 17


def refusal(error: BadRequest) -> JSONResponse:
    """The response that an error makes."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status in (408, 413):
        # The rest of the body may still be on its way.
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


@dataclass(frozen=True)
class Access:
    """Who may ask.

    - local: the server listens on the loopback interface, so any other host name is DNS rebinding
    - origins: web pages that may ask ("*": any); their hosts may be named too
    - key: the API key that clients send; None: no key needed
    """

    local: bool = True
    host: str = "127.0.0.1"
    origins: frozenset[str] = frozenset()
    key: str | None = None

    def check(self, request: Request) -> None:
        """Raises BadRequest, 403 or 415, for what a foreign web page could send from a visitor's browser."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.local and not self._is_own(host):
            raise BadRequest(
                f"Host {host[:100]!r} is not this server's; ask for {self.host}, or name it by --allow-origin", 403
            )
        # A page of this server's own names the host that it asks.
        if origin and not self.origins & {"*", origin.lower()} and origin.partition("://")[2] != host:
            raise BadRequest(f"Origin {origin[:100]!r} may not ask here; allow it by --allow-origin", 403)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            raise BadRequest(f"Content-Type is {kind[:60]!r}; send the body as 'Content-Type: application/json'", 415)

    def check_key(self, request: Request) -> None:
        if not self.has_key(request):
            raise BadRequest(
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'", 401, "invalid_api_key"
            )

    def has_key(self, request: Request) -> bool:
        """Whether the client sent the key, or needs none."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self.key is None:
            return True
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode())

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            known = {"localhost", self.host, *(urlsplit(origin).hostname for origin in self.origins)}
            return name in known or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


@dataclass
class Bodies:
    """Reads requests' bodies: each within `longest` bytes and `deadline_s`, all at once within `together` bytes."""

    longest: int = MAX_BODY
    together: int = MAX_BODIES
    deadline_s: float = BODY_S
    _held: int = field(default=0, init=False)

    async def read(self, request: Request) -> bytearray:
        """Raises BadRequest: 413, 408, or 503 where all bodies together are too large."""
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
    """The outermost layer: checks access, and tells `replied` the status of each response."""

    def __init__(self, app: ASGIApp, access: Access, replied: Callable[[int], None]):
        cors = CORSMiddleware(app, sorted(access.origins), ["GET", "POST"], ["Authorization"])
        self._app, self._access, self._replied = cors if access.origins else app, access, replied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._replied(message["status"])
            await send(message)

        try:
            self._access.check(Request(scope))
            await self._app(scope, receive, count)
        except BadRequest as error:
            await refusal(error)(scope, receive, count)


class Connection(H11Protocol):
    """uvicorn's connection, with deadlines for a request's head and for a client that doesn't read."""

    _overdue: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._overdue = self.loop.call_later(HEAD_S, self._end_slow)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._overdue = _cancel(self._overdue)
        elif self._overdue is None:
            self._overdue = self.loop.call_later(HEAD_S, self._end_slow)

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[no-untyped-call]
        self._stalled = self._stalled or self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[no-untyped-call]
        self._stalled = _cancel(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        self._overdue, self._stalled = _cancel(self._overdue), _cancel(self._stalled)
        super().connection_lost(exc)

    def _end_slow(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(f"no request after {HEAD_S:g} s; send it faster")


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
