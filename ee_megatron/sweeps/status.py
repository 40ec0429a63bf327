"""A sweep's state as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from . import records
from .sweep import StageTask, Sweep

ERROR_WIDTH = 90
SETTING_WIDTH = 40
MOST_LISTED = 10


def status_table(sweep: Sweep, queue: Mapping[str, str]) -> str:
    """Shared tasks, then one line per run, then how many are in which state. `queue`: what Slurm has."""
    lines = [f"{sweep.directory}"]
    for task in sweep.tasks:
        if len(task.runs) > 1:
            record = records.read_record(sweep, task.key)
            spent = f", {record.seconds:.0f} s" if record else ""
            lines.append(f"{sweep.describe(task)}: {records.task_state(sweep, task, queue)}{spent}")
    keys = list(dict.fromkeys(key for run in sweep.runs for key in run.settings))
    table = [["run", *keys, "status", "stage", "starts", "seconds", "accuracy", "depth", "reward", ""]]
    states: Counter[str] = Counter()
    for run in sweep.runs:
        own = sweep.task(run.tasks[-1])
        state = records.run_state(sweep, run, queue)
        states[state] += 1
        record, result = records.read_record(sweep, own.key), records.read_result(sweep, run.id) or {}
        values = [_tail(run.settings.get(key, "")) for key in keys]
        effort = [record.stage, str(record.starts), f"{record.seconds:.0f}"] if record else [""] * 3
        figures = [result.get(name) for name in ("accuracy", "mean_depth", "reward")]
        shown = ["" if value is None else f"{value:.3f}" for value in figures]
        table.append([run.id, *values, state, *effort, *shown, _head(records.error_of(sweep, run))])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.append(", ".join(f"{count} {state}" for state, count in states.items()))
    return "\n".join(lines)


def left_out(sweep: Sweep, tasks: Sequence[StageTask], queue: Mapping[str, str]) -> list[str]:
    """A line for each of the unfinished among `tasks` that are not to be started, with the reason; failed ones, and
    those beyond the first few, in one."""
    lines, failed = [], 0
    for task in tasks:
        state = records.task_state(sweep, task, queue)
        if state == records.FINISHED:
            continue
        if queue.get(task.key, records.GONE) != records.GONE:
            job = records.submitted(sweep).get(task.key, "?")
            lines.append(f"{sweep.describe(task)}: Slurm has it as job {job} ({queue[task.key]})")
        elif state == records.RUNNING:
            lines.append(f"{sweep.describe(task)}: {_believed(sweep, task)}")
        else:
            failed += 1
    more = len(lines) - MOST_LISTED
    lines = [*lines[:MOST_LISTED], *([f"{more} more like these"] if more > 0 else [])]
    return lines + (
        [f"{failed} task(s) that failed or need one that did; --retry-failed starts them"] if failed else []
    )


def _believed(sweep: Sweep, task: StageTask) -> str:
    record = records.read_record(sweep, task.key)
    assert record is not None
    silent = records.silent_for(records.record_path(sweep, task.key))
    where = f"running on {record.host}{f' as job {record.job}' if record.job else ''}"
    if silent < 2 * records.BEAT_S:
        return f"{where}, written {silent:.0f} s ago"
    return f"{where}, silent for {silent:.0f} s; taken for dead after {max(0.0, records.SILENT_S - silent):.0f} s more"


def _tail(value: object) -> str:
    """The end of a long setting: paths differ there."""
    text = str(value)
    return text if len(text) <= SETTING_WIDTH else f"…{text[1 - SETTING_WIDTH :]}"


def _head(error: str) -> str:
    return error if len(error) <= ERROR_WIDTH else f"{error[: ERROR_WIDTH - 1]}…"
