"""Answers to whole sets of prompts, by an engine that has nothing else to do, or one answer token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    begun: Sequence[Sequence[Rollout]] = (),
    stop: Callable[[], bool] = lambda: False,
    positions: int | None = None,
) -> list[list[Rollout]]:
    """The answers to every prompt, in the prompts' order and of each rule by rule, with up to `rows` in flight and as
    many as fit `positions`.

    A seed gives the same answers whatever `rows` is: to the bit where the decoder's products are its own (linear.py),
    elsewhere up to rounding: another batch may change the last bits of a logit, and with them a choice that hangs on
    these bits. `progress(done, total)` counts answers. Raises ValueError for impossible settings and for prompts
    that do not fit the model.

    Once `stop()` holds, what there is is returned as it is: answers may be unfinished or without a token. As `begun` of
    another call, under these weights or newer ones, such answers go on and finished ones are returned as they are.
    """
    if request.samples < 1 or rows < 1:
        raise ValueError(f"samples={request.samples}, rows={rows}: both must be at least 1")
    scheduler = Scheduler(decoder, tokenizer, min(rows, max(1, request.answers)), positions=positions)
    return answer(scheduler, tokenizer, request, version, progress, begun, stop)


class Engine(Protocol):
    """What `answer` asks of whatever makes the tokens."""

    finished: dict[int, Row]

    def add(self, request: Request) -> int: ...
    def share_prefix(self, tokens: Sequence[int]) -> None: ...
    def advance(self) -> list[Event]: ...
    @property
    def busy(self) -> bool: ...
    def take_unfinished(self, request: int, version: int) -> Rollout: ...


def answer(
    scheduler: Engine,
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    version: int,
    progress: Progress | None = None,
    begun: Sequence[Sequence[Rollout]] = (),
    stop: Callable[[], bool] = lambda: False,
) -> list[list[Rollout]]:
    """`generate` by an engine that has nothing else to do."""
    prompts, total = request.prompts, request.answers
    sampling, seed = request.sampling, request.seed
    # By rule and sample: the answers to one prompt wait together, and it is read once for all of them.
    wanted = [(exits, sample) for exits in request.rules for sample in range(request.samples)]
    encoded = [encode_text(tokenizer, prompt.text) for prompt in prompts]
    prefills = [encode_continuation(tokenizer, p.prefill) if p.prefill else [] for p in prompts]
    ids: dict[tuple[int, int], int] = {}
    # The longest prompts first, so that rows of like length are read together.
    for p in sorted(range(len(prompts)), key=lambda i: -len(encoded[i])):
        for k, (exits, sample) in enumerate(wanted):
            first = begun[p][k] if begun else None
            if first is None or not is_whole(first, sampling):
                first = first if first is not None and first.length else None
                ids[p, k] = scheduler.add(
                    Request(encoded[p], sampling, exits, seed, prompts[p].id, sample, prefill=prefills[p], begun=first)
                )
    scheduler.share_prefix(common_beginning(encoded))
    reported = 0
    while scheduler.busy and not stop():
        scheduler.advance()
        if progress and len(scheduler.finished) > reported:
            reported = len(scheduler.finished)
            progress(reported, total)
    return [
        [scheduler.take_unfinished(ids[p, k], version) if (p, k) in ids else begun[p][k] for k in range(len(wanted))]
        for p in range(len(prompts))
    ]


def is_whole(answer: Rollout, sampling: SamplingParams) -> bool:
    """Whether an answer has ended, by its own doing or at the limit."""
    return answer.finished or answer.length >= sampling.max_new_tokens


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
