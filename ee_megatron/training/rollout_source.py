"""Where a step's rollouts come from: the pool, verified, or what an earlier run left on disk. The leader's only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..config.schema import RLConfig
from ..policy import WeightSet
from ..rollout.pool import RolloutPool
from ..rollout.sampling import ExitPolicy, SamplingParams
from ..tasks import VerifierPool
from ..types import Group, Prompt
from .rollout_store import load_rollouts, save_rollouts
from .session import Session


def make_source(session: Session) -> Actor | Dump:
    rl = session.cfg.rl
    return Dump(Path(rl.replay), rl.group_size) if rl.replay else Actor(session)


class Dump:
    """Rollouts of an earlier run in place of a pool's."""

    def __init__(self, directory: Path, group_size: int):
        self.directory, self.group_size = directory, group_size

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


class Actor:
    """The leader's side of a step: prompts in, verified groups out."""

    def __init__(self, session: Session):
        self.cfg = session.cfg
        task = session.make_task()
        self.verifier: VerifierPool = session.make_verifier(task)
        self.prompts = task.prompts("train")
        self.pool: RolloutPool = session.make_pool(session.spec)
        self.dump = session.path / "rollouts"

    def act(self, weights: WeightSet, step: int, detail: Callable[[str, int, int], None]) -> list[Group]:
        """Roll out step `step`'s prompts under `weights`. The prompts depend on seed and step alone, so that a resumed
        run goes on where it was: no prompt twice, none lost, until all have been used."""
        rl, r = self.cfg.rl, self.cfg.rollout
        self.pool.load(weights)
        prompts = step_prompts(self.prompts, step, rl)
        answers = self.pool.generate(
            prompts,
            rl.group_size,
            SamplingParams(rl.temperature, r.max_new_tokens, tuple(r.stop)),
            ExitPolicy("sample"),
            rl.seed * 1_000_003 + step,
            lambda done, total: detail("rollouts", done, total),
        )
        stale = {a.weight_version for group in answers for a in group} - {weights.version}
        if stale:
            raise RuntimeError(f"rollouts under weight versions {sorted(stale)}, expected {weights.version}")
        verdicts = iter(
            self.verifier.verify_many([(p, a.text) for p, g in zip(prompts, answers, strict=True) for a in g])
        )
        groups = []
        for prompt, group in zip(prompts, answers, strict=True):
            found = [next(verdicts) for _ in group]
            rewards = np.array([v.reward for v in found], dtype=np.float32)
            correct, well_formed = ([getattr(v, name) for v in found] for name in ("correct", "well_formed"))
            groups.append(Group(prompt, group, rewards, np.array(correct), np.array(well_formed)))
        if rl.dump_rollouts:
            save_rollouts(self.dump / f"step_{step + 1}", groups)
        return groups

    def health(self) -> dict[str, float]:
        pool = self.pool.health()
        return {
            "verifier_timeouts": float(self.verifier.timeouts),
            "actor_restarts": float(pool["restarts"]),
            "actors_alive": float(pool["alive"]),
        }


def step_prompts(prompts: list[Prompt], step: int, rl: RLConfig) -> list[Prompt]:
    """Step's share of an endless sequence of shuffled passes over the prompts."""
    first, chosen = step * rl.prompts_per_step, []
    for position in range(first, first + rl.prompts_per_step):
        epoch, place = divmod(position, len(prompts))
        order = np.random.default_rng([rl.seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[order[place]])
    return chosen
