"""Reading numbers out of generated text. Every function is linear in the text, whatever the text is."""

from __future__ import annotations

import re
from decimal import Decimal

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
    """The value of a text that is one number and nothing but sign, currency, thousands commas and a unit; else None.

    "$1,200.50", "-3", "18 dollars per day", "**42**", "1{,}200", "\\text{18 km/h}" are numbers;
    "3 x 8", "2 thousand", "1/2" and
    digits outside ASCII are not. A percent sign counts as a unit.
    """
    if len(text) > 200:
        return None
    grouped = _GROUPED.sub(",", text)
    cleaned = _NOISE.sub(lambda found: "$" if found.group() == "\\$" else " ", grouped).replace("\\%", "%").strip()
    cleaned = cleaned.strip("$").strip() if cleaned.startswith("$") and cleaned.endswith("$") else cleaned
    match = _PLAIN.fullmatch(cleaned.rstrip(" .!"))
    if match is None or (match["sign"] and match["inner"]):
        return None
    if any(word.lower() in _NOT_UNITS for word in _UNIT_WORD.findall(match["unit"] or "")):
        return None
    return _decimal((match["sign"] or match["inner"]) + match["whole"] + (match["fraction"] or ""))


def last_number(text: str) -> str | None:
    """The last number in the text as written ("$1,200"), or None. A hyphen after a digit or letter is no sign."""
    found = _LAST.findall(text)
    return found[-1] if found else None


def number_value(written: str) -> Decimal | None:
    """The value of what `last_number` found; None if it is too long to be compared or its commas are misplaced."""
    bare = written.translate({ord(sign): None for sign in "$€£¥₹"})
    if "," in bare and not re.fullmatch(r"[-\u2212]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", bare):
        bare = bare.rsplit(",", 1)[1]
    return _decimal(bare)


def _decimal(written: str) -> Decimal | None:
    bare = written.replace(",", "").replace("\u2212", "-")
    return Decimal(bare) if len(bare) <= MAX_NUMBER else None
