"""Evaluate one model under one exit policy on a set of prompts: answers, a result row, the threshold to deploy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

import numpy as np

from ..exit_rules import ExitRule
from ..rollout.engine.request import GenerationRequest, Progress
from ..rollout.engine.sampling import SamplingParams
from ..rollout.engine.scoring import Inspection, Score
from ..rollout.pool.interface import RolloutPool
from ..statistics import wilson_interval
from ..tasks.base import Task, Verdict
from ..tasks.verifier import VerifierPool
from ..types import Prompt, Rollout


class Reading(TypedDict):
    """An exit's prediction: its most probable token; the gate's hazard there (None: there is no gate).
    depth None: the teacher at full depth."""

    depth: int | None
    text: str
    logprob: float
    hazard: float | None


class Token(TypedDict):
    """One generated token; natural logs. Of the teacher, in nats (None: not measured): its distribution's entropy, the
    token's surprisal under it, KL(teacher at full depth ‖ model at its exit). `readings`: of the exits on the way to
    the one that was taken, and of the teacher; answers that are stored for the report have them."""

    text: str
    depth: int
    logprob: float
    exit_logprob: float
    entropy: float | None
    surprisal: NotRequired[float | None]
    kl: NotRequired[float | None]
    readings: NotRequired[list[Reading]]


class AnswerRecord(TypedDict):
    """One answer as results.json has it and the report shows it. `id` is the prompt's, `text` excludes the stop string,
    `tokens` does not. `flops`: of prompt and answer by the exits taken; None: not counted. `task`: the task or its
    family; `group`: the first of the prompt's groups, which other prompts may share."""

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
class GenerationResult:
    """The pool's answers to a request, grouped by prompt. `scores`: of the answers under model and teacher; None: not
    scored. `seconds`: wall-clock time of generation; None: not timed separately."""

    rollouts: Sequence[Rollout]
    scores: Sequence[Score] | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class AnswerBench:
    """Generates and judges answers. sampling: of free answers. progress(done, total) counts answers. generate: makes a
    request's answers instead of the pool, from a cache for example."""

    pool: RolloutPool
    verifier: VerifierPool
    sampling: SamplingParams
    seed: int = 0
    progress: Progress | None = None
    generate: Callable[[GenerationRequest], Sequence[Rollout]] | None = None

    def answer(
        self, prompts: Sequence[Prompt], exits: ExitRule, sampling: SamplingParams | None = None
    ) -> list[Rollout]:
        """Generate one answer to each prompt, in order."""
        if not prompts:
            return []
        request = GenerationRequest(prompts, 1, sampling or self.sampling, exits, self.seed)
        if self.generate is not None:
            return list(self.generate(request))
        return [answer for (answer,) in self.pool.generate(request, self.progress)]

    def correct(self, prompts: Sequence[Prompt], texts: Iterable[str]) -> list[bool]:
        verdicts = self.verifier.verify_many(list(zip(prompts, texts, strict=True)))
        return [verdict.correct for verdict in verdicts]


def answer_sets(
    pool: RolloutPool, request: GenerationRequest, progress: Progress | None = None
) -> list[GenerationResult]:
    """Generate unscored answers, a set per exit rule; timed if there is one rule. Raises ValueError without prompts."""
    if not request.prompts:
        raise ValueError("no prompts to evaluate on; the task has none in this split")
    begun = time.perf_counter()
    groups = pool.generate(request, progress)
    seconds = None if request.others else time.perf_counter() - begun
    parts = [slice(start, start + request.samples) for start in range(0, request.per_prompt, request.samples)]
    return [GenerationResult([answer for group in groups for answer in group[part]], None, seconds) for part in parts]


def score_sets(pool: RolloutPool, sets: Sequence[GenerationResult]) -> list[GenerationResult]:
    """Score sets of answers to the same prompts with the pool's current weights. All answers to a prompt are adjacent,
    so that the prompt is prefilled once. Raises ValueError for sets of different sizes."""
    together = [rollout for group in zip(*(one.rollouts for one in sets), strict=True) for rollout in group]
    scores = pool.score(together) if together else []
    return [replace(one, scores=scores[i :: len(sets)]) for i, one in enumerate(sets)]


def evaluate_model(
    answered: GenerationResult, request: GenerationRequest, task: Task, verifier: VerifierPool, *,
    label: str, num_layers: int, decode: Callable[[int], str], flops: Callable[[Rollout], float] | None = None,
) -> tuple[EvaluationRow, list[AnswerRecord]]:  # fmt: skip
    """Judge and summarise the answers to a request of one sample by one rule.

    `label` is the model's name in the tables; `decode` gives the text of a token id. Scores fill the row's `kl` and the
    tokens' entropy. `flops` counts an answer's. Raises ValueError if the verifier is another task's.
    """
    prompts, rollouts, scores = request.prompts, answered.rollouts, answered.scores
    if verifier.task_name != task.name:
        raise ValueError(f"the verifier judges {verifier.task_name!r}, the prompts are {task.name!r}'s; use one task")
    exits = request.exits.label
    verdicts = verifier.verify_many([(p, r.text) for p, r in zip(prompts, rollouts, strict=True)])
    divergences = [score.divergence for score in scores] if scores is not None else None
    row = summarise(prompts, rollouts, verdicts, num_layers, divergences, answered.seconds, model=label, exits=exits)
    answers = [
        AnswerRecord(
            id=prompt.id, prompt=prompt.text, reference=prompt.answer, model=label, exits=exits,
            correct=verdicts[i].correct, text=rollout.text,
            tokens=_tokens(rollout, scores[i] if scores is not None else None, decode),
            flops=flops(rollout) if flops is not None else None, task=prompt.task,
            group=prompt.group.partition(";")[0],
        )
        for i, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True))
    ]  # fmt: skip
    return row, answers


