"""One model under one exit policy on one set of prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

from ..rollout.engine.request import GenerationRequest, Progress
from ..rollout.engine.scoring import Inspection, Score
from ..rollout.pool.interface import RolloutPool
from ..tasks.base import Task
from ..tasks.verifier import VerifierPool
from ..types import Rollout
from .summary import EvaluationRow, summarise


class Reading(TypedDict):
    """What one exit would have written, its most probable token; the gate's hazard there (None: there is no gate).
    depth None: the teacher at full depth."""

    depth: int | None
    text: str
    logprob: float
    hazard: float | None


class Token(TypedDict):
    """One generated token; natural logs. Of the teacher, in nats (None: not measured): its distribution's entropy, the
    token's surprisal under it, KL(teacher at full depth ‖ model at its exit). `readings`: of the exits on the way to
    the one that was taken, and of the teacher; answers that are kept for the report have them."""

    text: str
    depth: int
    logprob: float
    exit_logprob: float
    entropy: float | None
    surprisal: NotRequired[float | None]
    kl: NotRequired[float | None]
    readings: NotRequired[list[Reading]]


class Answer(TypedDict):
    """One answer as the report shows it. `id` is the prompt's, `text` excludes the stop string, `tokens` does not.
    `flops`: of prompt and answer by the exits taken; None: not counted. `task`: the task or its family;
    `group`: the first of the prompt's groups, which other prompts may share."""

    id: str
    prompt: str
    reference: str
    model: str
    exits: str
    correct: bool
    text: str
    tokens: list[Token]
    flops: NotRequired[float | None]
    task: NotRequired[str]
    group: NotRequired[str]


@dataclass(frozen=True)
class AnsweredSet:
    """The answers to a request as the pool made them, those of a prompt next to each other. `scores`: of the answers,
    read again by model and teacher; None: they were not. `seconds`: of generation alone, by the clock; None: it was not
    timed by itself."""

    rollouts: Sequence[Rollout]
    scores: Sequence[Score] | None
    seconds: float | None


def answer_sets(pool: RolloutPool, request: GenerationRequest, progress: Progress | None = None) -> list[AnsweredSet]:
    """The request's answers by the weights that the pool holds, not scored: a set for each of its rules, timed if there
    is only one.

    Raises ValueError if there are no prompts.
    """
    if not request.prompts:
        raise ValueError("no prompts to evaluate on; the task has none in this split")
    begun = time.perf_counter()
    groups = pool.generate(request, progress)
    seconds = None if request.others else time.perf_counter() - begun
    parts = [slice(start, start + request.samples) for start in range(0, request.per_prompt, request.samples)]
    return [AnsweredSet([answer for group in groups for answer in group[part]], None, seconds) for part in parts]


def score_sets(pool: RolloutPool, sets: Sequence[AnsweredSet]) -> list[AnsweredSet]:
    """Sets of answers to the same prompts with their scores, by the weights that the pool holds.

    The answers of a prompt are next to each other when they are read again, so that the prompt is read once for all.
    Raises ValueError for sets of different sizes.
    """
    together = [rollout for group in zip(*(one.rollouts for one in sets), strict=True) for rollout in group]
    scores = pool.score(together) if together else []
    return [replace(one, scores=scores[i :: len(sets)]) for i, one in enumerate(sets)]


def evaluate_model(
    answered: AnsweredSet,
    request: GenerationRequest,
    task: Task,
    verifier: VerifierPool,
    *,
    label: str,
    num_layers: int,
    decode: Callable[[int], str],
    flops: Callable[[Rollout], float] | None = None,
) -> tuple[EvaluationRow, list[Answer]]:
    """The answers to a request of one sample by one rule, judged and summarised.

    `label` is the model's name in the tables; `decode` gives the text of a token id. Scores fill the row's `kl` and the
    tokens' entropy. `flops` counts an answer's.

    Raises ValueError if the verifier is another task's.
    """
    prompts, rollouts, scores = request.prompts, answered.rollouts, answered.scores
    if verifier.task_name != task.name:
        raise ValueError(f"the verifier judges {verifier.task_name!r}, the prompts are {task.name!r}'s; use one task")
    exits = request.exits.label
    verdicts = verifier.verify_many([(p, r.text) for p, r in zip(prompts, rollouts, strict=True)])
    divergences = [score.divergence for score in scores] if scores is not None else None
    row = summarise(prompts, rollouts, verdicts, num_layers, divergences, answered.seconds, model=label, exits=exits)
    answers = [
        Answer(
            id=prompt.id,
            prompt=prompt.text,
            reference=prompt.answer,
            model=label,
            exits=exits,
            correct=verdicts[i].correct,
            text=rollout.text,
            tokens=_tokens(rollout, scores[i] if scores is not None else None, decode),
            flops=flops(rollout) if flops is not None else None,
            task=prompt.task,
            group=prompt.group.partition(";")[0],
        )
        for i, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True))
    ]
    return row, answers


def add_readings(
    answers: Sequence[Answer],
    inspected: Sequence[Inspection],
    depths: Sequence[int],
    decode: Callable[[int], str],
) -> None:
    """Give the tokens of answers [n] their readings, from what `inspect` found in the same answers; `depths` [M]."""
    for answer, entry in zip(answers, inspected, strict=True):
        for t, token in enumerate(answer["tokens"]):
            token["readings"] = [
                Reading(
                    depth=depth,
                    text=decode(int(entry.said[t, i])),
                    logprob=round(float(entry.said_logprobs[t, i]), 5),
                    hazard=None if math.isnan(entry.hazards[t, i]) else round(float(entry.hazards[t, i]), 5),
                )
                for i, depth in enumerate(depths)
                if entry.said[t, i] >= 0
            ]
            said, logprob = int(entry.teacher_said[t]), round(float(entry.teacher_said_logprobs[t]), 5)
            token["readings"].append(Reading(depth=None, text=decode(said), logprob=logprob, hazard=None))


def _tokens(rollout: Rollout, score: Score | None, decode: Callable[[int], str]) -> list[Token]:
    return [
        Token(
            text=decode(int(token)),
            depth=int(rollout.exit_depths[t]),
            logprob=round(float(rollout.token_logprobs[t]), 5),
            exit_logprob=round(float(rollout.exit_logprobs[t]), 5),
            entropy=round(float(score.teacher_entropy[t]), 5) if score is not None else None,
            surprisal=round(-float(score.teacher_logprobs[t]), 5) if score is not None else None,
            kl=round(float(score.divergence[t]), 5) if score is not None else None,
        )
        for t, token in enumerate(rollout.tokens)
    ]
