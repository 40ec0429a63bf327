"""One gloo rank of Megatron-LM core_v0.16.1 on a CPU: its own arguments, model, `load_checkpoint`, `save_checkpoint`.

What it needs of a GPU and hasn't here is replaced in this process alone:
- triton, which it imports for kernels that no model here calls: an empty module;
- CUDA's calls and `device="cuda"`: ee_megatron.parallel.cpu_shims, and the same for `torch` as checkpointing sees it;
- the state of CUDA's random numbers, which it saves: that of the CPU's;
- the compute capability that its arguments ask for.
Everything else is its own code, read from the source tree on PYTHONPATH.

Environment: RANK, WORLD_SIZE; argument: a JSON file with tokens and each model's flags. Results lie beside it.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import json
import logging
import os
import sys
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
def logits(model, tokens):
    later = torch.ones(1, 1, tokens.size(1), tokens.size(1)).triu(1).bool()
    out = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), later)
    shares = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, out.contiguous())
    return torch.cat(shares, -1)


def work(job: dict, out: Path) -> None:
    stub_triton()
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{out / 'meeting'}", rank=int(os.environ["RANK"]), world_size=world
    )
    initialise(Degrees(tensor=world))
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine
    from megatron.training import arguments, checkpointing, global_vars
    from gpt_builders import gpt_builder  # isort: skip

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
        model = gpt_builder(args, pre_process=True, post_process=True).eval()
        said, warned = io.StringIO(), []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record, found=warned: found.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        with contextlib.redirect_stdout(said):
            iteration, _ = checkpointing.load_checkpoint([model], None, None, strict=True)
        logging.getLogger().removeHandler(handler)
        found = {"said": said.getvalue(), "warned": warned, "iteration": iteration}
        found["logits"] = logits(model, torch.tensor(job["tokens"]))
        checkpointing.save_checkpoint(10, [model], None, None, 0)
        if dist.get_rank() == 0:
            torch.save(found, out / f"{name}.pt")


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent)
