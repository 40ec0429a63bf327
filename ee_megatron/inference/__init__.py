"""A trained model in use: what a path names (`found.py`), its answers, what every exit would have said."""

from __future__ import annotations

from .answers import Answer, Answers
from .model import EarlyExitModel
from .readout import Readout

__all__ = ["Answer", "Answers", "EarlyExitModel", "Readout"]
