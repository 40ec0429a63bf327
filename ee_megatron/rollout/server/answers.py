"""Requests of one client in the engine: their events as they come, collected into one response or streamed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from ..engine.scoring import PromptScore
from .choices import Choice, usage
from .protocol import NO_MEMORY, Asked, BadRequest
from .worker import Busy, Engine, Ticket, Told

log = logging.getLogger(__name__)
# How often a request that waits for tokens looks whether its client is still there, seconds.
LOOK_S = 0.2
# Events that may wait for a client who reads slower than the model writes; then it is given up.
BACKLOG = 1 << 14


class Answers:
    """Tickets of one client in the engine, and what is told of them. Raises BadRequest if the queue is full.

    `ticket` makes the one of an index, given who is to be told of it.
    """

    def __init__(self, engine: Engine, count: int, ticket: Callable[[int, Callable[[Told], None]], Ticket]):
        self._engine, self._left = engine, count
        self._events: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(index: int) -> Callable[[Told], None]:
            # From the engine's thread; the loop may be gone when the server is stopped in the middle.
            def tell(event: Told) -> None:
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return tell

        self._tickets = [ticket(i, sink(i)) for i in range(count)]
        try:
            engine.submit(self._tickets)
        except Busy as error:
            raise BadRequest(str(error), 429, "queue_full") from None
        except RuntimeError as error:
            raise BadRequest(str(error), 503) from None

    async def events(self, request: Request) -> AsyncIterator[tuple[int, Told]]:
        """(index of the answer, what is told of it) until all have finished or the client is gone."""
        loop = asyncio.get_running_loop()
        look = loop.time() + LOOK_S
        while self._left:
            if loop.time() >= look:
                if await request.is_disconnected():
                    return
                look = loop.time() + LOOK_S
            if self._events.qsize() > BACKLOG:
                raise BadRequest(f"{BACKLOG} tokens wait to be read by this client; read faster", 408)
            try:
                index, event = await asyncio.wait_for(self._events.get(), LOOK_S)
            except TimeoutError:
                continue
            if isinstance(event, Exception):
                raise told_as(event)
            last = not self._tickets[index].generate if isinstance(event, PromptScore) else event.finished is not None
            self._left -= last
            yield index, event

    def end(self, error: BadRequest) -> None:
        """Tell the client this instead of what is still to come. In the event loop's thread."""
        self._events.put_nowait((0, error))

    def cancel(self) -> None:
        """What has not finished is given up; safe to call always."""
        self._engine.cancel(self._tickets)


def told_as(error: Exception) -> BadRequest:
    """An error of the engine's, as the client is told of it."""
    if isinstance(error, BadRequest):
        return error
    text = " ".join(str(error).split())
    if is_memory(error):
        return NO_MEMORY
    return BadRequest(text, 400) if isinstance(error, ValueError) else BadRequest(f"the engine failed: {text}", 500)


def is_memory(error: Exception) -> bool:
    """Whether the system or a device had no memory: torch says so in RuntimeErrors."""
    return isinstance(error, MemoryError | OSError) or "alloc" in str(error) or "out of memory" in str(error)


@dataclass
class Reply:
    """What turns events into one response."""

    asked: Asked
    choices: list[Choice]
    chat: bool
    num_layers: int
    name: str

    def head(self) -> dict:
        kind = ("chat.completion.chunk" if self.asked.stream else "chat.completion") if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.name}

    def usage(self) -> dict:
        return usage(self.choices, self.asked.n, self.num_layers)

    def body(self) -> bytes:
        whole = {**self.head(), "choices": [choice.whole() for choice in self.choices], "usage": self.usage()}
        return json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()

    def take(self, index: int, event: Told, generate: bool) -> dict | None:
        """What is told of a choice -> the choice of a streamed chunk, None if there is nothing to say."""
        choice = self.choices[index]
        if isinstance(event, PromptScore):
            choice.scored(event, last=not generate)
            return choice.prompt_piece()
        assert not isinstance(event, Exception)
        return choice.piece(event)

    async def collect(self, request: Request, under_way: Answers, generate: bool) -> Response:
        """All at once. 499 for a client that has left, which nobody reads."""
        try:
            async for index, event in under_way.events(request):
                if isinstance(event, PromptScore):
                    self.choices[index].scored(event, last=not generate)
                elif not isinstance(event, Exception):
                    self.choices[index].events.append(event)
        finally:
            under_way.cancel()
        if any(choice.finished is None for choice in self.choices):
            return Response(status_code=499)
        # Long answers make long bodies, with a text for every token.
        try:
            return Response(await asyncio.to_thread(self.body), media_type="application/json")
        except ValueError as error:
            log.exception("an answer can't be written down")
            raise BadRequest(str(error), 500) from None

    def stream(self, request: Request, under_way: Answers, generate: bool, echo: bool) -> Response:
        events = self._chunks(request, under_way, generate, echo)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _chunk(self, head: dict, index: int, event: Told, generate: bool) -> bytes:
        return sse({**head, "choices": [self.take(index, event, generate)]})

    async def _chunks(self, request: Request, under_way: Answers, generate: bool, echo: bool) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk per token, the usage if asked for, [DONE]; an error ends them."""
        head = self.head()
        try:
            if echo:
                for choice in self.choices:
                    yield sse({**head, "choices": [choice.prompt_piece()]})
            async for index, event in under_way.events(request):
                # A prompt may have as much to say as a whole answer: not in the event loop.
                chunk = partial(self._chunk, head, index, event, generate)
                yield await asyncio.to_thread(chunk) if isinstance(event, PromptScore) else chunk()
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                yield sse({**head, "choices": [], "usage": self.usage()})
            yield b"data: [DONE]\n\n"
        except BadRequest as error:
            yield sse(error.body())
        except Exception as error:
            log.exception("a stream failed")
            yield sse(BadRequest(" ".join(str(error).split()), 500).body())
        finally:
            under_way.cancel()


def sse(body: dict) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
