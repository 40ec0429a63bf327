"""Where a step's rollouts come from: the pool, verified, or what an earlier run left on disk. The leader's only.

With rollout.max_staleness = n, step t learns from rollouts under version max(1, t + 1 - n), where t + 1 is the version
that a step t updates; they are made while the learner is at steps t - n to t - 1. Which version that is depends on
the step alone, never on who was quick: the same seed gives the same run. Weights that rollouts under way were begun
with are kept in the stage's ahead/ directory, so that a killed run makes the same rollouts again.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..checkpoint.policy_files import policy_written
from ..config.derive import exits_read
from ..config.schema import RLConfig
from ..exit_rules import ExitRule, Fixed, Sample
from ..objectives.schedules import price_rise
from ..observe.rundir import atomic_directory, write_atomic
from ..policy import PolicySpec, WeightSet, open_policy
from ..rollout.engine.request import GenerationRequest
from ..rollout.engine.sampling import SamplingParams
from ..rollout.pool.interface import Pending, RolloutPool
from ..tasks import VerifierPool
from ..tensors import Block, Shape, Stream, drain
from ..types import Group, Prompt, Rollout
from .problems import training_problems
from .session import Session
from .stored import load_rollouts, save_rollouts

log = logging.getLogger(__name__)


def make_source(session: Session) -> RolloutSource | ReplaySource:
    rl = session.cfg.rl
    return ReplaySource(Path(rl.replay), rl.group_size) if rl.replay else RolloutSource(session)


class ReplaySource:
    """Rollouts that an earlier run left on disk (`rl.dump_rollouts`), replayed in place of a pool's."""

    def __init__(self, directory: Path, group_size: int):
        self.directory, self.group_size = directory, group_size

    def reference_accuracy(self) -> None:
        """Recorded rollouts have none to be held to."""

    def take(self, version: int, policy: Stream) -> WeightSet:
        """Nobody asks for the weights."""
        drain(policy)
        return WeightSet(version, {})

    def act(self, weights: WeightSet, step: int, detail: Callable[[str, int, int], None]) -> list[Group]:
        groups = load_rollouts(self.directory / f"step_{step + 1}")
        sizes = {len(group.rollouts) for group in groups}
        if sizes != {self.group_size}:
            raise ValueError(
                f"{self.directory}/step_{step + 1}: groups of {sorted(sizes)} rollouts; set rl.group_size to that"
            )
        return groups

    def health(self) -> dict[str, float]:
        return {}

    @property
    def seconds(self) -> dict[str, float]:
        return {}


