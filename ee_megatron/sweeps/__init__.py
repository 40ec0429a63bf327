"""Sweeps: a grid of settings becomes runs, their stages become tasks, executors start them, one table collects them."""
