"""Early exits in vLLM, from outside its tree: models, sampling and weights for it, an engine round it, and what
`vllm serve` needs.

vLLM's pins differ from this package's, so what is here runs in an environment of its own (`make vllm`), where this
package is installed without its dependencies. vLLM is imported only inside functions.
"""

from __future__ import annotations

from ...families import VLLM

# Others are refused, for vLLM's insides move.
VERSIONS = ("0.32",)
# Where `rollout.cache_gib` doesn't say how much memory an engine takes: of a GPU's, for all that it holds; of a CPU's,
# for its cache.
GPU_SHARE, CPU_CACHE_GIB = 0.9, 1
# Positions that a step reads at most.
CHUNK = 8192


def architecture(family: str) -> str:
    """vLLM's name of the early-exit model of a family."""
    return f"EarlyExit{family}ForCausalLM"


def is_supported(version: str) -> bool:
    return version.startswith(tuple(f"{tested}." for tested in VERSIONS))


def check_version(version: str) -> None:
    """Raises ValueError for a vLLM that was not tested."""
    if not is_supported(version):
        raise ValueError(
            f"vLLM {version} is installed, early exits were tested with {' and '.join(VERSIONS)}; run: make vllm"
        )


def register() -> None:
    """vLLM calls this in every process of its own: entry point vllm.general_plugins. Models without exits are left as
    they are."""
    from vllm import ModelRegistry

    from . import config

    config.register()
    for family in VLLM.values():
        ModelRegistry.register_model(architecture(family), f"{__name__}.model:{architecture(family)}")
