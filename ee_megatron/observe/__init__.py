"""Run directory, metrics, progress, locks. Independent of models."""
