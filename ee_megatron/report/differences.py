"""All answers of two models side by side, found by what changed: the data that the page's script shows in pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .answers import heading
from .results import Results

TOKENS = 400_000
"""Tokens that the page holds for this, all together; where there are more, long answers lose their middle."""
LONGEST, SHORTEST = 400, 24


def problems_of(results: Results) -> list[dict[str, Any]]:
    """The answers that results.json keeps, as lines of answers.jsonl: for evaluations that left no such file."""
    lines: dict[str, dict[str, Any]] = {}
    for answer in results.answers:
        row = results.chosen(str(answer.get("model", "")))
        if row is None or row.get("exits") != answer.get("exits"):
            continue
        prompt = str(answer.get("prompt", ""))
        line = lines.setdefault(
            str(answer.get("id", prompt)), {"prompt": prompt, "reference": answer.get("reference", ""), "answers": {}}
        )
        tokens = answer.get("tokens") or []
        line["answers"][f"{answer['model']}, {answer['exits']}"] = {
            "correct": bool(answer.get("correct")),
            "pieces": [str(token.get("text", "")) for token in tokens],
            "depths": [token.get("depth", 0) for token in tokens],
        }
    return list(lines.values())


def differences(results: Results, problems: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the script needs, and how many problems there are; None without two models that answered the same ones.

    {"labels", "first", "second": which two are compared to begin with, "count", "cut": whether answers lost their
    middle, "data": JSON that is safe within a script element}. Of an answer: [right, tokens, mean depth as a share of
    the layers, pieces, place of each piece's depth on the scale, place of the gap or -1].
    """
    labels = list(results.in_order(dict.fromkeys(label for p in problems for label in p["answers"])))
    shared = [p for p in problems if len(p["answers"]) > 1]
    if len(labels) < 2 or not shared:
        return None
    answers = sum(len(p["answers"]) for p in shared)
    longest = max(SHORTEST, min(LONGEST, TOKENS // answers))
    outcomes, layers = results.outcomes, results.num_layers
    cut = any(len(a["depths"]) > longest for p in shared for a in p["answers"].values())
    entries = [
        [
            heading(str(p["prompt"])),
            str(p.get("reference", "")),
            [_answer(p["answers"].get(label), outcomes, layers, longest) for label in labels],
        ]
        for p in shared
    ]
    first, second = (labels[-2], labels[-1]) if len(labels) > 1 else (labels[0], labels[0])
    found = {"labels": labels, "outcomes": outcomes, "problems": entries}
    return {
        "labels": labels,
        "first": first,
        "second": second,
        "count": len(shared),
        "cut": longest if cut else 0,
        "data": embedded(found),
    }


def embedded(value: Any) -> Markup:
    """JSON that ends no script element, whatever it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _answer(answer: Mapping[str, Any] | None, outcomes: Sequence[int], layers: int, longest: int) -> list[Any] | None:
    if answer is None:
        return None
    pieces, depths = answer["pieces"], answer["depths"]
    places = [min(range(len(outcomes)), key=lambda i: abs(outcomes[i] - depth)) for depth in depths]
    mean = sum(depths) / len(depths) / layers if depths else None
    gap = -1
    if len(pieces) > longest:
        gap = longest // 2
        pieces, places = (part[:gap] + part[gap - longest :] for part in (pieces, places))
    return [int(bool(answer["correct"])), len(depths), None if mean is None else round(mean, 4), pieces, places, gap]
