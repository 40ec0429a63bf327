"""Which tokens of an answer are which: classes, and the final answer's span."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .chain import MARK

CLASSES = ("digits", "operators", "words", "other")
_OPERATORS = set("+-*/=×÷^<>%")
_NUMBER = re.compile(r"\s*[-+$€£]?[0-9][0-9,.]*")


def token_class(text: str) -> str:
    """digits, operators, words or other (punctuation, white space, special tokens), by what a token's text holds."""
    bare = text.strip()
    if not bare:
        return "other"
    if any(c.isdigit() for c in bare):
        return "digits"
    if set(bare) <= _OPERATORS or bare == "x":
        return "operators"
    return "words" if any(c.isalpha() for c in bare) else "other"


def answer_span(texts: Sequence[str]) -> slice:
    """The tokens of the final answer: those that write the number after the last "The answer is"; empty without one.

    `texts` are the tokens' own texts. Where what follows the mark is no number, it is the rest of the line.
    """
    whole = "".join(texts)
    at = whole.rfind(MARK)
    if at < 0:
        return slice(0, 0)
    begin = at + len(MARK)
    rest = whole[begin:].split("\n", 1)[0]
    number = _NUMBER.match(rest)
    written = number[0] if number else rest
    end = begin + len(written.rstrip(" .,"))
    start, first, last, position = begin + len(written) - len(written.lstrip()), None, 0, 0
    for t, text in enumerate(texts):
        after = position + len(text)
        if after > start and position < end:
            first, last = t if first is None else first, t + 1
        position = after
    return slice(0, 0) if first is None else slice(first, last)
