"""Answers for the report page: token by token, two models side by side, and every exit's prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .results import Results
from .tables import is_number

# A prompt with worked examples is long; its end is the problem, the whole stands behind a fold.
PROMPT_SHOWN = 320
TOKENS = 400_000
"""Tokens of all answers that the page holds for `differences`; where there are more, long answers lose their middle."""
LONGEST, SHORTEST = 400, 24


def problems(results: Results) -> list[dict[str, Any]]:
    """Answers of results.json by prompt, one column per model, its exit rules below each other: {"heading", "prompt",
    "reference", "columns": {model: [{"model", "exits", "text", …}]}}; tokens as of `shown_answer`."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for answer in results.answers:
        prompt = answer["prompt"]
        new = {"heading": heading(prompt), "prompt": prompt, "reference": answer["reference"], "columns": {}}
        columns = by_prompt.setdefault(prompt, new)["columns"]
        columns.setdefault(answer["model"], []).append(shown_answer(answer, results.outcomes))
    # Prompts that every model answered first: they are the comparison.
    return sorted(by_prompt.values(), key=lambda problem: -len(problem["columns"]))


def heading(prompt: str) -> str:
    """A prompt, or the end of a long one."""
    return prompt if len(prompt) <= PROMPT_SHOWN else "… " + prompt[-PROMPT_SHOWN:].lstrip()


def shown_answer(answer: Mapping[str, Any], outcomes: Sequence[int]) -> dict[str, Any]:
    """An answer with "mean", its mean depth as text, and "tokens" as [{"text", "index": of its depth, "tip"}];
    "left_out": number of tokens omitted in the middle."""
    tokens = answer["tokens"]
    depths = [token["depth"] for token in tokens]
    return {
        "text": "", "left_out": 0, **answer,
        "mean": f"{sum(depths) / len(depths) / outcomes[-1]:.2f}" if depths else "–",
        "tokens": [_token(token, outcomes) for token in tokens],
    }  # fmt: skip


def _token(token: Mapping[str, Any], outcomes: Sequence[int]) -> dict[str, Any]:
    depth, text = token["depth"], token["text"]
    lines = [_quoted(text), f"depth {depth} of {outcomes[-1]}"]
    for key, name in (("logprob", "probability"), ("exit_logprob", "exit probability")):
        if is_number(token.get(key)):
            lines.append(f"{name} {math.exp(token[key]):.3f}")
    if is_number(token.get("entropy")):
        lines.append(f"entropy {token['entropy']:.3f} nats")
    for reading in token.get("readings") or []:
        who = "teacher" if reading.get("depth") is None else f"exit {reading['depth']}"
        hazard = f", hazard {reading['hazard']:.2f}" if is_number(reading.get("hazard")) else ""
        lines.append(f"{who}: {_quoted(reading['text'])} {math.exp(reading['logprob']):.2f}{hazard}")
    return {"text": visible(text), "index": _place(depth, outcomes), "tip": "\n".join(lines)}


def _place(depth: float, outcomes: Sequence[int]) -> int:
    """Index of the exit depth that is nearest."""
    return min(range(len(outcomes)), key=lambda i: abs(outcomes[i] - depth))


def visible(text: str) -> str:
    """A token's text with symbols for invisible characters."""
    return text.replace("\n", "↵\n").replace("\t", "⇥") or "∅"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def differences(results: Results, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Data for the page's script to compare two models' answers (`lines` of answers.jsonl), or None without two models
    that answered the same problems.

    {"labels", "first", "second": which two are compared to begin with, "count", "cut": whether answers lost their
    middle, "data": JSON that is safe within a script element}. Of an answer: [right, tokens, mean depth as a share of
    the layers, pieces, place of each piece's depth on the scale, place of the gap or -1].
    """
    labels = sorted(dict.fromkeys(label for line in lines for label in line["answers"]), key=results.rank)
    shared = [line for line in lines if len(line["answers"]) > 1]
    if not shared:
        return None
    longest = max(SHORTEST, min(LONGEST, TOKENS // sum(len(line["answers"]) for line in shared)))
    outcomes, layers = results.outcomes, results.num_layers

    def compact(answer: Mapping[str, Any] | None) -> list[Any] | None:
        if answer is None:
            return None
        pieces, depths, gap = answer["pieces"], answer["depths"], -1
        places = [_place(depth, outcomes) for depth in depths]
        mean = round(sum(depths) / len(depths) / layers, 4) if depths else None
        if len(pieces) > longest:
            gap = longest // 2
            pieces, places = (part[:gap] + part[gap - longest :] for part in (pieces, places))
        return [int(bool(answer["correct"])), len(depths), mean, pieces, places, gap]

    entries = [
        [heading(p["prompt"]), p["reference"], [compact(p["answers"].get(label)) for label in labels]] for p in shared
    ]
    cut = longest if any(len(a["depths"]) > longest for p in shared for a in p["answers"].values()) else 0
    data = embedded({"labels": labels, "outcomes": outcomes, "problems": entries})
    return {"labels": labels, "first": labels[-2], "second": labels[-1], "count": len(shared), "cut": cut, "data": data}


def embedded(value: Any) -> Markup:
    """JSON that can't end a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
