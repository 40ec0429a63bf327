"""The routes: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import PreTrainedTokenizerBase

from ...exit_rules import ExitRule
from ..engine.prompts import encode_text
from ..engine.request import Event
from ..engine.scoring import PromptScore, score_prompts
from .middleware import Access, Bodies, Guard, refusal
from .protocol import BadRequest, ChatRequest, CompletionRequest, GenerationFields, parse
from .response_format import Choice, Reply, server_sent
from .worker import ServingEngine, Ticket

log = logging.getLogger(__name__)
T = TypeVar("T")
# Characters that are tokenised in the event loop; longer texts that may wait; characters at most per token of a prompt.
QUICK_CHARACTERS, LONG_TEXTS, CHARACTERS_PER_TOKEN = 1 << 12, 8, 16
# Prompt positions, padding included, that are scored at once.
SCORE_POSITIONS = 2048
BROKEN = BadRequest("the server failed to answer this; its log says why", 500)
NO_MEMORY = BadRequest("there is no memory for this request now; try again later or ask for less", 503, "no_memory")
LEFT = BadRequest("the client has left", 499)
STOPPING = BadRequest("the server is stopping; ask again when it is back", 503, "stopping")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    - max_length, max_prompt: positions of prompt and answer together, of the prompt alone
    - max_answers: prompts x n
    - max_entries: tokens of all answers and echoed prompts x (1 + logprobs); each takes 30 to 50 bytes of the reply
    - default_tokens: new tokens of a request that doesn't say
    """

    max_length: int
    max_prompt: int
    max_answers: int = 128
    max_entries: int = 1 << 18
    default_tokens: int = 256


class Tokenization:
    """Texts to tokens and back; long texts go one after another beside the event loop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        self.tokenizer, self._most = tokenizer, CHARACTERS_PER_TOKEN * max_tokens
        self._waiting, self._lane = 0, asyncio.Semaphore(1)
        self._piece = lru_cache(1 << 17)(lambda token: str(tokenizer.decode([token])))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens as it stands, special ones too."""
        return self._piece(tokens[0]) if len(tokens) == 1 else str(self.tokenizer.decode(list(tokens)))

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """`work` on so many characters. Raises BadRequest if too many long texts wait."""
        if size <= QUICK_CHARACTERS:
            return work()
        if self._waiting >= LONG_TEXTS:
            raise BadRequest(f"{self._waiting} long prompts wait to be read; try again later", 429, "queue_full")
        self._waiting += 1
        try:
            async with self._lane:
                return await asyncio.to_thread(work)
        finally:
            self._waiting -= 1

    async def prompts(self, given: Sequence[str | list[int]]) -> list[list[int]]:
        """Prompts as tokens. Raises BadRequest for a text that is too long."""
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        for text in texts:
            self._check(text)
        return await self.run(
            sum(map(len, texts)), lambda: [encode_text(self.tokenizer, p) if isinstance(p, str) else p for p in given]
        )

    async def chat(self, asked: ChatRequest) -> list[int]:
        """Messages through the model's chat template, as tokens. Raises BadRequest."""
        if not self.tokenizer.chat_template:
            raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
        messages = [message.plain() for message in asked.messages]

        def encode() -> list[int]:
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:
                # Templates refuse roles and orders of messages by exceptions of their own.
                reason = " ".join(str(error).split())[:300]
                raise BadRequest(f"messages: the chat template refuses them: {reason}", param="messages") from None
            self._check(str(text))
            # The template writes the beginning of the sequence itself.
            return list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])

        return await self.run(sum(len(message["content"]) for message in messages), encode)

    def _check(self, text: str) -> None:
        if len(text) > self._most:
            raise BadRequest(
                f"the prompt has {len(text)} characters; this server reads at most {self._most}; shorten the prompt",
                code="context_length_exceeded",
            )


