"""Devices for plans: data sheets, or this machine's CPU measured, and which share of their peak is reached."""

from __future__ import annotations

import os
import time
import timeit
from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Reach:
    """What an estimate assumes. compute: share of the peak that large products reach; memory: of the bandwidth; links:
    of links and network; launch: seconds to start one kernel, Python's and PyTorch's share included; host: speed of
    the host's core, 1 for the one that its work was measured on."""

    compute: float
    memory: float
    links: float
    launch: float
    host: float


@dataclass(frozen=True)
class Device:
    """A data sheet. tflops, fp32: dense peak in bfloat16 and in float32 (no TF32), 10^12 FLOP/s; memory: bytes;
    bandwidth: bytes/s of its memory; link, network: bytes/s per direction to a device of the same node, of another;
    reserved: bytes for the driver's context, collectives' buffers and the allocator's gaps; on_cpu: cores of a machine,
    whose rates are one core's; likely, best: the two ends of an estimate."""

    name: str
    tflops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    fp32: float
    reserved: float = 3.0 * GIB
    on_cpu: bool = False
    cores: int = 1
    likely: Reach = Reach(0.4, 0.65, 0.7, 7.5e-6, 1.0)
    best: Reach = Reach(0.55, 0.8, 0.9, 4e-6, 2.0)

    def peak(self, item: int) -> float:
        """FLOP/s of products of elements of `item` bytes."""
        return (self.tflops if item == 2 else self.fp32) * 1e12

    def of_cores(self, count: float) -> Device:
        """A CPU with so many of its cores, or a share of one, no more than there are; a GPU as it is."""
        share = min(count, self.cores) if self.on_cpu else 1.0
        return replace(self, tflops=self.tflops * share, fp32=self.fp32 * share, bandwidth=self.bandwidth * share)


# Data sheets of the SXM boards; network: one 400 (A100: 200) Gbit/s port per device. Memory is what a program sees.
DEVICES: dict[str, Device] = {
    "H100": Device("H100", 989, 79.1 * GIB, 3.35e12, 450e9, 50e9, 67),
    "H200": Device("H200", 989, 139.8 * GIB, 4.8e12, 450e9, 50e9, 67),
    "A100": Device("A100", 312, 79.1 * GIB, 2.04e12, 300e9, 25e9, 19.5),
}
OTHER_BOARDS = ("PCIe", "NVL", "MIG", "GH200", "H100L")
"""Boards that are sold under the name of one of DEVICES and are slower."""


def board(name: str) -> Device | None:
    """The device of `DEVICES` with this driver's name, or None."""
    other = any(part in name for part in OTHER_BOARDS)
    return None if other else next((device for key, device in DEVICES.items() if key in name), None)


def find_device(name: str, tflops: float | None = None, memory_gib: float | None = None) -> Device:
    """A device of `DEVICES`, or "cpu": this machine, measured; tflops and memory_gib replace what the table says.
    Raises ValueError for an unknown name or a number that is not positive."""
    by_name = {known.lower(): device for known, device in DEVICES.items()}
    if name.lower() not in (*by_name, "cpu"):
        raise ValueError(f"--on {name}: no such device; expected one of {', '.join(DEVICES)}, cpu")
    for flag, value in (("--tflops", tflops), ("--memory-gib", memory_gib)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value}: expected a number > 0")
    device = by_name.get(name.lower()) or this_cpu()
    if tflops is not None:
        # On a CPU for either dtype.
        device = replace(device, tflops=tflops, fp32=tflops if device.on_cpu else device.fp32)
    return device if memory_gib is None else replace(device, memory=memory_gib * GIB)


def this_cpu() -> Device:
    """One core of this machine: the speed of products of 1024 x 1024 matrices in bfloat16 and float32, and of reading
    64 MiB; the memory of the machine. Measured in this thread's CPU time, which other processes don't lengthen."""
    import torch

    def fastest(statement: str, **names: Any) -> float:
        return min(timeit.repeat(statement, timer=time.thread_time, number=1, repeat=4, globals=names))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        numbers, square = torch.ones(2**24), torch.ones(1024, 1024)
        read = numbers.nbytes / fastest("x.sum()", x=numbers)
        narrow, wide = (2e-12 * 1024**3 / fastest("x @ x", x=x) for x in (square.bfloat16(), square))
    finally:
        torch.set_num_threads(threads)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Links are loopback's copies: an order of magnitude, not a measurement.
    return Device(
        "cpu", narrow, memory, read, 2e9, 1e9, wide, 1.0 * GIB, on_cpu=True, cores=cores,
        likely=Reach(0.55, 0.8, 1.0, 6e-6, 1.0), best=Reach(1.0, 1.0, 1.0, 3e-6, 2.0),
    )  # fmt: skip
