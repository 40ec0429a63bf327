"""The device itself: its name, what its memory and its matrix units reach, TF32; collectives in a world of one."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import replace

import torch
import torch.distributed as dist

from ee_megatron.planning.devices import Device, board, this_cpu

from .findings import Findings
from .shapes import Bench

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers")


def measure(findings: Findings, bench: Bench) -> None:
    for name, value in identity(bench).items():
        findings.figure(name, value)
    copied, products = bandwidth(bench), {}
    findings.figure("copy: bytes read and written", copied / 1e12, "TB/s")
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"), ("float32", torch.float32, "highest"), ("TF32", torch.float32, "high"),
    ):  # fmt: skip
        if name == "TF32" and not findings.only_on_cuda("products in TF32 are faster than in float32"):
            continue
        products[name] = tflops(bench, dtype, precision)
        findings.figure(f"products in {name}", products[name], "TFLOP/s")
    device, source = device_of(bench)
    findings.figure("roofline's bandwidth", device.bandwidth / 1e12, "TB/s")
    findings.figure("roofline's products", device.tflops, "TFLOP/s")
    findings.figure("roofline from", source)
    if bench.kind == "cuda":
        why = "a card with matrix units; less means that another process has it, or that it is throttled"
        findings.check(
            "products in TF32 are faster than in float32", products["TF32"] / products["float32"], at_least=1.2, why=why
        )
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        findings.check("free memory", free / total, at_least=0.9, why="the card should be this check's alone")


def identity(bench: Bench) -> dict[str, str]:
    """Card, driver and versions, in words."""
    found = {"device": platform.processor() or platform.machine()}
    if bench.kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
        except (OSError, subprocess.TimeoutExpired):
            driver = "unknown"
        found = {
            "device": properties.name,
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
            "compute capability": f"{properties.major}.{properties.minor}",
            "driver": driver,
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**found, "Python": platform.python_version(), **versions}


def device_of(bench: Bench) -> tuple[Device, str]:
    """The device for plans and rooflines, and where its figures come from: a data sheet, or measured here."""
    if bench.kind == "cpu":
        return replace(this_cpu(), bandwidth=bandwidth(bench)), "a copy and a product, measured here"
    name = torch.cuda.get_device_name(0)
    known = board(name)
    if known is not None:
        return known, f"{known.name}'s data sheet"
    memory = float(torch.cuda.get_device_properties(0).total_memory)
    measured = tflops(bench, torch.bfloat16, "highest"), memory, bandwidth(bench)
    fp32 = tflops(bench, torch.float32, "highest")
    return Device(name, *measured, link=450e9, network=50e9, fp32=fp32), "a copy and products, measured here"


def bandwidth(bench: Bench) -> float:
    """Bytes/s of a copy within the device's memory, read and written; the best of five."""
    source = torch.ones(2**30 if bench.kind == "cuda" else 2**26, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / min(bench.seconds(lambda: target.copy_(source)) for _ in range(5))


def tflops(bench: Bench, dtype: torch.dtype, precision: str) -> float:
    """10^12 FLOP/s of a square product; the best of five."""
    n = 8192 if bench.kind == "cuda" else 512
    a = torch.randn(n, n, device=bench.device).to(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        a @ a
        return 2 * n**3 / min(bench.seconds(lambda: a @ a) for _ in range(5)) / 1e12
    finally:
        torch.set_float32_matmul_precision(before)


def collectives(findings: Findings, bench: Bench) -> None:
    """What a learner asks of its groups, on the device and beside it."""
    from megatron.core import parallel_state

    bench.join()
    findings.only_on_cuda("NCCL")
    findings.figure("backend", str(dist.get_backend_config()))
    named = {
        "data": parallel_state.get_data_parallel_group(),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "model": parallel_state.get_model_parallel_group(),
    }
    for where in dict.fromkeys((bench.device, torch.device("cpu"))):
        for name, group in named.items():
            value = torch.arange(1000.0, device=where)
            parts = [torch.empty_like(value)]
            dist.all_reduce(value, group=group)
            dist.all_gather(parts, value, group=group)
            dist.broadcast(value, 0, group=group)
            wrong = int((parts[0] != torch.arange(1000.0, device=where)).sum() + (value != parts[0]).sum())
            findings.check(f"{name} group on {where.type}: wrong elements", wrong, at_most=0)
    box = [{"step": 1}]
    dist.broadcast_object_list(box, src=0)
    large = torch.ones(2**26 if bench.kind == "cuda" else 2**18, device=bench.device)
    dist.all_reduce(large)
    seconds = min(bench.seconds(lambda: dist.all_reduce(large)) for _ in range(3))
    findings.figure(f"all-reduce of {large.nbytes / 2**20:.0f} MiB", seconds * 1e3, "ms")
