"""A model's exit depths, the width of its gates, and the probability that a token takes each exit.

Shapes: M exits, L layers, [...] any leading axes. Depths count the layers that changed the residual stream; the outcome
"no exit" has depth L and index M. Formulas: docs/method.md. Importing this imports no torch: settings are checked
against a model without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What a fraction of the hidden size has to be a multiple of: the alignment that matrix units want of bfloat16 rows.
GATE_UNITS = 8


@dataclass(frozen=True)
class ExitLayout:
    """Exit depths of a model. They belong to the model and are stored with it; the pipeline layout belongs to the run.

    first_token: a prompt's last position, which predicts the first generated token, may exit as the later ones do.

    Raises ValueError unless 1 <= e_1 < ... < e_M <= L-1.
    """

    num_layers: int
    depths: tuple[int, ...]
    first_token: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(int(d) for d in self.depths))
        bad = [d for d in self.depths if not 1 <= d <= self.num_layers - 1]
        if bad:
            raise ValueError(
                f"exits.depths: {bad} outside 1..{self.num_layers - 1} (the model has {self.num_layers} layers); "
                f"set depths between 1 and {self.num_layers - 1}"
            )
        if list(self.depths) != sorted(set(self.depths)):
            raise ValueError(
                f"exits.depths: {list(self.depths)} must increase strictly; set {sorted(set(self.depths))}"
            )

    @property
    def outcomes(self) -> tuple[int, ...]:
        """The M exit depths and L, in order: outcome i has depth outcomes[i]."""
        return (*self.depths, self.num_layers)

    @staticmethod
    def default(num_layers: int, pipeline: int = 1) -> ExitLayout:
        """Default exits: every fifth layer and the boundaries of an even pipeline split."""
        edges = [round(num_layers * s / pipeline) for s in range(1, pipeline)]
        return ExitLayout(num_layers, tuple(sorted({*range(5, num_layers, 5), *edges} - {0, num_layers})))

    def stage_sizes(self, stages: int) -> tuple[int, ...]:
        """Layers per stage; the inner boundaries are the exits nearest to an even split. Raises ValueError, naming the
        nearest fix, if there are too few exits."""
        if len(self.depths) < stages - 1:
            raise ValueError(
                f"parallel.pipeline={stages}: stages need {stages - 1} boundaries at exits, but "
                f"exits.depths has only {len(self.depths)}: {list(self.depths)}; add depths near "
                f"{[round(self.num_layers * s / stages) for s in range(1, stages)]}"
            )
        edges = _nearest_increasing(self.depths, [self.num_layers * s / stages for s in range(1, stages)])
        bounds = [0, *edges, self.num_layers]
        return tuple(b - a for a, b in itertools.pairwise(bounds))


def _nearest_increasing(choices: Sequence[int], targets: Sequence[float]) -> list[int]:
    """Strictly increasing choices, one per target, with the least total distance (dynamic programme)."""
    best: dict[int, tuple[float, list[int]]] = {-1: (0.0, [])}
    for target in targets:
        step: dict[int, tuple[float, list[int]]] = {}
        for last, (cost, path) in best.items():
            for i in range(last + 1, len(choices)):
                option = (cost + abs(choices[i] - target), [*path, choices[i]])
                if i not in step or option[0] < step[i][0]:
                    step[i] = option
        best = step
    return min(best.values(), key=lambda option: option[0])[1] if targets else []


def gate_units(gate_width: float, hidden: int) -> int:
    """Hidden units of gates that are `gate_width` times as wide as the model, whose hidden size is `hidden`.

    Raises ValueError for a fraction that doesn't come to a multiple of GATE_UNITS.
    """
    units = round(gate_width * hidden)
    if units > 0 and (units % GATE_UNITS == 0 or float(gate_width).is_integer()):
        return units
    nearest = max(1, round(gate_width * hidden / GATE_UNITS)) * GATE_UNITS
    raise ValueError(
        f"exits.gate_width={gate_width:g}: {units} units for a model of hidden size {hidden}; expected a multiple of "
        f"{GATE_UNITS}: {nearest / hidden:.6g} gives {nearest}"
    )


def gate_log_term(gate_logit: Tensor, exit_depths: Tensor, depth: int, targets: Tensor | None = None) -> Tensor:
    """Share of the gate at `depth` in log q(prescribed exit); the sum over all gates is log q.

    z [...], prescribed depths [...] -> [...]: logsigmoid(z) where the position exits here, logsigmoid(-z) where it goes
    deeper, 0 where it had exited before (this gate was not reached). With target hazards s* [...] instead:
    s* logsigmoid(z) + (1 - s*) logsigmoid(-z), the negative cross-entropy; 0 where s* is negative.
    """
    import torch
    from torch.nn.functional import logsigmoid

    here, deeper = logsigmoid(gate_logit), logsigmoid(-gate_logit)
    if targets is None:
        return torch.where(exit_depths == depth, here, torch.where(exit_depths > depth, deeper, 0.0))
    return torch.where(targets >= 0, targets * here + (1 - targets) * deeper, 0.0)


def target_hazards(divergences: Tensor, kl_factor: float) -> Tensor:
    """Calibration targets s* = 2 (1 - sigmoid(c d)) = 1 - tanh(c d / 2) from divergences d >= 0 in nats, same shape."""
    return 1.0 - (0.5 * kl_factor * divergences.clamp(min=0)).tanh()


def exit_distribution(hazards: Tensor) -> Tensor:
    """Exit distribution q [..., M+1] of hazards s [..., M] in [0, 1], by stick-breaking."""
    import torch

    survive = torch.cumprod(1.0 - hazards, dim=-1)
    one = torch.ones_like(survive[..., :1])
    return torch.cat([hazards, one], dim=-1) * torch.cat([one, survive], dim=-1)


def sample_exits(hazards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample outcome indices int64 [...] from hazards [..., M]: the first gate that fires, M if none does."""
    import torch

    fire = torch.rand(hazards.shape, generator=generator, device=hazards.device) < hazards
    never = torch.ones_like(fire[..., :1])
    return torch.cat([fire, never], dim=-1).int().argmax(dim=-1)
