"""Prompts are read in parallel, each once, however many rows begin with it; so are answers that go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .decoder import Decoder, Prefilled
from .prompts import pad
from .request import Row

# Prompt positions read in one parallel forward, padding included, and before rows start: bounds a prefill's memory.
PREFILL_POSITIONS = 8192
# A shorter common beginning isn't worth a forward of its own.
SHORTEST_PREFIX = 8


class Read(NamedTuple):
    """What has been read of a prompt: its parts in order (a common beginning may be one), and logits [V] at its end."""

    parts: tuple[Prefilled, ...]
    logits: Tensor


class Reader:
    """Reads `positions` (None: PREFILL_POSITIONS) at a time, longer prompts alone, and keeps what waiting rows need."""

    def __init__(self, decoder: Decoder, positions: int | None):
        self.decoder, self.positions = decoder, positions or PREFILL_POSITIONS
        self._read: dict[tuple[int, ...], Read] = {}
        self._prefix: tuple[tuple[int, ...], Prefilled] | None = None

    def share_prefix(self, tokens: Sequence[int]) -> None:
        """Read a common beginning once; prompts that begin with it and go on are read from there."""
        self._prefix = None
        if len(tokens) >= SHORTEST_PREFIX:
            row = torch.tensor([list(tokens)], device=self.decoder.device)
            self._prefix = tuple(tokens), self.decoder.prefill(row, torch.tensor([len(tokens)]))[0]

    def lacks(self, row: Row) -> bool:
        """Whether a row's prompt is still to be read."""
        return bool(row.read) and row.read not in self._read

    def of(self, row: Row) -> Read:
        """What was read of a row's prompt. Raises KeyError."""
        return self._read[row.read]

    def parts(self, row: Row) -> tuple[Prefilled, ...]:
        """Keys and values of a row's prompt; () where there is nothing to read before the row runs."""
        return self._read[row.read].parts if row.read else ()

    def read(self, prompts: list[tuple[int, ...]]) -> None:
        """Prompts, the longest first: those of like length are read together and pad each other least."""
        head, prefix = self._prefix or ((), None)
        inside = [p for p in prompts if prefix and len(p) > len(head) and p[: len(head)] == head]
        outside = [p for p in prompts if p not in set(inside)]
        for group, past in ((inside, prefix), (outside, None)):
            start = len(head) if past else 0
            before = (past,) if past else ()
            while group:
                count = max(1, self.positions // (len(group[0]) - start))
                part, group = group[:count], group[count:]
                tokens, lengths = pad([p[start:] for p in part], self.decoder.device)
                prefilled = self.decoder.prefill(tokens, lengths, past)
                logits = self.decoder.readout(torch.stack([p.hidden for p in prefilled]))
                for prompt, own, last in zip(part, prefilled, logits, strict=True):
                    self._read[prompt] = Read((*before, own), last)

    def begun(self, rows: list[Row]) -> Iterator[tuple[list[Row], list[Prefilled]]]:
        """Rows of answers that go on, the longest first, some at a time, with all but their last token, which is read
        at its own exits."""
        decoder = self.decoder
        while rows:
            count = max(1, self.positions // rows[0].length)
            part, rows = rows[:count], rows[count:]
            tokens, lengths = pad([[*row.prompt_tokens, *row.tokens[:-1]] for row in part], decoder.device)
            depths = torch.full(tokens.shape, decoder.dims.num_layers, dtype=torch.int64)
            for b, row in enumerate(part):
                first = len(row.prompt_tokens) - 1
                depths[b, first : first + len(row.tokens)] = torch.tensor(row.exit_depths)
            yield part, decoder.prefill(tokens, lengths, exit_depths=depths.to(decoder.device))

    def forget(self, waiting: Iterable[Row]) -> None:
        """Keep what waiting rows need, the next ones' first, up to what is read at a time: it lies beside the cache."""
        needed, room = set[tuple[int, ...]](), self.positions
        for row in waiting if self._read else ():
            if row.read in self._read and row.read not in needed and len(row.read) <= room:
                needed.add(row.read)
                room -= len(row.read)
        self._read = {tokens: read for tokens, read in self._read.items() if tokens in needed}
