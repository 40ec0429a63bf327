"""The work of a pass of the model: lengths, depths of tokens, and how sequences share micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config.schema import SEQUENCE_MULTIPLE, RunConfig


@dataclass
class Load:
    """Sequences that a pass runs: all together, or one on average.

    answer: tokens that are predicted; prompts, prompts_seen: positions of prompts that are run and can't exit, and the
    keys that they see; by_depth, seen_by_depth [L + 1]: answer tokens that might exit, by the depth that they took, and
    their keys.
    """

    answer: float
    prompts: float
    prompts_seen: float
    by_depth: np.ndarray
    seen_by_depth: np.ndarray

    @staticmethod
    def counted(
        prompts: Sequence[int], depths: Sequence[np.ndarray], num_layers: int, group: int = 1, shared: float = 1.0,
        first_token: bool = False,
    ) -> Load:  # fmt: skip
        """Given sequences: tokens of each prompt, and depths [T] of each answer's tokens; unless `first_token` the
        first comes with the prompt. `group` neighbours have one prompt, whose share `shared` is run only once."""
        later, seen = np.zeros(num_layers + 1), np.zeros(num_layers + 1)
        for prompt, taken in zip(prompts, depths, strict=True):
            free = taken[not first_token :]
            later += np.bincount(free, minlength=num_layers + 1)
            keys = prompt + np.arange(len(taken) - len(free), len(taken), dtype=np.float64)
            seen += np.bincount(free, weights=keys, minlength=num_layers + 1)
        own = np.asarray(prompts, dtype=np.float64)
        # For the other sequences of a group only the prompt's last position is run.
        run, last = np.where(np.arange(len(own)) % group == 0, 1.0, 1.0 - shared), not first_token
        positions, keys = last + (own - 1) * run, last * own + own * (own - 1) / 2 * run
        return Load(float(sum(map(len, depths))), float(positions.sum()), float(keys.sum()), later, seen)

    @property
    def later(self) -> float:
        """Answer tokens that may exit."""
        return float(self.by_depth.sum())

    @property
    def written(self) -> float:
        """Positions at which a layer makes keys and values; the last token of a sequence is not an input."""
        return self.prompts + self.later

    def active(self, layer: int, full: bool = False) -> float:
        """Positions that run layer `layer` (1-based); full: without exits."""
        return self.prompts + float(self.by_depth[0 if full else layer :].sum())

    def seen(self, layer: int, full: bool = False) -> float:
        """Keys that these positions' queries see, summed."""
        return self.prompts_seen + float(self.seen_by_depth[0 if full else layer :].sum())

    def reaching(self, depth: int) -> float:
        """Positions at which the gate at `depth` is computed: those that reach it."""
        return float(self.by_depth[depth:].sum())

    def without_prompts(self) -> Load:
        """The load after prefill."""
        return Load(self.answer, 0.0, 0.0, self.by_depth, self.seen_by_depth)