class RolloutSource:
    """The leader's side of a step: prompts in, verified groups out. seconds: of the last step, by phase: weights sent,
    rollouts waited for, verified."""

    def __init__(self, session: Session):
        self.cfg = session.cfg
        task = session.make_task()
        self.verifier: VerifierPool = session.make_verifier(task)
        problems = training_problems(self.cfg, session.model_path, task, self.cfg.rl.wide_operands)
        self.prompts = prompts_of(problems, self.cfg.rl.families)
        self.pool: RolloutPool = session.make_pool(session.spec)
        self.dump_directory = session.path / "rollouts"
        self.history = WeightHistory(session.path / "ahead", session.spec)
        self._session = session
        self._under_way: dict[int, Pending] = {}
        self._mean_age = 0.0
        self.seconds: dict[str, float] = {}

    def reference_accuracy(self) -> dict[str, float] | None:
        """With rl.accuracy_floor: the share of the reference's answers that are right, by prompt id; to each prompt of
        the steps after rl.lambda_warmup or, without rl.accuracy_samples, of the first rl.accuracy_window of them. At
        full depth, else sampled as rollouts are. Found out once; the stage's reference_by_prompt.json has it."""
        rl = self.cfg.rl
        if rl.accuracy_floor is None:
            return None
        file = self._session.path / "reference_by_prompt.json"
        if not file.is_file():
            first = price_rise(rl.steps, rl.lambda_warmup)
            steps = range(first, rl.steps)[: None if rl.accuracy_samples else rl.accuracy_window]
            asked = {prompt.id: prompt for step in steps for prompt in step_prompts(self.prompts, step, rl)}
            prompts = list(asked.values())
            self.pool.load(None)
            samples = rl.accuracy_samples or rl.group_size
            answers = self._session.sample(self.pool, prompts, samples, rl.temperature, rl.seed, "reference")
            right = {group.prompt.id: float(group.correct.mean()) for group in self._verified(prompts, answers)}
            write_atomic(file, json.dumps(right) + "\n")
        return json.loads(file.read_text())

    def take(self, version: int, policy: Stream) -> WeightSet:
        """A version of the weights as its tensors come; where rollouts are made ahead it goes to the disk, too."""
        n = self.cfg.rollout.max_staleness
        if n:
            policy = self.history.keeping(version, policy, oldest=version_for(self._saved_steps(), n))
        return self.pool.take(version, policy)

    def act(self, weights: WeightSet, step: int, detail: Callable[[str, int, int], None]) -> list[Group]:
        """Step `step`'s groups, while those of later steps are begun as far as rollout.max_staleness lets them. The
        prompts depend on seed and step alone, so that a resumed run goes on where it was: no prompt twice, none lost,
        until all have been used."""
        rl, r = self.cfg.rl, self.cfg.rollout
        clock = [time.monotonic()]
        if r.check_weights or not r.max_staleness:
            self.pool.load(weights)
        if r.check_weights:
            self.pool.check(weights)
        clock.append(time.monotonic())
        self._begin(weights, step)
        answers = self._under_way.pop(step).result(lambda done, total: detail("rollouts", done, total))
        check_versions(answers, weights.version, r.max_staleness)
        self._mean_age = weights.version - float(np.concatenate(versions_of(answers)).mean())
        clock.append(time.monotonic())
        groups = self._verified(step_prompts(self.prompts, step, rl), answers)
        clock.append(time.monotonic())
        self.seconds = dict(zip(("sync", "rollout", "verify"), np.diff(clock).tolist(), strict=True))
        if exits_read(rl):
            rollouts = [rollout for group in answers for rollout in group]
            read = self.pool.read_exits(rollouts, lambda done, total: detail("divergences", done, total))
            for rollout, reading in zip(rollouts, read, strict=True):
                rollout.exits = reading
            self.seconds["divergences"] = time.monotonic() - clock[-1]
        if rl.dump_rollouts:
            save_rollouts(self.dump_directory / f"step_{step + 1}", groups)
        return groups

    def _begin(self, weights: WeightSet, step: int) -> None:
        """Ask for every step's rollouts that may be made by now and have not been asked for."""
        rl, r = self.cfg.rl, self.cfg.rollout
        n = r.max_staleness
        if r.partial != "finish":
            keep = r.partial == "continue"
            # Dropping the rollouts that are due now would make everybody wait for them again.
            for later in self._under_way.keys() - (set() if keep else {step}):
                self._under_way[later].renew(weights, keep)
        for coming in range(step, min(step + n, rl.steps - 1) + 1):
            if coming not in self._under_way:
                self._under_way[coming] = self.pool.begin(
                    self.history.version(version_for(coming, n), weights),
                    GenerationRequest(
                        step_prompts(self.prompts, coming, rl),
                        rl.group_size,
                        SamplingParams(rl.temperature, r.max_new_tokens, tuple(r.stop)),
                        exits_of(rl),
                        rl.seed * 1_000_003 + coming,
                    ),
                )

    def _saved_steps(self) -> int:
        """Steps done in the newest checkpoint on disk, where a killed run would go on."""
        directory = self._session.directory
        found = directory.latest_checkpoint() if directory else None
        return int(found.name.split("_")[1]) if found else 0

    def _verified(self, prompts: list[Prompt], answers: list[list[Rollout]]) -> list[Group]:
        verdicts = iter(
            self.verifier.verify_many([(p, a.text) for p, g in zip(prompts, answers, strict=True) for a in g])
        )
        groups = []
        for prompt, group in zip(prompts, answers, strict=True):
            found = [next(verdicts) for _ in group]
            rewards = np.array([v.reward for v in found], dtype=np.float32)
            correct, well_formed = ([getattr(v, name) for v in found] for name in ("correct", "well_formed"))
            groups.append(Group(prompt, group, rewards, np.array(correct), np.array(well_formed)))
        return groups

    def health(self) -> dict[str, float]:
        pool = self.pool.health()
        return {
            "verifier_timeouts": float(self.verifier.timeouts),
            "actor_restarts": float(pool["restarts"]),
            "actors_alive": float(pool["alive"]),
            "staleness": self._mean_age,
        }


