"""What one RL step has to read and write: lengths, and how deep its tokens run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """Sequences of `prompt` + `answer` tokens. Of the answer's tokens the first comes from the prompt, which never
    exits; the others take outcome i (exit i, or none) with probability shares[i]. `outcomes` are depths. `shared`: of a
    prompt's positions, how many another sequence of the strip has run already, on average."""

    prompt: int
    answer: int
    outcomes: tuple[int, ...]
    shares: tuple[float, ...]
    shared: float = 0.0

    @staticmethod
    def of(prompt: int, answer: int, outcomes: Sequence[int], mean_depth: float) -> Workload:
        """The flattest distribution over the outcomes (the one of most entropy) with this mean depth, as a share of the
        layers, over all tokens of an answer. Raises ValueError if no distribution has it."""
        if prompt < 1 or answer < 1:
            raise ValueError(f"--prompt-tokens {prompt}, --answer-tokens {answer}: expected numbers >= 1")
        layers = outcomes[-1]
        lowest = (outcomes[0] * (answer - 1) + layers) / layers / answer
        if not lowest - 1e-9 <= mean_depth <= 1:
            raise ValueError(
                f"--mean-depth {mean_depth}: expected {lowest:.2f} (every token at the first exit, depth {outcomes[0]} "
                f"of {layers}) to 1"
            )
        later = max(outcomes[0], (mean_depth * answer - 1) * layers / (answer - 1)) if answer > 1 else layers
        return Workload(prompt, answer, tuple(outcomes), tilted(outcomes, later))

    @property
    def positions(self) -> float:
        """Positions that one sequence adds to a strip."""
        return self.prompt - self.shared + self.answer

    def in_groups(self, together: float) -> Workload:
        """The same where so many sequences of one prompt lie in a strip: all but its last position is run once."""
        return replace(self, shared=(self.prompt - 1) * (1 - 1 / together))

    def at_full_depth(self) -> Workload:
        """The same without exits."""
        return replace(self, shares=(*[0.0] * (len(self.outcomes) - 1), 1.0))

    @property
    def written(self) -> float:
        """Positions of one sequence that a layer makes keys and values at; its last token is read by nobody."""
        return self.prompt - self.shared + self.answer - 1

    def reaching(self, depth: int) -> float:
        """Share of the answer's later tokens that run layer `depth` (1-based)."""
        return sum(share for outcome, share in zip(self.outcomes, self.shares, strict=True) if outcome >= depth)

    def active(self, layer: int, full: bool = False) -> float:
        """Positions of one sequence that layer `layer` (1-based) changes."""
        return self.prompt - self.shared + (self.answer - 1) * (1.0 if full else self.reaching(layer))

    def seen(self, layer: int, full: bool = False) -> float:
        """Keys that the queries of one sequence see in layer `layer` (1-based), summed over its active positions."""
        # All but the last position of a prompt are shared, or none.
        prompt = (self.prompt + 1 - self.shared) * self.prompt / 2
        later = (self.answer - 1) * (self.prompt + self.answer / 2)
        return prompt + later * (1.0 if full else self.reaching(layer))

    def asked(self, depth: int) -> float:
        """Positions of one sequence at which the gate at `depth` is asked: those that got that far."""
        return (self.answer - 1) * self.reaching(depth)


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
