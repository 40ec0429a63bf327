"""A trained model in use: what a path names (model_resolver.py), its answers, what every exit would have said."""

from __future__ import annotations

from .model import Answer, Answers, EarlyExitModel
from .readout import Readout

__all__ = ["Answer", "Answers", "EarlyExitModel", "Readout"]
