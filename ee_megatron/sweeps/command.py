"""`ee-megatron sweep`: resolve a grid, check every point, start what is not finished; status and table of what was."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..arguments import Parser
from ..config.cluster import site_options
from ..config.config_paths import find_config_dir, list_groups
from ..config.derive import ranks
from ..config.device import asks_for_gpus, pick_device
from ..config.errors import refuse
from ..config.identity import STAGES
from ..config.load import Attempt, load
from ..config.schema import RunConfig
from ..config.validate import check_name
from ..observe.lock import RunLock
from ..training.preflight import Preflight
from ..training.stopping import STOPPED, WITH_PARENT, dying_with_me, follow_parent
from . import records
from .collect import collect
from .extend import ids, placed
from .grid import GROUP, Grid, check, combine, excluded, from_settings, zipped
from .grid_file import from_file
from .local import LocalExecutor
from .slurm import asked_for, minutes_of, queued, submit
from .status import left_out, status_table
from .sweep import StageTask, Sweep, resolve, spelt, stages_of
from .task import TaskRunner, Told, finish_run, stopped_by_signals

EPILOG = """\
examples:
  ee-megatron sweep experiment=demo_cpu rl.depth_penalty.weight=0,0.3,1 seed=1,2,3 --name front --dry-run
  ee-megatron sweep experiment=demo_cpu rl.adapter_lr=1e-5:1e-3:log3 --name rates --max-parallel 2
  ee-megatron sweep sweep=lambda_front --executor slurm --slurm partition=gpu --slurm time=8:00:00
  ee-megatron sweep experiment=demo_cpu rl.depth_penalty.weight=2 seed=1,2,3 --name front --extend
  ee-megatron sweep status front --watch
  ee-megatron sweep collect front

