"""What the layers must know about each position, beside the hidden states.

It travels in one tensor, megatron-core's `context` argument: `control` fp32 [s, b, C]. Each pipeline stage takes it
from its own data; it never crosses a stage boundary.

    channel 0      prescribed exit depth (layers that may change the position; L = no exit, 0 = padding)
    channel 1      1 where gates are asked, else 0 (prompt, padding)
    channel 2      weight of the position in the exit loss
    channel 3      weight of the gates' entropy at the position, a bonus
    channel 4      the sequence whose key and value the position takes: its own, or an earlier one that begins with the
                   same prompt (the position is then run there only, and its depth here is 0); -1 for padding
    channel 5 + i  optional soft target of gate i, -1 for none; without them the prescribed depth is the target
"""

from __future__ import annotations

import torch
from torch import Tensor

EXIT_DEPTH, ASKED, WEIGHT, ENTROPY, SOURCE, TARGETS = 0, 1, 2, 3, 4, 5


def make_control(
    exit_depths: Tensor,
    asked: Tensor | None = None,
    weight: Tensor | None = None,
    entropy: Tensor | None = None,
    sources: Tensor | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """The control tensor [S, B, C] from one tensor [B, S] per channel (targets: [B, S, M]).

    Left out: no gate is asked, weights are 0, every position takes its own key and value.
    """
    rows = torch.arange(len(exit_depths), device=exit_depths.device).unsqueeze(1)
    sources = rows.expand_as(exit_depths) if sources is None else sources
    # What another sequence runs has no depth of its own here.
    exit_depths = torch.where(sources == rows, exit_depths, 0)
    nothing = torch.zeros_like(exit_depths)
    channels = (exit_depths, *(nothing if x is None else x for x in (asked, weight, entropy)), sources)
    control = torch.stack([x.float() for x in channels], dim=-1)
    if targets is not None:
        control = torch.cat([control, targets.float()], dim=-1)
    return control.transpose(0, 1).contiguous()
