"""What one RL step has to read and write: lengths, and how deep its tokens run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np


class Load(Protocol):
    """What a pass has to run, of one sequence or of all together."""

    @property
    def answer(self) -> float:
        """Tokens that are predicted."""

    @property
    def written(self) -> float:
        """Positions that a layer makes keys and values at; the last token of a sequence is read by nobody."""

    def active(self, layer: int, full: bool = False) -> float:
        """Positions that layer `layer` (1-based) changes; full: without exits."""

    def seen(self, layer: int, full: bool = False) -> float:
        """Keys that these positions' queries see, summed."""

    def asked(self, depth: int) -> float:
        """Positions at which the gate at `depth` is asked: those that got that far."""


@dataclass(frozen=True)
class Workload:
    """Sequences of `prompt` + `answer` tokens. Of the answer's tokens the first comes from the prompt, which never
    exits; the others take outcome i (exit i, or none) with probability shares[i], and with `first_token` it, too.
    `outcomes` are depths. `shared`: of a prompt's positions, how many another sequence of the strip has run already, on
    average."""

    prompt: int
    answer: int
    outcomes: tuple[int, ...]
    shares: tuple[float, ...]
    shared: float = 0.0
    first_token: bool = False

    @staticmethod
    def of(prompt: int, answer: int, outcomes: Sequence[int], mean_depth: float, first_token: bool = False) -> Workload:
        """The flattest distribution over the outcomes (the one of most entropy) with this mean depth, as a share of the
        layers, over all tokens of an answer. Raises ValueError if no distribution has it."""
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
        return Workload(prompt, answer, tuple(outcomes), tilted(outcomes, mean), first_token=first_token)

    @property
    def later(self) -> float:
        """Tokens of an answer that may exit."""
        return self.answer - (not self.first_token)

    @property
    def positions(self) -> float:
        """Positions that one sequence adds to a strip: its last token is no input."""
        return self.written

    def in_groups(self, together: float) -> Workload:
        """The same where so many sequences of one prompt lie in a strip: all but its last position is run once."""
        return replace(self, shared=(self.prompt - 1) * (1 - 1 / together))

    def at_full_depth(self) -> Workload:
        """The same without exits."""
        return replace(self, shares=(*[0.0] * (len(self.outcomes) - 1), 1.0))

    @property
    def written(self) -> float:
        return self.prompt - self.shared + self.answer - 1

    def reaching(self, depth: int) -> float:
        """Share of the answer's tokens that may exit that run layer `depth` (1-based)."""
        return sum(share for outcome, share in zip(self.outcomes, self.shares, strict=True) if outcome >= depth)

    def active(self, layer: int, full: bool = False) -> float:
        prompt = self.prompt - self.shared - self.first_token
        return prompt + self.later * (1.0 if full else self.reaching(layer))

    def seen(self, layer: int, full: bool = False) -> float:
        # All but the last position of a prompt are shared, or none.
        prompt = (self.prompt + 1 - self.shared) * self.prompt / 2 - self.first_token * self.prompt
        later = (self.answer - 1) * (self.prompt + self.answer / 2) + self.first_token * self.prompt
        return prompt + later * (1.0 if full else self.reaching(layer))

    def asked(self, depth: int) -> float:
        return self.later * self.reaching(depth)


@dataclass(frozen=True)
class Counted:
    """Given sequences, all together. prompts, prompts_seen: positions of prompts that are run and can't exit, and the
    keys that they see; later, later_seen [L + 1]: by depth, answer tokens that might exit and took it, and their keys.
    """

    answer: float
    prompts: float
    prompts_seen: float
    later: np.ndarray
    later_seen: np.ndarray

    @staticmethod
    def of(
        prompts: Sequence[int], depths: Sequence[np.ndarray], num_layers: int, group: int = 1, shared: float = 1.0,
        first_token: bool = False,
    ) -> Counted:  # fmt: skip
        """Tokens of each prompt, and depths [T] of each answer's tokens; unless `first_token` the first comes with the
        prompt. `group` neighbours have one prompt, of which this share is run only once."""
        later, seen = np.zeros(num_layers + 1), np.zeros(num_layers + 1)
        for prompt, taken in zip(prompts, depths, strict=True):
            free = taken[not first_token :]
            later += np.bincount(free, minlength=num_layers + 1)
            keys = prompt + np.arange(len(taken) - len(free), len(taken), dtype=np.float64)
            seen += np.bincount(free, weights=keys, minlength=num_layers + 1)
        own = np.asarray(prompts, dtype=np.float64)
        # Of the others of a group only the prompt's last position is run.
        run, last = np.where(np.arange(len(own)) % group == 0, 1.0, 1.0 - shared), not first_token
        positions, keys = last + (own - 1) * run, last * own + own * (own - 1) / 2 * run
        return Counted(
            float(sum(map(len, depths))), float(positions.sum()), float(keys.sum()), later, seen
        )  # fmt: skip

    @property
    def written(self) -> float:
        return self.prompts + float(self.later.sum())

    def active(self, layer: int, full: bool = False) -> float:
        return self.prompts + float(self.later[0 if full else layer :].sum())

    def seen(self, layer: int, full: bool = False) -> float:
        return self.prompts_seen + float(self.later_seen[0 if full else layer :].sum())

    def asked(self, depth: int) -> float:
        return float(self.later[depth:].sum())

    def without_prompts(self) -> Counted:
        """Where these have been read before."""
        return replace(self, prompts=0.0, prompts_seen=0.0)


def least_depth(answer: int, outcomes: Sequence[int], first_token: bool) -> float:
    """The mean depth, as a share of the layers, of an answer whose tokens all leave at the first exit."""
    later = answer - (not first_token)
    return (outcomes[0] * later + outcomes[-1] * (answer - later)) / outcomes[-1] / answer


def tilted(outcomes: Sequence[int], mean: float) -> tuple[float, ...]:
    """Probabilities proportional to exp(t * depth) with the given mean depth; t by bisection."""
    span = outcomes[-1] - outcomes[0]
    if span == 0:
        return (1.0,)

    def shares(tilt: float) -> list[float]:
        weights = [math.exp(tilt * (o - (outcomes[-1] if tilt > 0 else outcomes[0])) / span) for o in outcomes]
        return [w / sum(weights) for w in weights]

    low, high = -700.0, 700.0
    for _ in range(200):
        middle = (low + high) / 2
        if sum(s * o for s, o in zip(shares(middle), outcomes, strict=True)) < mean:
            low = middle
        else:
            high = middle
    return tuple(shares((low + high) / 2))
