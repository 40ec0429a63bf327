"""What can be called on vLLM's workers: exits are attached, weights set in place, tokens fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from ...families.hf_directory import HFDirectory
from ...policy import PolicySpec, stays_float32
from .model import EarlyExit
from .steps import Made, Steps


class ExitWorker:
    """Mixed into vLLM's worker; every name begins with `exits_`, for none may be vLLM's own."""

    model_runner: Any

    def exits_attach(self, path: str) -> None:
        """`path`: the Hugging Face directory that the base's weights are read from."""
        runner = self.model_runner
        model = runner.model
        assert isinstance(model, EarlyExit), type(model)
        self._exits_source, self._exits_model = Path(path), model
        steps = self._exits_steps = runner.sampler = Steps(runner, model)
        run = runner._model_forward

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

        runner._model_forward = forward

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
            source = HFDirectory(self._exits_source)
            held |= {name: model.part(name) for name in source.dims.tensor_shapes()}
            source.close()
        return {name: value.detach().cpu() for name, value in held.items()}

    def _exits_base(self) -> Iterator[tuple[str, Tensor]]:
        source = HFDirectory(self._exits_source)
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