class Workload(Load):
    """One average sequence of `prompt` + `answer` tokens.

    Of the answer's tokens the first comes from the prompt, which never exits; the others, and with `first_token` this
    one too, take outcome i (exit i, or none) with probability shares[i]. `outcomes` are depths. `shared`: positions of
    the prompt that another sequence of the micro-batch has run already, on average.
    """

    def __init__(
        self, prompt: int, answer: float, outcomes: Sequence[int], shares: Sequence[float], shared: float = 0.0,
        first_token: bool = False,
    ) -> None:  # fmt: skip
        self.prompt, self.outcomes, self.shares = prompt, tuple(outcomes), tuple(shares)
        self.shared, self.first_token = shared, first_token
        share = np.zeros(outcomes[-1] + 1)
        share[list(outcomes)] = shares
        keys = (answer - 1) * (prompt + answer / 2) + first_token * prompt
        # All but the last position of a prompt are shared, or none.
        seen = (prompt + 1 - shared) * prompt / 2 - first_token * prompt
        super().__init__(
            answer, prompt - shared - first_token, seen, share * (answer - (not first_token)), share * keys
        )

    @staticmethod
    def of(prompt: int, answer: int, outcomes: Sequence[int], mean_depth: float, first_token: bool = False) -> Workload:
        """With the distribution of most entropy over the outcomes that has this mean depth, as a share of the layers,
        over all tokens of an answer. Raises ValueError if no distribution has it."""
        if prompt < 1 or answer < 1:
            raise ValueError(f"--prompt-tokens {prompt}, --answer-tokens {answer}: expected numbers >= 1")
        layers, later = outcomes[-1], answer - (not first_token)
        lowest = least_depth(answer, outcomes, first_token)
        if not lowest - 1e-9 <= mean_depth <= 1:
            raise ValueError(
                f"--mean-depth {mean_depth}: expected {lowest:.2f} (every token at the first exit, depth {outcomes[0]} "
                f"of {layers}) to 1"
            )
        mean = max(outcomes[0], (mean_depth * answer - (answer - later)) * layers / later) if later else layers
        return Workload(prompt, answer, outcomes, tilted(outcomes, mean), first_token=first_token)

    def in_groups(self, together: float) -> Workload:
        """The same with so many sequences of one prompt in a micro-batch: all but its last position is run once."""
        shared = (self.prompt - 1) * (1 - 1 / together)
        return Workload(self.prompt, self.answer, self.outcomes, self.shares, shared, self.first_token)

    def at_full_depth(self) -> Workload:
        """The same without exits."""
        shares = [0.0] * (len(self.outcomes) - 1) + [1.0]
        return Workload(self.prompt, self.answer, self.outcomes, shares, self.shared, self.first_token)


def least_depth(answer: int, outcomes: Sequence[int], first_token: bool) -> float:
    """The mean depth, as a share of the layers, of an answer whose tokens all leave at the first exit."""
    later = answer - (not first_token)
    return (outcomes[0] * later + outcomes[-1] * (answer - later)) / outcomes[-1] / answer


def tilted(outcomes: Sequence[int], mean: float) -> tuple[float, ...]:
    """Probabilities proportional to exp(t * depth) with the given mean depth; t by bisection."""
    depths = np.array(outcomes, dtype=np.float64)
    scaled = (depths - depths[0]) / max(1.0, depths[-1] - depths[0])

    def shares(tilt: float) -> np.ndarray:
        weights = np.exp(tilt * scaled - max(tilt, 0.0))
        return weights / weights.sum()

    low, high = -700.0, 700.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle) @ depths < mean else (low, middle)
    return tuple(shares((low + high) / 2).tolist())


@dataclass(frozen=True)
class Packing:
    """A pass over `sequences`. load: of one, with what it shares; micro_batches: of every data rank; width: positions
    of each, all alike; each, filled: sequences and positions of one that holds any, on average."""

    load: Workload
    sequences: float
    micro_batches: int
    width: int
    each: float
    filled: float


def pack_pass(cfg: RunConfig, load: Workload, sequences: float, group: int = 1) -> Packing:
    """A model of the learner's packing, for sequences of the mean length, of which `group` neighbours have one prompt
    and stay together: the fewest micro-batches within parallel.tokens_per_micro_batch, or one per sequence."""
    budget, data = cfg.parallel.tokens_per_micro_batch, cfg.parallel.data
    most, count = math.ceil(sequences / data), 1
    while True:
        # In more micro-batches fewer sequences of a group are together, and its prompt is held more often.
        shared = load.in_groups(min(float(group), max(1.0, sequences / (data * count))))
        needed = min(most, math.ceil(sequences * shared.written / (data * budget) - 1e-9))
        if needed <= count:
            break
        count = needed
    each = sequences / (data * count)
    # Where many sequences share a micro-batch they leave 3% of it empty.
    width = round_up(math.ceil(max(each * shared.written * 1.03, load.prompt + load.answer - 1)), SEQUENCE_MULTIPLE)
    return Packing(shared, sequences, count, width, max(1.0, each), max(1.0, each) * shared.written)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below the value."""
    return -(-value // multiple) * multiple
