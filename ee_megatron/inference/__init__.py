"""Use of a trained model: resolve a path to a model (model_resolver.py), generate answers, read out every exit."""

from __future__ import annotations

from .model import Answer, Answers, EarlyExitModel
from .readout import Readout

__all__ = ["Answer", "Answers", "EarlyExitModel", "Readout"]
