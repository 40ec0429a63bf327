"""Sets of answers that are kept: found again whole, made again where anything differs or is damaged."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ee_megatron.config.load import load
from ee_megatron.config.schema import TaskConfig
from ee_megatron.evaluation.evaluate import GenerationResult
from ee_megatron.exit_rules import ExitRule, Off, Sample, Threshold
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.rollout.engine.scoring import Inspection, Score
from ee_megatron.tasks import make_task
from ee_megatron.training.answer_cache import AnswerCache
from ee_megatron.training.context import StageContext
from ee_megatron.training.evaluate import Measurer
from ee_megatron.training.serialization import save_answers
from ee_megatron.types import Prompt, Rollout
from tests.tiny import firing_policy, tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
PROMPTS = make_task(TaskConfig("arithmetic", train=3, validation=3, evaluation=8)).prompts("evaluation")
MADE_BY = {"base": "tiny", "dtype": "float32"}


class Counting:
    """The pool, and how often it was asked."""

    def __init__(self, pool: LocalPool):
        self.pool, self.generated, self.read = pool, 0, 0

    def generate(self, *arguments: Any) -> list[list[Rollout]]:
        self.generated += 1
        self.asked = arguments[0]
        return self.pool.generate(*arguments)

    def score(self, *arguments: Any) -> list[Score]:
        self.read += 1
        return self.pool.score(*arguments)

    def inspect(self, *arguments: Any) -> list[Inspection]:
        self.read += 1
        return self.pool.inspect(*arguments)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> LocalPool:
    path = tiny_hf("llama", tmp_path_factory.mktemp("model"))
    pool = LocalPool(path, SPEC, rows=8, threads=1)
    pool.load(firing_policy(path, SPEC))
    return pool


def request(exits: ExitRule | None = None, tokens: int = 12, seed: int = 0, **changed: Any) -> GenerationRequest:
    prompts = [replace(PROMPTS[0], **changed), *PROMPTS[1:]]
    return GenerationRequest(prompts, 1, SamplingParams(0.0, tokens, ("\n",)), exits or Threshold(0.5), seed)


def answer(
    kept: AnswerCache, pool: Any, asked: GenerationRequest | None = None, weights: str = "w"
) -> GenerationResult:
    (found,) = kept.answers(pool, weights, asked or request())
    return found


def same(a: Any, b: Any) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, np.ndarray):
            return x.dtype == y.dtype and np.array_equal(x, y)
        return bool(x == y)

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def sets_alike(a: GenerationResult, b: GenerationResult) -> bool:
    pairs = [*zip(a.rollouts, b.rollouts, strict=True), *zip(a.scores or (), b.scores or (), strict=True)]
    return a.seconds == b.seconds and (a.scores is None) == (b.scores is None) and all(same(x, y) for x, y in pairs)


@pytest.mark.parametrize("scored", [False, True])
def test_a_set_is_made_once_and_found_again_to_the_bit(pool: LocalPool, tmp_path: Path, scored: bool) -> None:
    counting: Any = Counting(pool)

    def made() -> GenerationResult:
        kept = AnswerCache(tmp_path / "answers", MADE_BY)
        return kept.score(counting, "w", [request()])[0] if scored else answer(kept, counting)

    first, again = made(), made()
    assert (counting.generated, counting.read) == (1, int(scored))
    assert {int(d) for r in first.rollouts for d in r.exit_depths} >= {4, 6} and sets_alike(first, again)


def test_whatever_decides_answers_tells_sets_apart(pool: LocalPool, tmp_path: Path) -> None:
    counting: Any = Counting(pool)
    kept = AnswerCache(tmp_path / "answers", MADE_BY)
    answer(kept, counting)
    # The reference doesn't: it is compared with, not read.
    answer(kept, counting, request(answer="other"))
    assert counting.generated == 1
    answer(kept, counting, weights="other weights")
    for asked in (
        request(Off()), request(Threshold(0.5000001)), request(tokens=11), request(seed=1), request(text="other"),
    ):  # fmt: skip
        answer(kept, counting, asked)
    answer(AnswerCache(tmp_path / "answers", {**MADE_BY, "dtype": "bfloat16"}), counting)
    # Scores are made of the answers that are there.
    kept.score(counting, "w", [request()])
    assert counting.generated == 8 == len(list((tmp_path / "answers").iterdir()))


def test_a_set_of_before_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on disk stays of use for as long as the version does."""
    monkeypatch.setattr("ee_megatron.training.answer_cache.__version__", "1")
    one = GenerationRequest([Prompt("p", "Q", "A", "t")], 1, SamplingParams(0.0, 12, ("\n",)), Threshold(0.5), 3)
    assert AnswerCache(Path(), {})._place("w", one).name == "eea4046a67514039"
    penalised = replace(one, sampling=replace(one.sampling, repetition_penalty=1.1))
    assert AnswerCache(Path(), {})._place("w", penalised).name != "eea4046a67514039"