@dataclass
class Service:
    """All that routes need. `waiting`: for each client under way, the events it waits for."""

    engine: ServingEngine
    texts: Tokenization
    name: str
    exits: ExitRule
    limits: Limits
    access: Access = field(default_factory=Access)
    bodies: Bodies = field(default_factory=Bodies)
    stopping: bool = False
    waiting: dict[asyncio.Task, asyncio.Queue] = field(default_factory=dict)

    def end(self) -> None:
        """Tell everyone who still waits that the server stops. In the event loop's thread."""
        for events in self.waiting.values():
            events.put_nowait((0, STOPPING))

    async def read(self, request: Request, kind: type[GenerationFields]) -> Any:
        """The request's fields. Raises BadRequest."""
        self.access.check_key(request)
        if self.stopping:
            raise STOPPING
        asked = await asyncio.to_thread(parse, kind, await self.bodies.read(request))
        if asked.model != self.name:
            message = f"model {asked.model[:100]!r} is not served here; ask for {self.name!r}"
            raise BadRequest(message, 404, "model_not_found", "model")
        return asked

    def check_size(self, prompts: list[list[int]], asked: GenerationFields) -> list[int]:
        """New tokens that answers to each prompt may have. Raises BadRequest for what is too long or too much."""
        limits, vocab, allowed = self.limits, self.engine.decoder.dims.vocab, list[int]()
        if not prompts or len(prompts) * asked.n > limits.max_answers:
            raise BadRequest(
                f"{len(prompts)} prompts x n={asked.n}: expected 1 to {limits.max_answers} answers", param="n"
            )
        for prompt in prompts:
            if not prompt or min(prompt) < 0 or max(prompt) >= vocab:
                raise BadRequest(f"a prompt needs tokens, and their ids must lie in 0..{vocab - 1}", param="prompt")
            room = limits.max_length - len(prompt)
            wanted = min(limits.default_tokens, max(1, room)) if asked.limit is None else asked.limit
            if wanted > room or len(prompt) > limits.max_prompt:
                raise BadRequest(
                    f"the prompt has {len(prompt)} tokens and max_tokens is {wanted}; this server takes "
                    f"{limits.max_length} together, {limits.max_prompt} in a prompt; shorten it or lower max_tokens",
                    code="context_length_exceeded",
                )
            allowed.append(wanted)
        tokens, top = sum(allowed) + asked.echo * sum(map(len, prompts)), asked.top or 0
        if (entries := asked.n * tokens * (1 + top)) > limits.max_entries:
            raise BadRequest(
                f"{tokens} tokens (max_tokens, and prompts by echo) x n={asked.n} x (1 + logprobs={top}) are {entries} "
                f"entries; at most {limits.max_entries} a request; lower one of these, or send fewer prompts",
                param="max_tokens",
            )
        return allowed


