"""Early exits in vLLM, from outside its tree: models, sampling and weights for it, and an engine round it.

vLLM's pins differ from this package's, so what is here runs in an environment of its own (`make vllm`), where this
package is installed without its dependencies. Nothing of vLLM is imported before it is asked for.
"""

from __future__ import annotations

FAMILIES = ("Llama", "Qwen2", "Qwen3")
# Tested; others are refused, for vLLM's insides move.
VERSIONS = ("0.32",)
# Of a GPU's memory, what an engine takes for all that it holds, and of a CPU's what its cache has, GiB.
GPU_SHARE = 0.9
CPU_CACHE_GIB = 1


def architecture(family: str) -> str:
    """vLLM's name of the early-exit model of a family."""
    return f"EarlyExit{family}ForCausalLM"


def register() -> None:
    """vLLM calls this in every process of its own: entry point vllm.general_plugins."""
    from vllm import ModelRegistry

    for family in FAMILIES:
        ModelRegistry.register_model(architecture(family), f"{__name__}.model:{architecture(family)}")
