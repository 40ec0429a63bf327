"""Devices that plans are made for: what a data sheet says of them, and what share of it is counted on."""

from __future__ import annotations

import os
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30

LONG_S = 0.2
"""A run that warming up is little of: products in bfloat16 on a processor without instructions for them."""

GPU_AT_BEST = {
    "efficiency": 0.55, "streaming": 0.8, "moving": 0.8, "reach": 0.9, "launch": 4e-6, "wait": 8e-6, "row": 15e-6,
    "host": 2.0,
}  # fmt: skip
CPU_AT_BEST = {"efficiency": 1.0, "streaming": 1.0, "moving": 0.5, "launch": 3e-6, "row": 15e-6}


@dataclass(frozen=True)
class Device:
    """tflops, fp32: dense peak in bfloat16 and in float32 (no TF32), 10^12 FLOP/s; memory: bytes; bandwidth: bytes/s of
    its memory; link and network: bytes/s per direction to a device of the same node and of another; reserved: bytes for
    the driver's context, collectives' buffers and the allocator's gaps; packed: a CPU, where matrices are kept in a
    second, packed layout for decoding; cores: of a CPU's machine, the rates above are one core's.

    What is assumed, by what is likely; `best` has the optimistic ends of some of it:

    - efficiency: share of the peak that large products reach; streaming: of the bandwidth that reading weights and
      caches reaches; moving: that elementwise operations reach, one by one; reach: of links and network
    - launch: seconds that starting one kernel takes, Python's and PyTorch's share included; wait: that the host and the
      device lose where one waits for the other; row: of the host's own work per row and token of the embedded engine
    - host: speed of a host's core beside the one that its work was measured on"""

    name: str
    tflops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    fp32: float
    efficiency: float = 0.4
    streaming: float = 0.65
    moving: float = 0.5
    reach: float = 0.7
    launch: float = 7.5e-6
    wait: float = 15e-6
    row: float = 34e-6
    host: float = 1.0
    reserved: float = 3.0 * GIB
    packed: bool = False
    cores: int = 1
    best: Mapping[str, float] = field(default_factory=lambda: GPU_AT_BEST)

    def peak(self, item: int) -> float:
        """FLOP/s of products of elements of `item` bytes."""
        return (self.tflops if item == 2 else self.fp32) * 1e12

    def flops(self, item: int) -> float:
        """FLOP/s counted on."""
        return self.peak(item) * self.efficiency

    def of_cores(self, count: float) -> Device:
        """A CPU with so many of its cores, or a share of one, no more than there are."""
        share = min(count, self.cores)
        rates = {name: getattr(self, name) * share for name in ("tflops", "fp32", "bandwidth")}
        return replace(self, **rates) if self.packed else self

    def at_best(self, *names: str) -> Device:
        """With these assumptions at their optimistic end; without names all of them."""
        return replace(self, **{name: self.best[name] for name in names or self.best})  # type: ignore[arg-type]


# Data sheets of the SXM boards; network: one 400 (A100: 200) Gbit/s port per device. Memory is what a program sees.
DEVICES: dict[str, Device] = {
    "H100": Device("H100", 989, 79.1 * GIB, 3.35e12, 450e9, 50e9, 67),
    "H200": Device("H200", 989, 139.8 * GIB, 4.8e12, 450e9, 50e9, 67),
    "A100": Device("A100", 312, 79.1 * GIB, 2.04e12, 300e9, 25e9, 19.5),
}


OTHER_BOARDS = ("PCIe", "NVL", "MIG", "GH200", "H100L")
"""Boards that are sold under the name of one of DEVICES and are slower."""


def board(name: str) -> Device | None:
    """The device that a driver names so, if it is one of `DEVICES`."""
    if any(other in name for other in OTHER_BOARDS):
        return None
    return next((device for key, device in DEVICES.items() if key in name), None)


def find_device(
    name: str, tflops: float | None = None, memory_gib: float | None = None, efficiency: float | None = None
) -> Device:
    """A device of `DEVICES`, or "cpu": this machine, measured. The other arguments replace what the table says.

    Raises ValueError for an unknown name or a number that is not positive.
    """
    by_name = {known.lower(): device for known, device in DEVICES.items()}
    if name.lower() not in (*by_name, "cpu"):
        raise ValueError(f"--on {name}: no such device; expected one of {', '.join(DEVICES)}, cpu")
    for flag, value in (("--tflops", tflops), ("--memory-gib", memory_gib), ("--efficiency", efficiency)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value}: expected a number > 0")
    device = this_cpu() if name.lower() == "cpu" else by_name[name.lower()]
    if tflops is not None:
        # On a CPU of whatever the run computes in.
        device = replace(device, tflops=tflops, fp32=tflops if device.packed else device.fp32)
    if efficiency is not None:
        # Who names it leaves nothing to assume.
        device = replace(device, efficiency=efficiency, best={**device.best, "efficiency": efficiency})
    return device if memory_gib is None else replace(device, memory=memory_gib * GIB)


def this_cpu() -> Device:
    """One core of this machine: the speed of products of 1024 x 1024 matrices in bfloat16 and float32, what it reads by
    a sum of 64 MiB; memory as the system reports it (all ranks share it)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        numbers = torch.ones(2**24)
        read = numbers.nbytes / _least(numbers.sum)
        rates = {dtype: 2 * 1024**3 / _product_s(dtype) / 1e12 for dtype in (torch.bfloat16, torch.float32)}
    finally:
        torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Loopback's copies: an order of magnitude, not a measurement.
    return Device(
        "cpu", rates[torch.bfloat16], float(memory), read, 2e9, 1e9, rates[torch.float32], efficiency=0.8,
        streaming=0.8, moving=0.3, reach=1.0, launch=6e-6, wait=0.0, reserved=1.0 * GIB, packed=True, cores=cores,
        best=CPU_AT_BEST,
    )  # fmt: skip


def _product_s(dtype: torch.dtype) -> float:
    import torch

    a = torch.ones(1024, 1024, dtype=dtype)
    return _least(lambda: a @ a)


def _least(action: Callable[[], object]) -> float:
    """Seconds of this thread's CPU time, which other processes don't lengthen: of the fastest of five runs after one
    that is not counted, or of the first alone where it is long."""
    first = timeit.timeit(action, timer=time.thread_time, number=1)
    return first if first > LONG_S else min(timeit.repeat(action, timer=time.thread_time, number=1, repeat=5))