def test_answers_are_kept_before_they_are_read_and_sets_that_lack_scores_are_read_together(
    pool: LocalPool, tmp_path: Path
) -> None:
    class Killed(Counting):
        def score(self, *arguments: Any) -> list[Score]:
            raise KeyboardInterrupt

    kept = AnswerCache(tmp_path / "answers", MADE_BY)
    requests = [request(Off()), request(Sample()), request()]
    killed: Any = Killed(pool)
    with pytest.raises(KeyboardInterrupt):
        kept.score(killed, "w", requests[:2])
    counting: Any = Counting(pool)
    together = kept.score(counting, "w", requests)
    assert (killed.generated, counting.generated, counting.read) == (2, 1, 1)
    for one, of in zip(together, requests, strict=True):
        assert sets_alike(one, kept.score(counting, "w", [of])[0])
    assert (counting.generated, counting.read) == (1, 1)
    # What one set lacks is made for it alone.
    for name in ("answers.safetensors", "answers.jsonl"):
        (kept._place("w", requests[1]) / name).unlink()
    assert sets_alike(kept.score(counting, "w", requests)[0], together[0])
    assert (counting.generated, counting.read) == (2, 2)


def test_sets_of_several_rules_are_made_together_and_each_is_kept_by_itself(pool: LocalPool, tmp_path: Path) -> None:
    kept = AnswerCache(tmp_path / "answers", MADE_BY)
    counting: Any = Counting(pool)
    rules = [Threshold(t) for t in (0.4, 0.5, 0.6)]
    asked = request().by(*rules)
    first = kept.answers(counting, "w", asked)
    assert counting.generated == 1 and len({tuple(r.exit_depths) for one in first for r in one.rollouts[:1]}) > 1
    for rule, one in zip(rules, first, strict=True):
        assert one.seconds is None, "nobody knows what one took"
        assert sets_alike(answer(kept, counting, request(rule)), one)
        for a, b in zip(one.rollouts, pool.generate(request(rule)), strict=True):
            assert same(a, b[0])
    assert counting.generated == 1
    shutil.rmtree(kept._place("w", request(rules[1])))
    again = kept.answers(counting, "w", asked)
    assert counting.generated == 2 and counting.asked.rules == (rules[1],) and again[1].seconds is not None
    assert all(same(a, b) for a, b in zip(again[1].rollouts, first[1].rollouts, strict=True))
    assert sets_alike(again[0], first[0]) and sets_alike(again[2], first[2])
    # A row of the results says how fast it was: answers to the same problems that were made with others don't serve.
    (scored,) = kept.score(counting, "w", [request(rules[0])])
    assert counting.generated == 3 and scored.seconds is not None
    assert answer(kept, counting, request(rules[0])).seconds == scored.seconds and counting.generated == 3


def test_a_set_that_is_inspected_is_scored_by_the_same_reading(pool: LocalPool, tmp_path: Path) -> None:
    kept = AnswerCache(tmp_path / "answers", MADE_BY)
    counting: Any = Counting(pool)
    first, inspected = kept.inspect(counting, "w", request())
    assert (counting.generated, counting.read) == (1, 1) and first.scores is not None
    for scored, expected, entry in zip(first.scores, pool.score(first.rollouts), inspected, strict=True):
        assert same(scored, expected) and len(entry.hazards) == len(scored.divergence)
    assert sets_alike(kept.score(counting, "w", [request()])[0], first) and counting.read == 1
    again, inspected_again = kept.inspect(counting, "w", request())
    assert sets_alike(again, first) and (counting.generated, counting.read) == (1, 2)
    for entry, other in zip(inspected_again, inspected, strict=True):
        np.testing.assert_array_equal(entry.hazards, other.hazards)


