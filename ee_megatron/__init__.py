"""Early-exit transformers on megatron-core: calibrated by self-distillation, reinforced to think aloud."""

__version__ = "0.1.0"
