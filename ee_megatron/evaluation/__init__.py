"""Evaluation of a model's answers under an exit policy. Definitions of all figures: docs/evaluation.md.

evaluate.py: answers, their row, the choice of a threshold; results.py: what is written; controls.py: rules that know
less, calibration of the gates; externalisation.py: what is written down; choice.py: in which style.
"""
