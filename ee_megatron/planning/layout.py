"""Which layers, gates and ends each pipeline rank holds, and how many parameters that makes on each of its ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..config.derive import policy_spec, stage_sizes
from ..config.schema import RunConfig
from ..exits import gate_units
from ..families import ModelDims, padded_vocab
from ..policy import PolicySpec

KEY_VALUE = ("self_attn.k_proj", "self_attn.v_proj")
JOINT = (
    ("self_attn.q_proj",),
    KEY_VALUE,
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A layer's linears, those together that are one product."""
ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class PipelineStage:
    """Consecutive layers (1-based numbers) on one pipeline rank; the first stage embeds, the last one reads out."""

    layers: tuple[int, ...]
    embedding: bool
    head: bool


@dataclass(frozen=True)
class Layout:
    """One run's degrees and stages. `stages[p]`: the stages of pipeline rank p, in order."""

    dims: ModelDims
    spec: PolicySpec
    tensor: int
    pipeline: int
    data: int
    virtual: int
    sequence_parallel: bool
    sizes: tuple[int, ...]

    @staticmethod
    def of(cfg: RunConfig, dims: ModelDims) -> Layout:
        """Raises ValueError as config/validate.py does, for stages that do not end at exits."""
        p, spec = cfg.parallel, policy_spec(cfg, dims)
        sizes = stage_sizes(p, spec.layout)
        return Layout(dims, spec, p.tensor, p.pipeline, p.data, p.virtual, p.sequence_parallel, sizes)

    def on_one_rank(self) -> Layout:
        """The same model and policy where nothing is shared out."""
        one = {"tensor": 1, "pipeline": 1, "data": 1, "virtual": 1}
        return replace(self, **one, sequence_parallel=False, sizes=(self.dims.num_layers,))  # type: ignore[arg-type]

    @property
    def ranks(self) -> int:
        """Ranks of the learner."""
        return self.tensor * self.pipeline * self.data

    def stages(self, pipeline_rank: int) -> list[PipelineStage]:
        """A pipeline rank's stages, in order."""
        found, first, last = [], 1, len(self.sizes) - 1
        for index, size in enumerate(self.sizes):
            if index % self.pipeline == pipeline_rank:
                found.append(PipelineStage(tuple(range(first, first + size)), index == 0, index == last))
            first += size
        return found

    def gates(self, pipeline_rank: int) -> list[int]:
        """Depths of the gates that this rank holds: a gate lies in the layer that follows its exit."""
        layers = {layer for stage in self.stages(pipeline_rank) for layer in stage.layers}
        return [depth for depth in self.spec.exit_depths if depth + 1 in layers]


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank. `base` without `copy`, the tied embedding's second copy on the last stage; both with the
    vocabulary's padding."""

    base: int
    copy: int
    adapters: int
    gates: int

    @property
    def total(self) -> int:
        """Parameters that the rank holds."""
        return self.base + self.copy + self.adapters + self.gates

    def trained(self, full: bool) -> int:
        """Parameters with a gradient; full: the base's too."""
        return self.adapters + self.gates + (self.base + self.copy if full else 0)


def rank_parameters(layout: Layout, pipeline_rank: int) -> Parameters:
    """By arithmetic; construct.py counts the same on the modules themselves."""
    dims, stages = layout.dims, layout.stages(pipeline_rank)
    layers = [layer for stage in stages for layer in stage.layers]
    embedding, head = any(s.embedding for s in stages), any(s.head for s in stages)
    matrix = padded_vocab(dims.vocab, layout.tensor) // layout.tensor * dims.hidden
    base = len(layers) * _block_elements(dims, layout.tensor)
    base += matrix * embedding + (dims.hidden + (0 if dims.tied else matrix)) * head
    copy = matrix if dims.tied and head and not embedding else 0
    shapes = [joint(layout, (part,)) for part in dims.linear_shapes()]
    adapters = len(layers) * sum(rank * (rows + columns) for rows, columns, rank in shapes)
    width = gate_units(layout.spec.gate_width, dims.hidden)
    gate = width * dims.hidden + 2 * width + 1
    return Parameters(base, copy, adapters, gate * len(layout.gates(pipeline_rank)))


def joint(layout: Layout, parts: tuple[str, ...]) -> tuple[int, int, int]:
    """Rows and columns on a tensor-parallel rank of linears that are one product, and their adapters' ranks' sum."""
    shapes, spec = layout.dims.linear_shapes(), layout.spec
    rows, columns = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
    rank = spec.rank * sum(part in spec.targets for part in parts)
    if parts[0] in ROW_PARALLEL:
        return rows, columns // layout.tensor, rank
    return rows // layout.tensor, columns, rank


def _block_elements(dims: ModelDims, tensor: int) -> int:
    """Elements of one layer's base on a tensor-parallel rank: vectors that follow a sum over ranks are whole."""
    whole = [f"{linear}.bias" for linear in ROW_PARALLEL]
    return sum(
        math.prod(shape) // (tensor if "_proj" in name and name not in whole else 1)
        for name, shape in dims.block_shapes().items()
    )
