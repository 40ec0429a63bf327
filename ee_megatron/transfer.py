"""Records of tensors from the host to a device, in as few transfers as there are dtypes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


def to_device(record: Record, device: torch.device) -> Record:
    """The record with every tensor of the CPU in it on `device`: tensors, dataclasses, tuples and lists of them.

    One transfer per dtype, which on CUDA comes from pinned memory and does not make the host wait. On the CPU the
    record itself.
    """
    if device.type == "cpu":
        return record
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in _tensors(record):
        groups[tensor.dtype].append(tensor)
    moved: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype, tensors in groups.items():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
        parts = flat.split([tensor.numel() for tensor in tensors])
        moved[dtype] = iter([part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])
    return _rebuilt(record, moved)


def _parts(record: Any) -> dict[Any, Any]:
    """What a record is made of, by field or place; empty for anything else."""
    if is_dataclass(record):
        return {field.name: getattr(record, field.name) for field in fields(record) if field.init}
    return dict(enumerate(record)) if isinstance(record, tuple | list) else {}


def _tensors(record: Any) -> Iterator[Tensor]:
    if isinstance(record, Tensor):
        yield record
    for part in _parts(record).values():
        yield from _tensors(part)


def _rebuilt(record: Any, moved: dict[torch.dtype, Iterator[Tensor]]) -> Any:
    if isinstance(record, Tensor):
        return next(moved[record.dtype])
    parts = {key: _rebuilt(part, moved) for key, part in _parts(record).items()}
    if is_dataclass(record):
        return replace(record, **parts)  # type: ignore[type-var]
    return type(record)(parts.values()) if isinstance(record, tuple | list) else record
