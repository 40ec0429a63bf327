"""Which row has which slot of the cache, and the pages of its positions: rows that begin alike hold those of their
prompt together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set

from .cache import PAGE, KVCache, pages_for
from .decoder import Prefilled
from .request import Row


class Slots:
    """`count` slots of a cache. A row that has one may hold the pages that it can come to need, `row.longest`."""

    def __init__(self, cache: KVCache, count: int):
        self.cache = cache
        self._free = list(range(count))[::-1]
        # Slots of rows that hold whole pages of what was read of their prompts together, by what that is.
        self._together: dict[tuple[int, ...], list[int]] = {}

    @property
    def free(self) -> int:
        """Slots that no row has."""
        return len(self._free)

    @property
    def together(self) -> Set[tuple[int, ...]]:
        """What was read of the prompts whose whole pages are held: another row with such a prompt needs none for it."""
        return self._together.keys()

    def room(self, inside: Iterable[Row]) -> float:
        """Pages that no row in flight can come to need."""
        if self.cache.limit is None:
            return math.inf
        own = sum(pages_for(row.longest) - common_pages(row) for row in inside)
        return self.cache.limit - own - sum(len(read) // PAGE for read in self._together)

    def enter(self, entering: Sequence[tuple[Row, Sequence[Prefilled]]], coming: int = 0) -> None:
        """Give rows a slot with what has been read of them, part after part, and pages for `coming` positions more."""
        first: list[Row] = []
        others: list[Row] = []
        for row, _ in entering:
            row.slot = self._free.pop()
            alike = self._together.setdefault(row.read, []) if common_pages(row) else []
            (others if alike else first).append(row)
            alike.append(row.slot)
        self.hold(first, coming)
        for row in others:
            self.cache.share(self._together[row.read][0], row.slot, common_pages(row))
        self.hold(others, coming)
        shared = {row.slot: PAGE * common_pages(row) for row in others}
        for row, parts in entering:
            for part in parts:
                there = max(0, shared.get(row.slot, 0) - part.start)
                if there < part.keys.shape[1]:
                    self.cache.fill(row.slot, part.start + there, part.keys[:, there:], part.values[:, there:])

    def hold(self, rows: list[Row], coming: int = 0) -> None:
        """Give rows the pages of what they have: the last token's keys and values are made next."""
        self.cache.hold([row.slot for row in rows], [row.length + coming for row in rows])

    def leave(self, row: Row) -> None:
        """Take a row's slot back, and the pages that it alone holds."""
        self._free.append(row.slot)
        self.cache.release(row.slot)
        if common_pages(row):
            alike = self._together[row.read]
            alike.remove(row.slot)
            if not alike:
                del self._together[row.read]
        row.slot = -1


def common_pages(row: Row) -> int:
    """Whole pages of what was read of a prompt, which nothing is written to afterwards. Those of an answer that goes
    on are its own: it was read with it."""
    return 0 if row.request.begun is not None else len(row.read) // PAGE
