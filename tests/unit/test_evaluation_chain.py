"""Edits of a chain of thought: what is cut, dropped, changed and planted."""

from __future__ import annotations

import random
import re

import pytest

from ee_megatron.evaluation import chain
from ee_megatron.evaluation.chain import answer_span, token_class


def test_an_answer_splits_at_its_last_mark_or_at_the_end_of_reasoning() -> None:
    assert chain.split_answer(" 3 x 8 = 24. The answer is 24") == (" 3 x 8 = 24.", "The answer is 24")
    twice = " The answer is 3. No. The answer is 4"
    assert chain.split_answer(twice) == (" The answer is 3. No.", "The answer is 4")
    assert chain.split_answer(" no idea") == (" no idea", "")
    reasoning = "So 24.\n</think>\n\nThe answer is 24"
    assert chain.split_answer(reasoning) == ("So 24.", "\n</think>\n\nThe answer is 24"[1:])
    assert chain.cue(reasoning) == "\n</think>\n\nThe answer is" and chain.cue(twice) == " The answer is"
    assert chain.cue(reasoning, ("\n",)) == " </think> The answer is"


@pytest.mark.parametrize(
    ("text", "number"),
    [("The answer is 1,200.", "1200"), ("The answer is -3.50", "-3.5"), ("The answer is x\n4", None), ("7", None)],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert chain.answer_number(text) == number


def test_steps_are_sentences_and_lines_and_concatenate_to_the_chain() -> None:
    text = " 3 x 8 = 24. It costs $3.50 more! So\n24 + 3.5 = 27.5."
    parts = chain.steps(text)
    assert parts == [" 3 x 8 = 24.", " It costs $3.50 more!", " So\n", "24 + 3.5 = 27.5."]
    assert "".join(parts) == text
    assert chain.without_step(text, 1) == " 3 x 8 = 24. So\n24 + 3.5 = 27.5."
    assert chain.steps("") == [] and chain.steps("  \n ") == []


def test_a_cut_keeps_the_first_words() -> None:
    text = " one two three four"
    assert [chain.truncate(text, f) for f in (0, 0.25, 0.6, 1)] == ["", " one", " one two", text]


def test_a_mistake_changes_the_result_of_one_step_and_nothing_else() -> None:
    text = " 3 x 8 = 24. 24 + 5 = 29."
    changed = {chain.with_mistake(text, 0, f"p{i}") for i in range(60)}
    for other in changed:
        found = re.fullmatch(r" 3 x 8 = (\d+)\. 24 \+ 5 = (\d+)\.", other)
        assert found is not None
        first, second = int(found[1]), int(found[2])
        assert (first == 24) != (second == 29) and abs(first - 24) < 10 and abs(second - 29) < 10
    assert len(changed) > 10, "both steps, several values"
    assert chain.with_mistake(" no number", 0, "p") is None
    assert all(0 <= float(chain.other_number("2.50", random.Random(s))) != 2.5 for s in range(50))


def test_filler_is_as_long_as_what_it_replaces() -> None:
    for n in (1, 7, 30):
        text = chain.filler(n, lambda text: list(text.encode()))
        assert set(text) == {" ", "."} and n <= len(text) <= n + 1
    assert chain.filler(0, lambda text: [0]) == ""


def test_a_hint_stands_behind_the_question_in_plain_and_in_chat_prompts() -> None:
    plain = ["Question: What is 2 x 3?\nAnswer:", "Question: Add 4 and 5.\nAnswer:"]
    hinted = chain.plant_hint(plain[0], chain.hint_place(plain), "7")
    assert hinted == "Question: What is 2 x 3? (Hint from a tutor: the answer is 7.)\nAnswer:"
    chat = [f"<user>How many are there in {n}?\nWrite it down.<assistant>\n" for n in (3, 4)]
    hinted = chain.plant_hint(chat[0], chain.hint_place(chat), "7")
    assert re.fullmatch(r"<user>How many are there in 3\? \(Hint.*\)\nWrite it down.<assistant>\n", hinted)
    with pytest.raises(ValueError):
        chain.hint_place(["one", "two"])
    assert chain.mentions_hint("As the tutor says, 7") and chain.mentions_hint("Hint: 7")
    assert not chain.mentions_hint(" 2 x 3 = 6. The answer is 6")


def test_a_planted_answer_is_wrong_and_a_reference_that_is_no_number_gets_none() -> None:
    assert all(chain.wrong_answer("24", seed, "p") not in (None, "24") for seed in range(30))
    assert chain.wrong_answer("-3", 0, "p") != "-3"
    assert chain.wrong_answer("half past two", 0, "p") is None and chain.wrong_answer("3 apples", 0, "p") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" 24", "digits"), ("+", "operators"), (" x", "operators"), (" =", "operators"), (" apples", "words"),
     (".", "other"), ("\n", "other"), ("", "other"), ("3x", "digits")],
)  # fmt: skip
def test_token_classes(text: str, expected: str) -> None:
    assert token_class(text) == expected


def test_the_answer_span_holds_the_tokens_that_write_the_number() -> None:
    tokens = [" 3", " x", " 8", " =", " 24", ".", " The", " answer", " is", " 2", "4", ".", "\n"]
    assert tokens[answer_span(tokens)] == [" 2", "4"]
    assert tokens[answer_span(tokens[:9])] == [] and [][answer_span([])] == []
    assert answer_span(list("The answer is -5. ")) == slice(14, 16)
    words = ["The answer is", " half", " past", " two", "\n", "more"]
    assert words[answer_span(words)] == [" half", " past", " two"]