A comma separates values of an axis, unless it stands in brackets or quotes: task.families=[sum,word] is one value,
task.families=[sum],[sum,word] two. start:stop:step, start:stop:lin5 and start:stop:log5 are ranges, both ends in.
`seed` stands for calibrate.seed and rl.seed; `budget=1e15,1e16` (FLOPs) for the number of steps that it buys.
The same command again goes on: finished runs are skipped, stopped and killed ones continued.
"""
WATCH_S = 5.0


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 (a run failed), 130 (told to stop). Raises Faults with everything that is wrong."""
    first, *rest = arguments or [""]
    if first in ("status", "collect"):
        return _look(first, rest)
    if first == "task":
        return _task(rest)
    return _sweep(_parse(list(arguments)))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="ee-megatron sweep",
        description="A grid of runs: checked as a whole, shared stages made once, one table.",
        usage="%(prog)s key=a,b,c ... [options]\n       %(prog)s status NAME [--watch]\n       %(prog)s collect NAME",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of every run; several values make an axis")
    parser.add_argument("--name", default="", help="results go to runs/NAME (default: the experiment's name)")
    parser.add_argument(
        "--last", default="evaluate", choices=list(STAGES), help="stage to end with (default: evaluate)"
    )
    parser.add_argument("--zip", action="append", default=[], metavar="key,key", help="axes that run together")
    parser.add_argument("--exclude", action="append", default=[], metavar="'key=a key=b,c'", help="points to leave out")
    parser.add_argument("--executor", default="local", choices=("local", "slurm", "debug"))
    parser.add_argument("--max-parallel", type=int, metavar="N", help="tasks at a time (default: local 1, slurm 256)")
    parser.add_argument("--slurm", action="append", default=[], metavar="key=value", help="an option of sbatch")
    parser.add_argument("--extend", action="store_true", help="add these points to the sweep that the name has")
    parser.add_argument("--retry-failed", action="store_true", help="start failed runs again too")
    parser.add_argument("--dry-run", action="store_true", help="check and list the points; start and write nothing")
    options, rest = parser.parse_known_args(arguments)
    if wrong := [text for text in rest if text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    options.settings += rest
    return options


def _sweep(options: argparse.Namespace) -> int:
    parallel = (256 if options.executor == "slurm" else 1) if options.max_parallel is None else options.max_parallel
    if parallel < 1:
        raise ValueError(f"--max-parallel {parallel}: expected a number >= 1")
    slurm = _slurm_options(options.slurm)
    if options.executor == "slurm":
        site_options(os.environ)
    checker = Checker(options.executor, options.last)
    grid = resolve(make_grid(options), options.last, checker)
    sweep, mine = placed(grid, options.extend), ids(grid)
    queue = queued(sweep) if options.executor == "slurm" else {}
    wanted = [task for task in sweep.tasks if mine & set(task.runs)]
    tasks = [task for task in to_start(sweep, queue, options.retry_failed) if task in wanted]
    out = left_out(sweep, [task for task in wanted if task not in tasks], queue)
    if options.dry_run:
        print(_plan(sweep, tasks, queue))
        return 0
    if options.executor != "slurm" and tasks and checker.neediest is not None:
        pick_device(checker.neediest, ranks(checker.neediest))
    lock = RunLock(sweep.directory / ".lock")
    if options.executor != "slurm":
        sweep.directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        records.save(sweep)
        write_missing_results(sweep)
        only = f", {len(mine)} of them asked for" if len(mine) < len(sweep.runs) else ""
        so_far = records.counts(sweep, queue)
        print(f"{sweep.directory}: {len(sweep.runs)} run(s){only}; {so_far}; {len(tasks)} task(s) to start", flush=True)
        for line in out:
            print(f"left out: {line}", flush=True)
        if options.executor == "slurm":
            return _on_slurm(sweep, tasks, slurm, parallel, queue)
        forget_failures(sweep, tasks)
        code = _here(sweep, tasks) if options.executor == "debug" else _locally(sweep, tasks, parallel)
    finally:
        lock.release()
    unfinished = _ending(sweep, mine)
    return code or unfinished


def _ending(sweep: Sweep, mine: set[str]) -> int:
    """Say what became of a local sweep; 1 unless all of the runs that were asked for have finished."""
    print(f"{records.counts(sweep)}; `ee-megatron sweep collect {_name(sweep)}` makes the table")
    runs = [run for run in sweep.runs if run.id in mine]
    states = [records.run_state(sweep, run) for run in runs]
    for run, state in zip(runs, states, strict=True):
        if state == records.FAILED:
            print(f"error: {spelt(run.settings) or 'the run'}: {records.error_of(sweep, run)}", file=sys.stderr)
    return int(any(state != records.FINISHED for state in states))


def make_grid(options: argparse.Namespace) -> Grid:
    """From the command line, on top of a file's if there is `sweep=NAME`. Raises ValueError."""
    chosen = [text for text in options.settings if text.startswith(f"{GROUP}=")]
    isoflop = [text for text in options.settings if text.startswith("isoflop.")]
    line = from_settings(text for text in options.settings if text not in (*chosen, *isoflop))
    for keys in options.zip:
        zipped(line, [key.strip() for key in keys.split(",")])
    line.exclude = [excluded(text) for text in options.exclude]
    if len(chosen) > 1:
        raise ValueError(f"{' '.join(chosen)}: expected one grid file at most")
    grid = combine(from_file(_grid_file(chosen[0].split("=", 1)[1])), line) if chosen else line
    for text in isoflop:
        key, _, value = text.removeprefix("isoflop.").partition("=")
        grid.isoflop.put(key, value)
    if options.name:
        check_name("--name", options.name)
        grid.fixed.pop("name", None)
        grid.fixed["name"] = f"name={options.name}"
    check(grid)
    return grid


def _grid_file(name: str) -> Path:
    """configs/sweep/NAME.yaml, or a path that ends in .yaml."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"{GROUP}={name}: no such file")
        return Path(name)
    directory = find_config_dir()
    choices = list_groups(directory).get(GROUP, [])
    if name not in choices:
        raise ValueError(
            f"{GROUP}={name}: no such grid; there are {', '.join(choices) or 'none'}, or give a .yaml file"
        )
    return directory / GROUP / f"{name}.yaml"


class Checker:
    """All that can be known of a configuration before anything starts. Models and start policies are looked at once."""

    def __init__(self, executor: str, last: str):
        self.executor, self.last = executor, last
        self.neediest: RunConfig | None = None
        """Of the configurations that ask for GPUs the one with the most ranks."""
        self._preflight = Preflight()

    def __call__(self, cfg: RunConfig) -> None:
        """Raises Faults, all that is wrong."""
        refuse(self._preflight.faults(Attempt(cfg, []), stages_of(cfg, self.last)))
        if asks_for_gpus(cfg) and (self.neediest is None or ranks(cfg) > ranks(self.neediest)):
            self.neediest = cfg
        if self.executor == "debug" and ranks(cfg) > 1:
            raise ValueError(f"--executor debug: runs in this process, but there are {ranks(cfg)} ranks; use local")
        if self.executor != "slurm" and cfg.cluster.nodes > 1:
            raise ValueError(f"cluster.nodes={cfg.cluster.nodes}: more than this machine; use --executor slurm")


def to_start(sweep: Sweep, queue: dict[str, str], retry_failed: bool) -> list[StageTask]:
    """Unfinished tasks that nobody is at, and that no failed one keeps from starting. `queue`: what Slurm has."""
    unclaimed = [task for task in sweep.tasks if queue.get(task.key, records.GONE) == records.GONE]
    busy = (records.FINISHED, records.RUNNING)
    free = [task for task in unclaimed if records.task_state(sweep, task, queue) not in busy]
    return [task for task in free if retry_failed or records.failure(sweep, task) is None]


def write_missing_results(sweep: Sweep) -> None:
    """Of runs that had finished before this sweep was thought of."""
    for run in sweep.runs:
        if records.run_state(sweep, run) == records.FINISHED and records.read_result(sweep, run.id) is None:
            finish_run(sweep, run.id, load(run.overrides))


def forget_failures(sweep: Sweep, tasks: Sequence[StageTask]) -> None:
    """What is started again has not failed yet: tasks that need it must not take the old failure for its last word."""
    for task in tasks:
        record = records.read_record(sweep, task.key)
        if record is not None and record.state == records.FAILED:
            record.state, record.error = records.WAITING, ""
            records.write_record(sweep, task.key, record)


def _locally(sweep: Sweep, tasks: list[StageTask], parallel: int) -> int:
    def command(key: str) -> list[str]:
        return [sys.executable, "-m", "ee_megatron.cli", "sweep", "task", str(sweep.directory), key]

    environment = {"OMP_NUM_THREADS": "1", **dying_with_me()}
    return LocalExecutor(sweep, command, environment, parallel, lambda text: print(text, flush=True)).run(tasks)


def _here(sweep: Sweep, tasks: list[StageTask]) -> int:
    worst = 0
    for task in tasks:
        print(f"started {sweep.describe(task)}", flush=True)
        code = TaskRunner(sweep.directory, task.key, in_process=True).run()
        if code == STOPPED:
            return 130
        worst = max(worst, min(code, 1))
    return worst


def _on_slurm(
    sweep: Sweep, tasks: list[StageTask], options: dict[str, str], parallel: int, queue: dict[str, str]
) -> int:
    if not tasks:
        return 0
    forget_failures(sweep, tasks)
    requeues = load(sweep.runs[0].overrides).cluster.requeue_limit
    jobs = submit(sweep, tasks, options, parallel, requeues, queue)
    for number in records.job_numbers(jobs):
        its = [sweep.task(key) for key, job in jobs.items() if job.split("_")[0] == number]
        what = f"{len(its)} tasks in an array" if len(its) > 1 else sweep.describe(its[0])
        asked = asked_for(its, options)
        said = " ".join(f"{key}={asked[key]}" for key in asked if key not in ("time", "warning"))
        print(f"submitted job {number}: {what} ({said})")
    print(f"`ee-megatron sweep status {_name(sweep)} --watch` follows them")
    return 0


def _task(arguments: list[str]) -> int:
    """One task, as the local executor starts it."""
    parent = os.environ.pop(WITH_PARENT, "")
    if len(arguments) != 2:
        raise ValueError("sweep task: expected a sweep's directory and a task's key")
    runner = TaskRunner(Path(arguments[0]), arguments[1])
    with stopped_by_signals(runner.stop):
        if parent:
            follow_parent(int(parent))
        try:
            return runner.run()
        except Told:
            return STOPPED


def _look(command: str, arguments: list[str]) -> int:
    parser = Parser(prog=f"ee-megatron sweep {command}", description="by name or directory")
    parser.add_argument("name", metavar="NAME", help="the runs' name, NAME/sweep-<hash>, or a sweep's directory")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are (default: runs)")
    parser.add_argument("--last", default="", choices=list(STAGES), help="of several sweeps, the one up to this stage")
    if command == "collect":
        parser.add_argument("--out", type=Path, metavar="DIR", help="for the tables (default: the sweep's directory)")
    else:
        parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_S:g} s, until nothing runs")
    options = parser.parse_args(arguments)
    sweep = records.find_sweep(options.name, options.runs, options.last)
    if command == "collect":
        print(*collect(sweep, options.out), sep="\n")
        return 0
    while True:
        queue = queued(sweep)
        if options.watch and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print(status_table(sweep, queue), flush=True)
        busy = any(records.task_state(sweep, task, queue) in (records.RUNNING, records.QUEUED) for task in sweep.tasks)
        if not options.watch or not busy:
            return 0
        time.sleep(WATCH_S)


def _slurm_options(given: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in given:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", key) or not value.isprintable():
            # A line end would go on as a line of the job's script.
            raise ValueError(f"--slurm {text!r}: expected an option of sbatch as key=value, e.g. partition=gpu")
        options[key] = value
    minutes_of(options.get("time", "1"))
    if not options.get("warning", "0").isdigit():
        raise ValueError(f"--slurm warning={options['warning']}: expected seconds before the time limit")
    return options


def _plan(sweep: Sweep, tasks: list[StageTask], queue: dict[str, str]) -> str:
    lines = [f"{sweep.directory}: {len(sweep.runs)} run(s), {len(sweep.tasks)} task(s), {len(tasks)} to start"]
    for level in sweep.levels():
        for task in level:
            what = "start" if task in tasks else records.task_state(sweep, task, queue)
            ident = f"{task.runs[0]}  " if len(task.runs) == 1 else ""
            lines.append(f"  {what:<9} {ident}{sweep.describe(task)}")
    return "\n".join(lines)


def _name(sweep: Sweep) -> str:
    return str(sweep.directory) if sweep.directory.parts[0] != "runs" else sweep.directory.parent.name