class WeightHistory:
    """Versions of the weights that rollouts under way may have been begun with, on disk: version_N/ as
    `policy.save_policy` would write it, appearing whole."""

    def __init__(self, directory: Path, spec: PolicySpec):
        self.directory, self.spec = directory, spec

    def keeping(self, number: int, policy: Stream, oldest: int) -> Stream:
        """The stream, written as it passes if that version is not there; versions before `oldest`, which no run goes
        back to, are removed."""
        for path in self.directory.glob("version_*"):
            if int(path.name.split("_")[1]) < oldest:
                shutil.rmtree(path)
        return policy if self._path(number).is_dir() else KeptStream(policy, self._path(number), self.spec)

    def version(self, number: int, current: WeightSet) -> WeightSet:
        """A version from disk unless it is the current one. If it is gone the current one takes its place."""
        if number == current.version:
            return current
        if not self._path(number).is_dir():
            log.warning("%s is gone; rollouts are made under version %d instead", self._path(number), current.version)
            return current
        return WeightSet(number, open_policy(self._path(number))[1])

    def _path(self, number: int) -> Path:
        return self.directory / f"version_{number}"


@dataclass(frozen=True)
class KeptStream:
    """Another stream, of which a policy directory is made as it passes."""

    stream: Stream
    directory: Path
    spec: PolicySpec

    @property
    def table(self) -> Mapping[str, Shape]:
        return self.stream.table

    def __iter__(self) -> Iterator[Block]:
        with atomic_directory(self.directory) as temporary:
            yield from policy_written(temporary, self.spec, self.stream)


def version_for(step: int, staleness: int) -> int:
    """The version of the weights that step `step` (from 0) takes its rollouts from."""
    return max(1, step + 1 - staleness)


def check_versions(answers: list[list[Rollout]], version: int, staleness: int) -> None:
    """Raises RuntimeError unless every token is of `version` or at most `staleness` before."""
    allowed = range(version - staleness, version + 1)
    wrong = sorted({int(v) for versions in versions_of(answers) for v in versions} - set(allowed))
    if wrong:
        raise RuntimeError(
            f"rollouts under weight versions {wrong}, expected {allowed[0]} to {version} (rollout.max_staleness="
            f"{staleness})"
        )


def versions_of(answers: list[list[Rollout]]) -> list[np.ndarray]:
    return [a.weight_versions for group in answers for a in group if a.weight_versions is not None]


def exits_of(rl: RLConfig) -> ExitRule:
    """The rule that rollouts are made under."""
    return Fixed(rl.fixed_depth) if rl.fixed_depth else Sample()


def prompts_of(prompts: list[Prompt], families: Sequence[str]) -> list[Prompt]:
    """Those of some families; of all, if none is named."""
    return [p for p in prompts if not families or p.task.partition(".")[2] in families]


def step_prompts(prompts: list[Prompt], step: int, rl: RLConfig) -> list[Prompt]:
    """Step's share of an endless sequence of shuffled passes over the prompts."""
    first, chosen = step * rl.prompts_per_step, []
    for position in range(first, first + rl.prompts_per_step):
        epoch, place = divmod(position, len(prompts))
        chosen.append(prompts[shuffled(len(prompts), rl.seed, epoch)[place]])
    return chosen


@lru_cache(maxsize=2)  # every place of a pass looks here
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which pass `epoch` takes so many prompts, int64 [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count)
