"""Progress: plain lines, few of them, where nobody watches; a bar that is redrawn on a terminal."""

import io
import os
import pty
import select
import subprocess
import sys
import time

from ee_megatron.observe.progress import Progress, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_pipe_gets_a_line_every_ten_seconds_and_one_at_the_end():
    out, clock = io.StringIO(), Clock()
    with Progress("reinforce", 8, stream=out, clock=clock) as bar:
        for step in range(8):
            clock.now += 2.0
            bar.detail("rollouts", step, 8)
            clock.now += 2.0
            bar.advance(1, reward=0.71, accuracy=0.805, depth=0.623)
    assert out.getvalue().splitlines() == [
        "reinforce 2/8  reward 0.71  accuracy 80.5%  depth 0.623  0:10  0:30 left  rollouts 2/8",
        "reinforce 5/8  reward 0.71  accuracy 80.5%  depth 0.623  0:20  0:12 left",
        "reinforce 7/8  reward 0.71  accuracy 80.5%  depth 0.623  0:30  0:04 left  rollouts 7/8",
        "reinforce 8/8  reward 0.71  accuracy 80.5%  depth 0.623  0:32",
    ]


def test_a_resumed_stage_extrapolates_from_its_own_steps_only():
    out, clock = io.StringIO(), Clock()
    with Progress("rl", 12, done=10, stream=out, clock=clock) as bar:
        clock.now = 30.0
        bar.advance()
    assert out.getvalue().splitlines()[0] == "rl 11/12  0:30  0:30 left"


def test_a_long_step_says_what_it_is_busy_with_and_for_how_long():
    out, clock = io.StringIO(), Clock()
    with Progress("rl", 12, stream=out, interval=0.0, clock=clock) as bar:
        # What was done by the first sign took nobody knows how long.
        for now, name, done in ((10, "score", 4_000), (20, "score", 8_000), (25, "train", 3_000), (40, "train", 9_000)):
            clock.now = now
            bar.detail(name, done, 12_000)
        clock.now = 50
        bar.detail("train", 12_000, 12_000)
        # A second update of the step.
        bar.detail("train", 4_000, 12_000)
    assert [line.split("  ")[-1] for line in out.getvalue().splitlines()] == [
        "score 4,000/12,000", "score 8,000/12,000, 0:10 left", "train 3,000/12,000", "train 9,000/12,000, 0:08 left",
        "train 12,000/12,000", "train 4,000/12,000",
    ]  # fmt: skip


def test_other_ranks_show_nothing():
    out = io.StringIO()
    with Progress("rl", 1, enabled=False, stream=out) as bar:
        bar.detail("rollouts", 1, 2)
        bar.advance(1, loss=1.0)
    assert out.getvalue() == ""


def test_a_process_killed_at_any_moment_leaves_whole_lines():
    # Unbuffered, each write is a system call, and the error of whoever watches the process may come after any of them.
    raw = Recorded()
    with Progress("rl", 2, stream=io.TextIOWrapper(raw, write_through=True), interval=0.0) as bar:
        bar.advance(1, loss=1.0)
        bar.advance(1, loss=0.5)
    assert len(raw.writes) == 2 and all(data.endswith(b"\n") for data in raw.writes)


class Recorded(io.RawIOBase):
    """A file without a buffer; `writes` are its system calls."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.writes.append(bytes(data))
        return len(data)


def test_a_terminal_gets_a_bar_with_the_figures():
    code = """
from ee_megatron.observe.progress import Progress
with Progress("reinforce", 3) as bar:
    bar.advance(2, reward=0.71, depth=0.62)
    bar.detail("rollouts", 32, 64)
"""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "140"}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment)
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 30
    try:
        while (time.monotonic() < deadline and select.select([ours], [], [], 1.0)[0]) or child.poll() is None:
            seen += os.read(ours, 65536)
    except OSError:
        pass
    assert child.wait(10) == 0
    os.close(ours)
    text = seen.decode()
    for words in ("reinforce", "2/3", "reward 0.71", "depth 0.62", "rollouts 32/64", "\x1b["):
        assert words in text


def test_durations():
    assert [duration(s) for s in (0, 59.6, 90, 3700)] == ["0:00", "1:00", "1:30", "1:01:40"]