def add_readings(
    answers: Sequence[AnswerRecord],
    inspected: Sequence[Inspection],
    depths: Sequence[int],
    decode: Callable[[int], str],
) -> None:
    """Add the results of `inspect` for n answers to their tokens, as readings; `depths` [M]."""
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
    def rounded(values: np.ndarray | None, t: int) -> float | None:
        return None if values is None else round(float(values[t]), 5)

    entropy, surprisal, kl = (
        (score.teacher_entropy, -score.teacher_logprobs, score.divergence) if score is not None else (None, None, None)
    )
    return [
        Token(
            text=decode(int(token)), depth=int(rollout.exit_depths[t]),
            logprob=round(float(rollout.token_logprobs[t]), 5), exit_logprob=round(float(rollout.exit_logprobs[t]), 5),
            entropy=rounded(entropy, t), surprisal=rounded(surprisal, t), kl=rounded(kl, t),
        )
        for t, token in enumerate(rollout.tokens)
    ]  # fmt: skip


@dataclass(frozen=True)
class EvaluationRow:
    """One row of the result table: a model under one exit policy.

    - model: teacher, calibrated or reinforced; exits: the exit policy, in words
    - n answers, correct of them; accuracy = correct/n with its 95% Wilson interval [low, high]
    - mean_depth: mean of depth/L over all tokens of all answers (a first one that can't exit counts as 1)
    - total_depth: layers per answer (mean of the sum over its tokens); length: tokens per answer
    - kl: mean over all tokens of KL(teacher at full depth ‖ model at its exits), nats; None: not measured
    - tokens_per_s: generated per second of wall-clock time, prompts included; None: not timed separately
    - timed_out: answers without a verdict; they count as wrong
    - tokens_per_pass: where shallow exits drafted, tokens per check by full depth; else None
    """

    model: str
    exits: str
    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    mean_depth: float
    total_depth: float
    length: float
    kl: float | None = None
    tokens_per_s: float | None = None
    timed_out: int = 0
    tokens_per_pass: float | None = None


def summarise(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], num_layers: int,
    divergences: Sequence[np.ndarray] | None = None, seconds: float | None = None, *, model: str = "", exits: str = "",
) -> EvaluationRow:  # fmt: skip
    """Compute the result row of n prompts, their n answers and n verdicts (and float [T] divergences per answer).
    Raises ValueError for empty inputs or inputs that do not belong together."""
    strangers = [r.prompt_id for p, r, _ in zip(prompts, rollouts, verdicts, strict=True) if p.id != r.prompt_id]
    if strangers or not rollouts:
        raise ValueError(f"{len(rollouts)} answers to summarise; not in the order of their prompts: {strangers[:1]}")
    n, correct = len(rollouts), sum(verdict.correct for verdict in verdicts)
    low, high = wilson_interval(correct, n)
    depths = np.concatenate([np.asarray(rollout.exit_depths, dtype=np.float64) for rollout in rollouts])
    tokens, drafted = len(depths), sum(rollout.drafted for rollout in rollouts)
    return EvaluationRow(
        model, exits, n, correct, correct / n, low, high,
        mean_depth=float(depths.mean()) / num_layers if tokens else 1.0,
        total_depth=float(depths.sum()) / n,
        length=tokens / n,
        kl=float(np.concatenate(list(divergences)).mean(dtype=np.float64)) if divergences and tokens else None,
        tokens_per_s=tokens / seconds if seconds else None,
        timed_out=sum(verdict.timed_out for verdict in verdicts),
        tokens_per_pass=tokens / (tokens - drafted) if drafted else None,
    )  # fmt: skip


def pooled(rows: Sequence[EvaluationRow]) -> EvaluationRow:
    """Merge rows of one model under one exit policy: the first row with accuracy and mean depth over all answers."""
    n, tokens = sum(row.n for row in rows), [row.n * row.length for row in rows]
    depth = float(np.average([row.mean_depth for row in rows], weights=tokens)) if any(tokens) else 1.0
    return replace(rows[0], accuracy=sum(row.correct for row in rows) / n, mean_depth=depth)


def choose_threshold(rows: Sequence[EvaluationRow], tolerance: float) -> EvaluationRow:
    """Choose the row of least mean depth whose accuracy is within `tolerance` of the best row's. Among equal depths the
    more accurate wins, then the first in alphabetical order of `exits`, whatever the order of the rows. Raises
    ValueError for no rows or a negative tolerance."""
    if not rows or tolerance < 0:
        choice = f"threshold choice among {len(rows)} rows with tolerance {tolerance}"
        raise ValueError(f"{choice}; expected at least one row and evaluate.tolerance >= 0")
    # Accuracies are ratios of integers: the slack keeps "exactly within" on the inside.
    bar = max(row.accuracy for row in rows) - tolerance - 1e-9
    return min((row for row in rows if row.accuracy >= bar), key=lambda row: (row.mean_depth, -row.accuracy, row.exits))
