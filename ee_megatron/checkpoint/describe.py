"""Describe a model directory and compare two models, by tensors and by logits under random exit patterns: `convert
inspect`, `convert verify`, and opening a checkpoint of any kind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ..exits import ExitLayout
from ..model.config import megatron_config
from ..model.gpt import build_stage
from ..model.packed import PackedSequences, make_control
from ..policy import PolicySpec, open_policy
from ..tensors import FileTensors, ModelSource, entries_of, prefetch, row_blocks, tensor_bytes
from .hf_export import merged
from .mapping import whole_entries
from .megatron_read import MegatronDirectory, refuse_foreign
from .policy_files import folded, no_policy, policy_beside, policy_on, recorded_base
from .sources import HFSource, all_finite, gates_of, is_megatron
from .store import MANIFEST, read_manifest
from .workspace import refuse_unfinished

# Of the logits that are compared: the largest difference, relative; how many sequences, and how long.
TOLERANCE = 1e-4
SEQUENCES, LENGTH = 3, 24
MEMINFO = Path("/proc/meminfo")
DEADLINE = timedelta(minutes=10)


class TensorRow(NamedTuple):
    """Table row of a tensor: its name, its name in the files, shape, dtype, sha256 ("" if it wasn't read), whether all
    values read are finite."""

    name: str
    stored: str
    shape: list[int]
    dtype: str
    sha256: str
    finite: bool


@dataclass
class Checkpoint:
    """An opened model of any kind: kind ("hf", "embed" or "megatron"), base tensors, adapters and gates."""

    kind: str
    path: Path
    base: ModelSource
    spec: PolicySpec
    tensors: Mapping[str, Tensor]

    def effective(self, name: str) -> Iterator[Tensor]:
        """A weight with its adapter merged, rounded as in an export, in blocks of rows that depend on its shape
        alone."""
        for block in row_blocks(self.base, name):
            yield merged(block, self.spec, self.tensors).to(block.data.dtype)

    def whole(self, name: str) -> Tensor:
        return torch.cat(list(self.effective(name)))

    def gates(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in self.spec.gate_shapes(self.base.dims)}


def open_base(path: str | Path) -> ModelSource:
    """Open the base model of a policy: a Hugging Face directory or a Megatron checkpoint. Raises as these do."""
    return MegatronDirectory(path) if is_megatron(Path(path)) else HFSource(path)


def open_checkpoint(path: Path, hf: str | Path | None = None, base_unchecked: bool = False) -> Checkpoint:
    """Open a Hugging Face model, an early-exit export, a Megatron checkpoint, or a policy or adapter on the model `hf`.

    Raises FileNotFoundError or ValueError, one line: for a policy that belongs to another model, too, unless
    `base_unchecked`.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    if is_megatron(path):
        base = MegatronDirectory(path)
        return Checkpoint("megatron", path, base, *policy_beside(base, base_unchecked))
    if (path / "policy.json").is_file():
        if hf is None:
            raise ValueError(f"{path} holds a policy without its base model; add --hf BASE")
        whole = open_base(hf)
        source, policy = folded(whole, policy_on(whole, path, base_unchecked))
        return Checkpoint("hf", path, source, *policy)
    refuse_foreign(path)
    plain = HFSource(path)
    policy = gates_of(plain) or no_policy(plain.dims.num_layers)
    return Checkpoint("embed" if plain.spec else "hf", path, plain, *policy)


def describe(folder: Path, hashes: bool = True) -> tuple[str, list[TensorRow], dict[str, Any]]:
    """Kind of a directory, its tensors, and facts about it.

    `hashes`: read every tensor, compare with the manifest where there is one, and look for numbers that aren't finite;
    else only headers are read and the hashes are those of the manifest. Raises ValueError if the directory is of no
    kind or is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")
    refuse_unfinished(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {"tensors": {}}
    if (folder / "adapter_config.json").is_file():
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= FileTensors(file)
        facts = {key: manifest[key] for key in ("adapters", "gates", "exit_depths") if key in manifest}
        return "peft adapter", [_row(tensors, name, {}, True) for name in tensors], facts
    if (folder / "policy.json").is_file() and not is_megatron(folder):
        spec, policy = open_policy(folder)
        facts = {"exit_depths": list(spec.exit_depths), "rank": spec.rank, "alpha": spec.alpha}
        facts["base"] = recorded_base(folder) or "not recorded"
        return "policy", [_row(policy, name, {}, hashes) for name in policy], facts
    opened = open_checkpoint(folder)
    recorded = {name: line["sha256"] for name, line in manifest["tensors"].items()}
    rows = [_row(source, name, recorded, hashes) for source in (opened.base, opened.tensors) for name in source]
    for row in rows:
        if row.sha256 != recorded.get(row.name, row.sha256):
            raise ValueError(
                f"{folder}: {row.name} is not what {MANIFEST} says; the directory is damaged, convert it again"
            )
    facts = {key: manifest[key] for key in ("layout", "adapters", "gates") if key in manifest}
    if opened.spec.exit_depths:
        facts["exit_depths"] = list(opened.spec.exit_depths)
    if isinstance(opened.base, MegatronDirectory) and "layout" not in facts:
        facts["layout"] = {"tensor": opened.base.stored_degree()}
    kinds = {"megatron": "megatron", "embed": "early-exit", "hf": "hugging face"}
    return f"{kinds[opened.kind]} {opened.base.dims.family}", rows, facts


def _row(source: Mapping[str, Tensor], name: str, recorded: Mapping[str, str], hashes: bool) -> TensorRow:
    """Table row of a tensor. `recorded`: hashes to show if `hashes` is off and nothing is read."""
    sha256, finite = recorded.get(name, ""), True
    dtype, shape = entries_of(source)[name]
    if hashes:
        read = hashlib.sha256()
        for block in prefetch(row_blocks(source, name)):
            read.update(tensor_bytes(block.data))
            finite = finite and all_finite(block.data)
        sha256 = read.hexdigest()
    stored = source.parameter(name) if isinstance(source, MegatronDirectory) else name
    return TensorRow(name, stored, list(shape), str(dtype).removeprefix("torch."), sha256, finite)


def compare_tensors(a: Checkpoint, b: Checkpoint) -> tuple[list[str], list[str]]:
    """Compare two models' effective weights and gates block by block; returns (differences, remarks).

    Models in two dtypes are the same if the wider, rounded to the narrower, is the narrower.
    """
    if a.base.dims != b.base.dims:
        return [f"dimensions: {a.base.dims} in {a.path}, {b.base.dims} in {b.path}"], []
    wrong: list[str] = []
    rounded = 0
    for name in a.base:
        dtype = min(a.base.dtype(name), b.base.dtype(name), key=lambda kind: kind.itemsize)
        rounded += a.base.dtype(name) != b.base.dtype(name)
        pairs = zip(a.effective(name), b.effective(name), strict=True)
        worst = max(_worst(left.to(dtype), right.to(dtype)) for left, right in pairs)
        if worst:
            wrong.append(f"{name}: differs by up to {worst:.3g}")
    remarks = [f"{rounded} tensors are stored in two dtypes; equal means after rounding"] if rounded else []
    if not a.spec.exit_depths or not b.spec.exit_depths:
        only = [f"gates only in {one.path}" for one in (a, b) if one.spec.exit_depths]
        return wrong, remarks + only
    if a.spec.layout != b.spec.layout or a.spec.gate_input != b.spec.gate_input:
        exits = f"exits: {a.spec.layout} {a.spec.gate_input}, {b.spec.layout} {b.spec.gate_input}"
        return [*wrong, exits], remarks
    left, right = a.gates(), b.gates()
    return wrong + [f"{name}: differs" for name in left if not torch.equal(left[name], right[name])], remarks


def _worst(left: Tensor, right: Tensor) -> float:
    return 0.0 if torch.equal(left, right) else float((left.double() - right.double()).abs().max()) or float("inf")


def compare_logits(a: Checkpoint, b: Checkpoint) -> tuple[float, float]:
    """Largest relative differences of the logits in float32, without exits and under random exit patterns.

    Each side runs in its own body: the exported class, or megatron-core.
    """
    dims = a.base.dims
    depths = a.spec.exit_depths or b.spec.exit_depths or ExitLayout.default(dims.num_layers).depths or (1,)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, dims.vocab, (SEQUENCES, LENGTH), generator=generator)
    outcomes = torch.tensor([*depths, dims.num_layers])
    pattern = outcomes[torch.randint(0, len(outcomes), ids.shape, generator=generator)]
    differences = []
    for exits in (torch.full_like(ids, dims.num_layers), pattern):
        left, right = logits_of(a, ids, exits), logits_of(b, ids, exits)
        differences.append(float((left - right).abs().max() / left.abs().max()))
    return differences[0], differences[1]


def verify(a: Checkpoint, b: Checkpoint, logits: bool = True) -> tuple[bool, list[str]]:
    """Compare two models; returns (whether they are the same, lines of findings)."""
    wrong, remarks = compare_tensors(a, b)
    if wrong:
        more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
        return False, [*wrong[:5], *more, *remarks]
    lines = [f"{len(a.base)} tensors are equal", *remarks]
    if not logits:
        return True, lines
    plain, exits = compare_logits(a, b)
    lines.append(
        f"logits differ by {plain:.1e} (full depth) and {exits:.1e} (random exits), relative; bound {TOLERANCE}"
    )
    return max(plain, exits) <= TOLERANCE, lines


@contextmanager
def single_process() -> Iterator[None]:
    """Context with a process group of one rank, unless the process is in a group already; without a GPU the calls that
    megatron-core makes to it are answered by the CPU. No port is opened: the store is in memory."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=DEADLINE)
    device = torch.cuda.current_device
    try:
        if not torch.cuda.is_available():
            torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
        parallel_state.initialize_model_parallel()
        yield
    finally:
        torch.cuda.current_device = device
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@torch.no_grad()
def logits_of(checkpoint: Checkpoint, ids_BT: Tensor, depths_BT: Tensor) -> Tensor:
    """Logits float32 [B, T, V] of token ids and exit depths int64 [B, T] (L: no exit). Loads the whole model into
    memory.

    Raises ValueError if it does not fit into what is free.
    """
    _check_memory(checkpoint)
    run = _megatron if checkpoint.kind == "megatron" else _exported
    return run(checkpoint, ids_BT, depths_BT)


def _check_memory(checkpoint: Checkpoint) -> None:
    need = 4 * sum(torch.Size(shape).numel() for shape in checkpoint.base.dims.tensor_shapes().values())
    if MEMINFO.is_file():
        free = next(int(line.split()[1]) << 10 for line in MEMINFO.read_text().splitlines() if "MemAvailable" in line)
        if need > free:
            raise ValueError(
                f"{checkpoint.path}: its logits need {need / 1e9:.0f} GB of memory in float32, {free / 1e9:.0f} GB are "
                "free; compare tensors only, with --no-logits"
            )


def _exported(checkpoint: Checkpoint, ids_BT: Tensor, depths_BT: Tensor) -> Tensor:
    """Logits by this version's class, not by code in the directory: a check must not run what it checks."""
    # Transformers' models take seconds to import.
    from .export_files.configuration_early_exit import EarlyExitConfig
    from .export_files.modeling_early_exit import EarlyExitForCausalLM

    dims = checkpoint.base.dims
    fields = {key: value for key, value in checkpoint.base.config.items() if key not in ("model_type", "architectures")}
    exits = sorted({*depths_BT.flatten().tolist()} - {dims.num_layers})
    model = EarlyExitForCausalLM(EarlyExitConfig(dims.family, exits, **fields)).float().eval()
    parameters = dict(model.named_parameters())
    for name in checkpoint.base:
        parameters.pop(name).copy_(checkpoint.whole(name))
    # Prescribed exits don't need the gates.
    assert all(name.startswith("gates.") for name in parameters), sorted(parameters)
    return model(ids_BT, exit_depths=depths_BT, use_cache=False).logits


def _megatron(checkpoint: Checkpoint, ids_BT: Tensor, depths_BT: Tensor) -> Tensor:
    dims = checkpoint.base.dims
    with single_process():
        model = build_stage(megatron_config(dims, None, (dims.num_layers,), dtype=torch.float32)).eval()
        parameters = dict(model.named_parameters())
        for item in whole_entries(dims):
            parameters.pop(item.parameter).copy_(item.shard([checkpoint.whole(name) for name in item.names], 1, 0))
        assert not parameters, sorted(parameters)
        packed = PackedSequences.of([ids_BT.size(1)] * len(ids_BT))
        hidden_W1D = model(ids_BT.view(1, -1), make_control(packed, depths_BT.flatten()))
        return (hidden_W1D @ model.readout_weight().T).view(*ids_BT.shape, -1)[..., : dims.vocab].clone()
