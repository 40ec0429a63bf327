"""Devices that plans are made for: what a data sheet says of them, and what share of it is counted on."""

from __future__ import annotations

import os
import timeit
from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """tflops: dense bfloat16 (fp32 on a CPU) peak; efficiency: share of it that large products are assumed to reach;
    memory: bytes; bandwidth: bytes/s of its memory; link and network: bytes/s per direction to a device of the same
    node and of another; launch: seconds that starting one kernel takes, Python's and PyTorch's share included; row: of
    the host's own work per row and token of the embedded engine; streaming: share of the bandwidth that decoding is
    assumed to reach; reserved: bytes for the driver's context,
    collectives' buffers and the allocator's gaps; packed: matrices are kept in a second, packed layout for decoding."""

    name: str
    tflops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    efficiency: float = 0.4
    launch: float = 7.5e-6
    row: float = 34e-6
    streaming: float = 0.8
    reserved: float = 3.0 * GIB
    packed: bool = False

    @property
    def flops(self) -> float:
        """FLOP/s counted on."""
        return self.tflops * 1e12 * self.efficiency


# Data sheets of the SXM boards; network: one 400 (A100: 200) Gbit/s port per device. Memory is what a program sees.
DEVICES: dict[str, Device] = {
    "H100": Device("H100", 989, 79.1 * GIB, 3.35e12, 450e9, 50e9),
    "H200": Device("H200", 989, 139.8 * GIB, 4.8e12, 450e9, 50e9),
    "A100": Device("A100", 312, 79.1 * GIB, 2.04e12, 300e9, 25e9),
}


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
    return replace(
        device,
        tflops=device.tflops if tflops is None else tflops,
        memory=device.memory if memory_gib is None else memory_gib * GIB,
        efficiency=device.efficiency if efficiency is None else efficiency,
    )


def this_cpu() -> Device:
    """One core of this machine: fp32 speed by a product of 1024 x 1024 matrices, memory as the system reports it (all
    ranks share it)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.ones(1024, 1024)
        a @ a
        best = min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
    finally:
        torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Loopback copies and one core's share of memory bandwidth: an order of magnitude, not a measurement.
    tflops = 2 * 1024**3 / best / 1e12
    return Device(
        "cpu", tflops, float(memory), 1e10, 2e9, 1e9, 0.7, launch=6e-6, streaming=1.0, reserved=1.0 * GIB, packed=True
    )
