"""The result as a table in text and as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ee_megatron.observe.rundir import write_atomic
from ee_megatron.report.numbers import number
from ee_megatron.report.template import render, style


def summary(parts: Sequence[dict[str, Any]]) -> str:
    """A line per part: status, seconds, checks that passed, the first reason if it did not pass."""
    lines = []
    for part in parts:
        judged = [check for check in part["checks"] if check["status"] in ("passed", "failed")]
        passed = sum(check["status"] == "passed" for check in judged)
        reason = f"  {part['reasons'][0]}" if part["reasons"] else ""
        lines.append(
            f"{part['status']:<12} {part['seconds']:>5.0f} s  {passed:>2}/{len(judged):<2} {part['title']}{reason}"
        )
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Text as it is, numbers with three digits, a dash for what is not there."""
    if value is None:
        return "–"
    return number(value) if isinstance(value, int | float) else str(value)


def write_page(path: Path, result: dict[str, Any]) -> None:
    """The whole result, what failed first."""
    machine: list[dict[str, Any]] = next((part["figures"] for part in result["parts"] if part["name"] == "machine"), [])
    facts = [f"{f['name']} {f['value']}" for f in machine if isinstance(f["value"], str)]
    page = render(
        Path(__file__).with_name("page.html.j2"), style=style(), result=result, facts=facts, cell=cell,
    )  # fmt: skip
    write_atomic(path, page)
