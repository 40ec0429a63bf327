"""Answers to whole sets of prompts, by an engine that has nothing else to do, or one answer token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ...exit_rules import ExitRule
from ...types import Prompt, Rollout
from .decoder import Decoder
from .prompts import common_beginning, encode_continuation, encode_text
from .request import Event, GenerationRequest, Progress, Request, Row
from .sampling import SamplingParams
from .scheduler import Scheduler


def generate(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    version: int,
    progress: Progress | None = None,
    rows: int = 64,
    positions: int | None = None,
) -> list[list[Rollout]]:
    """The answers to every prompt, in the prompts' order and of each rule by rule, with up to `rows` in flight and as
    many as fit `positions`.

    A seed gives the same answers whatever `rows` is: to the bit where the decoder's products are its own (linear.py),
    elsewhere up to rounding: another batch may change the last bits of a logit, and with them a choice that hangs on
    these bits. `progress(done, total)` counts answers. Raises ValueError for impossible settings and for prompts
    that do not fit the model.
    """
    if request.samples < 1 or rows < 1:
        raise ValueError(f"samples={request.samples}, rows={rows}: both must be at least 1")
    scheduler = Scheduler(decoder, tokenizer, min(rows, max(1, request.answers)), positions=positions)
    return answer(scheduler, tokenizer, request, version, progress)


class GenerationEngine(Protocol):
    """What `answer` needs of an engine."""

    finished: dict[int, Row]

    def add(self, request: Request) -> int: ...
    def share_prefix(self, tokens: Sequence[int]) -> None: ...
    def advance(self) -> list[Event]: ...
    @property
    def busy(self) -> bool: ...
    def take(self, request: int, version: int) -> Rollout: ...


def answer(
    engine: GenerationEngine,
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    version: int,
    progress: Progress | None = None,
) -> list[list[Rollout]]:
    """`generate` by an engine that has nothing else to do."""
    prompts, sampling, seed = request.prompts, request.sampling, request.seed
    # By rule and sample: the answers to one prompt wait together, and it is prefilled once for all of them.
    wanted = [(exits, sample) for exits in request.rules for sample in range(request.samples)]
    encoded = [encode_text(tokenizer, prompt.text) for prompt in prompts]
    prefills = [encode_continuation(tokenizer, p.prefill) if p.prefill else [] for p in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    # The longest prompts first, so that prompts of similar length are prefilled together.
    for p in sorted(range(len(prompts)), key=lambda i: -len(encoded[i])):
        ids[p] = [
            engine.add(Request(encoded[p], sampling, exits, seed, prompts[p].id, sample, prefill=prefills[p]))
            for exits, sample in wanted
        ]
    engine.share_prefix(common_beginning(encoded))
    reported = 0
    while engine.busy:
        engine.advance()
        if progress and len(engine.finished) > reported:
            reported = len(engine.finished)
            progress(reported, request.answers)
    return [[engine.take(id, version) for id in group] for group in ids]


def stream(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sampling: SamplingParams,
    exits: ExitRule,
    seed: int = 0,
) -> Iterator[Event]:
    """Sample 0 of `generate`, token by token; the texts concatenate to the rollout's."""
    scheduler = Scheduler(decoder, tokenizer, in_flight=1)
    prefill = encode_continuation(tokenizer, prompt.prefill) if prompt.prefill else []
    scheduler.add(Request(prompt.text, sampling, exits, seed, prompt.id, stream=True, prefill=prefill))
    while scheduler.busy:
        yield from scheduler.advance()
