"""Scaling laws of a table of runs: fits, comparisons of forms, plots."""
