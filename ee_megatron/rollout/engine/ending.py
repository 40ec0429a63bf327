"""When an answer ends, and its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopChecker:
    """End-of-sequence ids and stop strings. Decodes the answer only when its newest token could complete a stop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int], stop: Sequence[str]):
        self.tokenizer = tokenizer
        # A special token never shows up in decoded text: as a stop string it is an end-of-sequence id.
        special = {text: tokenizer.convert_tokens_to_ids(text) for text in stop if text in tokenizer.all_special_tokens}
        ids = set(eos_ids) or {tokenizer.eos_token_id} - {None}
        self.end_ids = frozenset(ids | set(special.values()))
        self.stop = tuple(text for text in stop if text not in special)
        self._last_characters = {text[-1] for text in self.stop}
        # A space may be lost and a character beyond ASCII split when a token is decoded alone: then always look.
        self._always = any(last == " " or not last.isascii() for last in self._last_characters)
        self._could_complete = cache(self._completes)

    def ends(self, tokens: Sequence[int], newest: int) -> bool:
        """Whether an answer ends with the token that comes next after its `tokens`."""
        if newest in self.end_ids:
            return True
        if not self.stop or not (self._always or self._could_complete(newest)):
            return False
        text = self.decode([*tokens, newest])
        return any(stop in text for stop in self.stop)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer's text without special tokens, up to the first stop string."""
        text = self.decode(tokens)
        cuts = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def settled(self, tokens: Sequence[int]) -> str:
        """The part of the text that later tokens can't change: no broken character, no beginning of a stop string."""
        text = self.text(tokens).rstrip("\ufffd")
        held = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return text[: len(text) - max(held, default=0)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _completes(self, token: int) -> bool:
        piece = self.decode([token])
        return any(last in piece for last in self._last_characters)
