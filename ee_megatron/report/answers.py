"""Answers token by token, side by side: what the page shows of each, and what the pointer is told."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .numbers import is_number
from .results import Results
from .svg import legend_mark

# A prompt with worked examples is long; its end is the problem, the whole stands behind a fold.
PROMPT_SHOWN = 320


def problems(results: Results) -> list[dict[str, Any]]:
    """Answers grouped by prompt, one column per model in the method's order, its exit rules one below the other."""
    # Asked once: the results look through every token for them.
    order, outcomes = {model: index for index, model in enumerate(results.models)}, results.outcomes
    grouped: dict[str, list[dict[str, Any]]] = {}
    for answer in results.answers:
        grouped.setdefault(str(answer.get("prompt", "")), []).append(answer)
    found = []
    for prompt, answers in grouped.items():
        answers.sort(key=lambda a: order[str(a.get("model", ""))])
        columns: dict[str, list[dict[str, Any]]] = {}
        for a in answers:
            columns.setdefault(str(a.get("model", "")), []).append(_answer(a, outcomes, order))
        found.append(
            {
                "heading": heading(prompt),
                "prompt": prompt,
                "reference": answers[0].get("reference", ""),
                "columns": list(columns.values()),
            }
        )
    # Prompts that every model answered first: they are the comparison.
    return sorted(found, key=lambda p: -len(p["columns"]))


def heading(prompt: str) -> str:
    """A prompt, or its end where it is long."""
    return prompt if len(prompt) <= PROMPT_SHOWN else "… " + prompt[-PROMPT_SHOWN:].lstrip()


def _answer(answer: Mapping[str, Any], outcomes: Sequence[int], order: Mapping[str, int]) -> dict[str, Any]:
    model = str(answer.get("model", ""))
    return {
        "model": model,
        "mark": legend_mark(order[model]),
        "exits": answer.get("exits", ""),
        "text": answer.get("text", ""),
        **shown_answer(answer, outcomes),
    }


def shown_answer(answer: Mapping[str, Any], outcomes: Sequence[int]) -> dict[str, Any]:
    """{"correct", "mean": mean depth in words, "tokens", "left_out": how many tokens are missing in the middle}."""
    tokens = answer.get("tokens") or []
    depths = [t["depth"] for t in tokens if is_number(t.get("depth"))]
    return {
        "correct": answer.get("correct"),
        "mean": f"{sum(depths) / len(depths) / outcomes[-1]:.2f}" if depths else "–",
        "tokens": [_token(token, outcomes) for token in tokens],
        "left_out": answer.get("left_out", 0),
    }


def _token(token: Mapping[str, Any], outcomes: Sequence[int]) -> dict[str, Any]:
    depth = token.get("depth")
    index = min(range(len(outcomes)), key=lambda i: abs(outcomes[i] - (depth or outcomes[-1])))
    lines = [f"depth {depth if depth is not None else '–'} of {outcomes[-1]}"]
    for key, name in (("logprob", "probability"), ("exit_logprob", "exit probability")):
        if is_number(token.get(key)):
            lines.append(f"{name} {math.exp(token[key]):.3f}")
    if is_number(token.get("entropy")):
        lines.append(f"entropy {token['entropy']:.3f} nats")
    lines += [_reading(reading) for reading in token.get("readings") or []]
    text = str(token.get("text", ""))
    return {"text": visible(text), "index": index, "tip": f"{quoted(text)}\n" + "\n".join(lines)}


def visible(text: str) -> str:
    """A token with signs for what has none."""
    return text.replace("\n", "↵\n").replace("\t", "⇥") or "∅"


def _reading(reading: Mapping[str, Any]) -> str:
    """What one exit would have written, as a line: who, the token, its probability, the hazard."""
    who = "teacher" if reading.get("depth") is None else f"exit {reading['depth']}"
    line = f"{who}: {quoted(str(reading.get('text', '')))} {math.exp(reading['logprob']):.2f}"
    hazard = reading.get("hazard")
    return f"{line}, hazard {hazard:.2f}" if is_number(hazard) else line


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
