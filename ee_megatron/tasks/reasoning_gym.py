"""Families of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760), judged by the package's own scorers."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from ..config.schema import TaskConfig
from ..types import Prompt
from .answers import answer_part, final_answer
from .base import ChatTemplate, Problem, Split, Verdict
from .procedural import EXAMPLES, FAMILY_LIMIT, ProceduralTask
from .reasoning_gym_source import Entry, generate

LONGEST_ANSWER = 20_000
_OPEN, _CLOSE = "<answer>", "</answer>"
# Some scorers evaluate an answer as Python or as a SymPy expression; beyond these functions no answer calls anything.
# fmt: off
_CALLABLE = frozenset({
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs", "and", "or", "not",
})
# fmt: on
_NAME_CALLED = re.compile(r"([^\W\d]\w+)\s*\(")
_RESULT_CALLED = re.compile(r"[\])}\"']\s*\(")


class ReasoningGymTask(ProceduralTask):
    """Deterministic in its section and the package's version.

    All problems are made when the task is. `Prompt.group` is a digest of the question, which decides the split.
    """

    name = "reasoning_gym"
    instruction = f"Reason step by step, and put nothing but your final answer between {_OPEN} and {_CLOSE}."

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        if not task.families:
            raise ValueError("task.families: none; expected families of reasoning-gym, [chain_sum,gcd] for example")
        super().__init__(task, task.families, chat)
        wanted = {split: -(-size // len(self.families)) if size else FAMILY_LIMIT for split, size in self.sizes.items()}
        wanted["train"] += EXAMPLES
        self._entries = generate(self.families, self.seed, wanted)
        self._by_group = {
            family: {_group(entry): entry for entries in splits.values() for entry in entries}
            for family, splits in self._entries.items()
        }

    def __getstate__(self) -> dict:
        # The verifier process finds an entry by its group.
        return {**super().__getstate__(), "_entries": {}}

    def warm_up(self) -> None:
        """Load the package, so that no answer's deadline pays for it."""
        import reasoning_gym  # noqa: F401

    def worked(self, split: Split) -> list[tuple[Prompt, str]]:
        """As in `Task`. Raises ValueError for families whose problems come without an answer (rush_hour, for one)."""
        self._check_answers(self.families)
        return super().worked(split)

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        """As in `Task`. Raises ValueError as `worked` does."""
        if shots:
            self._check_answers([self._locate(prompt)[0]])
        return super().few_shot(prompt, shots, seed)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Well formed: between answer tags. Otherwise what is marked as in `final_answer`, or else the whole text or
        its last line if that is right; if not, there is no answer. Partly right, by the scorer, is wrong."""
        part = answer_part(text)
        if part is None:
            return Verdict(correct=False, well_formed=False, answered=False)
        _, opening, after = part.rpartition(_OPEN)
        if opening:
            # Without a closing tag too: as a stop string it is cut off.
            tagged = after.partition(_CLOSE)[0]
            right = self._right(prompt, tagged)
            # An empty answer can be the right one ("ab").
            return Verdict(correct=right, well_formed=True, answered=right or bool(tagged.strip()))
        marked = final_answer(part)
        if marked is not None and marked[1]:
            return Verdict(correct=self._right(prompt, marked[0]), well_formed=False, answered=True)
        right = any(self._right(prompt, bare) for bare in (part, part.rstrip().rpartition("\n")[2]))
        return Verdict(correct=right, well_formed=False, answered=right)

    def _right(self, prompt: Prompt, written: str) -> bool:
        from reasoning_gym import get_score_answer_fn

        family, _ = self._locate(prompt)
        score = get_score_answer_fn(family)
        entry = self._by_group[family][prompt.group]
        # The package's own reference needs no scorer, also where its text would not be let through.
        if entry["answer"] is not None and written.strip() == str(entry["answer"]).strip():
            return True
        return any(_safe(text) and _scored(score, text, entry) for text in {written.strip(), written.strip(" \n.")})

    def _check_answers(self, families: Sequence[str]) -> None:
        lacking = [f for f in families if any(entry["answer"] is None for entry in self._by_group[f].values())]
        if lacking:
            raise ValueError(
                f"task.families: {', '.join(lacking)} of reasoning-gym come without reference answers, so there are no "
                "worked examples; leave them out, or set pretrain=null and teacher=null"
            )

    def _draw(self, family: str, split: str, limit: int) -> list[Problem]:
        problems = []
        for entry in self._entries[family][split][:limit]:
            answer = "" if entry["answer"] is None else str(entry["answer"])
            problems.append(Problem(entry["question"].strip(), answer, f" {_OPEN}{answer}{_CLOSE}", _group(entry)))
        return problems


def _safe(text: str) -> bool:
    """Whether a scorer may see an answer: nothing long, nothing that would call or reach into Python if evaluated."""
    # As Python reads identifiers: full-width letters are letters.
    text = unicodedata.normalize("NFKC", text)
    if not 0 < len(text) <= LONGEST_ANSWER or "__" in text:
        return False
    if "(" in text and ("\\" in text or "#" in text or _RESULT_CALLED.search(text)):
        return False
    return set(_NAME_CALLED.findall(text)) <= _CALLABLE


def _scored(score: object, text: str, entry: Entry) -> bool:
    assert callable(score)
    try:
        # Exactly: spell_backward's credit for parts of an answer may add up to 0.9999 or 1.0000000000000002.
        return bool(score(text, entry) == 1)
    except Exception:
        # Several scorers raise at text that is not of their form (prime_factorization at words).
        return False


def _group(entry: Entry) -> str:
    return hashlib.sha256(entry["question"].encode()).hexdigest()[:16]
