"""Whether two checkpoints are the same model: tensor by tensor, and by their logits under random exit patterns."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..exits import ExitLayout
from .describe import Checkpoint
from .logits_parity import logits_of

TOLERANCE = 1e-4
SEQUENCES, LENGTH = 3, 24


def compare_tensors(a: Checkpoint, b: Checkpoint) -> tuple[list[str], list[str]]:
    """(differences, remarks) of two models' effective weights and gates, block by block.

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


def compare_logits(a: Checkpoint, b: Checkpoint, seed: int = 0) -> tuple[float, float]:
    """Largest relative differences of the logits in float32, without exits and under random exit patterns.

    Each side runs in its own body: Hugging Face's class, the exported class, or megatron-core.
    """
    dims = a.base.dims
    depths = a.spec.exit_depths or b.spec.exit_depths or ExitLayout.default(dims.num_layers).depths or (1,)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, dims.vocab, (SEQUENCES, LENGTH), generator=generator)
    outcomes = torch.tensor([*depths, dims.num_layers])
    pattern = outcomes[torch.randint(0, len(outcomes), ids.shape, generator=generator)]
    found = []
    for exits in (torch.full_like(ids, dims.num_layers), pattern):
        left, right = logits_of(a, ids, exits), logits_of(b, ids, exits)
        found.append(float((left - right).abs().max() / left.abs().max()))
    return found[0], found[1]


def verify(a: Checkpoint, b: Checkpoint, logits: bool = True) -> tuple[bool, list[str]]:
    """(the same model?, what was found, a line each)."""
    wrong, remarks = compare_tensors(a, b)
    if wrong:
        more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
        return False, [*itertools.islice(wrong, 5), *more, *remarks]
    lines = [f"{len(a.base)} tensors are equal", *remarks]
    if not logits:
        return True, lines
    plain, exits = compare_logits(a, b)
    lines.append(
        f"logits differ by {plain:.1e} (full depth) and {exits:.1e} (random exits), relative; bound {TOLERANCE}"
    )
    return max(plain, exits) <= TOLERANCE, lines