def make_app(service: Service) -> Guard:
    app = FastAPI(title="ee-megatron", docs_url=None, redoc_url=None, openapi_url=None)
    created, metrics = int(time.time()), service.engine.metrics

    @app.exception_handler(BadRequest)
    async def refuse(_: Request, error: BadRequest) -> Response:
        return refusal(error)

    @app.exception_handler(StarletteHTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return refusal(BadRequest(f"{request.method} {request.url.path[:100]}: {error.detail}", error.status_code))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return refusal(NO_MEMORY if isinstance(error, MemoryError) else BROKEN)

    @app.get("/health")
    async def health(request: Request) -> Response:
        alive = service.engine.alive and not service.stopping
        body = {"status": "ok" if alive else "stopped", "model": service.name}
        if service.access.has_key(request):
            body |= service.engine.health()
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        service.access.check_key(request)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        service.access.check_key(request)
        about = {"object": "model", "created": created, "owned_by": "ee-megatron"}
        return {"object": "list", "data": [{"id": service.name, **about, "max_model_len": service.limits.max_length}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked: CompletionRequest = await service.read(request, CompletionRequest)
        return await answer(service, request, asked, asked.prompts)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked: ChatRequest = await service.read(request, ChatRequest)
        return await answer(service, request, asked, [await service.texts.chat(asked)])

    return Guard(app, service.access, lambda status: metrics.responses.labels(str(status)).inc())


async def answer(
    service: Service, request: Request, asked: GenerationFields, given: Sequence[str | list[int]]
) -> Response:
    """Check, queue, and either stream or collect. `given`: the prompts as texts or tokens."""
    engine, n = service.engine, asked.n
    prompts = await service.texts.prompts(given)
    allowed = service.check_size(prompts, asked)
    try:
        requests = asked.requests(prompts, [max(1, tokens) for tokens in allowed], service.exits)
        requests[0].exits.check(engine.decoder.layout, engine.decoder.gates is not None)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    decode, echoes, scores = service.texts.decode, [""] * len(prompts), list[PromptScore | None]([None] * len(prompts))
    if asked.echo:
        echoes = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in given]
        if asked.top is not None:
            scores = await score(engine, request, prompts, asked.top)
    choices = [
        Choice(i, item.prompt, asked, decode, echoes[i // n], scores[i // n])  # type: ignore[arg-type]
        for i, item in enumerate(requests)
    ]
    reply = Reply(asked, choices, engine.decoder.dims.num_layers, service.name)
    events = submit(service, request, requests if asked.limit != 0 else [])
    if asked.stream:
        chunks = stream(reply, events, asked.echo)
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    async for index, event in events:
        choices[index].events.append(event)
    # Long answers make long bodies, with a text for every token.
    return Response(await asyncio.to_thread(reply.body), media_type="application/json")


async def score(
    engine: ServingEngine, request: Request, prompts: list[list[int]], top: int
) -> list[PromptScore | None]:
    """What the prompts' own tokens score, as many at a time as are read together; other requests go on between."""
    scores: list[PromptScore | None] = []
    while len(scores) < len(prompts):
        some, longest = list[list[int]](), 0
        for prompt in prompts[len(scores) :]:
            longest = max(longest, len(prompt))
            if some and longest * (len(some) + 1) > SCORE_POSITIONS:
                break
            some.append(prompt)
        if await request.is_disconnected():
            raise LEFT
        try:
            work = partial(score_prompts, engine.decoder, some, [top] * len(some))
            scores += await asyncio.wrap_future(engine.call(work))
        except Exception as error:
            raise as_refusal(error) from error
    return scores


def submit(service: Service, request: Request, requests: list) -> AsyncIterator[tuple[int, Event]]:
    """Queue requests in the engine; what has not finished when the response ends or the client leaves is cancelled.
    Yields (index of the answer, its next token). Raises BadRequest if the queue is full, and for the engine's errors.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event | Exception]]()

    def tell(index: int, event: Event | Exception) -> None:
        # The loop may be gone when the server is stopped in the middle.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    async def watch() -> None:
        try:
            while (await request.receive())["type"] != "http.disconnect":
                pass
        finally:
            service.engine.cancel(tickets)
            events.put_nowait((0, LEFT))

    async def follow() -> AsyncIterator[tuple[int, Event]]:
        left = len(tickets)
        while left:
            index, event = await events.get()
            if isinstance(event, Exception):
                raise as_refusal(event)
            left -= event.finished is not None
            yield index, event

    tickets = [Ticket(item, partial(tell, i)) for i, item in enumerate(requests)]
    service.engine.submit(tickets)
    watching = asyncio.create_task(watch())
    service.waiting[watching] = events
    watching.add_done_callback(service.waiting.pop)
    return follow()


def as_refusal(error: Exception) -> BadRequest:
    """An error of the engine's, as the client is told of it."""
    if isinstance(error, BadRequest):
        return error
    text = " ".join(str(error).split())
    # torch raises RuntimeErrors where there is no memory.
    if isinstance(error, MemoryError | OSError) or "alloc" in text or "out of memory" in text:
        return NO_MEMORY
    return BadRequest(text) if isinstance(error, ValueError) else BadRequest(f"the engine failed: {text}", 500)


async def stream(reply: Reply, events: AsyncIterator[tuple[int, Event]], echo: bool) -> AsyncIterator[bytes]:
    """Server-sent events: a chunk per token, the usage if asked for, [DONE]; an error ends them."""
    try:
        for choice in reply.choices if echo else ():
            # A prompt may have as much to say as a whole answer: not in the event loop.
            yield reply.chunk(await asyncio.to_thread(choice.prompt_piece))
        async for index, event in events:
            yield reply.chunk(reply.choices[index].piece(event))
        yield reply.end()
    except Exception as error:
        if not isinstance(error, BadRequest):
            log.exception("a stream failed")
            error = BROKEN
        yield server_sent(error.body())
