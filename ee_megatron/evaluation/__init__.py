"""Evaluation of a model's answers under an exit policy. Definitions of all figures: docs/evaluation.md.

evaluate.py: answers, their result row, the choice of a threshold; results.py: files; controls.py: rules with less
information, calibration of the gates; externalisation.py: how much reasoning is written; choice.py: in which style.
"""
