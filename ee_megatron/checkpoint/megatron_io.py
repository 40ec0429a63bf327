"""Megatron checkpoints (torch_dist): the base model's tensors in megatron-core's distributed format.

    <directory>/weights/        what megatron-core's dist_checkpointing reads; any tensor or pipeline layout can load it
    <directory>/policy.*        adapters and gates by their layout-free names (policy.py)
    <directory>/config.json     the Hugging Face config; tokenizer files and manifest.json beside it

`save_weights` and `load_weights` run on all ranks of a run together; `MegatronDirectory` reads the tensors back under
their Hugging Face names, in one process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..families import ModelDims, dims_from_config
from ..model.config import megatron_config
from ..model.gpt import EarlyExitGPT, build_stage
from .manifest import read_manifest, tensor_sha256
from .mapping import Entry, entries

WEIGHTS = "weights"
KIND = "megatron"
DEADLINE = timedelta(minutes=10)


@contextmanager
def single_process() -> Iterator[None]:
    """A world of one rank for the length of the block, unless the process is in a world already.

    Nothing is listened on: the store is in memory. Raises ValueError inside a world of several ranks, where one process
    cannot hold the whole model.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(f"conversion runs in one process, but {dist.get_world_size()} ranks were started; start one")
    joined, split = not dist.is_initialized(), not parallel_state.model_parallel_is_initialized()
    if joined:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=DEADLINE)
    try:
        if split:
            parallel_state.initialize_model_parallel()
        yield
    finally:
        if split and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if joined:
            dist.destroy_process_group()


@contextmanager
def _cuda_optional() -> Iterator[None]:
    """Without a GPU megatron-core's reader and writer have nothing to wait for and exchange their flags on the CPU."""
    originals = torch.cuda.synchronize, torch.cuda.current_device
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.synchronize, torch.cuda.current_device = originals


def _sharded(model: EarlyExitGPT) -> dict[str, Any]:
    # Layers are stored one by one, not stacked, so that stages of unequal length can load them.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(metadata={"dp_cp_group": group, "non_homogeneous_layers": True})
    return {name: tensor for name, tensor in state.items() if not name.endswith("._extra_state")}


def save_weights(model: EarlyExitGPT, directory: Path) -> None:
    """Write the base tensors of all ranks into an empty directory that exists. Collective.

    The calling program needs a `__main__` guard: megatron-core starts helper processes that import it again.
    """
    with _cuda_optional():
        dist_checkpointing.save(_sharded(model), str(directory))


@torch.no_grad()
def load_weights(model: EarlyExitGPT, directory: Path) -> None:
    """Fill this rank's base parameters from `directory`, whatever layout wrote it. Collective.

    Rows of the vocabulary that only pad it to a multiple of the tensor-parallel degree become zero.
    Raises FileNotFoundError if there is no checkpoint.
    """
    if not (directory / "metadata.json").is_file():
        raise FileNotFoundError(f"{directory}: no metadata.json there; expected a torch_dist checkpoint")
    for name, parameter in model.named_parameters():
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            parameter.zero_()
    with _cuda_optional():
        loaded = dist_checkpointing.load(_sharded(model), str(directory))
    model.load_state_dict(loaded, strict=False)


def build_whole(dims: ModelDims, dtype: torch.dtype) -> EarlyExitGPT:
    """The base model on the CPU in one piece, its weights unset. Needs `single_process`."""
    return build_stage(megatron_config(dims, None, (dims.num_layers,), dtype=dtype))


class MegatronDirectory:
    """A Megatron checkpoint under Hugging Face names: the interface of `HFDirectory`, so that exports read either.

    Raises FileNotFoundError or ValueError: not such a directory, an unsupported architecture, tensors that are missing,
    left over, or not those of the manifest. Opening it reads all weights (they are in megatron-core's own format).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        if self.manifest.get("kind") != KIND:
            raise ValueError(f"{self.path}: manifest.json says {self.manifest.get('kind')!r}, expected {KIND!r}")
        self.config: dict = json.loads((self.path / "config.json").read_text())
        self.dims = dims_from_config(self.config)
        self._stored = self._read()
        self._entry = {name: entry for entry in whole_entries(self.dims) for name in entry.names}

    def names(self) -> list[str]:
        return list(self.dims.tensor_shapes())

    def tensor(self, name: str) -> Tensor:
        """The tensor as Hugging Face stores it, on the CPU."""
        entry = self._entry[name]
        return entry.join([self._stored[entry.parameter]])[entry.names.index(name)].contiguous()

    def _read(self) -> dict[str, Tensor]:
        folder = self.path / WEIGHTS
        if not (folder / "metadata.json").is_file():
            raise FileNotFoundError(f"{folder}: no metadata.json there; the checkpoint is incomplete, convert it again")
        try:
            with single_process(), _cuda_optional():
                stored = dist_checkpointing.load_plain_tensors(str(folder))
        # The format's reader raises whatever its parts raise (pickle, zip, end of file), or collects that in an
        # exception of its own that is no `Exception`; the last line of its text is the cause.
        except (Exception, CheckpointException) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ValueError(
                f"{folder}: cannot be read ({reason}); the checkpoint is damaged, convert it again"
            ) from None
        expected = {entry.parameter for entry in whole_entries(self.dims)}
        missing, extra = sorted(expected - stored.keys()), sorted(stored.keys() - expected)
        if missing or extra:
            raise ValueError(
                f"{folder}: missing {missing[:3]}, unexpected {extra[:3]}; config.json and weights disagree"
            )
        for name, line in self.manifest["tensors"].items():
            if name in stored and tensor_sha256(stored[name]) != line["sha256"]:
                raise ValueError(
                    f"{folder}: {name} is not what manifest.json says; the checkpoint is damaged, convert it again"
                )
        return stored


def whole_entries(dims: ModelDims) -> list[Entry]:
    """The name map of a model that is one stage."""
    return list(entries(dims, 0, dims.num_layers, embedding=True, head=True))
