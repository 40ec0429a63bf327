"""The final answer of a free-form solution, and whether it equals the reference.

Numbers are compared directly, words after normalisation (case, articles, punctuation, white space, LaTeX wrappers), yes
or no and the letters of multiple choice by what the answer begins with. Expressions go to math-verify, whose own time
limits are switched off: it sets them by signals, which work in a main thread only, and a verifier process has a
deadline anyway. Every function is linear in the text, whatever the text is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence, Set
from decimal import Decimal

from .base import NO_ANSWER, Verdict

TAIL = 8000
"""Characters at the end of an answer that are searched for a final answer."""
_LONGEST_EXPRESSION = 200

_RUN_ON = re.compile(r"\n[ \t]{0,8}(?:Question|Problem|Q):|<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>")
# Not "24 answers x 2 points/answer = 48": that is a unit.
_STATED = re.compile(r"(?<!/)(?<!per )\b(?:final )?answer(?: is|:|\s?=)[: ]*([^\n]+)", re.IGNORECASE)
_HASHES = re.compile(r"####([^\n]+)")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# "1.5 x \frac{1}{2}" must not pass for 0.75: working it out is the model's task, not the verifier's.
_UNFINISHED = re.compile(r"[0-9)}\]]\s*(?:[-+*×÷x]|\\times|\\cdot|\\div)\s*[0-9({\\]")
_EXPRESSION = re.compile(r"\\[dt]?frac|\\sqrt|[0-9]\s*/\s*[0-9]|\^|\\pi")
_FORMULA = re.compile(r"[+*/=<>(|\[]|[0-9][A-Za-z]|[A-Za-z0-9)]\s*-\s*[A-Za-z0-9(]")
# Read as a product of its letters, "listen" would equal "silent".
_WORD = re.compile(r"(?<!\\)\b(?!sin\b|cos\b|tan\b|log\b|exp\b)[A-Za-z]{3,}")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{")
_MARKUP = re.compile(r"[{}$*`\"\u201c\u201d]")
_HYPHEN = re.compile(r"(?<=[a-z]{2})-(?=[a-z]{2})")
# "a sin x" is a product.
_ARTICLE = re.compile(r"\b(?:an?|the) (?!(?:sin|cos|tan|log|exp|ln)\b)(?=[a-z]{2})")
_SPACED = re.compile(r"\s*([,;:()\[\]=+/<>|])\s*")
_LETTER = re.compile(r"\(?([A-Z])\)?")
_CHOSEN = re.compile(r"(?:(?:option|choice) )?\(?([A-Za-z])(?:\)|[.:](?=\s|$)|$| [-\u2013\u2014] )", re.IGNORECASE)
_TRUTH = ("yes", "no", "true", "false")
_SAID = re.compile(r"([a-z]+)\s*(?:$|[,.;:!\u2013\u2014-])")
_NAMED = re.compile(r"^[A-Za-z]\s*=\s*|^=\s*|^(?:therefore|thus|hence|then|so|simply|just|exactly|again|also)\b[ ,:]*")
_HEDGED = re.compile(r"\b(?:or|and|not)\b")
# "The answer is not \boxed{18}", and the second box of "\boxed{18} or \boxed{19}".
_DENIED = re.compile(r"(?:\bnot|n't|n\u2019t|\bnever)(?: be| equal(?: to)?)?[ $:(\[\\]*\Z", re.IGNORECASE)
_EITHER = re.compile(r"\}[ $).\\]*\bor\b[ $(\\]*\Z")
# What turns a choice into two: "(B) or (C)", "B) and C)", "(B), (C)". Not "B. A is wrong", not "B) a".
_ANOTHER = re.compile(r"\s*(?:(?:or|and|,|/|&)\s*)+(?:(?:option|choice) )?(?:\([A-Za-z]\)|[A-Z](?=\)|[.,]|\s|$))")
# Evaluating these could take for ever: towers of powers, three-digit exponents, factorials, integrals and sums.
_EXPLOSIVE = re.compile(r"\^[^^]{0,20}\^|\^\s*\{?[^0-9]{0,3}[0-9]{3}|\*\*|!|\\(?:i+nt|oint|sum|prod|lim)(?![a-z])")
_DEEPEST = 8
"""Brackets within brackets that math-verify is given: its time grows with them beyond all bounds."""


def answer_part(text: str) -> str | None:
    """The part of a text that may hold the answer: behind a reasoning block, before a run-on next question.

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
    """Extract (answer as written, whether it was marked); None without an answer.

    Marked: \\boxed{...}, "The answer is ...", "Answer: ..." or "#### ..."; the last mark in the text counts, unless the
    last line is nothing but another number. Without a mark it is the last line if that is nothing but a number, else
    the last number in the text. A box that is denied ("not \\boxed{18}") or one of two ("\\boxed{18} or \\boxed{19}")
    is the answer with that word before it, which equals no reference.
    """
    tail = text[-TAIL:]
    marks = [(match.start(), match[1]) for pattern in (_STATED, _HASHES) for match in pattern.finditer(tail)]
    position, boxed = last_boxed(tail)
    marks.append((position, _taken_back(tail[max(0, position - 40) : max(0, position)]) + boxed))
    last_line = tail.rstrip().rpartition("\n")[2].strip()
    bare = plain_number(last_line)
    for _, written in sorted(marks, reverse=True):
        if written.strip(" .*$"):
            again = bare is not None and bare != _number_at_start(written)
            return (last_line, False) if again else (written.strip(), True)
    if bare is not None:
        return last_line, False
    number = last_number(tail)
    return (number, False) if number is not None else None


