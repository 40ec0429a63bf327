"""vLLM's worker with exits: they are attached, weights set in place, tokens fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from ...families.hf_directory import HFDirectory
from ...policy import PolicySpec, stays_float32
from .model import EarlyExit
from .steps import ExitSampler, Made

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class ExitWorker(Worker):
    """What can be called from outside begins with `exits_`, for none may be vLLM's own."""

    model_runner: Any

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        runner = self.model_runner
        model = runner.model
        assert isinstance(model, EarlyExit), type(model)
        self._exits_model = model
        steps = self._exits_steps = runner.sampler = ExitSampler(runner, model)
        if model.compact is not None:
            model.compact.builder = lambda: runner.attn_groups[0][0].get_metadata_builder()
        run, sample = runner._model_forward, runner.sample_tokens

        def forward(*args: Any, **kwargs: Any) -> Any:
            model.gated_layers.watched = steps.prepare()
            if model.gated_layers.watched:
                # Rules that see readouts are no part of a graph.
                context = get_forward_context()
                context.skip_compiled, context.cudagraph_runtime_mode = True, CUDAGraphMode.NONE
            try:
                return run(*args, **kwargs)
            finally:
                model.gated_layers.watched = ()

        def sample_tokens(grammar: Any) -> Any:
            output = sample(grammar)
            if steps.told:
                output.aux_output_connector_output, steps.told = steps.told, {}
            return output

        runner._model_forward, runner.sample_tokens = forward, sample_tokens

    def exits_take(self) -> list[Made]:
        """The tokens that have been made since the last call."""
        made, self._exits_steps.made = self._exits_steps.made, []
        return made

    @torch.inference_mode()
    def exits_load(self, spec: PolicySpec | None, tensors: dict[str, Tensor] | None) -> None:
        """Make a policy's tensors the model's, in place: adapters merged into the base, or the whole base, and gates.
        None: the base without gates."""
        weights = self._exits_base() if tensors is None or spec is None else self._exits_merged(spec, tensors)
        self._exits_model.replace_weights(weights)

    def exits_held(self, whole: bool) -> dict[str, Tensor]:
        """Gates, and with `whole` every tensor of the base, by their Hugging Face names; the devices' own tensors."""
        model = self._exits_model
        dtype = self.model_runner.model_config.dtype
        gates = {f"gates.{name}": value for name, value in model.gated_layers.gates.named_parameters()}
        held: dict[str, Tensor] = {n: v if stays_float32(n) else v.to(dtype) for n, v in gates.items()}
        if whole:
            source = HFDirectory(Path(self.model_runner.model_config.model))
            held |= {name: model.part(name) for name in source.dims.tensor_shapes()}
            source.close()
        return {name: value.detach().cpu() for name, value in held.items()}

    def _exits_base(self) -> Iterator[tuple[str, Tensor]]:
        source = HFDirectory(Path(self.model_runner.model_config.model))
        for name in source.dims.tensor_shapes():
            yield name, source.tensor(name)
        source.close()

    def _exits_merged(self, spec: PolicySpec, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """W + scale · B A in float32, as the embedded engine merges."""
        if spec.full:
            yield from tensors.items()
            return
        for name, base in self._exits_base():
            prefix = name.removesuffix(".weight")
            down, up = (tensors.get(f"{prefix}.{factor}.weight") for factor in ("lora_A", "lora_B"))
            if down is not None and up is not None:
                yield name, torch.addmm(base.float(), up.float(), down.float(), alpha=spec.scale)
            else:
                yield name, base
        yield from ((name, tensor) for name, tensor in tensors.items() if name.startswith("gates."))
