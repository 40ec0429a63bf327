"""CPU replacements for the CUDA calls that megatron-core 0.16 makes unconditionally. Inert with CUDA.

Kept in one place, so that an upgrade of megatron-core has one file to check.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

_installed = False


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Context for imports of megatron-core and DeepSpeed on a CPU: a quarter of a rank's start goes into Inductor,
    which they bring in by passing fused kernels to `torch.compile` (none is called on a CPU), and into wandb."""
    if torch.cuda.is_available():
        yield
        return
    compiled, absent = torch.compile, "wandb" not in sys.modules
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
    if absent:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled
        if absent:
            del sys.modules["wandb"]


def install() -> None:
    """Patch megatron-core for CPU ranks on gloo. Does nothing if CUDA is available or on a second call."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    # Tied embeddings on the last stage are moved with `.cuda()`; only parameters' data are, so identity is right.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    _patch_schedule_factories()
    _patch_rng_tracker()


def _patch_schedule_factories() -> None:
    from megatron.core.pipeline_parallel import schedules

    class _Torch:
        """`torch` as the schedules see it: factory calls with device="cuda" land on the CPU."""

        def __getattr__(self, name: str):
            value = getattr(torch, name)
            return _factory_on_cpu(value) if name in ("zeros", "tensor") else value

    schedules.torch = _Torch()


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, device=None, **options: factory(*args, device="cpu" if device == "cuda" else device, **options)


def _patch_rng_tracker() -> None:
    """The tracker forks named random streams; on a CPU they are states of torch's default generator."""
    from megatron.core.tensor_parallel import random as tp_random

    class CPURNGStatesTracker(tp_random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            saved = torch.get_rng_state()
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(saved)

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            saved = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(saved)

    tp_random.CudaRNGStatesTracker = CPURNGStatesTracker
    tp_random._CUDA_RNG_STATE_TRACKER = CPURNGStatesTracker()
    tp_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    tp_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tp_random._set_cuda_rng_state = lambda *_, **__: None
