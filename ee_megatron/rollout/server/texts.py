"""Texts to tokens and back, beside the event loop: a long prompt takes its own time, not everybody's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from .protocol import BadRequest

T = TypeVar("T")
# Characters up to which work is quick: it never waits behind longer.
QUICK = 1 << 14
# Pieces of slow work that may wait; a text has so many characters at most for each position that it may take.
SLOW_QUEUE, CHARACTERS_PER_TOKEN = 8, 16
DECODED = 1 << 17


class Texts:
    """Two threads with a tokenizer each: one for short texts, one for long ones. `longest`: tokens of a prompt."""

    def __init__(self, quick: PreTrainedTokenizerBase, slow: PreTrainedTokenizerBase, longest: int):
        self.template = bool(quick.chat_template)
        self.longest = longest
        self._lanes = [(t, ThreadPoolExecutor(1, f"texts-{i}")) for i, t in enumerate((quick, slow))]
        self._slow = 0
        self._piece = lru_cache(DECODED)(lambda token: str(quick.decode([token])))
        self._quick = quick

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens as it stands, special ones too."""
        return self._piece(tokens[0]) if len(tokens) == 1 else str(self._quick.decode(list(tokens)))

    async def run(self, size: int, work: Callable[[PreTrainedTokenizerBase], T]) -> T:
        """`work`, on so many characters, in the thread for it. Raises BadRequest if too much waits there."""
        slow = size > QUICK
        if slow and self._slow >= SLOW_QUEUE:
            raise BadRequest(f"{self._slow} long prompts wait to be read; try again later", 429, "queue_full")
        self._slow += slow
        tokenizer, lane = self._lanes[slow]
        try:
            return await asyncio.get_running_loop().run_in_executor(lane, work, tokenizer)
        finally:
            self._slow -= slow

    def check(self, text: str) -> None:
        """Raises BadRequest for a text that is too long to be worth tokenising."""
        most = CHARACTERS_PER_TOKEN * self.longest
        if len(text) > most:
            raise BadRequest(
                f"the prompt has {len(text)} characters; this server reads {self.longest} tokens and no more than "
                f"{most} characters; shorten the prompt",
                code="context_length_exceeded",
            )

    def close(self) -> None:
        for _, lane in self._lanes:
            lane.shutdown(wait=False, cancel_futures=True)