def last_boxed(text: str) -> tuple[int, str]:
    """(position, contents) of the last \\boxed{...}, in one pass; (-1, "") if there is none or its braces are open."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return -1, ""
    opening = text.index("{", start)
    level = 0
    for position in range(opening, len(text)):
        level += {"{": 1, "}": -1}.get(text[position], 0)
        if level == 0:
            return start, text[opening + 1 : position]
    return -1, ""


def _taken_back(before: str) -> str:
    """ "not " or "or " if that is what the text before a box makes of it, else nothing."""
    return "not " if _DENIED.search(before) else "or " if _EITHER.search(before) else ""


def same_answer(written: str, reference: str) -> bool:
    """Whether an answer as written equals the reference: as number, choice, words or expression."""
    target = plain_number(reference)
    if target is not None:
        value = _number_at_start(written)
        if value is not None:
            return value == target
        # An integer is written as one: "36/2" is 18 left to the verifier to work out.
        return _words(written) == _words(reference) or (
            target % 1 != 0 and _same_expression(written, str(target), numeric=True)
        )
    letter = _LETTER.fullmatch(reference.strip())
    if letter:
        bare = _bare(written).lstrip()
        chosen = _CHOSEN.match(bare)
        return chosen is not None and chosen[1].upper() == letter[1] and not _ANOTHER.match(bare, chosen.end())
    wanted = _words(reference)
    if wanted in _TRUTH:
        words = _words(written)
        said = _SAID.match(words)
        if said is None or said[1] != wanted:
            return False
        # "yes, no" is not an answer; "yes, no doubt" is one.
        again = _SAID.match(words[said.end() :].removeprefix(" ").removeprefix("or "))
        return again is None or again[1] not in _TRUTH or again[1] == wanted
    end = _SENTENCE_END.search(written)
    if wanted and wanted in (_words(written), _words(written[: end.start()] if end else written)):
        return True
    return _same_expression(written, reference, numeric=False)


def _number_at_start(written: str) -> Decimal | None:
    """The number of "18", "$18 per day", "18. So she earns ..." or "3 x 6 = 18"; None if it isn't one."""
    number = plain_number(written)
    if number is not None:
        return number
    start, boxed = last_boxed(written)
    if start >= 0:
        return None if _taken_back(written[:start]) else plain_number(boxed)
    end = _SENTENCE_END.search(written)
    stated = _NAMED.sub("", (written[: end.start()] if end else written).strip(" $"))
    before, equals, after = stated.rpartition("=")
    if equals and not _HEDGED.search(before.lower()):
        return plain_number(after)
    return plain_number(stated)


def _bare(text: str) -> str:
    """Without LaTeX's text commands, braces, dollar signs, emphasis and quotation marks."""
    return _MARKUP.sub(" ", _WRAPPER.sub(" ", text)).replace("\u2019", "'").strip(" '\u2018")


def _words(text: str) -> str:
    if len(text) > TAIL:
        return ""
    lowered = " ".join(_HYPHEN.sub(" ", _bare(text).casefold()).split())
    return _ARTICLE.sub("", _SPACED.sub(r"\1", lowered)).strip(" .,;:!?")


def _same_expression(written: str, reference: str, numeric: bool) -> bool:
    sides = (written, reference)
    for side in sides:
        if len(side) > _LONGEST_EXPRESSION or not side.isascii() or _EXPLOSIVE.search(side) or _deep(side):
            return False
    if _HEDGED.search(written) and not _HEDGED.search(reference):
        return False
    formulas = all(_FORMULA.search(side) for side in sides) and not any(_WORD.search(_bare(side)) for side in sides)
    if not formulas and not any(_EXPRESSION.search(side) for side in sides):
        return False
    if numeric and _UNFINISHED.search(written):
        return False
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [math_verify.parse(_as_latex(side), parsing_timeout=None) for side in (reference, written)]
    return bool(parsed[0]) and bool(parsed[1]) and math_verify.verify(parsed[0], parsed[1], timeout_seconds=None)


def _deep(text: str) -> bool:
    """Whether brackets of any kind stand deeper within each other than `_DEEPEST`."""
    level = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        if level > _DEEPEST:
            return True
    return False


def _as_latex(text: str) -> str:
    bare = text.strip().rstrip(".")
    return bare if "$" in bare or "\\boxed" in bare else f"${bare}$"


