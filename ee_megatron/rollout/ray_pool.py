"""A pool of Ray actors, each a whole replica in its own process: dead ones are replaced and their prompts retried."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..families.hf_directory import HFDirectory
from ..policy import WeightSet
from ..types import Prompt, Rollout, Trace
from .pool import LocalPool, ReplicaSettings, identity
from .sampling import ExitPolicy, SamplingParams
from .scheduler import Progress
from .scoring import Score

# How long a wait may sleep before deadlines are looked at again, seconds.
POLL_S = 1.0
# Chunks per actor: more spread the load better and lose less to a death, fewer keep its rows fuller.
CHUNKS_PER_ACTOR = 4
# Finished answers per trace or score call.
READ_CHUNK = 128


class Replica:
    """What runs in an actor's process. It works only for a caller who expects the weights that it holds."""

    def __init__(self, settings: ReplicaSettings):
        self.pool = LocalPool(
            settings.model_path, settings.spec, settings.dtype, settings.device, settings.rows, settings.threads
        )
        self.held: tuple[int, str] | None = None

    def load(self, weights: WeightSet | None) -> tuple[tuple[int, str], int]:
        """Returns what it holds now, and its process id."""
        self.held = None
        self.pool.load(weights)
        self.held = identity(weights)
        return self.held, os.getpid()

    def call(self, expected: tuple[int, str], method: str, arguments: tuple) -> list:
        """Run a method of the pool. Raises ValueError if other weights are held than the caller expects."""
        if self.held != expected:
            held = "no weights" if self.held is None else f"version {self.held[0]} ({self.held[1][:12]})"
            raise ValueError(
                f"replica holds weights {held}, expected version {expected[0]} ({expected[1][:12]}); load them"
            )
        return getattr(self.pool, method)(*arguments)


@dataclass
class _Actor:
    """An actor and the one call it has in flight: a chunk's number, or None for a load."""

    handle: Any
    started: bool = False
    held: tuple[int, str] | None = None
    pid: int = 0
    call: Any = None
    chunk: int | None = None
    stale: bool = False
    deadline: float = 0.0


@dataclass
class _Work:
    """Chunks of one request: arguments and sizes by number, those not given out yet, results."""

    method: str
    arguments: list[tuple]
    sizes: list[int]
    pending: deque[int] = field(default_factory=deque)
    results: dict[int, list] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pending.extend(range(len(self.arguments)))


