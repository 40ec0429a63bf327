"""The logit lens as tables: a row per token, a column per exit, the exit that was taken marked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import heading, quoted, visible

STEPS = 5
"""Steps of the scale of probabilities."""


def grids(lens: Mapping[str, Any], models: Sequence[str], num_layers: int) -> dict[str, Any]:
    """{"heads": of the columns, "problems": [{"heading", "answers": [{"model", "exits", "written", "given", "left_out"}
    in the models' order]}]}; `written` and `given` are rows of the answer and of the prompt's end:
    {"text", "taken", "cells": [{"text", "css", "tip"}]}."""
    depths = [*lens.get("exit_depths", []), num_layers]
    found: dict[str, list[dict[str, Any]]] = {}
    order = {model: place for place, model in enumerate(models)}
    for answer in sorted(lens.get("answers", []), key=lambda a: order.get(a["model"], len(order))):
        rows = [_row(row, depths, written=i >= answer["given"]) for i, row in enumerate(answer["rows"])]
        written = rows[answer["given"] :]
        found.setdefault(str(answer["prompt"]), []).append(
            {
                "model": answer["model"],
                "exits": answer["exits"],
                "given": rows[: answer["given"]],
                "written": written,
                "left_out": answer.get("tokens", len(written)) - len(written),
            }
        )
    problems = [{"heading": heading(prompt), "answers": answers} for prompt, answers in found.items()]
    return {"heads": [*map(str, depths[:-1]), f"end ({num_layers})", "teacher"], "problems": problems}


def _row(row: Mapping[str, Any], depths: Sequence[int], *, written: bool) -> dict[str, Any]:
    cells = [_cell(r, row, depth, written) for r, depth in zip(row["readouts"], depths, strict=True)]
    cells.append(_cell(row["teacher"], row, None, written))
    return {"text": visible(row["text"]), "taken": row["taken"], "cells": cells}


def _cell(readout: Sequence[Sequence[Any]], row: Mapping[str, Any], depth: int | None, written: bool) -> dict[str, Any]:
    """depth None: the teacher's."""
    text, logprob = readout[0]
    kinds = [f"p{min(STEPS - 1, int(math.exp(logprob) * STEPS))}"]
    if text == row["text"]:
        kinds.append("same")
    where = "teacher" if depth is None else f"depth {depth}"
    if depth is not None and written:
        if depth == row["taken"]:
            kinds.append("taken")
            where += ", where it left"
        elif depth > row["taken"]:
            kinds.append("behind")
            where += ", had it gone on"
    lines = [f"{quoted(t)} {math.exp(p):.3f}" for t, p in readout]
    came = "written" if written else "the prompt goes on"
    tip = "\n".join([where, *lines, f"{came}: {quoted(row['text'])}"])
    shown = visible(text).strip("\n") if text.strip(" ") else "␣" * len(text)
    return {"text": shown or "∅", "css": " ".join(kinds), "tip": tip}


def read_lens(text: str) -> dict[str, Any]:
    """lens.json. Raises ValueError if it is none."""
    found = json.loads(text)
    if not isinstance(found, dict) or not all(
        len(row["readouts"]) == len(found["exit_depths"]) + 1 for a in found["answers"] for row in a["rows"]
    ):
        raise ValueError("its readouts don't fit its exits")
    return found
