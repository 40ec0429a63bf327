"""Cached decoding in lock-step, the plain way: what the scheduler does for rows that it regroups."""

from __future__ import annotations

import torch
from torch import Tensor

from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.engine.decoder import Decoder


@torch.inference_mode()
def step(decoder: Decoder, cache: KVCache, tokens: Tensor, positions: Tensor, depths: Tensor) -> Tensor:
    """Read one token int64 [R] per cache slot 0..R-1 at its position [R], left at its exit depth [R] -> stream [R, D].

    Keys and values of the skipped layers are in the cache when this returns.
    """
    outcomes, places = decoder.layout.outcomes, positions.tolist()
    cache.hold(range(len(places)), [1 + place for place in places])
    hidden = decoder.weights.embedding[tokens]
    for segment, depth in enumerate(outcomes):
        rows = (depths >= depth).nonzero().squeeze(-1)
        if len(rows):
            at = decoder.rows(cache, rows.tolist(), positions[rows].tolist())
            hidden[rows] = decoder.run_segment(segment, hidden[rows], cache, at)
    order = depths.argsort(stable=True)
    outcome = [outcomes.index(depth) for depth in depths[order].tolist()]
    at = decoder.rows(cache, order.tolist(), positions[order].tolist())
    decoder.write_skipped(hidden[order], outcome, cache, at)
    return hidden
