"""Generates the answers to whole sets of prompts with an engine that has no other requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ...types import Rollout
from .decoder import Decoder
from .prompts import common_beginning, encode_continuation, encode_text
from .request import Event, GenerationRequest, Progress, Request, Row
from .scheduler import Scheduler


class GenerationEngine(Protocol):
    """The part of an engine that `answer` needs."""

    finished_rows: dict[int, Row]

    def add(self, request: Request) -> int: ...
    def share_prefix(self, tokens: Sequence[int]) -> None: ...
    def advance(self) -> list[Event]: ...
    @property
    def busy(self) -> bool: ...
    def take(self, request: int, version: int) -> Rollout: ...


def answer_requests(
    engine: GenerationEngine, requests: Sequence[Request], version: int, progress: Progress | None = None
) -> list[Rollout]:
    """Generate answers to requests whose prompts are token ids, in their order. `progress(done, total)` counts them."""
    ids: dict[int, int] = {}
    # The longest prompts first, so that prompts of similar length are prefilled together.
    for i in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt)):
        ids[i] = engine.add(requests[i])
    engine.share_prefix(common_beginning([r.prompt for r in requests if not isinstance(r.prompt, str)]))
    reported = 0
    while engine.busy:
        engine.advance()
        if progress and len(engine.finished_rows) > reported:
            reported = len(engine.finished_rows)
            progress(reported, len(requests))
    return [engine.take(ids[i], version) for i in range(len(requests))]


def answer(
    engine: GenerationEngine,
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    version: int,
    progress: Progress | None = None,
) -> list[list[Rollout]]:
    """Generate the answers to every prompt, in the prompts' order, rule by rule."""
    requests = []
    for prompt in request.prompts:
        tokens = encode_text(tokenizer, prompt.text)
        prefill = encode_continuation(tokenizer, prompt.prefill) if prompt.prefill else []
        # By rule and sample: the answers to one prompt wait together, and it is prefilled once for all of them.
        requests += [
            Request(tokens, request.sampling, exits, request.seed, prompt.id, sample, prefill=prefill)
            for exits in request.rules
            for sample in range(request.samples)
        ]
    answers, count = answer_requests(engine, requests, version, progress), request.per_prompt
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def generate(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    version: int,
    progress: Progress | None = None,
    rows: int = 64,
    positions: int | None = None,
) -> list[list[Rollout]]:
    """`answer` with a decoder, up to `rows` concurrently and as many as fit `positions`.

    A seed gives the same answers whatever `rows` is: to the bit where the decoder's products are its own (linear.py),
    elsewhere up to rounding: another batch may change the last bits of a logit, and with them a choice that hangs on
    these bits. Raises ValueError for impossible settings and for prompts that do not fit the model.
    """
    if request.samples < 1 or rows < 1:
        raise ValueError(f"samples={request.samples}, rows={rows}: both must be at least 1")
    scheduler = Scheduler(decoder, tokenizer, min(rows, max(1, request.answers)), positions=positions)
    return answer(scheduler, tokenizer, request, version, progress)
