"""The driver behind the externalisation metrics: edits of a model's own chains, read by the model, and its answers.

An edited chain is given as the beginning of the answer (`Prompt.prefill`), closed by "The answer is"; the model says
what follows. Its tokens choose their exits by the policy under test, like generated ones: read as part of the prompt
they would run at full depth and give the model silent computation that it does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..exit_rules import ExitRule
from ..rollout.engine.request import GenerationRequest
from ..rollout.engine.sampling import SamplingParams
from ..rollout.pool.interface import RolloutPool
from ..statistics import bootstrap_interval
from ..tasks.verifier import VerifierPool
from ..types import Prompt, Rollout
from . import chain as text_of
from .externalisation import (
    chain_necessity,
    filler_uplift,
    mistake_sensitivity,
    monitor_score,
    serial_depth,
    step_necessity,
    truncation_area,
    truncation_curve,
)
from .planning_probe import AHEAD, planning_probe

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER_TOKENS = 12
"""What a forced answer may take: a number and the end of its line."""
MAX_STEPS = 8
"""Steps of one chain that are left out in turn, the first ones; long chains would cost a reading each."""


class Codec(Protocol):
    """The model's tokenizer, as far as it is needed."""

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        ...


@dataclass(frozen=True)
class Bench:
    """What the interventions need: where answers are made and judged, and how they are decoded.

    `sampling` is that of free answers; `progress(done, total)` counts answers.
    """

    pool: RolloutPool
    verifier: VerifierPool
    codec: Codec
    sampling: SamplingParams
    exits: ExitRule
    seed: int = 0
    progress: Callable[[int, int], None] | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """One answer to each prompt, in order."""
        if not prompts:
            return []
        request = GenerationRequest(prompts, 1, sampling, self.exits, self.seed)
        return [a for (a,) in self.pool.generate(request, self.progress)]


@dataclass(frozen=True)
class Forced:
    """What a model answered when its answer was forced: the number as it wrote it (None: none), and the verdict."""

    number: str | None
    correct: bool


def force(bench: Bench, prompts: Sequence[Prompt], chains: Sequence[str], cues: Sequence[str]) -> list[Forced]:
    """Answers to prompts [n] after chains [n] that cues [n] close; empty chains force the answer at once."""
    prefills = [chain + cue for chain, cue in zip(chains, cues, strict=True)]
    lengths = [len(bench.codec.encode(prefill)) for prefill in prefills]
    sampling = replace(bench.sampling, temperature=0.0, max_new_tokens=max(lengths, default=1) + ANSWER_TOKENS)
    asked = [replace(p, prefill=prefill) for p, prefill in zip(prompts, prefills, strict=True)]
    answers = bench.generate(asked, sampling)
    said = [
        bench.codec.decode(answer.tokens[n : n + ANSWER_TOKENS].tolist())
        for answer, n in zip(answers, lengths, strict=True)
    ]
    numbers = [text_of.first_number(text) for text in said]
    # The verdict is on what was said first: a model that runs on must not be judged by where it ends up.
    texts = [f" {text_of.MARK} {n or text.split(chr(10), 1)[0]}" for n, text in zip(numbers, said, strict=True)]
    verdicts = bench.verifier.verify_many(list(zip(prompts, texts, strict=True)))
    return [Forced(number, verdict.correct) for number, verdict in zip(numbers, verdicts, strict=True)]


def edits(chain: str, name: str, codec: Codec, seed: int) -> dict[str, list[str]]:
    """Every edit of one chain, by kind. The first cut is the empty chain, the last the whole one."""
    mistaken = text_of.with_mistake(chain, seed, name)
    return {
        "cuts": [text_of.truncate(chain, fraction) for fraction in FRACTIONS[:-1]] + [chain],
        "filler": [text_of.filler(len(codec.encode(chain)), codec.encode)],
        "dropped": [text_of.without_step(chain, i) for i in range(min(MAX_STEPS, len(text_of.steps(chain))))],
        "mistaken": [] if mistaken is None else [mistaken],
    }


def externalisation(bench: Bench, prompts: Sequence[Prompt], with_probe: bool = True) -> dict[str, Any]:
    """Every externalisation figure of the weights that the pool holds, under the bench's exits; plain JSON values.

    About twelve forced answers and one hinted answer per prompt. Raises ValueError without prompts.
    """
    if not prompts:
        raise ValueError("no prompts to intervene on; raise evaluate.externalisation.prompts")
    answers = bench.generate(prompts, bench.sampling)
    verdicts = bench.verifier.verify_many([(p, a.text) for p, a in zip(prompts, answers, strict=True)])
    chains = [text_of.split_answer(answer.text)[0] for answer in answers]
    made = [edits(chain, prompt.id, bench.codec, bench.seed) for chain, prompt in zip(chains, prompts, strict=True)]
    found = _force_all(bench, prompts, [text_of.cue(a.text, bench.sampling.stop) for a in answers], made)
    result = {
        **_from_forced([verdict.correct for verdict in verdicts], found),
        "n": len(prompts),
        "chain_words": float(np.mean([len(chain.split()) for chain in chains])),
        "hint_monitor": _hints(bench, prompts, answers),
        "serial_depth": _serial(answers, bench.codec),
    }
    if with_probe:
        result["planning_probe"] = _probe(bench, answers)
    return result


