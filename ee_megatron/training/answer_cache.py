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
from ..evaluation.evaluate import AnsweredSet, answer_sets, score_sets
from ..rollout.engine.request import GenerationRequest, Progress
from ..rollout.engine.scoring import Inspection
from ..rollout.pool.interface import RolloutPool
from .serialization import load_answers, save_answers

logger = logging.getLogger(__name__)
ANSWERS = "answers"
"""Name of the directory: an evaluation's lies beside the stages, that of a stage which samples is its own."""


class KeptAnswers:
    """A directory of sets, which may be deleted whenever no stage is at work: they are made again.

    `made_by`: plain JSON values for whatever decides answers beside weights and request.
    """

    def __init__(self, directory: Path, made_by: Mapping[str, Any]):
        self.directory, self.made_by = directory, dict(made_by)

    def answer(
        self, pool: RolloutPool, weights: str, request: GenerationRequest, progress: Progress | None = None
    ) -> AnsweredSet:
        """The answers to a request of one rule, as `answer_each`."""
        (found,) = self.answer_each(pool, weights, request, progress)
        return found

    def answer_each(
        self,
        pool: RolloutPool,
        weights: str,
        request: GenerationRequest,
        progress: Progress | None = None,
        *,
        timed: bool = False,
    ) -> list[AnsweredSet]:
        """As `answer_sets`; `weights` is the digest of those that the pool holds. Each rule's set is kept by itself.

        Those that aren't there are asked for together. `timed`: one without `seconds` is made again.
        """
        found = {rule: self._find(weights, request.by(rule), scored=False) for rule in request.rules}
        lacking = [rule for rule, one in found.items() if one is None or (timed and one.seconds is None)]
        if lacking:
            for rule, made in zip(lacking, answer_sets(pool, request.by(*lacking), progress), strict=True):
                self._save(weights, request.by(rule), made)
                found[rule] = made
        return [one for rule in request.rules if (one := found[rule]) is not None]

    def score(
        self,
        pool: RolloutPool,
        weights: str,
        requests: Sequence[GenerationRequest],
        progress: Progress | None = None,
    ) -> list[AnsweredSet]:
        """The answers to requests for the same prompts, scored and timed: each is made by itself, then those
        that lack scores are read again together."""
        found = [self._find(weights, request, scored=True) for request in requests]
        lacking = [request for request, one in zip(requests, found, strict=True) if one is None]
        made = score_sets(pool, [self._timed(pool, weights, request, progress) for request in lacking])
        for request, one in zip(lacking, made, strict=True):
            self._save(weights, request, one)
        left = iter(made)
        return [one or next(left) for one in found]

    def inspect(
        self, pool: RolloutPool, weights: str, request: GenerationRequest, progress: Progress | None = None
    ) -> tuple[AnsweredSet, list[Inspection]]:
        """As `score` for one request, and what their gates held, which isn't kept: one reading gives both."""
        found = self._find(weights, request, scored=True)
        answered = found or self._timed(pool, weights, request, progress)
        inspected = pool.inspect(answered.rollouts)
        if found is None:
            answered = replace(answered, scores=[entry.score for entry in inspected])
            self._save(weights, request, answered)
        return answered, inspected

    def _timed(
        self, pool: RolloutPool, weights: str, request: GenerationRequest, progress: Progress | None
    ) -> AnsweredSet:
        (found,) = self.answer_each(pool, weights, request, progress, timed=True)
        return found

    def _find(self, weights: str, request: GenerationRequest, *, scored: bool) -> AnsweredSet | None:
        place = self.directory / self._name(weights, request, scored)
        return self._read(place, request) if place.is_dir() else None

    def _save(self, weights: str, request: GenerationRequest, made: AnsweredSet) -> None:
        place = self.directory / self._name(weights, request, made.scores is not None)
        try:
            save_answers(place, made)
        except OSError:
            # Another stage wrote the same set at the same time.
            if not place.is_dir():
                raise

    def _name(self, weights: str, request: GenerationRequest, scored: bool) -> str:
        sampling = request.sampling
        known = {
            "version": __version__,
            "made_by": self.made_by,
            "weights": weights,
            "exits": request.exits.to_results(),
            "sampling": [sampling.temperature, sampling.max_new_tokens, sampling.stop, sampling.top_k, sampling.top_p],
            "samples": request.samples,
            "seed": request.seed,
            "scored": scored,
            "prompts": [[p.id, p.text, p.prefill] for p in request.prompts],
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    @staticmethod
    def _read(place: Path, request: GenerationRequest) -> AnsweredSet | None:
        try:
            found = load_answers(place)
            if [r.prompt_id for r in found.rollouts] != [p.id for p in request.prompts for _ in range(request.samples)]:
                raise ValueError("other prompts")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("%s: damaged (%s); its answers are made again", place, error)
            return None
        logger.info("%s: %d answers of before", place, len(found.rollouts))
        return found
