"""The ranks of a stage together: rank 0 generates, writes files and shows progress; the others receive its results."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ..parallel.heartbeat import Heartbeat
from .preemption import Parting, Stopped, listener

T = TypeVar("T")


class Distributed:
    """This process among the ranks of its stage. `heartbeat` is None for a single rank."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.leads = self.rank == 0
        self.heartbeat: Heartbeat | None = None

    @property
    def meet(self) -> Callable[[], None] | None:
        """Waits for rank 0 as long as it gives signs of life; None for a single rank."""
        return self.heartbeat.meet if self.heartbeat else None

    def broadcast_from_rank0(self, make: Callable[..., T] | None, *arguments: Any) -> T:
        """What rank 0 makes of the arguments, on every rank; the others' are ignored. Plain records only. The others
        wait as long as rank 0 lives: deadlines of its work are `make`'s own."""
        box: list[Any] = [make(*arguments) if self.leads and make else None]
        if self.heartbeat is not None:
            self.heartbeat.meet()
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def unless_stopped(self, make: Callable[..., T] | None, *arguments: Any) -> T | None:
        """`broadcast_from_rank0` for work that may be abandoned: None on every rank if rank 0 is told to stop
        meanwhile."""

        def attempt() -> T | None:
            assert make is not None
            try:
                with listener.at_once():
                    return make(*arguments)
            except Stopped:
                return None

        return self.broadcast_from_rank0(attempt if make else None)

    def told_to_stop(self) -> bool:
        """Whether any rank has been; all ranks call it."""
        told = torch.tensor([listener.asked])
        if self.heartbeat is not None:
            self.heartbeat.meet()
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())

    def stop(self, steps: int) -> NoReturn:
        """End the stage on every rank after `steps` steps. Raises Stopped."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        store = dist.distributed_c10d._get_default_store() if world > 1 else None
        leave = Parting(self.rank, world, store).leave
        raise Stopped(f"stopped after {steps} step(s), as told; the same command goes on", leave)
