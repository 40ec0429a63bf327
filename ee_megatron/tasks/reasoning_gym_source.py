"""Problems of reasoning-gym, made in a process of their own with a fixed hash seed. Started by `generate` only.

Some of the package's families walk over Python sets, so the same seed gives other problems in another process unless
that process hashes strings alike. The package also takes two seconds to load, which nothing else has to wait for.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .base import SPLITS, split_of

GENERATE_TIMEOUT_S = 600.0
"""For all families together. Most make a thousand problems in a second or two, some (knight_swap) one in three."""
_CHUNK = 500
_BARREN_CHUNKS = 3
_START = "from ee_megatron.tasks.reasoning_gym_source import main; main()"
_NONSENSE = "?!"

Entry = dict[str, Any]
"""What the package calls an entry: question, answer (None where only the scorer can tell) and metadata."""
Entries = dict[str, dict[str, list[Entry]]]
"""Family -> split -> entries."""


def generate(families: Sequence[str], seed: int, wanted: dict[str, int]) -> Entries:
    """The first `wanted[split]` entries of each family and split; fewer where a family has no more.

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
            f"{GENERATE_TIMEOUT_S:.0f} s; ask for fewer (task.train, task.evaluation) or leave out the slow families"
        ) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ValueError(f"task.families: {', '.join(families)} could not be made by reasoning-gym: {lines[-1]}")
    result = pickle.loads(done.stdout)
    if isinstance(result, str):
        raise ValueError(result)
    entries: Entries = result
    return entries


def main() -> None:
    """Standard input: (families, seed, wanted), pickled; standard output: the entries, or an error's text."""
    families, seed, wanted = pickle.load(sys.stdin.buffer)
    # What the package prints must not get between the bytes.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        answer: Entries | str = {family: _family(family, seed, wanted) for family in families}
    except ValueError as error:
        answer = str(error)
    with output:
        pickle.dump(answer, output)


def _family(family: str, seed: int, wanted: dict[str, int]) -> dict[str, list[Entry]]:
    from reasoning_gym.factory import DATASETS

    known = sorted(set(DATASETS) - {"composite"})
    if family not in known:
        near = difflib.get_close_matches(family, known, n=3, cutoff=0.0)
        raise ValueError(
            f"task.families: reasoning-gym has no family {family!r}; nearest of its {len(known)}: {', '.join(near)}"
        )
    found: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in _stream(family, seed):
        split = split_of(f"{seed}:{entry['question']}")
        if len(found[split]) < wanted[split]:
            found[split].append(entry)
        if all(len(found[split]) >= wanted[split] for split in SPLITS):
            break
    return found


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
        raise ValueError(
            f"task.families: {family}: reasoning-gym's scorer accepts any answer ({_NONSENSE!r} too); leave it out"
        )
    if entry["answer"] is not None and dataset.score_answer(entry["answer"], entry) < 1:
        raise ValueError(
            f"task.families: {family}: reasoning-gym's scorer refuses its own reference {str(entry['answer'])[:60]!r}; "
            "leave it out"
        )
