"""A name has one sweep per last stage: whose runs a grid's points are among, or are added to.

A sweep that grew keeps its directory, and with it records, results and what Slurm has of its tasks. Its tasks keep
their keys: where two runs part, they still part when there are more of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..config.identity import stage_dir
from ..config.load import load
from ..config.schema import RunConfig
from . import records
from .grid import SEED, SEEDS
from .sweep import Sweep, SweepRun, cut


def placed(grid: Sweep, extend: bool) -> Sweep:
    """The sweep on disk that a grid's runs belong to, with all runs of both; `grid` itself if its name has none.

    A grid that has all runs of an earlier one extends it, and one that has some of them is a part of it. Others are
    added with `extend` only. Nothing is written. Raises ValueError if it is not clear what is meant.
    """
    mine, name = ids(grid), grid.directory.parent
    found = [sweep for sweep in records.sweeps_in(name) if sweep.last == grid.last]
    related = [sweep for sweep in found if ids(sweep) <= mine or mine <= ids(sweep)]
    if not found:
        if extend:
            raise ValueError(f"--extend: {name} has no sweep up to {grid.last} yet; leave it out to begin one")
        return grid
    if not related and not extend:
        inside = "none" if all(mine.isdisjoint(ids(sweep)) for sweep in found) else "not all"
        raise ValueError(
            f"{name} has a sweep of {len(found[0].runs)} run(s) up to {grid.last}, and {inside} of these points are "
            "its: --extend adds them to it; or give all of its points too, or another --name"
        )
    if not related and len(found) > 1:
        listed = ", ".join(sweep.directory.name for sweep in found)
        raise ValueError(f"--extend: {name} has {len(found)} sweeps up to {grid.last}: {listed}; take another --name")
    return _union(max(related or found, key=lambda sweep: len(sweep.runs)), grid)


def ids(sweep: Sweep) -> set[str]:
    return {run.id for run in sweep.runs}


def _union(earlier: Sweep, grid: Sweep) -> Sweep:
    """Runs of both in `earlier`'s place; those that both have are started as `grid` says."""
    before, ours = ({run.id: run for run in sweep.runs} for sweep in (earlier, grid))
    first, then = (grid, earlier) if before.keys() <= ours.keys() else (earlier, grid)
    order = dict.fromkeys(run.id for sweep in (first, then) for run in sweep.runs)
    runs = [replace(ours.get(ident) or before[ident]) for ident in order]
    if len(runs) == len(grid.runs):
        return replace(grid, directory=earlier.directory)
    configured = [(run, _configuration(earlier.directory, run, grid.last)) for run in runs]
    keys = dict.fromkeys(key for sweep in (first, then) for run in sweep.runs for key in run.settings)
    for run, cfg in configured:
        run.tasks = []
        # What one grid varies the other may have left alone.
        known = (before[run.id].settings if run.id in before else {}) | run.settings
        values = {key: known[key] if key in known else _setting(cfg, key) for key in keys}
        run.settings = {key: value for key, value in values.items() if value is not None}
    return Sweep(earlier.directory, grid.last, runs, cut(configured, grid.last))


def _configuration(directory: Path, run: SweepRun, last: str) -> RunConfig:
    try:
        cfg = load(run.overrides)
        same = stage_dir(cfg, last).name == f"{last}-{run.id}"
        reason = "" if same else "its settings now name other results"
    except (ValueError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
    if reason:
        raise ValueError(f"{directory}: run {run.id} cannot be gone on with ({reason}); take another --name")
    return cfg


def _setting(cfg: RunConfig, key: str) -> Any:
    """A setting's value as a grid would give it; None for what is no single setting (a group, a budget)."""
    value = OmegaConf.select(OmegaConf.structured(cfg), SEEDS[-1] if key == SEED else key, default=None)
    if OmegaConf.is_list(value):
        return OmegaConf.to_container(value)
    return value if isinstance(value, bool | int | float | str) else None