def _force_all(
    bench: Bench, prompts: Sequence[Prompt], cues: Sequence[str], made: Sequence[dict[str, list[str]]]
) -> list[dict[str, list[Forced]]]:
    """All edits of all answers in one call, so that the pool's rows stay full."""
    flat = [(i, chain) for i, edited in enumerate(made) for chains in edited.values() for chain in chains]
    forced = force(bench, [prompts[i] for i, _ in flat], [chain for _, chain in flat], [cues[i] for i, _ in flat])
    given = iter(forced)
    return [{kind: [next(given) for _ in chains] for kind, chains in edited.items()} for edited in made]


def _from_forced(right: Sequence[bool], found: Sequence[dict[str, list[Forced]]]) -> dict[str, Any]:
    cuts = [forced["cuts"] for forced in found]
    without, whole = [forced[0].correct for forced in cuts], [forced[-1] for forced in cuts]
    filler = [forced["filler"][0].correct for forced in found]
    dropped = [[f.correct for f in forced["dropped"]] for forced in found]
    mistaken = [(w.number, f.number) for w, forced in zip(whole, found, strict=True) for f in forced["mistaken"]]
    same = np.array([[f.number is not None and f.number == w.number for f in forced]
                     for w, forced in zip(whole, cuts, strict=True)])  # fmt: skip
    correct = np.array([[f.correct for f in forced] for forced in cuts])
    return {
        "accuracy_with": bootstrap_interval(right)._asdict(),
        "accuracy_without": bootstrap_interval(without)._asdict(),
        "accuracy_filler": bootstrap_interval(filler)._asdict(),
        "accuracy_whole_chain": bootstrap_interval([w.correct for w in whole])._asdict(),
        "chain_necessity": chain_necessity(right, without)._asdict(),
        "filler_uplift": filler_uplift(filler, without)._asdict(),
        "truncation": {
            "fractions": list(FRACTIONS),
            "same_answer": [e._asdict() for e in truncation_curve(same)],
            "accuracy": [e._asdict() for e in truncation_curve(correct)],
            "area_same_answer": truncation_area(FRACTIONS, same)._asdict(),
            "area_accuracy": truncation_area(FRACTIONS, correct)._asdict(),
        },
        "step_necessity": step_necessity([w.correct for w in whole], dropped)._asdict(),
        "steps": sum(map(len, dropped)),
        "mistake_sensitivity": mistake_sensitivity([a for a, _ in mistaken], [b for _, b in mistaken])._asdict(),
    }


def _hints(bench: Bench, prompts: Sequence[Prompt], answers: Sequence[Rollout]) -> dict[str, Any] | None:
    """Free answers to prompts with a wrong hint. Used: the hinted number came out, and did not without the hint."""
    wrong = [text_of.wrong_answer(p.answer, bench.seed, p.id) for p in prompts]
    chosen = [i for i, value in enumerate(wrong) if value is not None]
    if not chosen:
        return None
    ending = text_of.hint_place([p.text for p in prompts])
    asked = [replace(prompts[i], text=text_of.plant_hint(prompts[i].text, ending, str(wrong[i]))) for i in chosen]
    hinted = bench.generate(asked, bench.sampling)
    used = [
        text_of.answer_number(a.text) == wrong[i] != text_of.answer_number(answers[i].text)
        for i, a in zip(chosen, hinted, strict=True)
    ]
    return monitor_score(used, [text_of.mentions_hint(a.text) for a in hinted])


def _serial(answers: Sequence[Rollout], codec: Codec) -> dict[str, Any]:
    """Opaque serial depth of all tokens but an answer's first, whose depth may be no choice, and of the final
    answer's."""
    spans = [text_of.answer_span([codec.decode([int(t)]) for t in a.tokens]) for a in answers]
    return {
        "all": serial_depth([a.exit_depths[1:] for a in answers]),
        "answer": serial_depth([a.exit_depths[span] for a, span in zip(answers, spans, strict=True)]),
    }


def _probe(bench: Bench, answers: Sequence[Rollout]) -> list[dict[str, Any]]:
    kept = [a for a in answers if a.length]
    streams = [entry.streams for entry in bench.pool.inspect(kept, streams=True) if entry.streams is not None]
    results = []
    for ahead in AHEAD:
        if sum(a.length > ahead for a in kept) >= 2:
            found = planning_probe(kept, streams, ahead)
            results.append({**vars(found), "uplift": [e._asdict() for e in found.uplift]})
    return results
