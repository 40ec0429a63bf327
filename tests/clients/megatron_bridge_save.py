"""Megatron-Bridge 0.3.1 makes Megatron checkpoints of Hugging Face models: its own conversion and saving, on a CPU.

What it imports and can't have here is replaced in this process alone: Transformer Engine, triton and the others of
STUBS by empty modules once megatron-core has found out that they aren't there, so that its own layers are used; CUDA's
calls by ee_megatron.parallel.cpu_shims. Arguments: model directory, output directory, and so on in pairs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from unittest import mock

import torch
import torch.distributed as dist

STUBS = ("transformer_engine", "triton", "mamba_ssm", "causal_conv1d", "fla", "nvidia_resiliency_ext", "modelopt")
# Installed for another version of transformers, and only asked for by training.
LATE = ("datasets", "wandb")
FUSIONS = (
    "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion",
    "apply_rope_fusion", "cross_entropy_loss_fusion", "persist_layer_norm",
)  # fmt: skip


class Empty(types.ModuleType):
    """A module whose classes are layers without content, and whose functions do nothing."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "jit":
            return lambda function=None, **_: function or (lambda inner: inner)
        return type(name, (torch.nn.Module,), {}) if name[0].isupper() else mock.MagicMock()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        known = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        """There is nothing in it."""


def local_layers(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")


def work(pairs: list[tuple[str, str]]) -> None:
    import megatron.core.distributed
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer
    import megatron.core.transformer.transformer_block  # noqa: F401
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from ee_megatron.parallel import cpu_shims

    sys.meta_path.append(Finder(STUBS))
    for name in ("torch.utils.tensorboard", "torch.utils.tensorboard.writer"):
        sys.modules[name] = Empty(name)
    from megatron.bridge import AutoBridge

    cpu_shims.install()
    torch.cuda.set_device, torch.cuda.get_rng_state = lambda *_: None, torch.get_rng_state
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    for base, out in pairs:
        bridge = AutoBridge.from_hf_pretrained(base, torch_dtype=torch.float32)
        provider = bridge.to_megatron_provider(load_weights=True)
        provider.transformer_layer_spec, provider.use_cpu_initialization = local_layers, True
        provider.params_dtype = provider.pipeline_dtype = torch.float32
        for name in (*FUSIONS, "bf16", "fp16"):
            setattr(provider, name, False)
        provider.finalize()
        model = provider.provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=True, data_parallel_random_init=False, bf16=False, fp16=False,
            mixed_precision_wrapper=None,
        )  # fmt: skip
        if not any(isinstance(finder, Finder) and finder.names == LATE for finder in sys.meta_path):
            sys.meta_path.insert(0, Finder(LATE))
            for name in [name for name in sys.modules if name.split(".")[0] in LATE]:
                del sys.modules[name]
        bridge.save_megatron_model(model, out)


# megatron-core starts helper processes that import this file again.
if __name__ == "__main__":
    work(list(zip(sys.argv[1::2], sys.argv[2::2], strict=True)))
