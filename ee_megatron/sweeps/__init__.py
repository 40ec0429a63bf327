"""Sweeps: a grid of settings becomes runs, the stages that they share become tasks, one table has the results.

Each module imports from those before it: grid (settings with several values), sweep (runs, tasks, what is on disk),
run_metrics (a finished run's figures), task (makes a task's stages, here or in a Slurm job), slurm, collect, command.
"""
