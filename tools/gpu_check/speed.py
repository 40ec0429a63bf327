"""How fast the device is, and what the project makes of it: bandwidth, products and collectives in a world of one; then
decoding (tokens/s against a roofline and transformers' generate) and a learner's step (seconds against a roofline,
memory against the plan), each with its largest kernels, launches and host syncs."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from ee_megatron.exit_rules import Off, Prescribed
from ee_megatron.planning.devices import Device, board, this_cpu
from ee_megatron.planning.plan import RunPlan
from ee_megatron.planning.roofline import Roofline
from ee_megatron.rollout import Decoder, Request, SamplingParams, Scheduler
from tools.workloads import answer_all, exits_with_mean, interleaved, make_batch, ratio, spread

from .bench import GROWTH, Bench, Findings, ideal, tokenizer

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers")
LARGEST = 10
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
# A copy from or to pageable memory ends with the first, as `.item()` does; the last is the measurement's own.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
PROFILED = 8
"""Tokens of every answer in flight."""


def measure(findings: Findings, bench: Bench) -> None:
    for name, value in identity(bench).items():
        findings.figure(name, value)
    products: dict[str, float] = {}
    findings.figure("copy: bytes read and written", bandwidth(bench) / 1e12, "TB/s")
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


def decode(findings: Findings, bench: Bench) -> None:
    rows, prompt, answer = bench.size.decode
    device, _ = device_of(bench)
    bench.forget_peak()
    plan = bench.plan(bench.settings(False, prompts=rows), device, prompt, answer)
    findings.figure("answers in flight", rows)
    findings.figure("tokens of a prompt and of an answer", f"{prompt} + {answer}")
    decoder, words = bench.decoder(False, torch.bfloat16), tokenizer(bench.dims(False).vocab)
    kinds = {"full depth": 1.0, f"mean depth {bench.size.depth:g}": bench.size.depth}

    def answered(depth: float) -> None:
        answer_all(decoder, words, requests(bench, decoder, depth, answer), rows)

    answered(1.0)
    compare_memory(findings, bench, "rollout actor", plan, plan.actor.kinds)
    answered(bench.size.depth)
    hf = AutoModelForCausalLM.from_pretrained(bench.folder(False), dtype=torch.bfloat16).to(bench.device).eval()
    generate_hf(hf, bench, prompt, 2)
    tokens = rows * (answer - 1)
    cases: dict[str, Callable[[], None]] = {name: partial(answered, depth) for name, depth in kinds.items()}
    cases["transformers"] = partial(generate_hf, hf, bench, prompt, answer)
    seconds = timed(findings, bench, cases, "repeats")
    table = []
    for name, taken in seconds.items():
        speeds = (tokens / s for s in (spread(taken)[0], max(taken), min(taken)))
        table.append((name, *speeds, *ratio(seconds["transformers"], taken)))
    findings.table(
        "Tokens/s, prompts included; a repeat runs all of them in turn",
        ("what", "median", "least", "most", "of transformers' speed", "least", "most"), table,
    )  # fmt: skip
    for name, depth in kinds.items():
        at = plan if depth < 1 else bench.plan(bench.settings(False, prompts=rows), device, prompt, answer, depth)
        bound = Roofline(at.cfg, at.layout, at.load, ideal(device), at.item, rows, answer).phases()["rollouts"].best
        findings.figure(f"{name}: roofline", tokens / bound, "tokens/s")
        findings.figure(f"{name}: what `plan` expects", tokens / at.phases["rollouts"].likely, "tokens/s")
        compare_speed(findings, name, bound, spread(seconds[name])[0])
    # Some tokens of every answer at full depth, prompts read before: the first advance gives each its first token.
    scheduler = Scheduler(decoder, words, rows)
    for request in requests(bench, decoder, 1.0, answer):
        scheduler.add(request)
    scheduler.advance()

    def rounds() -> None:
        made = 0
        while made < PROFILED * rows:
            made += len(scheduler.advance())

    profiled(findings, bench, "decoding", rounds, PROFILED, "round")


def timed(
    findings: Findings, bench: Bench, cases: Mapping[str, Callable[[], Any]], what: str
) -> dict[str, list[float]]:
    """Seconds of every case, all of them in turn in each repeat, after which no more memory may be in use."""
    clocks: dict[str, Callable[[], float]] = {name: partial(bench.seconds, action) for name, action in cases.items()}
    seconds = interleaved(clocks | {"live": bench.live_bytes}, bench.size.repeats)
    live = seconds.pop("live")
    findings.check(f"live memory grows over {what} by", max(live) - live[0], at_most=GROWTH, unit="bytes")
    return seconds


def compare_memory(findings: Findings, bench: Bench, what: str, plan: RunPlan, kinds: Any) -> None:
    """The plan has to hold: what it says fits has to fit, and what it refuses should not have."""
    if findings.only_on_cuda("memory against the plan"):
        planned, peak = plan.device_bytes(kinds), bench.peak_bytes()
        findings.figure(f"{what}: planned", planned / 2**30, "GiB")
        findings.figure(f"{what}: torch's peak", peak / 2**30, "GiB")
        why = "the plan counts tensors, and lets a device keep 3 GiB for what lies between them"
        findings.check(f"{what}: peak of what was planned", peak / planned, at_least=0.7, at_most=1.1, why=why)


def compare_speed(findings: Findings, what: str, bound: float, median: float) -> None:
    """Seconds by the roofline, and measured."""
    why = "nothing is faster than the device: else the clock or the count is wrong"
    findings.check(f"{what}: share of the roofline", bound / median, at_least=0.0, at_most=1.05, why=why)


def requests(bench: Bench, decoder: Decoder, depth: float, answer: int) -> Iterator[Request]:
    """Random prompts whose tokens leave at exits of the given mean depth, as a share of the layers."""
    rows, prompt, _ = bench.size.decode
    outcomes, layers = decoder.layout.outcomes, decoder.dims.num_layers
    ids = torch.randint(decoder.dims.vocab, (rows, prompt), generator=torch.Generator().manual_seed(2)).tolist()
    drawn = {(f"p{i}", 0): [layers, *exits_with_mean(outcomes, depth * layers, answer - 1, i)] for i in range(rows)}
    exits = Prescribed(drawn) if depth < 1 else Off()
    for i, tokens in enumerate(ids):
        yield Request(tokens, SamplingParams(1.0, answer), exits, 0, f"p{i}")


def generate_hf(hf: PreTrainedModel, bench: Bench, prompt: int, answer: int) -> None:
    """The same number of tokens by transformers, sampled from the whole vocabulary."""
    ids = torch.randint(hf.config.vocab_size, (bench.size.decode[0], prompt)).to(bench.device)
    made = hf.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=answer, pad_token_id=0,
    )  # fmt: skip
    assert made.shape[1] == prompt + answer


def step(findings: Findings, bench: Bench) -> None:
    prompts, group, prompt, answer, tokens = bench.size.step
    device, _ = device_of(bench)
    bench.forget_peak()
    bench.join()
    cfg = bench.settings(False, prompts, group, tokens)
    plan = bench.plan(cfg, device, prompt, answer)
    learner = bench.learner(cfg, torch.bfloat16, bench.policy(False))
    batch, weights = make_batch(
        learner.spec, learner.dims.vocab, prompts * group, prompt, answer, plan.load.shares, group
    )  # fmt: skip
    deepest = batch.at_full_depth(learner.spec.num_layers)
    findings.figure("sequences", f"{prompts} prompts x {group} answers, {prompt} + {answer} tokens")
    findings.figure("positions of a micro-batch", tokens)
    for _ in range(2):
        # The second has AdamW's moments from the start.
        learner.step(deepest, weights, adapter_lr=1e-4, gate_lr=1e-4)
    compare_memory(findings, bench, "learner rank", plan, plan.learner[0])

    def update() -> None:
        learner.step(batch, weights, adapter_lr=1e-4, gate_lr=1e-4)

    def scoring() -> None:
        learner.score(batch)
        learner.score(batch, reference=True)

    update()
    seconds = timed(findings, bench, {"update": update, "scoring": scoring}, "steps")
    findings.table("Seconds", ("what", "median", "least", "most"), [(n, *spread(t)) for n, t in seconds.items()])
    bounds = Roofline(cfg, plan.layout, plan.load, ideal(device), plan.item, plan.actor.rows, answer).phases()
    for name, taken in seconds.items():
        median = spread(taken)[0]
        findings.figure(f"{name}: roofline", bounds[name].best, "s")
        findings.figure(f"{name}: what `plan` expects", plan.phases[name].likely, "s")
        findings.figure(f"{name}: reached", plan.flops[name] / median / 1e12, "TFLOP/s")
        compare_speed(findings, name, bounds[name].best, median)
    profiled(findings, bench, "step", update, 1, "step")


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
