"""Counters and histograms in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds.
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
PREFIX = "ee_megatron_"


class Counter:
    """Sums by one label, or a single one without."""

    def __init__(self, name: str, about: str, label: str = "", known: Iterable[str] = ()):
        self.name, self.about, self.label = name, about, label
        self.values: dict[str, float] = dict.fromkeys(known if label else [""], 0.0)

    def add(self, amount: float = 1, label: str = "") -> None:
        self.values[label] = self.values.get(label, 0.0) + amount

    def lines(self) -> list[str]:
        return _family(self.name, "counter", self.about, [(self.label, k, v) for k, v in self.values.items()])


@dataclass
class Histogram:
    name: str
    about: str
    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))] += 1
        self.total += value

    def lines(self) -> list[str]:
        lines, below = [f"# HELP {self.name} {self.about}", f"# TYPE {self.name} histogram"], 0
        for bound, count in zip([*map(_number, self.bounds), "+Inf"], self.counts, strict=True):
            below += count
            lines.append(f'{self.name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{self.name}_sum {_number(self.total)}", f"{self.name}_count {below}"]


class Metrics:
    """What has happened since the start. Written by the engine's thread and the HTTP side, hence a lock."""

    def __init__(self, outcomes: Iterable[int]):
        self._lock = threading.Lock()
        self._requests = Counter(
            f"{PREFIX}requests_total",
            "Answers asked for, by what became of them.",
            "outcome",
            ("answered", "cancelled", "refused", "failed"),
        )
        self._prompt = Counter(f"{PREFIX}prompt_tokens_total", "Tokens of prompts that were taken in.")
        self._tokens = Counter(f"{PREFIX}generation_tokens_total", "Tokens generated.")
        self._exits = Counter(
            f"{PREFIX}exit_depth_tokens_total", "Tokens by the layers they ran.", "depth", map(str, outcomes)
        )
        self._layers = Counter(f"{PREFIX}layers_run_total", "Layers that generated tokens ran.")
        self._replies = Counter(f"{PREFIX}http_responses_total", "HTTP responses, by status.", "status", ())
        self._first = Histogram(
            f"{PREFIX}time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BOUNDS
        )
        self._between = Histogram(
            f"{PREFIX}time_per_output_token_seconds", "From one token of an answer to the next.", TOKEN_BOUNDS
        )

    def came(self, prompt_tokens: int) -> None:
        with self._lock:
            self._prompt.add(prompt_tokens)

    def ended(self, outcome: str, count: int = 1) -> None:
        with self._lock:
            self._requests.add(count, outcome)

    def replied(self, status: int) -> None:
        with self._lock:
            self._replies.add(1, str(status))

    def tokens(self, depths: Sequence[int], first: Sequence[float], between: Sequence[float]) -> None:
        """Tokens that came together: their depths, and the seconds that each was waited for."""
        with self._lock:
            self._tokens.add(len(depths))
            self._layers.add(sum(depths))
            for depth in depths:
                self._exits.add(1, str(depth))
            for seconds in first:
                self._first.observe(seconds)
            for seconds in between:
                self._between.observe(seconds)

    def outcomes(self) -> dict[str, int]:
        with self._lock:
            return {name: int(count) for name, count in self._requests.values.items()}

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Everything, and `gauges`: name -> (what it is, its value now)."""
        with self._lock:
            parts = [self._requests, self._prompt, self._tokens, self._exits, self._layers, self._replies]
            lines = [line for part in parts for line in part.lines()]
            lines += [*self._first.lines(), *self._between.lines()]
        for name, (about, value) in gauges.items():
            lines += _family(f"{PREFIX}{name}", "gauge", about, [("", "", value)])
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, about: str, samples: Iterable[tuple[str, str, float]]) -> list[str]:
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for label, value, count in samples:
        lines.append(f'{name}{{{label}="{value}"}} {_number(count)}' if label else f"{name} {_number(count)}")
    return lines


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
