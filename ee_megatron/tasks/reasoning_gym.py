"""Task from families of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760), judged by the package's own scorers.

Problems are made in a process of their own with a fixed hash seed: some of the package's families walk over Python
sets, so the same seed gives other problems in another process unless that process hashes strings alike. The package
also takes two seconds to load, which nothing else has to wait for.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from ..config.schema import TaskConfig
from ..types import Prompt
from . import base
from .answers import answer_part, final_answer
from .base import EXAMPLES, SPLITS, ChatTemplate, Problem, ProceduralTask, Split, Verdict, register, split_of

GENERATE_TIMEOUT_S = 600.0
"""For all families together. Most make a thousand problems in a second or two, some (knight_swap) one in three."""
_CHUNK = 500
_BARREN_CHUNKS = 3
_START = "from ee_megatron.tasks.reasoning_gym import main; main()"
_NONSENSE = "?!"

Entry = dict[str, Any]
"""What the package calls an entry: question, answer (None where only the scorer can tell) and metadata."""
Entries = dict[str, dict[str, list[Entry]]]
"""Family -> split -> entries."""

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


@register("reasoning_gym")
class ReasoningGymTask(ProceduralTask):
    """Problems of reasoning-gym, deterministic in the section and the package's version.

    All problems are made when the task is. `Prompt.group` is a digest of the question, which decides the split.
    """

    name = "reasoning_gym"
    instruction = f"Reason step by step, and put nothing but your final answer between {_OPEN} and {_CLOSE}."

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        if not task.families:
            raise ValueError("task.families: none; expected families of reasoning-gym, [chain_sum,gcd] for example")
        super().__init__(task, task.families, chat)
        wanted = {
            split: -(-size // len(self.families)) if size else base.FAMILY_LIMIT for split, size in self.sizes.items()
        }
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
        self._check_answers()
        return super().worked(split)

    def few_shot(self, prompt: Prompt, shots: int, seed: int) -> Prompt:
        if shots:
            self._check_answers()
        return super().few_shot(prompt, shots, seed)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Judge an answer. Well formed: between answer tags. Otherwise what is marked as in `final_answer`, or the
        whole text or its last line if that is right; else there is no answer. Partly right, by the scorer, is wrong."""
        part = answer_part(text)
        if part is None:
            return base.NO_ANSWER
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

        family = prompt.id.split("/")[1]
        score = get_score_answer_fn(family)
        entry = self._by_group[family][prompt.group]
        # The package's own reference needs no scorer, also where its text would not be let through.
        if entry["answer"] is not None and written.strip() == str(entry["answer"]).strip():
            return True
        return any(_safe(text) and _scored(score, text, entry) for text in {written.strip(), written.strip(" \n.")})

    def _check_answers(self) -> None:
        """Raises ValueError for families whose problems come without an answer (rush_hour, for one)."""
        lacking = [f for f in self.families if any(entry["answer"] is None for entry in self._by_group[f].values())]
        if lacking:
            raise ValueError(
                f"task.families: {', '.join(lacking)} of reasoning-gym come without reference answers, so there are no "
                "worked examples; leave them out, or set pretrain=null and teacher=null"
            )

    def _streams(self, family: str, split: str) -> list[Iterator[Problem]]:
        return [map(_problem, self._entries[family][split])]


def _problem(entry: Entry) -> Problem:
    answer = "" if entry["answer"] is None else str(entry["answer"])
    return Problem(entry["question"].strip(), answer, f" {_OPEN}{answer}{_CLOSE}", _group(entry))


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


# ---- making the problems ----


def generate(families: Sequence[str], seed: int, wanted: dict[str, int]) -> Entries:
    """Generate the first `wanted[split]` entries of each family and split; fewer if a family has no more.

    Raises ValueError if the package is missing, if it has no such family or one whose scorer is unusable, or if the
    problems take longer than GENERATE_TIMEOUT_S.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            "task.name=reasoning_gym: the package reasoning-gym is not installed; "
            "pip install 'ee-megatron[reasoning-gym]'"
        )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _START],
            input=pickle.dumps((tuple(families), seed, wanted)),
            capture_output=True,
            env=environment,
            timeout=GENERATE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"task.families: {wanted} problems of each of {', '.join(families)} were not made in "
            f"{GENERATE_TIMEOUT_S:.0f} s; set fewer (task.train, task.evaluation) or leave out the slow families"
        ) from None
    if done.returncode:
        # The last line of a traceback is the exception.
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ValueError(f"task.families: {', '.join(families)}: {lines[-1].removeprefix('ValueError: ')}")
    entries: Entries = pickle.loads(done.stdout)
    return entries


def main() -> None:
    """Entry point. Standard input: (families, seed, wanted), pickled; standard output: the entries."""
    families, seed, wanted = pickle.load(sys.stdin.buffer)
    # What the package prints must not get between the bytes.
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        pickle.dump({family: _family(family, seed, wanted) for family in families}, output)


def _family(family: str, seed: int, wanted: dict[str, int]) -> dict[str, list[Entry]]:
    from reasoning_gym.factory import DATASETS

    known = sorted(set(DATASETS) - {"composite"})
    if family not in known:
        near = difflib.get_close_matches(family, known, n=3, cutoff=0.0)
        raise ValueError(f"reasoning-gym has no family {family!r}; nearest of its {len(known)}: {', '.join(near)}")
    entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in _stream(family, seed):
        split = split_of(f"{seed}:{entry['question']}")
        if len(entries[split]) < wanted[split]:
            entries[split].append(entry)
        if all(len(entries[split]) >= wanted[split] for split in SPLITS):
            break
    return entries


def _stream(family: str, seed: int) -> Iterator[Entry]:
    """Distinct entries, datasets of the package's usual size one after the other, until they bring nothing new."""
    import reasoning_gym

    seen: set[str] = set()
    chunk, barren = 0, 0
    while barren < _BARREN_CHUNKS:
        digest = hashlib.sha256(f"{seed}/{family}/{chunk}".encode()).hexdigest()
        dataset = reasoning_gym.create_dataset(family, size=_CHUNK, seed=int(digest[:7], 16))
        before = len(seen)
        for index in range(_CHUNK):
            entry = dataset[index]
            if not seen:
                _check_scorer(family, dataset, entry)
            if entry["question"] not in seen:
                seen.add(entry["question"])
                yield {name: entry[name] for name in ("question", "answer", "metadata")}
        chunk, barren = chunk + 1, barren + 1 if len(seen) == before else 0


def _check_scorer(family: str, dataset: Any, entry: Entry) -> None:
    """A scorer that takes anything for right would teach a model to say anything: game_of_life_halting's does."""
    try:
        fooled = dataset.score_answer(_NONSENSE, entry) >= 1
    except Exception:
        fooled = False
    if fooled:
        raise ValueError(f"reasoning-gym's scorer of {family} accepts any answer ({_NONSENSE!r} too); leave it out")
    if entry["answer"] is not None and dataset.score_answer(entry["answer"], entry) < 1:
        refused = str(entry["answer"])[:60]
        raise ValueError(f"reasoning-gym's scorer of {family} refuses its own reference {refused!r}; leave it out")
