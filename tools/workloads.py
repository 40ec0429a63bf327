"""What benchmarks, tests and the GPU check run: batches with drawn exits, requests, answers to all of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from ee_megatron.learner.batch import ReplayBatch, pack
from ee_megatron.objectives.weights import Weights, mean_weights
from ee_megatron.planning.workload import tilted
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, Request, Scheduler

T = TypeVar("T")


def exits_with_mean(outcomes: Sequence[int], mean: float, shape: int | tuple[int, ...], seed: int) -> np.ndarray:
    """Depths drawn from the maximum-entropy distribution over `outcomes` with the given mean (in layers)."""
    return np.random.default_rng(seed).choice(outcomes, size=shape, p=tilted(outcomes, mean))


def make_weights(batch: ReplayBatch) -> Weights:
    """A likelihood's: of tokens and of exits."""
    return Weights(mean_weights(batch, batch.loss_mask), mean_weights(batch, batch.gate_mask))


def make_batch(
    spec: PolicySpec, vocab: int, sequences: int, prompt: int, answer: int, shares: Sequence[float], group: int,
    seed: int = 0,
) -> tuple[ReplayBatch, Weights]:  # fmt: skip
    """Sequences of one length, in groups of one prompt, whose later tokens leave in the given shares, rounded within a
    sequence, in any order."""
    generator = np.random.default_rng(seed)
    tokens = [generator.integers(0, vocab, prompt + answer) for _ in range(sequences)]
    for row in range(sequences):
        tokens[row][:prompt] = tokens[row - row % group][:prompt]
    # The outcome of each of answer - 1 evenly spaced quantiles.
    outcome = np.searchsorted(np.cumsum(shares), (np.arange(answer - 1) + 0.5) / (answer - 1)).clip(max=len(shares) - 1)
    later = np.array(spec.layout.outcomes, dtype=np.int32)[outcome]
    first = np.array([spec.num_layers], dtype=np.int32)
    depths = [np.concatenate([first, generator.permutation(later)]) for _ in range(sequences)]
    batch = pack([t[:prompt] for t in tokens], [t[prompt:] for t in tokens], depths, spec.num_layers)
    return batch, make_weights(batch)


def answer_all(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, requests: Iterable[Request], in_flight: int
) -> Scheduler:
    """A scheduler that has answered all requests."""
    scheduler = Scheduler(decoder, tokenizer, in_flight)
    for request in requests:
        scheduler.add(request)
    while scheduler.busy:
        scheduler.advance()
    return scheduler


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return statistics.median(values), min(values), max(values)


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """`spread` of the ratios within each repeat."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def interleaved(cases: Mapping[str, Callable[[], T]], repeats: int, warm_up: int = 0) -> dict[str, list[T]]:
    """The results of every case, `repeats` times each, all of them in turn: a drift of the machine's speed affects all
    alike."""
    found: dict[str, list[T]] = {name: [] for name in cases}
    for repeat in range(warm_up + repeats):
        for name, run in cases.items():
            result = run()
            if repeat >= warm_up:
                found[name].append(result)
    return found


def save(file: Path | None, found: object) -> None:
    """Figures as JSON, if a file is wanted."""
    if file is not None:
        file.write_text(json.dumps(found, indent=1, default=str))
