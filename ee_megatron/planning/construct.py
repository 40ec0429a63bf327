"""The run's model, really built for every rank: megatron-core's modules without memory, in one process without peers.

torch's fake process group answers for the other ranks, and fake tensors have shapes but no storage, so a 70B model on
64 ranks takes seconds. What is built is what `Learner` builds.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from .layout import ROW_PARALLEL, Layout, Parameters, rank_parameters


def build_ranks(layout: Layout) -> dict[tuple[int, int], Parameters]:
    """(tensor rank, pipeline rank) -> parameters counted on the modules of that rank; data ranks repeat them.

    Raises RuntimeError inside a process group or if a count differs from the arithmetic, ValueError as megatron-core
    does for what it cannot build.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "a plan is made before ranks start, but a process group exists here; plan in a fresh process"
        )
    found: dict[tuple[int, int], Parameters] = {}
    for pipeline_rank in range(layout.pipeline):
        expected = rank_parameters(layout, pipeline_rank)
        for tensor_rank in range(layout.tensor):
            with _as_rank(layout, tensor_rank, pipeline_rank):
                found[tensor_rank, pipeline_rank] = _count(layout)
            if found[tensor_rank, pipeline_rank] != expected:
                raise RuntimeError(
                    f"rank (tensor {tensor_rank}, pipeline {pipeline_rank}) has {found[tensor_rank, pipeline_rank]}, "
                    f"the plan expected {expected}: the plan's arithmetic is out of date (planning/layout.py)"
                )
    check_sums(layout, found)
    return found


def check_sums(layout: Layout, found: dict[tuple[int, int], Parameters]) -> None:
    """All ranks together hold the family's published tensors, plus what is known to be there more than once: vectors on
    every tensor-parallel rank, the tied copy, vocabulary padding. Raises RuntimeError otherwise."""
    from ..model.config import padded_vocab

    dims, extra_ranks = layout.dims, layout.tensor - 1
    whole = sum(torch.Size(shape).numel() for shape in dims.tensor_shapes().values())
    vectors = [(n, s) for n, s in dims.block_shapes().items() if len(s) == 1]
    repeated = sum(s[0] for n, s in vectors if "_proj" not in n or n.removesuffix(".bias") in ROW_PARALLEL)
    again = extra_ranks * (dims.num_layers * repeated + dims.hidden)
    padding = (padded_vocab(dims.vocab, layout.tensor) - dims.vocab) * dims.hidden * (1 if dims.tied else 2)
    base = sum(parameters.base for parameters in found.values())
    if base != whole + again + padding:
        raise RuntimeError(
            f"all ranks hold {base} base parameters; expected {whole} of the model + {again} vectors on every tensor "
            f"rank + {padding} of padding"
        )


def _count(layout: Layout) -> Parameters:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..checkpoint.mapping import policy_pieces
    from ..model.config import megatron_config
    from ..model.gpt import build_model

    config = megatron_config(
        layout.dims,
        layout.spec,
        layout.sizes,
        tensor=layout.tensor,
        virtual=layout.virtual,
        sequence_parallel=layout.sequence_parallel,
        on_cpu=True,
    )
    with FakeTensorMode():
        model = build_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    policy = [(piece.entry.parameter, piece.parameter.numel()) for piece in policy_pieces(model)]
    gates = sum(count for name, count in policy if name.startswith("gates."))
    adapters = sum(count for name, count in policy if ".lora_" in name)
    copy = sum(
        stage.output_layer.weight.numel()
        for stage in model
        if stage.post_process and not stage.pre_process and layout.dims.tied
    )
    return Parameters(total - gates - adapters - copy, copy, adapters, gates)


@contextlib.contextmanager
def _as_rank(layout: Layout, tensor_rank: int, pipeline_rank: int) -> Iterator[None]:
    """Inside, this process is the given rank (data rank 0) of a world that nobody else has joined."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ..parallel import cpu_shims, groups

    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    with cpu_shims.lean_imports():
        import megatron.core.models.gpt.gpt_model  # noqa: F401
    cpu_shims.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # megatron-core's order of ranks: tensor fastest, then data, pipeline slowest.
    rank = tensor_rank + layout.tensor * layout.data * pipeline_rank
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            create_gloo_process_groups=False,
        )
        assert parallel_state.get_tensor_model_parallel_rank() == tensor_rank
        assert parallel_state.get_pipeline_model_parallel_rank() == pipeline_rank
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        groups.finish()
