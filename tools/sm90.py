"""FlexAttention of the learner, compiled for an H100 on a machine without a GPU: `make sm90`.

Lowers attention's forward and backward pass from tensors without data, as inductor does on a GPU, and has Triton
compile each kernel for compute capability 9.0. Prints registers, spilled bytes and shared memory of every kernel; ends
with an error where one doesn't compile. Needs torch built for CUDA, with Triton. Values take a GPU (`make gpu-check`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.flex_attention import flex_attention_backward
from torch._inductor import compile_fx, config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# By its file: the environment has torch and nothing else.
FILE = Path(__file__).parents[1] / "ee_megatron" / "model" / "attention.py"
spec = importlib.util.spec_from_file_location("attention", FILE)
assert spec is not None and spec.loader is not None
attention = sys.modules["attention"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(attention)

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip
TARGET = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
# Query heads, key-value heads, dimension of a head.
SHAPES = {"1.5B": (12, 2, 128), "7B": (28, 4, 128), "70B on 8 GPUs": (8, 1, 128), "135M": (9, 3, 64)}
QUERIES, KEYS, BLOCK = 1500, 2000, 128


class Driver:
    """Stands for the driver of a GPU that isn't there."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """PyTorch and Triton take this machine for one with an H100."""
    triton.runtime.driver.set_active(Driver())
    config.use_static_cuda_launcher = False
    answers = {
        "get_device_properties": H100, "get_device_capability": (9, 0), "current_device": 0, "device_count": 1,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "_lazy_init": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "synchronize": None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda *_: TARGET))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", lambda: True))
        stack.enter_context(mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", lambda: None))
        yield


def lowered(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    # Only here: tracing would ask the driver for streams.
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        compile_fx.compile_fx_inner(graph, list(inputs))
    return graph.forward


def sources(heads: int, groups: int, dim: int, dtype: torch.dtype) -> dict[str, str]:
    """Source -> name of every kernel that inductor writes for both passes."""
    found: dict[str, str] = {}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(AsyncCompile, "triton", lambda _self, name, source, *_, **__: found.setdefault(source, name)),
    ):
        made = {"dtype": dtype, "device": "cuda"}
        q, k, v = (torch.empty(1, h, n, dim, **made) for h, n in ((heads, QUERIES), (groups, KEYS), (groups, KEYS)))
        queries, slots = (torch.empty(n, m, dtype=torch.int64, device="cuda") for n, m in ((2, QUERIES), (3, KEYS)))
        rows, columns = -(-QUERIES // BLOCK), -(-KEYS // BLOCK)
        counts, places = {"dtype": torch.int32, "device": "cuda"}, []
        for n, m in ((rows, columns), (columns, rows)):
            places += 2 * [torch.empty(1, 1, n, **counts), torch.empty(1, 1, n, m, **counts)]
        mask = BlockMask((QUERIES, KEYS), *places, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=attention.sees(queries, slots))
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=lowered, inference_compiler=lowered)
        attend = torch.compile(flex_attention, backend=backend, dynamic=True, fullgraph=True)
        # PyTorch's own way to the backward pass asks the driver for a context, so that is called by itself.
        with torch.no_grad():
            attend(q, k, v, block_mask=mask, enable_gqa=heads != groups)
        sums = torch.empty(1, heads, QUERIES, dtype=torch.float32, device="cuda")
        graph = backward(dim, places, (q, k, v, q, sums, q), queries, slots)
        lowered(graph, [q, k, v, q, sums, q, *places, *queries, *slots])
    return found


def backward(dim: int, places: list[Tensor], given: tuple, queries: Tensor, slots: Tensor) -> torch.fx.GraphModule:
    at, score = (torch.empty((), dtype=dtype, device="cuda") for dtype in (torch.int32, torch.float32))
    same = make_fx(lambda score, *_: score)(score, at, at, at, at)
    joint = make_fx(lambda *x: [x[-1], None, None, None, None])(score, at, at, at, at, score)
    take = torch.ops.aten.index.Tensor
    seen = make_fx(
        lambda _b, _h, q, key, place, row, at, first, last: attention.sees(
            (Taken(place, take), Taken(row, take)), (Taken(at, take), Taken(first, take), Taken(last, take))
        )(_b, _h, q, key)
    )(at, at, at, at, *queries, *slots)
    options = dict.fromkeys(("PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "OUTPUT_MAX"), False)
    options |= {"WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True}

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, slope: Tensor, *rest: Tensor) -> Any:
        mask = (QUERIES, KEYS, *rest[:8], None, None, None, None, BLOCK, BLOCK, seen)
        return flex_attention_backward(
            q, k, v, out, sums, slope, None, same, joint, mask, dim**-0.5, options, (), tuple(rest[8:])
        )[:3]

    return make_fx(run)(*given, *places, *queries, *slots)


class Taken:
    """A tensor whose subscript may be a tensor without data."""

    def __init__(self, tensor: Tensor, take: Any) -> None:
        self.tensor, self.take = tensor, take

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.take(self.tensor, [index])


def resources(name: str, source: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and shared memory of the largest configuration of a kernel."""
    kernel, found = getattr(PyCodeCache.load(source), name), []
    for made in (kernel._precompile_config(each).kernel for each in kernel.configs):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            out = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        registers, spilled = (int(re.findall(rf"{what}:(\d+)", out.stdout)[0]) for what in ("REG", "STACK"))
        found.append((registers, spilled, made.metadata.shared))
    return max(found)


def main() -> None:
    print(f"torch {torch.__version__}, Triton {triton.__version__}, compute capability 9.0")
    print(f"{'heads':<14} {'dtype':<9} {'kernel':<36} registers  spilled B  shared B")
    with pretended():
        for name, shape in SHAPES.items():
            for dtype in (torch.bfloat16, torch.float32):
                made = {(kernel, *resources(kernel, source)) for source, kernel in sources(*shape, dtype).items()}
                assert len({kernel for kernel, *_ in made if "tem_fused" in kernel}) == 2, made
                for kernel, registers, spilled, shared in sorted(made):
                    print(f"{name:<14} {str(dtype)[6:]:<9} {kernel:<36} {registers:>9} {spilled:>10} {shared:>9}")


if __name__ == "__main__":
    main()
