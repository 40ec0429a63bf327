"""Early exits in vLLM, from outside its tree: models, sampling and weights for it, an engine round it, and what
`vllm serve` needs.

vLLM's pins differ from this package's, so what is here runs in an environment of its own (`make vllm`), where this
package is installed without its dependencies. Nothing of vLLM is imported before it is asked for.
"""

from __future__ import annotations

from ...families import VLLM
from .supported_versions import architecture


def register() -> None:
    """vLLM calls this in every process of its own: entry point vllm.general_plugins. Models without exits are left as
    they are."""
    from vllm import ModelRegistry

    from . import config

    config.register()
    for family in VLLM.values():
        ModelRegistry.register_model(architecture(family), f"{__name__}.model:{architecture(family)}")
