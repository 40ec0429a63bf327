"""Which vLLM, and what its early-exit models are called."""

from __future__ import annotations

# Others are refused, for vLLM's insides move.
VERSIONS = ("0.32",)
# The field of a model's configuration in vLLM that makes its exits compact.
COMPACT = "compact_exits"


def architecture(family: str) -> str:
    """vLLM's name of the early-exit model of a family."""
    return f"EarlyExit{family}ForCausalLM"


def check_version(found: str) -> None:
    """Raises ValueError for a vLLM that was not tested."""
    if not found.startswith(tuple(f"{version}." for version in VERSIONS)):
        raise ValueError(
            f"vLLM {found} is installed, early exits were tested with {' and '.join(VERSIONS)}; run: make vllm"
        )
