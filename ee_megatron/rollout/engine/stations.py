"""Which waiting rows run next: rows wait at stations, one before each segment between exits and one before the readout.

Running a station costs a + b · rows, a being the reading of its weights: on a CPU in float32 a is worth about 25 rows.
So rows should run together. Of the orders that were simulated (tools/bench_decode.py --only orders), going through the
stations by depth and passing over those that are nearly empty is the best as long as all rows in flight fit one batch:
the fullest station first splits the rows into cohorts out of phase (32 rows, mean depth 0.5: 0.69 of the ceiling
against 0.79). With several times as many rows some station is always full, and nothing is left to gain.
"""

from __future__ import annotations

from collections.abc import Iterator

from .request import Row

# Share of the rows in flight below which a station is passed over, as long as some other isn't.
HOLD = 0.1


class Stations:
    """Queues of rows, by the segment that each has to run next; the last is the readout. `batch` rows run at most."""

    def __init__(self, count: int, batch: int, hold: float = HOLD):
        self.queues: list[list[Row]] = [[] for _ in range(count)]
        self.batch, self.hold = batch, hold
        self._next = 0

    def __len__(self) -> int:
        return sum(map(len, self.queues))

    def __iter__(self) -> Iterator[Row]:
        return (row for queue in self.queues for row in queue)

    def put(self, station: int, row: Row) -> None:
        """Let a row wait at a station."""
        self.queues[station].append(row)

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it waits."""
        for queue in self.queues:
            if row in queue:
                queue.remove(row)

    def take(self) -> tuple[int, list[Row]]:
        """The station to run now and its rows, oldest first, which leave the queue. There must be some row."""
        station = self._pick()
        queue = self.queues[station]
        rows, self.queues[station] = queue[: self.batch], queue[self.batch :]
        return station, rows

    def _pick(self) -> int:
        count = len(self.queues)
        # With more rows in flight than fit a batch there is always a well-filled station: the deepest full one first.
        full = [s for s in range(count) if len(self.queues[s]) >= self.batch]
        if full and len(self) > self.batch:
            return full[-1]
        enough = min(self.batch, max(1.0, self.hold * len(self)))
        for _ in range(count):
            station, self._next = self._next, (self._next + 1) % count
            if len(self.queues[station]) >= enough:
                return station
        return max(range(count), key=lambda s: len(self.queues[s]))
