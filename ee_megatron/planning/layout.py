"""Which layers and gates each learner rank holds, and how many parameters that makes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ..config.derive import policy_spec, stage_sizes
from ..config.schema import RunConfig
from ..exits import gate_units
from ..families import ModelDims, padded_vocab
from ..policy import PolicySpec

KEY_VALUE = ("self_attn.k_proj", "self_attn.v_proj")
JOINT = (("self_attn.q_proj",), KEY_VALUE, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
"""A layer's linears; those in one tuple are one product."""
ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Layout:
    """A run's model and policy, its parallel degrees, and layers per pipeline stage (`sizes`)."""

    dims: ModelDims
    spec: PolicySpec
    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    sizes: tuple[int, ...]

    @staticmethod
    def of(cfg: RunConfig, dims: ModelDims) -> Layout:
        """Raises ValueError as config/validate.py does, for stages that do not end at exits."""
        p, spec = cfg.parallel, policy_spec(cfg, dims)
        sizes = stage_sizes(p, spec.layout)
        return Layout(dims, spec, p.tensor, p.pipeline, p.data, p.sequence_parallel, sizes)

    def on_one_rank(self) -> Layout:
        """The same model and policy on a single rank."""
        return Layout(self.dims, self.spec, 1, 1, 1, False, (self.dims.num_layers,))

    @property
    def ranks(self) -> int:
        """Ranks of the learner."""
        return self.tensor * self.pipeline * self.data

    def stages(self, pipeline_rank: int) -> list[range]:
        """Layers (1-based numbers) of a pipeline rank's stages, in order. Rank 0 embeds, the last one has the head."""
        ends = list(itertools.accumulate(self.sizes))
        stages = [range(end - size + 1, end + 1) for size, end in zip(self.sizes, ends, strict=True)]
        return stages[pipeline_rank :: self.pipeline]

    def has_head(self, pipeline_rank: int) -> bool:
        return pipeline_rank == self.pipeline - 1

    def gates(self, pipeline_rank: int) -> list[int]:
        """Depths of the gates on this rank: a gate is part of the layer after its exit."""
        return [depth for depth in self.spec.exit_depths if any(depth + 1 in s for s in self.stages(pipeline_rank))]

    def joint(self, parts: tuple[str, ...]) -> tuple[int, int, int]:
        """Of linears that are one product: rows and columns on a tensor-parallel rank, sum of their adapters' ranks."""
        shapes, spec = self.dims.linear_shapes(), self.spec
        rows, columns = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
        rank = spec.rank * sum(part in spec.targets for part in parts)
        if parts[0] in ROW_PARALLEL:
            return rows, columns // self.tensor, rank
        return rows // self.tensor, columns, rank

    @property
    def sequence_ranks(self) -> int:
        """Ranks that the positions of a residual stream are shared among."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding, and of the head, on a tensor-parallel rank."""
        return padded_vocab(self.dims.vocab, self.tensor) // self.tensor


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank. `base` without `copy`, the tied embedding's second copy on the last stage; both with the
    vocabulary's padding."""

    base: int
    copy: int
    adapters: int
    gates: int

    def trained(self, full: bool) -> int:
        """Parameters with a gradient; full: the base's too."""
        return self.adapters + self.gates + (self.base + self.copy if full else 0)


def rank_parameters(layout: Layout, pipeline_rank: int) -> Parameters:
    """Parameters of every tensor-parallel rank of this pipeline rank. A test builds the modules and counts them."""
    dims, head = layout.dims, layout.has_head(pipeline_rank)
    layers, embedding = sum(map(len, layout.stages(pipeline_rank))), pipeline_rank == 0
    matrix = layout.vocabulary_rows * dims.hidden
    # Vectors that are added after a sum over ranks are whole on every rank.
    whole = [f"{linear}.bias" for linear in ROW_PARALLEL]

    def split(name: str) -> bool:
        return ("_proj" in name and name not in whole) or (dims.qk_norm_whole and name.startswith("self_attn."))

    block = sum(
        math.prod(shape) // (layout.tensor if split(name) else 1) for name, shape in dims.block_shapes().items()
    )
    base = layers * block + matrix * embedding + (dims.hidden + (0 if dims.tied else matrix)) * head
    adapters = sum(
        rank * (rows + columns) for rows, columns, rank in (layout.joint((x,)) for x in dims.linear_shapes())
    )
    width = gate_units(layout.spec.gate_width, dims.hidden)
    gate = width * dims.hidden + 2 * width + 1
    copy = matrix if dims.tied and head and not embedding else 0
    return Parameters(base, copy, layers * adapters, gate * len(layout.gates(pipeline_rank)))
