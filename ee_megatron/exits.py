"""Pure functions on exits: where they are, and the probability that a token takes each of them.

Shapes: M exits, L layers, [...] any leading axes. Depths count the layers that changed the residual stream; the outcome
"no exit" has depth L and index M. Formulas: docs/method.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .exit_layout import GATE_UNITS as GATE_UNITS
from .exit_layout import ExitLayout as ExitLayout
from .exit_layout import gate_units as gate_units


def gate_log_term(gate_logit: Tensor, exit_depths: Tensor, depth: int, targets: Tensor | None = None) -> Tensor:
    """The share of log q(prescribed exit) that the gate at `depth` owns; the sum over all gates is log q.

    z [...], prescribed depths [...] -> [...]: logsigmoid(z) where the position exits here, logsigmoid(-z) where it goes
    deeper, 0 where it had exited before (this gate was never asked). With target hazards s* [...] instead:
    s* logsigmoid(z) + (1 - s*) logsigmoid(-z), the negative cross-entropy; 0 where s* is negative.
    """
    here, deeper = F.logsigmoid(gate_logit), F.logsigmoid(-gate_logit)
    if targets is None:
        return torch.where(exit_depths == depth, here, torch.where(exit_depths > depth, deeper, 0.0))
    return torch.where(targets >= 0, targets * here + (1 - targets) * deeper, 0.0)


def target_hazards(divergences: Tensor, kl_factor: float) -> Tensor:
    """Calibration targets s* = 2 (1 - sigmoid(c d)) = 1 - tanh(c d / 2) from divergences d >= 0 in nats, same shape."""
    return 1.0 - torch.tanh(0.5 * kl_factor * divergences.clamp(min=0))


def exit_distribution(hazards: Tensor) -> Tensor:
    """Hazards s [..., M] in [0, 1] -> q [..., M+1] by stick-breaking."""
    survive = torch.cumprod(1.0 - hazards, dim=-1)
    one = torch.ones_like(survive[..., :1])
    stop = torch.cat([hazards, one], dim=-1)
    return stop * torch.cat([one, survive], dim=-1)


def sample_exits(hazards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Hazards [..., M] -> outcome indices int64 [...]: the first gate that fires, M if none does."""
    fire = torch.rand(hazards.shape, generator=generator, device=hazards.device) < hazards
    never = torch.ones_like(fire[..., :1])
    return torch.cat([fire, never], dim=-1).int().argmax(dim=-1)
