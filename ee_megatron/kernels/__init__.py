"""Compiled kernels for CPUs: the decoder's layers, products of matrices in panels, what is made of logits."""

from .compiled import LANES, Panels, panels

__all__ = ["LANES", "Panels", "panels"]
