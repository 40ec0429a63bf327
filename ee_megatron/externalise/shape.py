"""The shape of a run's model: what a ladder of models varies, and within which runs are compared."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..config.derive import read_dims
from ..config.schema import RunConfig
from ..sweeps.run_metrics import one_rank, parameters


@dataclass(frozen=True, order=True)
class Shape:
    """layers; width of the residual stream; parameters of the layers, without the embedding. 0: not known, because the
    config.json that the run was made from isn't there any more; `path` (model.path) then tells shapes apart."""

    layers: int
    width: int = 0
    parameters: int = 0
    path: str = ""

    @property
    def label(self) -> str:
        width = f" of width {self.width}" if self.width else ""
        size = f", {self.parameters:,} parameters" if self.parameters else ""
        return f"{self.layers} layers{width}{size}" + (f", {self.path}" if self.path else "")

    @property
    def slug(self) -> str:
        """The label for file names and anchors."""
        return re.sub(r"[^A-Za-z0-9]+", "-", f"{self.layers}x{self.width}-{self.parameters}-{self.path}").strip("-")


def shape_of(cfg: RunConfig, layers: int) -> Shape:
    """A run's shape, by its settings and the config.json that they name; `layers` are those that were measured."""
    try:
        dims = read_dims(cfg)
    except (FileNotFoundError, ValueError):
        dims = None
    # What stands there now may not be what the run was made from.
    if dims is None or dims.num_layers != layers:
        return Shape(layers, cfg.pretrain.width if cfg.pretrain else 0, path=cfg.model.path)
    return Shape(layers, dims.hidden, parameters(dims, one_rank(cfg, dims))["parameters_layers"])
