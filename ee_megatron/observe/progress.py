"""Progress of a stage: a live bar on a terminal, occasional lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

PERCENT = ("accuracy",)


class Progress:
    """Shows a stage's step, its latest metrics and the time left.

        with Progress("reinforce", total=12) as bar:
            bar.detail("rollouts", 32, 64)
            bar.advance(1, reward=0.71, accuracy=0.8, depth=0.62)

    On a terminal a bar is redrawn in place; elsewhere (pipe, file) at most one plain line per `interval` seconds is
    written, and one at the end. `done` is where a resumed stage starts. The time left is extrapolated from the steps
    of this process only. `enabled=False` (ranks other than 0) shows nothing.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        enabled: bool = True,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.done, self.enabled = stage, total, done, enabled
        self._stream, self._interval, self._clock = stream or sys.stdout, interval, clock
        self._first, self._written = done, -1
        self._start = self._last_line = clock()
        self._values: dict[str, float] = {}
        self._detail = ""
        # The step's current activity: name, count and time at its first call, last count.
        self._busy = "", 0, 0.0, 0
        self._rich: RichProgress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        self._start = self._last_line = self._clock()
        if self.enabled and self._stream.isatty():
            self._rich = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
                TextColumn("[dim]{task.fields[detail]}"), console=Console(file=self._stream), refresh_per_second=4,
            )  # fmt: skip
            self._task = self._rich.add_task(self.stage, total=self.total, completed=self.done, **self._fields())
            self._rich.start()
        return self

    def advance(self, steps: int = 1, **values: float) -> None:
        """Count `steps` more; `values` (reward, accuracy, depth, loss, …) replace the figures of the same name."""
        self.done += steps
        self._values.update({name: float(value) for name, value in values.items()})
        self._detail, self._busy = "", ("", 0, 0.0, 0)
        self._show()

    def detail(self, name: str, done: int, total: int) -> None:
        """Show the current activity of the step and its time left, until the next `advance`. A new name, or a smaller
        count, restarts the extrapolation."""
        before, first, since, last = self._busy
        if before != name or done < last:
            first, since = done, self._clock()
        self._busy = name, first, since, done
        left = self._left(done, total, first, since)
        self._detail = f"{name} {done:,}/{total:,}{left and f', {left}'}"
        self._show()

    def _fields(self) -> dict[str, Any]:
        figures = "  ".join(f"{n} {v:.1%}" if n in PERCENT else f"{n} {v:.3g}" for n, v in self._values.items())
        left = self._left(self.done, self.total, self._first, self._start)
        return {"figures": figures, "left": left, "detail": self._detail}

    def _left(self, done: int, total: int, first: int, since: float) -> str:
        """The time left, extrapolated from the pace since `first`."""
        if not first < done < total:
            return ""
        return f"{duration((self._clock() - since) / (done - first) * (total - done))} left"

    def line(self) -> str:
        """Plain text of the bar: stage step/total, figures, elapsed, time left, detail."""
        fields, elapsed = self._fields(), duration(self._clock() - self._start)
        parts = f"{self.stage} {self.done}/{self.total}", fields["figures"], elapsed, fields["left"], fields["detail"]
        return "  ".join(part for part in parts if part)

    def _show(self) -> None:
        if not self.enabled:
            return
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done, **self._fields())
        elif self._clock() - self._last_line >= self._interval:
            self._write()

    def _write(self) -> None:
        self._last_line, self._written = self._clock(), self.done
        # One write: `print` to an unbuffered stream makes two, and a process killed in between leaves half a line, to
        # which its parent's error is then appended.
        self._stream.write(f"{self.line()}\n")
        self._stream.flush()

    def __exit__(self, *error: object) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self.enabled and self._written != self.done:
            self._write()


def duration(seconds: float) -> str:
    """Format seconds: 90 -> "1:30", 3700 -> "1:01:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
