"""The final answer of a free-form solution, and whether it equals the reference.

Numbers are compared directly. Only expressions (fractions, roots, LaTeX) go to math-verify, whose own time limits are
switched off: it sets them by signals, which work in a main thread only, and a verifier process has a deadline anyway.
"""

from __future__ import annotations

import logging
import re
from decimal import Decimal

from .base import Verdict
from .numbers import last_number, number_value, plain_number

TAIL = 8000
"""Characters at the end of an answer that are searched for a final answer."""
_LONGEST_EXPRESSION = 200

_RUN_ON = re.compile(r"\n[ \t]{0,8}(?:Question|Problem|Q):|<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>")
_STATED = re.compile(r"\b(?:final )?answer(?: is|:|\s?=)[: ]*([^\n]+)", re.IGNORECASE)
_HASHES = re.compile(r"####([^\n]+)")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# "1.5 x \frac{1}{2}" must not pass for 0.75: working it out is the model's task, not the verifier's.
_UNFINISHED = re.compile(r"[0-9)}\]]\s*(?:[-+*×÷x]|\\times|\\cdot|\\div)\s*[0-9({\\]")
_EXPRESSION = re.compile(r"\\[dt]?frac|\\sqrt|[0-9]\s*/\s*[0-9]|\^|\\pi")
# Evaluating these could take for ever: towers of powers, three-digit exponents, factorials.
_EXPLOSIVE = re.compile(r"\^[^^]{0,20}\^|\^\s*\{?[^0-9]{0,3}[0-9]{3}|\*\*|!")


def answer_part(text: str) -> str | None:
    """What of a text is the answer: after a reasoning model's reasoning block, before a run-on next question.

    None if a reasoning block was opened and never closed: the answer had not begun.
    """
    before, closing, after = text.rpartition("</think>")
    if closing:
        text = after
    elif "<think>" in before or "<think>" in text:
        return None
    run_on = _RUN_ON.search(text)
    return text[: run_on.start()] if run_on else text


def final_answer(text: str) -> tuple[str, bool] | None:
    """(answer as written, whether it was marked), or None.

    Marked: \\boxed{...}, "The answer is ...", "Answer: ..." or "#### ..."; the last mark in the text counts. Otherwise
    the last line if that is nothing but a number, else the last number in the text.
    """
    tail = text[-TAIL:]
    marks = [(found.start(), found[1]) for pattern in (_STATED, _HASHES) for found in pattern.finditer(tail)]
    boxed = _last_boxed(tail)
    if boxed is not None:
        marks.append(boxed)
    for _, written in sorted(marks, reverse=True):
        if written.strip(" .*$"):
            return written.strip(), True
    lines = tail.rstrip().rsplit("\n", 1)
    if plain_number(lines[-1]) is not None:
        return lines[-1].strip(), False
    number = last_number(tail)
    return (number, False) if number is not None else None


def _last_boxed(text: str) -> tuple[int, str] | None:
    """(position, contents) of the last \\boxed{...} whose braces balance, in one pass over what follows it."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    opening = text.index("{", start)
    level = 0
    for position in range(opening, len(text)):
        level += {"{": 1, "}": -1}.get(text[position], 0)
        if level == 0:
            return start, text[opening + 1 : position]
    return None


def same_answer(written: str, reference: str) -> bool:
    """Whether an answer as written equals the reference: as numbers, as expressions, or as the same words."""
    target = plain_number(reference)
    value = _number_at_start(written)
    if target is not None and value is not None:
        return value == target
    if _words(written) == _words(reference):
        return True
    if target is not None:
        # An integer is written as one: "36/2" is 18 left to the verifier to work out.
        return target % 1 != 0 and _same_expression(written, str(target), numeric=True)
    return _same_expression(written, reference, numeric=False)


def _number_at_start(written: str) -> Decimal | None:
    """The number of "18", "$18 per day" or "18. So she earns ..."; None if it is none or an expression."""
    number = plain_number(written)
    if number is not None:
        return number
    if boxed := _last_boxed(written):
        return plain_number(boxed[1])
    end = _SENTENCE_END.search(written)
    return plain_number(written[: end.start()]) if end else None


def _words(text: str) -> str:
    return " ".join(re.sub(r"\\text\s*\{|[{}$*`\"']", " ", text).rstrip(" .!").lower().split())


def _same_expression(written: str, reference: str, numeric: bool) -> bool:
    if not any(_EXPRESSION.search(side) for side in (written, reference)):
        return False
    for side in (written, reference):
        if len(side) > _LONGEST_EXPRESSION or not side.isascii() or _EXPLOSIVE.search(side):
            return False
    if numeric and _UNFINISHED.search(written):
        return False
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [math_verify.parse(_as_latex(side), parsing_timeout=None) for side in (reference, written)]
    return bool(parsed[0]) and bool(parsed[1]) and math_verify.verify(parsed[0], parsed[1], timeout_seconds=None)


def _as_latex(text: str) -> str:
    bare = text.strip().rstrip(".")
    return bare if "$" in bare or "\\boxed" in bare else f"${bare}$"


def verify_solution(reference: str, text: str) -> Verdict:
    """The verdict on a free-form solution. Well formed: its final answer is marked (see `final_answer`)."""
    part = answer_part(text)
    found = final_answer(part) if part is not None else None
    if found is None:
        return Verdict(correct=False, well_formed=False, answered=False)
    written, marked = found
    if not marked and plain_number(reference) is not None:
        value = plain_number(written)
        value = value if value is not None else number_value(written)
        return Verdict(correct=value == plain_number(reference), well_formed=False, answered=True)
    return Verdict(correct=same_answer(written, reference), well_formed=marked, answered=True)