@pytest.mark.parametrize("file", ["answers.safetensors", "answers.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_set_is_made_again(
    pool: LocalPool, tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    counting: Any = Counting(pool)
    kept = AnswerCache(tmp_path / "answers", MADE_BY)
    first = answer(kept, counting)
    (place,) = (tmp_path / "answers").iterdir()
    content = (place / file).read_bytes()
    if damage == "gone":
        (place / file).unlink()
    else:
        (place / file).write_bytes(content[:100] if damage == "cut" else b"{}\n")
    with caplog.at_level("WARNING"):
        again = answer(kept, counting)
    assert counting.generated == 2 and "generated again" in caplog.text
    assert all(same(a, b) for a, b in zip(first.rollouts, again.rollouts, strict=True))
    assert sets_alike(again, answer(kept, counting)) and counting.generated == 2


@pytest.mark.parametrize("written", [True, False])
def test_a_write_that_fails_matters_only_if_the_set_is_not_there(
    pool: LocalPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    def fails(directory: Path, answered: GenerationResult) -> None:
        if written:
            save_answers(directory, answered)
        raise OSError("directory not empty")

    monkeypatch.setattr("ee_megatron.training.answer_cache.save_answers", fails)
    kept = AnswerCache(tmp_path / "answers", MADE_BY)
    if written:
        assert len(answer(kept, pool).rollouts) == 8
    else:
        with pytest.raises(OSError, match="not empty"):
            answer(kept, pool)


class Dying(Counting):
    """The pool of a process that is killed when it is asked once too often."""

    def __init__(self, pool: LocalPool, lives: int):
        super().__init__(pool)
        self.lives = lives

    def generate(self, *arguments: Any) -> list[list[Rollout]]:
        if self.generated == self.lives:
            raise KeyboardInterrupt
        return super().generate(*arguments)


def test_a_stage_that_samples_goes_on_with_the_parts_that_it_has(
    pool: LocalPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 problems of 2 answers in parts of 3: two parts, a kill, then the third alone; the same as in one piece."""
    monkeypatch.setattr("ee_megatron.training.context.PART_WAVES", 1)
    where = [f"model.path={pool.tokenizer.name_or_path}", f"runs={tmp_path}", "name=x", "device=cpu"]
    small = ["rollout.max_num_seqs=6", "rollout.max_new_tokens=12", "traces.temperature=1"]
    cfg = load([*where, *small, "exits.depths=[2,4]", "tracker=disabled"])
    whole = GenerationRequest(PROMPTS, 2, SamplingParams(1.0, 12, tuple(cfg.rollout.stop)), Off(), 0)
    pool.load(None)
    expected = pool.generate(whole)
    assert any(not same(a, b) for a, b in expected)
    dying: Any = Dying(pool, 2)
    model = Path(pool.tokenizer.name_or_path)
    with pytest.raises(KeyboardInterrupt), StageContext(cfg, "traces", model, learner=False) as context:
        context.sample(dying, list(PROMPTS), 2, 1.0, 0, "answers")
    counting: Any = Counting(pool)
    with StageContext(cfg, "traces", model, learner=False) as context:
        found = context.sample(counting, list(PROMPTS), 2, 1.0, 0, "answers")
        assert counting.generated == 1 and len(list((context.path / "answers").iterdir())) == 3
        context.finish()
        assert not (context.path / "answers").exists()
    assert [len(group) for group in found] == [2] * 8
    for group, other in zip(found, expected, strict=True):
        assert all(same(a, b) for a, b in zip(group, other, strict=True))


def test_an_evaluation_names_its_sets_by_the_weights_that_its_pool_holds(pool: LocalPool) -> None:
    work, policy = Measurer.__new__(Measurer), initial_policy(pool.decoder.dims, SPEC, seed=1)
    work.pool = pool
    seen = []
    for tensors in (policy, {name: t + 1 for name, t in policy.items()}):
        work.load_policy(tensors)
        seen.append(work.weights)
        assert work.weights == pool.health()["digest"]
    work.load_teacher()
    assert work.weights == pool.health()["digest"] and len({*seen, work.weights}) == 3
