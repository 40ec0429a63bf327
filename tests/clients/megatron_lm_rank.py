"""Megatron-LM core_v0.16.1 on gloo ranks of a CPU: its own arguments, `get_model`, `load_checkpoint`, pipeline schedule
and `save_checkpoint`.

What it needs of a GPU and hasn't here is replaced in these processes alone:
- triton, which it imports for kernels that no model here calls: an empty module;
- CUDA's calls and `device="cuda"`: ee_megatron.parallel.cpu_shims, and the same for `torch` as checkpointing sees it;
- the state of CUDA's random numbers, which it saves: that of the CPU's;
- the compute capability that its arguments ask for.
Everything else is its own code, read from the source tree on PYTHONPATH.

Argument: a JSON file with tokens, degrees and each model's flags. Results lie beside it. The ranks are forked when
everything is imported, since that takes as long as the rest.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import json
import logging
import multiprocessing
import os
import sys
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from ee_megatron.parallel import cpu_shims
from ee_megatron.parallel.groups import Degrees, initialise


def stub_triton() -> None:
    for name in ("triton", "triton.language"):
        module = mock.MagicMock()
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    # A decorator leaves what it decorates.
    sys.modules["triton"].jit = lambda function=None, **_: function or (lambda inner: inner)


class TorchOnCPU:
    """`torch`, its factories on the CPU when they are asked for a GPU."""

    def __getattr__(self, name: str):
        found = getattr(torch, name)
        return cpu_shims._factory_on_cpu(found) if name in ("tensor", "zeros", "ones") else found


@torch.no_grad()
def logits(model: list, tokens: torch.Tensor) -> torch.Tensor | None:
    """[B, S, padded vocabulary] on the last stage, else None: one forward pass of the pipeline, a sequence a time."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    later = torch.ones(1, 1, tokens.size(1), tokens.size(1)).triu(1).bool()
    positions = torch.arange(tokens.size(1))[None]

    def step(batches, stage):
        return stage(next(batches)[None], positions, later), lambda out, non_loss_data: out

    found = get_forward_backward_func()(
        forward_step_func=step, data_iterator=iter(tokens), model=model, num_microbatches=len(tokens),
        seq_length=tokens.size(1), micro_batch_size=1, forward_only=True, collect_non_loss_data=True,
    )  # fmt: skip
    if not parallel_state.is_pipeline_last_stage():
        return None
    mine = torch.cat(found).contiguous()
    shares = [torch.empty_like(mine) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(shares, mine, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shares, -1)


def rank(job: dict, out: Path, number: int) -> None:
    """What one rank does."""
    degrees = Degrees(**job["degrees"])
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(degrees.world)}
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=number, world_size=degrees.world)
    initialise(degrees)
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine
    from megatron.training import arguments, checkpointing, global_vars, training
    from gpt_builders import gpt_builder  # isort: skip
    from model_provider import model_provider  # isort: skip

    checkpointing.torch = TorchOnCPU()
    torch.cuda.get_rng_state = torch.get_rng_state
    arguments.get_device_arch_version = lambda: 9
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    init_num_microbatches_calculator(0, None, 1, 1, 1)
    for name, flags in job["models"].items():
        with mock.patch.object(sys, "argv", ["pretrain_gpt.py", *flags]):
            args = arguments.parse_args()
        if args.use_checkpoint_args:
            args, _ = checkpointing.load_args_from_checkpoint(args)
        arguments.validate_args(args)
        global_vars.set_args(args)
        torch.manual_seed(0)
        model = training.get_model(partial(model_provider, gpt_builder), wrap_with_ddp=False)
        for stage in model:
            stage.eval()
        said, warned = io.StringIO(), []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record, found=warned: found.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        with contextlib.redirect_stdout(said):
            iteration, _ = checkpointing.load_checkpoint(model, None, None, strict=True)
        logging.getLogger().removeHandler(handler)
        found = {"said": said.getvalue(), "warned": warned, "iteration": iteration}
        found["layers"] = sum(len(stage.decoder.layers) for stage in model)
        found["logits"] = logits(model, torch.tensor(job["tokens"]))
        checkpointing.save_checkpoint(10, model, None, None, 0)
        torch.save(found, out / f"{name}-{number}.pt")


def work(job: dict, out: Path) -> None:
    """Fork the ranks and wait for them; one that fails ends all."""
    stub_triton()
    cpu_shims.install()
    import model_provider  # noqa: F401

    world = Degrees(**job["degrees"]).world
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank, args=(job, out, number)) for number in range(world)]
    for process in ranks:
        process.start()
    waiting = list(ranks)
    while waiting and not any(process.exitcode for process in ranks):
        wait([process.sentinel for process in waiting])
        waiting = [process for process in waiting if process.exitcode is None]
    for process in waiting:
        process.kill()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent)
