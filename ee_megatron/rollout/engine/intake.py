"""Requests become answers in the making, or are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ...exits import ExitLayout
from .ending import StopChecker
from .prompts import encode_text
from .request import Request, Row
from .sampling import stream_key

# Sets of stop strings that are remembered: requests may come with any.
STOPS_KEPT = 64


@dataclass
class Intake:
    """For one model: its tokenizer, end-of-sequence ids, exits, and the longest sequence it takes."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: Iterable[int]
    layout: ExitLayout
    max_positions: int
    _stopping: dict[tuple[str, ...], StopChecker] = field(default_factory=dict)

    def begin(self, number: int, request: Request, gated: bool) -> Row:
        """The row of a request; `gated`: gates are loaded. Raises ValueError for what the model can't answer."""
        request.exits.check(self.layout, gated)
        prompt = request.prompt
        tokens = tuple(encode_text(self.tokenizer, prompt) if isinstance(prompt, str) else prompt)
        if not tokens:
            raise ValueError(f"prompt {request.prompt_id!r} has no tokens; give it a text")
        key = stream_key(request.seed, request.prompt_id, request.sample)
        stop = request.sampling.stop
        if stop not in self._stopping:
            if len(self._stopping) >= STOPS_KEPT:
                del self._stopping[next(iter(self._stopping))]
            self._stopping[stop] = StopChecker(self.tokenizer, self.eos_ids, stop)
        # The position that may exit is run as those of generated tokens are.
        read = tokens[:-1] if self.layout.first_token else tokens
        row = Row(number, request, tokens, read, key, self._stopping[stop])
        if row.tokens and (
            row.stopping.ends(row.tokens[:-1], row.last) or len(row.tokens) >= request.sampling.max_new_tokens
        ):
            raise ValueError(f"answer {request.prompt_id!r} was begun and ended; only an unfinished one goes on")
        check_prefill(row)
        if row.longest > self.max_positions:
            raise ValueError(
                f"prompt and answer take up to {row.longest} positions, the model has {self.max_positions}; "
                "shorten the prompts or lower max_new_tokens"
            )
        return row


def check_prefill(row: Row) -> None:
    """Raises ValueError for a prefill that leaves the model nothing to say."""
    prefill, limit = row.request.prefill, row.request.sampling.max_new_tokens
    if not prefill:
        return
    if len(prefill) >= limit:
        raise ValueError(
            f"prefill of {row.request.prompt_id!r} has {len(prefill)} tokens, the answer may have {limit}; "
            "raise max_new_tokens"
        )
    text = row.stopping.decode(prefill)
    if any(stop in text for stop in row.stopping.stop):
        raise ValueError(f"prefill of {row.request.prompt_id!r} holds a stop string; cut it there")
