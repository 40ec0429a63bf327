"""Caches sets of answers on disk: a killed stage reuses its own, and evaluations of several RL runs measure their
common teacher and calibrated policy once.

A set's name is a hash of everything that decides its answers: base, policy, rule, prompts, settings. What affects speed
alone (actors, rows, threads) is left out: tokens per second are those of when the answers were made.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .. import __version__
from ..evaluation.evaluate import GenerationResult, answer_sets, score_sets
from ..rollout.engine.request import GenerationRequest, Progress
from ..rollout.engine.sampling import SamplingParams
from ..rollout.engine.scoring import Inspection
from ..rollout.pool.interface import RolloutPool
from .serialization import load_answers, save_answers

logger = logging.getLogger(__name__)
ANSWERS = "answers"
"""Name of the directory: beside the stages for evaluations, inside the stage's own directory for one that samples."""


class AnswerCache:
    """A directory of answer sets. It may be deleted while no stage is running: missing sets are generated again.

    `made_by`: plain JSON values of everything that decides answers beside weights and request. `weights` is everywhere
    the digest of the pool's weights. A set is written when it is made, and again with its scores.
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
        """`answer_sets` with cache: a set for each of the request's rules; missing ones are generated together.
        `timed`: a set without `seconds` is generated again."""
        sets = {rule: self._read(weights, request.by(rule)) for rule in request.rules}
        lacking = [rule for rule, one in sets.items() if one is None or (timed and one.seconds is None)]
        if lacking:
            for rule, made in zip(lacking, answer_sets(pool, request.by(*lacking), progress), strict=True):
                self._write(weights, request.by(rule), made)
                sets[rule] = made
        return [one for rule in request.rules if (one := sets[rule]) is not None]

    def score(
        self,
        pool: RolloutPool,
        weights: str,
        requests: Sequence[GenerationRequest],
        progress: Progress | None = None,
    ) -> list[GenerationResult]:
        """Scored and timed answers to requests of one rule each for the same prompts: generated one by one, then those
        without scores are scored together."""
        sets = [one for request in requests for one in self.answers(pool, weights, request, progress, timed=True)]
        lacking = [i for i, one in enumerate(sets) if one.scores is None]
        for i, scored in zip(lacking, score_sets(pool, [sets[i] for i in lacking]), strict=True):
            self._write(weights, requests[i], scored)
            sets[i] = scored
        return sets

    def inspect(
        self, pool: RolloutPool, weights: str, request: GenerationRequest, progress: Progress | None = None
    ) -> tuple[GenerationResult, list[Inspection]]:
        """`score` for one request, with the gates' outputs, which are not stored: one pass computes both."""
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
            saved = load_answers(place)
            if [r.prompt_id for r in saved.rollouts] != [p.id for p in request.prompts for _ in range(request.samples)]:
                raise ValueError("other prompts")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("%s: damaged (%s); its answers are generated again", place, error)
            return None
        logger.info("%s: %d answers reused", place, len(saved.rollouts))
        return saved

    def _write(self, weights: str, request: GenerationRequest, made: GenerationResult) -> None:
        place = self._place(weights, request)
        try:
            save_answers(place, made)
        except OSError:
            # Another stage wrote the same set at the same time.
            if not place.is_dir():
                raise

    def _place(self, weights: str, request: GenerationRequest) -> Path:
        # Fields that were added later count where they are set: sets keep their names.
        sampling, unset = astuple(request.sampling), astuple(SamplingParams())
        known = {
            "version": __version__,
            "made_by": self.made_by,
            "weights": weights,
            "exits": request.exits.to_results(),
            "sampling": sampling[:5] if sampling[5:] == unset[5:] else sampling,
            "samples": request.samples,
            "seed": request.seed,
            "prompts": [[p.id, p.text, p.prefill] for p in request.prompts],
        }
        return self.directory / hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
