"""How far a conversion is: a bar with GB/s on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

INTERVAL_S = 10.0


class Meter:
    """Counts bytes of model weights on stderr. `quiet` shows nothing; the figures are kept all the same.

    with Meter("import", total) as meter:
        meter.add(block.nbytes)
    """

    def __init__(self, label: str, total: int, quiet: bool = False):
        self.label, self.total, self.quiet = label, total, quiet
        self.done = self.skipped = 0
        self._start = self._shown = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Meter:
        if not self.quiet and sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        self._start = self._shown = time.monotonic()
        return self

    def add(self, count: int) -> None:
        """`count` more bytes are through."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done + self.skipped)
        elif not self.quiet and time.monotonic() - self._shown > INTERVAL_S:
            self._shown = time.monotonic()
            print(f"{self.label}: {self.line()}", file=sys.stderr, flush=True)

    def skip(self, count: int) -> None:
        """`count` bytes were through before this run began."""
        self.skipped += count

    def line(self) -> str:
        """For example "3.2 of 15.2 GB, 0.61 GB/s"; the rate is that of this run alone."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return (
            f"{(self.done + self.skipped) / 1e9:.2f} of {self.total / 1e9:.2f} GB, {self.done / seconds / 1e9:.2f} GB/s"
        )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
