"""`ee-megatron sweep`: check every point of a grid, start unfinished ones; `status` and `collect` of a sweep."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..arguments import Parser, current
from ..config.cluster import site_options
from ..config.derive import ranks
from ..config.device import asks_for_gpus, pick_device
from ..config.errors import refuse
from ..config.identity import STAGES
from ..config.load import Attempt, load, pin_ids
from ..config.schema import RunConfig
from ..config.validate import check_name
from ..observe.rundir import check_folder
from ..training.preflight import Preflight
from .grid import read_grid
from .slurm import minutes_of, queued, submit
from .sweep import FINISHED, QUEUED, RUNNING, StageTask, Sweep, find_sweep, placed, resolve, spelt, stages_of
from .task import run_here

EPILOG = """\
examples:
  ee-megatron sweep experiment=demo_cpu rl.depth_penalty.weight=0,0.3,1 seed=1,2,3 --name front --dry-run
  ee-megatron sweep sweep=lambda_front --executor slurm --slurm partition=gpu --slurm time=8:00:00
  ee-megatron sweep experiment=demo_cpu rl.depth_penalty.weight=2 seed=1,2,3 --name front --extend
  ee-megatron sweep status front
  ee-megatron sweep collect front

A comma separates values of an axis, unless it stands in brackets or quotes: task.families=[sum,word] is one value,
task.families=[sum],[sum,word] two. range(start,stop,step) leaves out its stop. `seed` stands for calibrate.seed and
rl.seed. The same command again resumes: finished runs are skipped, stopped and killed ones continued.
"""
FIGURES = ("accuracy", "mean_depth", "reward", "loss")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 (a run failed), 130 (stopped on request). Raises Faults with all errors."""
    if arguments and arguments[0] in ("status", "collect"):
        return _look(*arguments)
    return _sweep(parse_arguments(list(arguments)))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="ee-megatron sweep",
        description="Run a grid of settings: all points are checked first, shared stages run once, one result table.",
        usage="%(prog)s key=a,b,c ... [options]\n       %(prog)s status NAME\n       %(prog)s collect NAME",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="a setting; several values make an axis")
    parser.add_argument("--name", default="", help="results go to runs/NAME (default: the experiment's name)")
    text = "stage to end with (default: evaluate)"
    parser.add_argument("--last", default="evaluate", type=current, choices=STAGES, help=text)
    parser.add_argument("--zip", action="append", default=[], metavar="key,key", help="axes that vary together")
    parser.add_argument("--executor", default="local", choices=("local", "slurm"), help="default: local")
    parser.add_argument("--max-parallel", type=int, metavar="N", help="tasks at a time (default: local 1, slurm 256)")
    parser.add_argument("--slurm", action="append", default=[], metavar="key=value", help="sbatch option (repeatable)")
    parser.add_argument("--extend", action="store_true", help="add these points to the existing sweep of that name")
    parser.add_argument("--retry-failed", action="store_true", help="also start failed runs again")
    parser.add_argument("--dry-run", action="store_true", help="check and list the points; start and write nothing")
    options, rest = parser.parse_known_args(arguments)
    if wrong := [text for text in rest if text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    options.settings += rest
    if options.name:
        check_name("--name", options.name)
        options.settings.append(f"name={options.name}")
    return options


def _sweep(options: argparse.Namespace) -> int:
    on_slurm = options.executor == "slurm"
    parallel = (256 if on_slurm else 1) if options.max_parallel is None else options.max_parallel
    if parallel < 1:
        raise ValueError(f"--max-parallel {parallel}: expected a number >= 1")
    slurm = _slurm_options(options.slurm)
    if on_slurm:
        site_options(os.environ)
    preflight, neediest = Preflight(), list[RunConfig]()

    def check(cfg: RunConfig) -> None:
        refuse(preflight.faults(Attempt(cfg, []), stages_of(cfg, options.last)))
        if not on_slurm and cfg.job.nodes > 1:
            raise ValueError(f"cluster.nodes={cfg.job.nodes}: more than this machine; use --executor slurm")
        neediest[:] = [max([*neediest, cfg], key=lambda each: (asks_for_gpus(each), ranks(each)))]

    grid = resolve(read_grid(options.settings, options.zip), options.last, check)
    sweep = placed(grid, options.extend)
    queue = queued(sweep) if on_slurm else {}
    tasks = [task for task in to_start(sweep, queue, options.retry_failed) if grid.ids & {*task.runs}]
    if not (on_slurm or options.dry_run) and tasks and asks_for_gpus(neediest[0]):
        pick_device(neediest[0], ranks(neediest[0]))
    print(f"{sweep.directory}: {len(sweep.runs)} run(s), {len(sweep.tasks)} task(s), {len(tasks)} to start")
    if options.dry_run:
        print(listing(sweep, queue, tasks))
        return 0
    for run in grid.runs:
        refuse(pin_ids(load(run.overrides), [], whole=True).values())
    print(f"{sweep.counts(queue)}; failed ones start again with --retry-failed", flush=True)
    with contextlib.ExitStack() as held:
        if not on_slurm:
            sweep.directory.mkdir(parents=True, exist_ok=True)
            sweep.lock.acquire()
            held.callback(sweep.lock.release)
        sweep.save()
        for run in sweep.runs:
            # Finished before this sweep existed, or killed before it wrote them.
            if sweep.is_done(run) and sweep.result(run) is None:
                from .run_metrics import measure

                measure(sweep, run, load(run.overrides))
        if on_slurm:
            submit(sweep, tasks, slurm, parallel, neediest[0].job.requeue_limit, queue)
            return 0
        stopped = bool(tasks) and run_here(sweep, tasks, parallel)
    print(f"{sweep.counts()}; `ee-megatron sweep collect {_name(sweep)}` makes the table")
    runs = [run for run in sweep.runs if run.id in grid.ids]
    for run in runs:
        if reason := sweep.failure(sweep.tasks[run.task]):
            print(f"error: {spelt(run.settings) or 'the run'}: {reason}", file=sys.stderr)
    return 130 if stopped else int(not all(sweep.is_done(run) for run in runs))


def to_start(sweep: Sweep, queue: dict[str, str], retry_failed: bool) -> list[StageTask]:
    """Unfinished tasks that are neither running nor queued, nor wait for a failed one. `queue`: of slurm.queued."""
    free = [task for task in sweep.tasks.values() if sweep.task_state(task, queue) not in (FINISHED, RUNNING, QUEUED)]
    return [task for task in free if retry_failed or not sweep.failure(task)]


def _slurm_options(given: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in given:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", key) or not value.isprintable():
            # A line end would start a new line of the job's script.
            raise ValueError(f"--slurm {text!r}: expected an option of sbatch as key=value, e.g. partition=gpu")
        options[key] = value
    minutes_of(options.get("time", "1"))
    if not options.get("warning", "0").isdigit():
        raise ValueError(f"--slurm warning={options['warning']}: expected seconds before the time limit")
    return options


def _look(command: str, *arguments: str) -> int:
    parser = Parser(prog=f"ee-megatron sweep {command}", description="by name or directory")
    parser.add_argument("name", metavar="NAME", help="the runs' name, or a sweep's directory")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    text = "of several sweeps, the one up to this stage"
    parser.add_argument("--last", default="", type=current, choices=list(STAGES), help=text)
    if command == "collect":
        parser.add_argument("--out", type=Path, metavar="DIR", help="for the tables (default: the sweep's directory)")
    options = parser.parse_args(arguments)
    sweep = find_sweep(options.name, options.runs, options.last)
    if command == "collect":
        # Late: pandas takes a second to import.
        from .run_metrics import collect

        check_folder("--out", options.out or sweep.directory)
        print(collect(sweep, options.out))
        return 0
    queue = queued(sweep)
    print(sweep.directory, listing(sweep, queue), sweep.counts(queue), sep="\n")
    return 0


def listing(sweep: Sweep, queue: dict[str, str], starting: Sequence[StageTask] = ()) -> str:
    """Text with a line for each task: its state (or "start" if it is `starting`), its run if it has a single one, its
    stages and host, a finished run's metrics. `queue`: of slurm.queued."""
    lines, runs, jobs = list[str](), {run.task: run for run in sweep.runs}, sweep.submitted()
    keys = {task.key for task in starting}
    for task in sweep.tasks.values():
        state, record, run = sweep.task_state(task, queue), sweep.record(task.key), runs.get(task.key)
        result = (sweep.result(run) or {}) if run and state == FINISHED else {}
        figures = [f"{key}={result[key]:.3f}" for key in FIGURES if result.get(key) is not None]
        where = f"job {jobs[task.key]} ({queue[task.key]})" if task.key in queue else ""
        if record is not None and state == RUNNING:
            where = f"{record.stage} on {record.host} {where}"
        what = "start" if task.key in keys else state
        parts = [run.id if run else "", sweep.describe(task), *figures, where, sweep.failure(task)]
        lines.append(f"  {what:<9} {'  '.join(part for part in parts if part)}")
    return "\n".join(lines)


def _name(sweep: Sweep) -> str:
    return str(sweep.directory) if sweep.directory.parts[0] != "runs" else sweep.directory.parent.name
