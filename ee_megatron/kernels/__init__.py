"""Compiled CPU kernels: the decoder's layers, products of matrices in panels, reductions of logits."""

from .compiled import LANES, Panels, panels

__all__ = ["LANES", "Panels", "panels"]
