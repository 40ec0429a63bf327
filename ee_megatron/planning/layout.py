"""Which layers, gates and ends each pipeline rank holds, and how many parameters that makes on each of its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config.derive import policy_spec, stage_sizes
from ..config.schema import RunConfig
from ..families import ModelDims, padded_vocab
from ..policy import PolicySpec


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
    base = len(layers) * sum(count for _, count in _block(dims, layout.tensor))
    base += matrix * embedding + (dims.hidden + (0 if dims.tied else matrix)) * head
    copy = matrix if dims.tied and head and not embedding else 0
    adapters = len(layers) * sum(adapter_elements(dims, layout.spec, layout.tensor, part) for part in targets(layout))
    width = layout.spec.gate_width * dims.hidden
    gate = width * dims.hidden + 2 * width + 1
    return Parameters(base, copy, adapters, gate * len(layout.gates(pipeline_rank)))


def targets(layout: Layout) -> tuple[str, ...]:
    """Linears that have an adapter."""
    return layout.spec.targets if layout.spec.rank else ()


def adapter_elements(dims: ModelDims, spec: PolicySpec, tensor: int, part: str) -> int:
    """Elements of one linear's two factors on a tensor-parallel rank: one factor is split, the other whole."""
    rows, columns = dims.linear_shapes()[part]
    whole, split = (rows, columns) if part.endswith(("o_proj", "down_proj")) else (columns, rows)
    return spec.rank * (whole + split // tensor)


def _block(dims: ModelDims, tensor: int) -> Iterator[tuple[str, int]]:
    row_parallel = ("self_attn.o_proj", "mlp.down_proj")
    for name, shape in dims.block_shapes().items():
        count = 1
        for size in shape:
            count *= size
        linear, kind = name.rsplit(".", 1)
        split = "_proj" in linear and not (kind == "bias" and linear in row_parallel)
        yield name, count // tensor if split else count
