"""What a piece of work is on the device: its largest kernels, how many are started, how often the host waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .findings import Findings
from .shapes import Bench

LARGEST = 10
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
# A copy from or to pageable memory ends with the first, as `.item()` does; the last is the measurement's own.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def profiled(findings: Findings, bench: Bench, what: str, action: Callable[[], Any], pieces: int, piece: str) -> None:
    """Run `action`, which is `pieces` of the same (a `piece` each), under torch's profiler."""
    cuda = bench.kind == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        action()
        bench.wait()
    events = recorded.key_averages()
    if cuda:
        kernels = [(e.key, e.count, e.self_device_time_total) for e in events if e.device_type == DeviceType.CUDA]
    else:
        kernels = [(e.key, e.count, e.self_cpu_time_total) for e in events]
    total = sum(time for _, _, time in kernels) or 1.0
    largest = sorted(kernels, key=lambda kernel: -kernel[2])[:LARGEST]
    findings.table(
        f"{what}: largest {'kernels' if cuda else 'operators, on a CPU'}",
        ("name", f"calls per {piece}", f"ms per {piece}", "share"),
        [(name, count / pieces, time / 1e3 / pieces, time / total) for name, count, time in largest],
    )
    findings.check(f"{what}: kernels in the profile", len(largest), at_least=LARGEST)
    counts = {e.key: e.count for e in events}
    read = counts.get("aten::_local_scalar_dense", 0)
    findings.figure(f"{what}: values read back by the host per {piece}", read / pieces)
    if not findings.only_on_cuda(f"{what}: kernels started, host syncs and copies"):
        return
    copies = sum(count for name, count, _ in kernels if name.startswith("Memcpy HtoD"))
    findings.figure(f"{what}: kernels started per {piece}", sum(counts.get(name, 0) for name in LAUNCHES) / pieces)
    findings.figure(f"{what}: host syncs per {piece}", sum(counts.get(name, 0) for name in WAITS) / pieces)
    findings.figure(f"{what}: copies to the device per {piece}", copies / pieces)
    findings.figure(f"{what}: time of kernels per {piece}", total / 1e3 / pieces, "ms")
