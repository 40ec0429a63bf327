"""Free-form answers: every way to write the right one counts, a wrong one in the same words does not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import Verdict, VerifierPool, make_task
from ee_megatron.tasks.answers import plain_number, same_answer, verify_solution
from ee_megatron.types import Prompt

# {n} is the bare number, {c} the one with thousands commas, {l} with LaTeX's.
STYLES = {
    "boxed": ("So \\[ \\boxed{{{n}}} \\]", "$\\boxed{{{c}}}$", "Thus \\boxed{{{l}}}."),
    "stated": ("The answer is {n}.", "The answer is: **{c}**", "**Final answer:** {n}"),
    "hashes": ("#### {n}", "#### {c}"),
    "bare last line": ("{n}", "{c}"),
    "units, commas, currency": (
        "The answer is ${c}.",
        "\\boxed{{\\${c}}}",
        "\\boxed{{{n}\\text{{ apples}}}}",
        "#### {c} dollars",
        "The answer is €{c} per day.",
        "{c} km/h",
        "USD {n}",
    ),
}
WELL_FORMED = {"boxed", "stated", "hashes"}


def written(value: Decimal, style: str) -> Iterator[str]:
    for template in STYLES[style]:
        plain = f"{value:,f}"
        yield template.format(n=plain.replace(",", ""), c=plain, l=plain.replace(",", "{,}"))


def perturbed(value: Decimal) -> list[Decimal]:
    """Off by one either way, by a digit at the front or the end, by the sign, by a fraction."""
    sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    others = [
        value + 1,
        value - 1,
        -value,
        value + Decimal("0.5"),
        value * 10,
        Decimal((sign, (digits[0] % 9 + 1, *digits[1:]), exponent)),
        Decimal((sign, (*digits, 7), exponent)),
        Decimal((sign, (*digits[:-1], (digits[-1] + 3) % 10), exponent)),
    ]
    return [other for other in others if other != value]


def check(gold: str, steps: str) -> tuple[int, int]:
    """(right answers accepted, perturbed ones rejected); fails at the first text that is judged wrongly."""
    value = plain_number(gold)
    assert value is not None, gold
    accepted = rejected = 0
    for style in STYLES:
        for text in written(value, style):
            verdict = verify_solution(gold, f"{steps}\n{text}")
            assert verdict.correct and verdict.answered, (gold, text)
            assert verdict.reward == (1.0 if style in WELL_FORMED or verdict.well_formed else 0.5), (gold, text)
            accepted += 1
        for other in perturbed(value):
            for text in written(other, style):
                verdict = verify_solution(gold, f"{steps}\n{text}")
                assert not verdict.correct and verdict.reward == 0.0, (gold, text)
                rejected += 1
    return accepted, rejected


# The first call imports math-verify.
@settings(deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(0, 99), st.integers(0, 10**6))
def test_a_number_is_accepted_in_every_style_and_rejected_when_perturbed(whole: int, cents: int, step: int) -> None:
    for gold in {str(whole), f"{whole:,}", f"{whole}.{cents:02d}"}:
        check(gold, f"First {step} + 1 = {step + 1}, and then the rest.")


@pytest.mark.skipif(not os.environ.get("EE_GSM8K"), reason="EE_GSM8K does not name a directory with GSM8K's JSONL")
def test_all_gold_answers_of_gsm8k_are_accepted_in_every_style_and_rejected_when_perturbed() -> None:
    rows = accepted = rejected = 0
    for part in ("train", "test"):
        for line in (Path(os.environ["EE_GSM8K"]) / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
            steps, _, gold = json.loads(line)["answer"].rpartition("####")
            right, wrong = check(gold.strip(), steps.strip())
            rows, accepted, rejected = rows + 1, accepted + right, rejected + wrong
    texts = sum(map(len, STYLES.values()))
    print(f"{rows} gold answers: {accepted} texts accepted, {rejected} perturbed texts rejected")
    assert (rows, accepted) == (8792, 8792 * texts)
    assert rejected > 6 * accepted


SAME = [
    # A reference, what equals it, and what does not.
    ("1200", ["1{,}200", "1\\,200", "US$1,200", "1,200 apples"], ["1{,}20", "1,20"]),
    ("75", ["75¢"], []),
    ("5", ["x = 5"], []),
    ("7", [], ["x = 5 or x = 7"]),
    ("18", ["3 x 6 = 18", "3 x 6 = 18 dollars. So", "therefore 18"], ["not 18", "17 or 18", "36/2"]),
    ("2", [], ["therefore 2 thousand"]),
    # Words: case, articles, punctuation, white space, LaTeX.
    ("eiffel tower", ["The  Eiffel tower."], []),
    ("Paris", ["\\text{Paris}", "“paris”!", "Paris. It is the capital of France."], ["Paris or London"]),
    ("(1,2)", ["( 1 , 2 )"], []),
    ("ice cream", ["an ice-cream"], []),
    ("a", [], ["the"]),
    ("the", [], [""]),
    ("listen", [], ["silent"]),
    ("b", [], ["a + b"]),
    ("2*3", [], ["23"]),
    ("-x", [], ["x"]),
    # Yes or no.
    ("yes", ["Yes, because she saw it.", "YES", "yes, no doubt"], ["no", "yes and no", "yes, no"]),
    ("no", ["**No.**", "no, no, no"], ["on", "nobody", "no. Or yes."]),
    ("true", [], ["not true"]),
    # Letters of a choice.
    (
        "B",
        ["B", "(b)", "\\textbf{(B) } 17", "Option B", "B. Paris", "(B) and a half of it", "B. Option A is out."],
        ["A", "(B) or (C)", "B) and C)", "(B), (C)", "(b)/(c)", "Banana"],
    ),
    ("(B)", ["B: Paris"], []),
    ("A", [], ["A or B", "A, B"]),
    # Expressions.
    ("x+1", ["1 + x"], ["x-1", "not x+1"]),
    ("\\frac{1}{2}", ["\\frac{2}{4}"], []),
    ("1/2", ["0.5"], ["\\int_0^1 x dx"]),
    ("\\frac{12}{3}", [], ["\\frac{1}{23}"]),
    ("\\sqrt{8}", ["2\\sqrt{2}"], []),
    ("0.75", [], ["1.5 x \\frac{1}{2}"]),
    ("3/4", [], ["0.5 or 3/4"]),
    ("1+x", ["(" * 8 + "x+1" + ")" * 8], ["(" * 9 + "x+1" + ")" * 9]),
]


@pytest.mark.parametrize(("reference", "right", "wrong"), SAME, ids=[case[0] for case in SAME])
def test_same_answer(reference: str, right: list[str], wrong: list[str]) -> None:
    assert {text: same_answer(text, reference) for text in right + wrong} == {
        **dict.fromkeys(right, True),
        **dict.fromkeys(wrong, False),
    }


RIGHT, BADLY_FORMED, WRONG = Verdict(True, True, True), Verdict(True, False, True), Verdict(False, True, True)
UNMARKED, NONE = Verdict(False, False, True), Verdict(False, False, False)


@pytest.mark.parametrize(
    ("reference", "text", "verdict"),
    [
        # The last mark counts, unless a bare number follows it.
        ("18", "The answer is 17.\nWait. The answer is 18.", RIGHT),
        ("18", "\\boxed{18}\nNo: the answer is 17.", WRONG),
        ("1200", "It is 1000 + 200.\n1,200", BADLY_FORMED),
        ("1200", "The answer is 1,300.\nNo:\n1,200", BADLY_FORMED),
        ("1200", "The answer is 1,200.\nNo:\n1,300", UNMARKED),
        ("1200", "The answer is 1,200.\n1200", RIGHT),
        # A unit of answers is no mark.
        ("66", "24 correct answers * 2 points/answer = 48 points.\n66", BADLY_FORMED),
        ("66", "24 answers at 2 points per answer = 48 points.\n66", BADLY_FORMED),
        # Neither a next question nor what is thought.
        ("18", "The answer is 17.\nQuestion: What is 9 + 9?\nAnswer: 18", WRONG),
        ("18", "<think>\\boxed{17}</think>The answer is 18", RIGHT),
        ("18", "<think>It must be \\boxed{18} so", NONE),
        # Boxes that are taken back.
        ("18", "It is not that, so \\boxed{18}.", RIGHT),
        ("18", "\\boxed{19}? No: \\boxed{18}", RIGHT),
        ("18", "It is not \\boxed{18}.", WRONG),
        ("18", "The answer is not $\\boxed{18}$", WRONG),
        ("18", "It isn't equal to \\boxed{18}", WRONG),
        ("18", "\\boxed{18} or \\boxed{19}", WRONG),
        ("18", "\\boxed{19} or \\boxed{18}", WRONG),
        # Numbers that are left to be worked out.
        ("18", "\\boxed{9 + 9}", WRONG),
        ("18", "The answer is 2 \\times 9", WRONG),
        ("18", "\\boxed{\\frac{36}{2}}", WRONG),
        ("2", "The answer is 2 thousand", WRONG),
        ("0.75", "The answer is 1.5 * \\frac{1}{2}", WRONG),
        ("0.75", "\\boxed{\\frac{3}{4}}", RIGHT),
        ("\\frac{3}{4}", "The answer is 3/4", RIGHT),
        ("x^2+1", "\\boxed{1 + x^2}", RIGHT),
        ("x^2+1", "\\boxed{x^2 - 1}", WRONG),
        # Words, and answers without a mark.
        ("Paris", "The answer is paris.", RIGHT),
        ("Paris", "The answer is London.", WRONG),
        ("18", "so she has 18 apples.", BADLY_FORMED),
        ("18", "I can't say.", NONE),
        ("Paris", "It is on the Seine.\nParis", BADLY_FORMED),
        ("Paris", "London", UNMARKED),
        ("Paris", "One would have to look it up in an atlas", NONE),
        ("yes", "No.", UNMARKED),
        ("B", "It must be the second.\nB", BADLY_FORMED),
        ("\\frac{1}{2}", "So it is \\frac{1}{2}\n\\frac{1}{2}", BADLY_FORMED),
        ("Paris", "", NONE),
    ],
)
def test_verdict_on_a_solution(reference: str, text: str, verdict: Verdict) -> None:
    assert verify_solution(reference, text) == verdict


def test_numbers_in_words_and_units() -> None:
    accepted = {"$1,200.50": "1200.5", "18 dollars per day": "18", "**42**": "42", "\\text{18 km/h}": "18", "50%": "50"}
    assert {text: str(plain_number(text)).rstrip("0") for text in accepted} == {
        text: value.rstrip("0") for text, value in accepted.items()
    }
    for text in ("3 x 8", "2 thousand", "18 or 20", "1,20", "1/2", "٤٢", "18 and a half", ""):
        assert plain_number(text) is None, text
    assert same_answer("18. So she earns $18 a day", "18") and not same_answer("18. So", "19")


def hostile(marker: Path) -> list[str]:
    """Texts that are long, deep, odd or would do something if they were run."""
    call = f"__import__('os').system('touch {marker}')"
    # fmt: off
    inner = [
        "7" * 100_000, "1," * 50_000, "{" * 100_000, "{" * 50_000 + "42" + "}" * 50_000, "-" * 100_000, "#" * 100_000,
        "(" * 150 + "42^2" + ")" * 150, "\\frac{1}" * 12_000, "\\frac{" * 20 + "1" + "}{2}" * 20,
        "\\sqrt{" * 30 + "2" + "}" * 30, "[" * 90 + "x+1" + "]" * 90, "answer is " * 10_000,
        "\\int_0^1 \\int_0^1 \\int_0^1 \\sin(x^2 y^2 z^2) dx dy dz", "\\sum_{n=1}^{99} \\frac{1}{n^2}",
        "9^{9^{9^9}}", "9^9^9^9", "(x+1)^{99}-(x-1)^{99}", "99999999!", "10^{100000000}", "1e999999999",
        call, f"{call}^2", f"\\frac{{{call}}}{{2}}", f"open('{marker}', 'w')",
        "٤٢", "４２", "𝟒𝟐", "四十二", "4\u200b2", "\u202e24", "NaN", "inf", "\x00" * 1000, "\ud800", "%s%n{0}{}",
        "\n" * 100_000, " " * 100_000 + "17",
    ]
    # fmt: on
    return [form.format(text) for text in inner for form in ("{}", "The answer is {}", "\\boxed{{{}}}", "#### {}")]


def test_hostile_answers_end_within_the_deadline_and_are_never_right(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}?", "answer": "42"}) + "\n" for i in range(20)))
    task = make_task(TaskConfig("dataset", path=str(rows), validation=2, evaluation=2))
    marker = tmp_path / "touched"
    texts = hostile(marker)
    deadline = 5.0  # The default; a busy machine loads parts of sympy for longer than two seconds.
    for reference in ("42", "4.2", "x^2+1", "forty-two"):
        prompt = Prompt("p", "6 x 7?", reference, "dataset")
        with VerifierPool(task, deadline_s=deadline) as pool:
            pool.verify_many([(prompt, "42")])
            verdicts = pool.verify_many([(prompt, text) for text in texts])
            timeouts = pool.timeouts
        assert not any(verdict.correct for verdict in verdicts)
        # What math-verify can't finish never reaches it.
        assert timeouts == 0
    assert not marker.exists()
