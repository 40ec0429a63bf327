"""A sweep's state as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from . import manifest as disk
from .executors import describe_task, state_now
from .sweep import Sweep

ERROR_WIDTH = 90
SETTING_WIDTH = 40


def status_table(sweep: Sweep, queue: Mapping[str, str]) -> str:
    """Shared tasks, then one line per run, then how many are in which state. `queue`: what Slurm has."""
    lines = [f"{sweep.directory}"]
    for task in sweep.tasks:
        if len(task.runs) > 1:
            record = disk.read_record(sweep, task.key)
            spent = f", {record.seconds:.0f} s" if record else ""
            lines.append(f"{describe_task(sweep, task)}: {state_now(sweep, task, queue)}{spent}")
    keys = list(dict.fromkeys(key for run in sweep.runs for key in run.settings))
    table = [["run", *keys, "status", "stage", "starts", "seconds", "accuracy", "depth", "reward", ""]]
    states: dict[str, int] = {}
    for run in sweep.runs:
        own = sweep.task(run.tasks[-1])
        state = disk.run_state(sweep, run)
        if state not in (disk.FINISHED, disk.FAILED):
            state = state_now(sweep, own, queue)
        states[state] = states.get(state, 0) + 1
        record, result = disk.read_record(sweep, own.key), disk.read_result(sweep, run.id) or {}
        values = [_tail(run.settings.get(key, "")) for key in keys]
        figures = [result.get("accuracy"), result.get("mean_depth"), result.get("reward")]
        table.append(
            [
                run.id, *values, state, record.stage if record else "", str(record.starts) if record else "",
                f"{record.seconds:.0f}" if record else "", *("" if v is None else f"{v:.3f}" for v in figures),
                _short(disk.error_of(sweep, run), ERROR_WIDTH),
            ]
        )  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.append(", ".join(f"{count} {state}" for state, count in states.items()))
    return "\n".join(lines)


def _tail(value: object) -> str:
    """The end of a long setting: paths differ there."""
    text = str(value)
    return text if len(text) <= SETTING_WIDTH else f"…{text[1 - SETTING_WIDTH :]}"


def _short(value: object, width: int) -> str:
    text = str(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
