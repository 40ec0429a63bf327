"""Choice of CPU or GPU: the settings' request, whether this node can meet it, and if not why, in one line.

torch is imported only when a node is examined, and nvidia-smi run only if something is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from .schema import RunConfig

if TYPE_CHECKING:
    import torch

SMI_S = 20.0
"""How long nvidia-smi may take; it hangs where a card does."""


def asks_for_gpus(cfg: RunConfig) -> bool:
    """Whether the settings require GPUs: device=cuda, or device=auto with a cluster's nodes that have some."""
    return cfg.device == "cuda" or (cfg.device == "auto" and cfg.job.gpus_per_node > 0)


def pick_device(cfg: RunConfig, count: int = 1) -> str:
    """Choose "cuda" or "cpu" for `count` processes of this node, which use a GPU each.

    Raises ValueError, one line, if GPUs are required, or used because they are there, and there are fewer than `count`.
    """
    if cfg.device == "cpu":
        return "cpu"
    import torch

    if not (asks_for_gpus(cfg) or torch.cuda.is_available()):
        return "cpu"
    nodes = f" with cluster.gpus_per_node={cfg.job.gpus_per_node}" if cfg.job.gpus_per_node else ""
    require_gpus(count, f"device={cfg.device}{nodes}")
    return "cuda"


def pick_dtype(cfg: RunConfig, device: str) -> torch.dtype:
    """Dtype by model.dtype; auto is bfloat16 on a GPU and on processors that multiply it faster than float32."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    fast = device == "cuda" or multiplies_bfloat16()
    return names.get(cfg.model.dtype, torch.bfloat16 if fast else torch.float32)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AMX, AVX512-BF16), which beat those of float32."""
    import torch

    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def require_gpus(count: int, request: str) -> None:
    """Raises ValueError unless this process can use `count` GPUs. `request`: the settings that need them."""
    import torch

    usable = 0
    if torch.cuda.is_available():
        # torch's own count is the driver's, also where CUDA shows a process a single MIG slice.
        visible = getattr(torch._C, "_cuda_getDeviceCount", torch.cuda.device_count)
        usable = min(torch.cuda.device_count(), visible())
    if usable < count:
        reason = _too_few(count, usable) if usable else f"{_none()}, or set device=cpu"
        raise ValueError(f"{request} on {socket.gethostname()}: {reason}")


def require_compiler(python: str, request: str) -> None:
    """Raises ValueError unless Triton can build here, on its first use, what starts its kernels: by $CC, gcc or clang,
    with the Python.h of this interpreter. `request`: the settings that need it."""
    if shutil.which(python) is None:
        raise ValueError(f"{request} on {socket.gethostname()}: no Python at {python}; run: make vllm")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    where = f"{request} on {socket.gethostname()}: kernels are compiled there on first use, and"
    if compiler is None:
        raise ValueError(
            f"{where} no C compiler was found ($CC, gcc, clang); install gcc, or load the cluster's module of it in "
            "slurm/site.env"
        )
    # As Triton looks for it.
    code = "import sysconfig; print(sysconfig.get_path('include', 'posix_prefix'))"
    try:
        printed = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
        folder = printed.stdout.strip()
        compiled = subprocess.run(
            [compiler, f"-I{folder}", "-E", "-x", "c", "-o", os.devnull, "-"], input="#include <Python.h>\n",
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"{where} C compiler {compiler} with {python}: {error}") from None
    if compiled.returncode:
        said = next((line for line in compiled.stderr.splitlines() if "error" in line), "no reason given")
        raise ValueError(
            f"{where} {compiler} cannot read Python.h in {folder} ({said.strip()}); install Python's headers "
            "(python3-dev), or use a Python that has them (uv, conda, pyenv)"
        )


def gpu_files() -> list[str]:
    """Numbers of this machine's NVIDIA GPUs, from their device files."""
    files = Path("/dev").glob("nvidia[0-9]*") if Path("/dev").is_dir() else []
    return sorted((file.name.removeprefix("nvidia") for file in files), key=int)


def _too_few(count: int, usable: int) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    slices = len(re.findall(r"^\s*MIG ", _smi("-L")[0], re.MULTILINE))
    if slices or (visible or "").startswith("MIG-"):
        listed = f"nvidia-smi -L lists {slices}" if slices else f"CUDA_VISIBLE_DEVICES={visible}"
        return (
            f"{count} processes need a GPU each, but these are MIG slices ({listed}): a process sees one, and NCCL "
            "joins no two of one card; use a single rank, or whole GPUs (an administrator's nvidia-smi -mig 0)"
        )
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    return (
        f"{count} processes need a GPU each, torch finds {usable}{shown}; lower parallel.*, take a node with more, or "
        "let every process see all GPUs of its node (no --gpus-per-task, no --gpu-bind)"
    )


def hides_all(visible: str | None) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES (None: not set) hides all GPUs."""
    return visible is not None and (not visible.strip() or visible.startswith(("-", "NoDevFiles")))


def _none() -> str:
    """The first reason that applies why torch finds no GPU at all, and the remedy."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hides_all(visible):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU; unset it, or name devices in it"
    listed, trouble = _smi("-L")
    cards = len(re.findall(r"^GPU \d+:", listed, re.MULTILINE))
    if not torch.backends.cuda.is_built():
        here = f"nvidia-smi lists {cards} GPU(s)" if cards else f"and there is no GPU ({trouble or 'none listed'})"
        return f"torch {torch.__version__} is built for CPUs only, {here}; install a CUDA build of torch on a GPU node"
    if trouble:
        return f"no NVIDIA driver answers ({trouble}); take a node with GPUs, or have its driver mended"
    summary = _smi()[0]
    driver, speaks = (re.search(rf"{name} Version:\s*([\d.]+)", summary) for name in ("Driver", "CUDA"))
    wheel = torch.version.cuda or ""
    if speaks and wheel and int(speaks[1].split(".")[0]) < int(wheel.split(".")[0]):
        number = driver[1] if driver else "unknown"
        return (
            f"the driver ({number}, for CUDA {speaks[1]}) is too old for torch {torch.__version__}, built for CUDA "
            f"{wheel}: update the driver, or install a torch built for CUDA {speaks[1].split('.')[0]}"
        )
    why = "without a reason"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    shown = "" if visible is None else f" and CUDA_VISIBLE_DEVICES={visible} names none of them"
    return f"nvidia-smi lists {cards} GPU(s){shown}, torch cannot use any ({why}); see what nvidia-smi says"


def _smi(*options: str) -> tuple[str, str]:
    """(nvidia-smi's output, ""), or ("", why it failed)."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *options], capture_output=True, text=True, timeout=SMI_S, check=False, errors="replace"
        )
    except OSError:
        return "", "no nvidia-smi"
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi did not answer within {SMI_S:g} s"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return "", f"nvidia-smi: {said[0]}" if said else f"nvidia-smi ended with exit code {done.returncode}"
    return done.stdout, ""
