"""Early exits in vLLM, from outside its tree: models, sampling and weights for it, an engine round it, and what
`vllm serve` needs.

vLLM's pins differ from this package's, so what is here runs in an environment of its own (`make vllm`), where this
package is installed without its dependencies. Nothing of vLLM is imported before it is asked for.
"""

from __future__ import annotations

FAMILIES = ("Llama", "Qwen2", "Qwen3")
# Tested; others are refused, for vLLM's insides move.
VERSIONS = ("0.32",)


def architecture(family: str) -> str:
    """vLLM's name of the early-exit model of a family."""
    return f"EarlyExit{family}ForCausalLM"


def check_version(found: str) -> None:
    """Raises ValueError for a vLLM that was not tested."""
    if not found.startswith(tuple(f"{version}." for version in VERSIONS)):
        raise ValueError(
            f"vLLM {found} is installed, early exits were tested with {' and '.join(VERSIONS)}; run: make vllm"
        )


def register() -> None:
    """vLLM calls this in every process of its own: entry point vllm.general_plugins. Models without exits are left as
    they are."""
    from vllm import ModelRegistry

    from . import config

    config.register()
    for family in FAMILIES:
        ModelRegistry.register_model(architecture(family), f"{__name__}.model:{architecture(family)}")
