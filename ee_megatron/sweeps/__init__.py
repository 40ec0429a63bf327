"""Sweeps: a grid of settings becomes runs, their stages become tasks, executors start them, one table collects them.

Each module imports from those before it: grid (the language), sweep (runs and tasks), records (what is on disk), task
(one task's stages), local and slurm (who starts tasks), status and collect (tables), command. budget and measured do
the arithmetic and are imported where it is done.
"""
