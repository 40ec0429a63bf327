"""Nested records travel to a device in one transfer per dtype. The device here is "meta", which keeps shapes only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ee_megatron.tensors import to_device


@dataclass(frozen=True)
class Inner:
    index: Tensor
    host: np.ndarray
    found: dict = field(default_factory=dict, init=False, compare=False)


@dataclass(frozen=True)
class Outer:
    weights: Tensor | None
    parts: tuple[Inner, ...]
    count: int


def make() -> Outer:
    return Outer(None, (Inner(torch.arange(6).view(2, 3), np.arange(2)), Inner(torch.zeros(0), np.arange(3))), 7)


def test_on_the_cpu_nothing_moves() -> None:
    record = make()
    assert to_device(record, torch.device("cpu")) is record


def test_tensors_move_and_the_rest_stays() -> None:
    record = make()
    moved = to_device([record, record], torch.device("meta"))
    for each in moved:
        assert each.weights is None and each.count == 7
        assert [part.index.device.type for part in each.parts] == ["meta", "meta"]
        assert [part.index.shape for part in each.parts] == [(2, 3), (0,)]
        assert [part.index.dtype for part in each.parts] == [torch.int64, torch.float32]
        assert each.parts[0].host is record.parts[0].host
    storages = {part.index.untyped_storage()._cdata for each in moved for part in each.parts}
    assert len(storages) == 2
