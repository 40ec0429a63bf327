"""Who waits for a slot, and who comes in next: what a row can come to need must fit beside what those in flight can."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Set

from .cache import pages_for
from .request import Row
from .slots import common_pages

# Where short requests pass long ones: a long one can come to need more than so much of the cache, and all of them that
# run together no more than their share, unless it is a single one.
LONG, SHARE_OF_LONG = 1 / 16, 1 / 2


class Waiting:
    """Rows in the order of their ids. `limit`: pages of the cache (None: as many as are asked for).

    With `passing` short rows don't wait for long ones that there is no room for; each kind keeps its order.
    """

    def __init__(self, limit: int | None, passing: bool):
        self.limit, self.passing = limit, passing
        self._rows: deque[Row] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    def first(self) -> Row:
        """Who has waited longest. There must be some row."""
        return self._rows[0]

    def put(self, row: Row) -> None:
        """Let a row wait, behind the others."""
        self._rows.append(row)

    def put_back(self, rows: list[Row]) -> None:
        """Let rows that came in wait again, before the others."""
        self._rows.extendleft(sorted(rows, key=lambda row: -row.id))

    def remove(self, row: Row) -> None:
        """Take a row out."""
        self._rows.remove(row)

    def next(self, room: float, inside: Iterable[Row], read: Set[tuple[int, ...]]) -> tuple[Row, int] | None:
        """The row that comes in next where `room` pages are left beside the rows `inside`, and the pages that it needs
        (whole ones of a prompt in `read` are there); None: there is no room for it."""
        kinds = set[bool]()
        for row in self._rows:
            long = self._is_long(row)
            if long in kinds:
                continue
            kinds.add(long)
            needed = pages_for(row.longest) - (common_pages(row) if row.read in read else 0)
            if needed <= (min(room, self._room_of_long(inside)) if long else room):
                return row, needed
            if not self.passing or len(kinds) == 2:
                return None
        return None

    def _is_long(self, row: Row) -> bool:
        return self.passing and self.limit is not None and pages_for(row.longest) > LONG * self.limit

    def _room_of_long(self, inside: Iterable[Row]) -> float:
        taken = sum(pages_for(row.longest) for row in inside if self._is_long(row))
        return SHARE_OF_LONG * (self.limit or 0) - taken if taken else math.inf