def verify_solution(
    reference: str, text: str, *, vocabulary: Set[str] = frozenset(), also: Sequence[str] = ()
) -> Verdict:
    """Judge a free-form solution. Well formed: its final answer is marked (see `final_answer`).

    `vocabulary`: all words that could be the answer, where they are known; then an answer that isn't the bare word, but
    names exactly one of them, is that one, badly formed. `also`: other ways to write the reference.

    Without a mark the last line is the answer if it is the reference, names one of the vocabulary or is hardly longer
    than the reference; otherwise there is no answer. For a number see `final_answer`.
    """
    part = answer_part(text)
    if part is None:
        return NO_ANSWER
    final = final_answer(part)
    references = (reference, *also)
    if final is not None and final[1]:
        if any(same_answer(final[0], known) for known in references):
            return Verdict(correct=True, well_formed=True, answered=True)
        named = _only(final[0], vocabulary)
        return Verdict(correct=named == reference, well_formed=named is None, answered=True)
    target = plain_number(reference)
    if target is not None:
        if final is None:
            return NO_ANSWER
        value = plain_number(final[0])
        value = value if value is not None else number_value(final[0])
        return Verdict(correct=value == target, well_formed=False, answered=True)
    line = part[-TAIL:].rstrip().rpartition("\n")[2].strip()
    named = _only(line, vocabulary)
    candidates = [line, *([final[0]] if final is not None else [])]
    correct = named == reference or any(same_answer(bare, known) for bare in candidates for known in references)
    short = 0 < len(_words(line).split()) <= max(3, len(_words(reference).split()))
    return Verdict(correct=correct, well_formed=False, answered=correct or named is not None or short)


def _only(text: str, vocabulary: Set[str]) -> str | None:
    """The word of the vocabulary that a text names, if it names one only."""
    named = set(_words(text).replace(",", " ").replace(".", " ").split()) & vocabulary
    return named.pop() if len(named) == 1 else None


# ---- numbers ----

# More digits than any reference has: longer ones are answers, but wrong, and are never converted.
MAX_NUMBER = 30

_SIGNED = r"(?:(?<![0-9A-Za-z)\]])[-\u2212])?[$€£¥₹]?[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?"
_LAST = re.compile(_SIGNED)
_PLAIN = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*(?P<currency>(?:US|USD|EUR|GBP)?\s*[$€£¥₹]?)\s*(?P<inner>[-+\u2212]?)"
    r"(?P<whole>[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?P<fraction>\.[0-9]+)?(?P<unit>\s*[%°A-Za-z€£$¥₹¢][%°²³A-Za-z/.' -]*)?"
)
_UNIT_WORD = re.compile(r"[A-Za-z]+")
# After a number these change its value or hedge it, so "2 thousand" must not pass for 2.
# fmt: off
_NOT_UNITS = frozenset({
    "and", "or", "to", "times", "plus", "minus", "over", "squared", "cubed", "half", "halves", "third", "thirds",
    "quarter", "quarters", "x", "k", "m", "bn", "e", "hundred", "hundreds", "thousand", "thousands", "million",
    "millions", "billion", "billions", "dozen", "dozens",
})
# fmt: on
# LaTeX's thousands: 1{,}200 and 1\,200.
_GROUPED = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3}(?![0-9]))")
_NOISE = re.compile(r"\\text\s*\{|\\mathrm\s*\{|\\textbf\s*\{|\\left|\\right|\\[,;!() \[\]]|[{}*`]|\\\$")


def plain_number(text: str) -> Decimal | None:
    """Value of a text that is one number and nothing but sign, currency, thousands commas and a unit; else None.

    "$1,200.50", "-3", "18 dollars per day", "**42**", "1{,}200", "\\text{18 km/h}" are numbers;
    "3 x 8", "2 thousand", "1/2" and
    digits outside ASCII are not. A percent sign counts as a unit.
    """
    if len(text) > 200:
        return None
    grouped = _GROUPED.sub(",", text)
    cleaned = _NOISE.sub(lambda noise: "$" if noise.group() == "\\$" else " ", grouped).replace("\\%", "%").strip()
    cleaned = cleaned.strip("$").strip() if cleaned.startswith("$") and cleaned.endswith("$") else cleaned
    match = _PLAIN.fullmatch(cleaned.rstrip(" .!"))
    if match is None or (match["sign"] and match["inner"]):
        return None
    if any(word.lower() in _NOT_UNITS for word in _UNIT_WORD.findall(match["unit"] or "")):
        return None
    return _decimal((match["sign"] or match["inner"]) + match["whole"] + (match["fraction"] or ""))


def last_number(text: str) -> str | None:
    """The last number in the text as written ("$1,200"), or None. A hyphen after a digit or letter is not a sign."""
    numbers = _LAST.findall(text)
    return numbers[-1] if numbers else None


def number_value(written: str) -> Decimal | None:
    """Value of a number from `last_number`; None if it is too long or its commas are misplaced."""
    bare = written.translate({ord(sign): None for sign in "$€£¥₹"})
    if "," in bare and not re.fullmatch(r"[-\u2212]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", bare):
        bare = bare.rsplit(",", 1)[1]
    return _decimal(bare)


def _decimal(written: str) -> Decimal | None:
    bare = written.replace(",", "").replace("\u2212", "-")
    return Decimal(bare) if len(bare) <= MAX_NUMBER else None
