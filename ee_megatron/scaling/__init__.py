"""Scaling studies: grids of runs, one table, fits."""
