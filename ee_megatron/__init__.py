"""Early-exit transformers on megatron-core: calibrated by self-distillation, reinforced to think aloud.

    from ee_megatron import EarlyExitModel

    model = EarlyExitModel.load("runs/demo_cpu")
    model.generate("Question: What is 7 times 8?\\nAnswer:", exits="threshold:0.7")[0].depths

docs/api.md has the rest. Importing the package is quick: torch is imported with the first of its names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference import Answer, Answers, EarlyExitModel, Readout

__version__ = "0.2.0"
__all__ = ["Answer", "Answers", "EarlyExitModel", "Readout"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import inference

    return getattr(inference, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
