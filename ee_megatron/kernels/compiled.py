"""Compiles this package's C with the machine's compiler, once per machine and source, and loads it.

Nothing depends on it: without a compiler, or with EE_MEGATRON_KERNELS=0, PyTorch does the same work.
How much the kernels save is measured in docs/measurements/speed.md.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = [Path(__file__).with_name(name) for name in ("decoding.c", "logits.c", "product.c")]
HEADER = Path(__file__).with_name("kernels.h")
FLAGS = (
    "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
    "-fno-signed-zeros", "-freciprocal-math",
)  # fmt: skip
COMPILE_SECONDS = 60
# Head sizes must be a multiple of this.
LANES = 16
ELEMENTS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}

# Inputs that lie together in product.c.
PAIRS = {torch.float32: 1, torch.bfloat16: 2}

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class Product(ctypes.Structure):
    """The struct `product` of kernels.h."""

    _fields_ = (("panels", _P), ("bias", _P), ("width", _L), ("out", _L))


class Shape(ctypes.Structure):
    """The struct `shape` of kernels.h."""

    _fields_ = (
        ("hidden", _L), ("heads", _L), ("kv_heads", _L), ("head_dim", _L), ("intermediate", _L), ("eps", _F),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """The struct `layer` of kernels.h."""

    _fields_ = (
        ("qkv", Product), ("out", Product), ("gate_up", Product), ("down", Product), ("attention_norm", _P),
        ("mlp_norm", _P), ("q_norm", _P), ("k_norm", _P), ("rotates", _I),
    )  # fmt: skip


SIGNATURES: dict[str, list[Any]] = {
    "add_norm": [_P, _P, _P, _P, _L, _L, _F],
    "silu_mul": [_P, _P, _L, _L],
    "turn_heads": [_P, _P, _P, _P, _P, _P, _F, _I, _L, _L, _L, _L],
    "attend": [_P, _P, _P, _L, _P, _P, _P, _P, _P, _F, _I, _L, _L, _L, _L],
    "attend_causal": [_P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _L, _L],
    "write_kv": [_P, _P, _L, _P, _P, _P, _P, _P, _F, _L, _L, _L, _L],
}
# Where the processor has what product.c needs.
PRODUCT_SIGNATURES: dict[str, list[Any]] = {
    "pack": [_P, _P, _L, _L],
    "multiply": [ctypes.POINTER(Product), _P, _P, _L, _I],
    "run_layers": [ctypes.POINTER(Layer), _P, _L, _P, _P, _P, _L, _P, _P, _L, ctypes.POINTER(Shape)],
    "gate": [ctypes.POINTER(Product), _P, _F, _P, _I, _F, _P, _P, _P, _L],
}
# Of float32 only.
LOGITS_SIGNATURES: dict[str, list[Any]] = {
    "best": [_P, _P, _P, _L, _L],
    "sample": [_P, _P, _P, _P, _L, _L],
    "compare": [_P, _P, _P, _L, _L],
}


class Library:
    """Compiled kernels for one dtype, by name. `columns`: outputs of a panel, 0 where there are no products."""

    add_norm: Callable[..., None]
    silu_mul: Callable[..., None]
    turn_heads: Callable[..., None]
    attend: Callable[..., None]
    attend_causal: Callable[..., None]
    write_kv: Callable[..., None]
    pack: Callable[..., None]
    multiply: Callable[..., None]
    run_layers: Callable[..., None]
    gate: Callable[..., None]
    best: Callable[..., None]
    sample: Callable[..., None]
    compare: Callable[..., None]

    def __init__(self, path: Path, dtype: torch.dtype):
        loaded = ctypes.CDLL(str(path))
        self.columns = int(loaded.columns()) if loaded.supports_products() else 0
        wanted = dict(SIGNATURES)
        if self.columns:
            wanted |= PRODUCT_SIGNATURES
        if dtype == torch.float32:
            wanted |= LOGITS_SIGNATURES
        for name, arguments in wanted.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
            setattr(self, name, function)


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor as a kernel's argument; None is NULL."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def library(dtype: torch.dtype) -> Library | None:
    """The compiled kernels for elements of `dtype`; None if the machine can't compile or run them."""
    if os.environ.get("EE_MEGATRON_KERNELS") == "0" or dtype not in ELEMENTS:
        return None
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        return None
    try:
        return Library(_compiled(compiler, ELEMENTS[dtype]), dtype)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning("decoding kernels not compiled, PyTorch is used instead: %s", detail)
        return None


class Panels:
    """A matrix packed for product.c; with `wide` results are float32 whatever W's dtype is."""

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None, wide: bool):
        self.out, self.width = weight.shape
        self.wide, self.library = wide, library
        weight = weight.contiguous()
        panels = -(-self.out // library.columns)
        self.packed = torch.empty(panels * library.columns * self.width, dtype=weight.dtype)
        library.pack(weight.data_ptr(), self.packed.data_ptr(), self.width, self.out)
        # The kernels add it before they round.
        self._bias = None if bias is None else bias.float().contiguous()
        self.product = Product(self.packed.data_ptr(), pointer(self._bias), self.width, self.out)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dtype = torch.float32 if self.wide else x.dtype
        y = torch.empty(*x.shape[:-1], self.out, dtype=dtype)
        self.library.multiply(self.product, x.data_ptr(), y.data_ptr(), x.shape[:-1].numel(), self.wide)
        return y

    def plain(self) -> Tensor:
        pair = PAIRS[self.packed.dtype]
        panels = self.packed.view(-1, self.width // pair, self.library.columns, pair)
        return panels.transpose(1, 2).reshape(-1, self.width)[: self.out]


def panels(weight: Tensor, bias: Tensor | None = None, *, wide: bool) -> Panels | None:
    """Pack a CPU matrix into panels; None if the processor or its compiler has no products for it."""
    kernels = library(weight.dtype) if weight.device.type == "cpu" else None
    if kernels is None or not kernels.columns or weight.shape[1] % PAIRS[weight.dtype]:
        return None
    return Panels(kernels, weight, bias, wide)


def _compiled(compiler: str, defines: tuple[str, ...]) -> Path:
    identity = hashlib.sha256(b"".join(path.read_bytes() for path in (HEADER, *SOURCES)))
    # -march=native: a home directory may be shared between machines with different processors.
    for part in (compiler, *FLAGS, *defines, platform.machine(), _processor(), torch.__version__):
        identity.update(part.encode() + b"\n")
    directory = _cache_directory()
    target = directory / f"kernels-{identity.hexdigest()[:20]}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            linked, objects = Path(scratch, "kernels.so"), []
            for source in SOURCES:
                objects.append(str(Path(scratch, source.stem + ".o")))
                _run([compiler, *FLAGS, *defines, "-c", str(source), "-o", objects[-1]])
            # Linked apart from the flags above, and to the OpenMP that PyTorch runs: a second would spin against it.
            bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
            openmp = str(bundled[0]) if bundled else "-fopenmp"
            _run([compiler, "-shared", *objects, openmp, "-lm", "-o", str(linked)])
            os.replace(linked, target)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)


def _cache_directory() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        directory = root / "ee_megatron"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    # A library is code: use only a directory that no other user can have made.
    return Path(tempfile.mkdtemp(prefix="ee_megatron-"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
