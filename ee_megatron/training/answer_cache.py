"""Sets of answers on disk: a stage that was killed goes on with those that it has, and evaluations of several RL runs
measure their common teacher and calibrated policy once.

A set is named by all that decides its answers: base, policy, rule, prompts, settings. What changes speed alone (actors,
rows, threads) isn't in it: tokens per second are those of when the answers were made.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .. import __version__
from ..evaluation.evaluate import GenerationResult, answer_sets, score_sets
from ..rollout.engine.request import GenerationRequest, Progress
from ..rollout.engine.scoring import Inspection
from ..rollout.pool.interface import RolloutPool
from .serialization import load_answers, save_answers

logger = logging.getLogger(__name__)
ANSWERS = "answers"
"""Name of the directory: an evaluation's lies beside the stages, that of a stage which samples is its own."""


class AnswerCache:
    """A directory of sets, which may be deleted whenever no stage is at work: they are made again.

    `made_by`: plain JSON values for whatever decides answers beside weights and request. `weights` is everywhere the
    digest of those that the pool holds. A set is written when it is made, and again with its scores.
    """

    def __init__(self, directory: Path, made_by: Mapping[str, Any]):
        self.directory, self.made_by = directory, dict(made_by)

    def answers(
        self,
        pool: RolloutPool,
        weights: str,
        request: GenerationRequest,
        progress: Progress | None = None,
        *,
        timed: bool = False,
    ) -> list[GenerationResult]:
        """As `answer_sets`: a set for each of the request's rules; those that aren't there are made together. `timed`:
        one without `seconds` is made again."""
        found = {rule: self._read(weights, request.by(rule)) for rule in request.rules}
        lacking = [rule for rule, one in found.items() if one is None or (timed and one.seconds is None)]
        if lacking:
            for rule, made in zip(lacking, answer_sets(pool, request.by(*lacking), progress), strict=True):
                self._write(weights, request.by(rule), made)
                found[rule] = made
        return [one for rule in request.rules if (one := found[rule]) is not None]

    def score(
        self,
        pool: RolloutPool,
        weights: str,
        requests: Sequence[GenerationRequest],
        progress: Progress | None = None,
    ) -> list[GenerationResult]:
        """The answers to requests of one rule each for the same prompts, scored and timed: each is made by itself, then
        those that lack scores are read together."""
        sets = [one for request in requests for one in self.answers(pool, weights, request, progress, timed=True)]
        lacking = [i for i, one in enumerate(sets) if one.scores is None]
        for i, scored in zip(lacking, score_sets(pool, [sets[i] for i in lacking]), strict=True):
            self._write(weights, requests[i], scored)
            sets[i] = scored
        return sets

    def inspect(
        self, pool: RolloutPool, weights: str, request: GenerationRequest, progress: Progress | None = None
    ) -> tuple[GenerationResult, list[Inspection]]:
        """As `score` for one request, and what their gates held, which isn't kept: one reading gives both."""
        (answered,) = self.answers(pool, weights, request, progress, timed=True)
        inspected = pool.inspect(answered.rollouts)
        if answered.scores is None:
            answered = replace(answered, scores=[entry.score for entry in inspected])
            self._write(weights, request, answered)
        return answered, inspected

    def _read(self, weights: str, request: GenerationRequest) -> GenerationResult | None:
        place = self._place(weights, request)
        if not place.is_dir():
            return None
        try:
            found = load_answers(place)
            if [r.prompt_id for r in found.rollouts] != [p.id for p in request.prompts for _ in range(request.samples)]:
                raise ValueError("other prompts")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("%s: damaged (%s); its answers are made again", place, error)
            return None
        logger.info("%s: %d answers of before", place, len(found.rollouts))
        return found

    def _write(self, weights: str, request: GenerationRequest, made: GenerationResult) -> None:
        place = self._place(weights, request)
        try:
            save_answers(place, made)
        except OSError:
            # Another stage wrote the same set at the same time.
            if not place.is_dir():
                raise

    def _place(self, weights: str, request: GenerationRequest) -> Path:
        sampling = request.sampling
        known = {
            "version": __version__,
            "made_by": self.made_by,
            "weights": weights,
            "exits": request.exits.to_results(),
            "sampling": [sampling.temperature, sampling.max_new_tokens, sampling.stop, sampling.top_k, sampling.top_p],
            "samples": request.samples,
            "seed": request.seed,
            "prompts": [[p.id, p.text, p.prefill] for p in request.prompts],
        }
        return self.directory / hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