class RayPool:
    """`RolloutPool` over `actors` Ray actors. Joins the cluster that RAY_ADDRESS names, else starts one on loopback.

    Every wait has a deadline: `start_timeout_s` for an actor's first load, `timeout_s` for any other call. An actor
    that dies or misses one is replaced, reloaded, and its chunk retried; loss number `failure_budget` raises
    RuntimeError.
    """

    def __init__(
        self,
        replica: ReplicaSettings,
        actors: int = 1,
        start_timeout_s: float = 180.0,
        timeout_s: float = 600.0,
        failure_budget: int = 3,
    ):
        if actors < 1:
            raise ValueError(f"rollout.actors={actors}: a pool needs at least 1")
        dims = HFDirectory(replica.model_path).dims
        prepare_environment()
        import ray

        self._ray, self._replica = ray, replica
        self._start_timeout_s, self._timeout_s, self._budget = start_timeout_s, timeout_s, failure_budget
        self._deaths = 0
        self._last_death = ""
        self._owner = not ray.is_initialized()
        if self._owner:
            shapes = replica.spec.tensor_shapes(dims).values() if replica.spec else []
            start_ray(ray, actors, 4 * sum(int(np.prod(shape)) for shape in shapes))
        self._weights: WeightSet | None = None
        self._reference: Any = ray.put(None)
        self._actors = [_Actor(self._create()) for _ in range(actors)]

    def load(self, weights: WeightSet | None) -> None:
        """Returns when every actor reports this version and digest."""
        self._weights, self._reference = weights, self._ray.put(weights)
        self._complete(_Work("", [], []), everyone=True)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: SamplingParams,
        exits: ExitPolicy,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Rollout]]:
        rows, actors = self._replica.rows, len(self._actors)
        size = max(-(-2 * rows // samples), -(-len(prompts) // (CHUNKS_PER_ACTOR * actors)))
        size = max(1, min(size, -(-len(prompts) // actors)))
        chunks = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        arguments = [(chunk, samples, sampling, exits, seed) for chunk in chunks]
        work = _Work("generate", arguments, [len(chunk) * samples for chunk in chunks])
        return self._complete(work, progress)

    def trace(self, rollouts: Sequence[Rollout], top_k: int, progress: Progress | None = None) -> list[Trace]:
        return self._read("trace", rollouts, (top_k,), progress)

    def score(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[Score]:
        return self._read("score", rollouts, (), progress)

    def divergence_to_teacher(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        return [entry.divergence for entry in self.score(rollouts)]

    def health(self) -> dict:
        """As of the last call: `alive` counts actors that hold the wanted weights; `pids` are theirs."""
        wanted = identity(self._weights)
        ready = [actor for actor in self._actors if actor.held == wanted]
        return {
            "backend": "ray",
            "actors": len(self._actors),
            "alive": len(ready),
            "restarts": self._deaths,
            "last_death": self._last_death,
            "version": wanted[0],
            "digest": wanted[1],
            "pids": [actor.pid for actor in ready],
        }

    def close(self) -> None:
        """End the actors, and Ray too if this pool started it."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors = []
        if self._owner and self._ray.is_initialized():
            self._ray.shutdown()

    # ---- driving the actors ----

    def _read(self, method: str, rollouts: Sequence[Rollout], extra: tuple, progress: Progress | None) -> list:
        size = max(1, min(READ_CHUNK, -(-len(rollouts) // len(self._actors))))
        chunks = [list(rollouts[i : i + size]) for i in range(0, len(rollouts), size)]
        return self._complete(_Work(method, [(c, *extra) for c in chunks], [len(c) for c in chunks]), progress)

    def _complete(self, work: _Work, progress: Progress | None = None, everyone: bool = False) -> list:
        """Run all chunks; `everyone`: until every actor holds the wanted weights. Results in the chunks' order."""
        wanted, total, done = identity(self._weights), sum(work.sizes), 0
        try:
            while len(work.results) < len(work.sizes) or (everyone and any(a.held != wanted for a in self._actors)):
                for actor in self._actors:
                    self._assign(actor, work, wanted)
                self._collect(work, wanted)
                now = sum(work.sizes[i] for i in work.results)
                if progress and now > done:
                    progress(now, total)
                done = now
        finally:
            for actor in self._actors:
                # What is still in flight belongs to the request that ends here: its outcome concerns no later one.
                actor.stale = actor.call is not None
        return [entry for i in range(len(work.sizes)) for entry in work.results[i]]

    def _assign(self, actor: _Actor, work: _Work, wanted: tuple[int, str]) -> None:
        """Give an idle actor the weights if it hasn't the wanted ones, else the next chunk."""
        if actor.call is not None:
            return
        if actor.held != wanted:
            actor.held = None
            actor.call = actor.handle.load.remote(self._reference)
            limit = self._timeout_s if actor.started else self._start_timeout_s
        elif work.pending:
            actor.chunk = work.pending.popleft()
            actor.call = actor.handle.call.remote(wanted, work.method, work.arguments[actor.chunk])
            limit = self._timeout_s
        else:
            return
        actor.deadline = time.monotonic() + limit

    def _collect(self, work: _Work, wanted: tuple[int, str]) -> None:
        """Wait for some call to end and take in what did; replace actors that died or are overdue."""
        busy = [actor for actor in self._actors if actor.call is not None]
        nearest = min(actor.deadline for actor in busy) - time.monotonic()
        ended, _ = self._ray.wait([actor.call for actor in busy], timeout=min(POLL_S, max(0.0, nearest)))
        for actor in busy:
            if actor.call in ended:
                self._take(actor, work)
            elif time.monotonic() > actor.deadline:
                what = "start" if not actor.started else "answer"
                self._replace(actor, work, f"it did not {what} within its deadline")

    def _take(self, actor: _Actor, work: _Work) -> None:
        errors = self._ray.exceptions
        call, chunk, stale = actor.call, actor.chunk, actor.stale
        try:
            result = self._ray.get(call, timeout=self._timeout_s)
        except (errors.RayActorError, errors.WorkerCrashedError) as error:
            return self._replace(actor, work, str(error).strip().splitlines()[0])
        except errors.RayTaskError as error:
            actor.call, actor.chunk, actor.stale = None, None, False
            if stale:
                return None
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        actor.call, actor.chunk, actor.stale = None, None, False
        if chunk is None:
            actor.held, actor.pid = result
            actor.started = True
            # Loads overtaken by a newer version are simply repeated by `_assign`.
        elif not stale:
            work.results[chunk] = result
        return None

    def _replace(self, actor: _Actor, work: _Work, reason: str) -> None:
        """Start a new actor in a lost one's place and put its chunk back at the front."""
        self._deaths += 1
        self._last_death = reason
        if actor.chunk is not None and not actor.stale:
            work.pending.appendleft(actor.chunk)
        self._ray.kill(actor.handle)
        if self._deaths >= self._budget:
            actor.call, actor.chunk, actor.held = None, None, None
            raise RuntimeError(
                f"rollout pool: {self._deaths} actors lost, rollout.failure_budget is {self._budget}; "
                f"the last: {reason}. Look for memory limits or lower rollout.rows"
            )
        self._actors[self._actors.index(actor)] = _Actor(self._create())

    def _create(self) -> Any:
        gpu = self._replica.device.startswith("cuda")
        environment = {
            "OMP_NUM_THREADS": str(max(1, self._replica.threads)),
            # Actors share cores with the learner, where threads that spin at barriers cost tenfold.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        remote = self._ray.remote(Replica).options(
            num_cpus=1, num_gpus=1 if gpu else 0, max_restarts=0, runtime_env={"env_vars": environment}
        )
        return remote.remote(self._replica)


def prepare_environment() -> None:
    """What Ray reads when it is imported or started. Without a cluster to join it stays on the loopback address: the
    variable's name speaks of other systems, but it is what decides which address a single node takes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def start_ray(ray: Any, actors: int, policy_bytes: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start one of this machine only: loopback, no dashboard, no usage reports."""
    common: dict[str, Any] = {
        "namespace": f"ee-megatron-{os.getpid()}",
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address=os.environ["RAY_ADDRESS"], **common)
        return
    ray.init(
        num_cpus=max(2, actors + 1),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        # Room for two versions of the weights on their way and the rollouts of a batch.
        object_store_memory=max(1 << 27, 3 * policy_bytes),
        **common,
    )
