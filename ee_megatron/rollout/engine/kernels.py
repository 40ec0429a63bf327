"""Compiles kernels.c with the machine's C compiler, once per machine and source, and loads it.

Nothing depends on it: without a compiler, or with EE_MEGATRON_KERNELS=0, the PyTorch forms in ops.py do the same work.
How much the kernels save is measured in docs/measurements/2026-11-26-decoding-kernels.md.
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
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = (
    "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
    "-fno-signed-zeros", "-freciprocal-math",
)  # fmt: skip
COMPILE_SECONDS = 60
# Head sizes must be a multiple of this.
LANES = 16
ELEMENTS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}

_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "add_norm": [_P, _P, _P, _P, _L, _L, _F],
    "silu_mul": [_P, _P, _L, _L],
    "attend": [_P, _P, _P, _L, _P, _P, _P, _P, _P, _F, _L, _L, _L, _L],
    "write_kv": [_P, _P, _L, _P, _P, _P, _P, _F, _L, _L, _L, _L],
    "sample": [_P, _P, _P, _P, _L, _L],
}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for elements of `dtype`; None where they can't be had."""
    if os.environ.get("EE_MEGATRON_KERNELS") == "0" or dtype not in ELEMENTS:
        return None
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler, ELEMENTS[dtype])))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning("decoding kernels not compiled, PyTorch is used instead: %s", detail)
        return None
    for name, arguments in SIGNATURES.items():
        if name != "sample" or dtype == torch.float32:
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
    return loaded


def _compiled(compiler: str, defines: tuple[str, ...]) -> Path:
    identity = hashlib.sha256(SOURCE.read_bytes())
    # -march=native: a home directory may be shared between machines with different processors.
    for part in (compiler, *FLAGS, *defines, platform.machine(), _processor(), torch.__version__):
        identity.update(part.encode() + b"\n")
    directory = _cache_directory()
    target = directory / f"kernels-{identity.hexdigest()[:20]}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            unlinked, linked = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
            _run([compiler, *FLAGS, *defines, "-c", str(SOURCE), "-o", str(unlinked)])
            # Linked apart from the flags above, and to the OpenMP that PyTorch runs: a second would spin against it.
            found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
            openmp = str(found[0]) if found else "-fopenmp"
            _run([compiler, "-shared", str(unlinked), openmp, "-lm", "-o", str(linked)])
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
    # A library is code: only a directory that nobody else could have made will do.
    return Path(tempfile.mkdtemp(prefix="ee_megatron-"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
