"""A pool of Ray actors, each a whole replica in its own process: dead ones are replaced and their prompts retried."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ...config.derive import actor_share, call_timeout, start_timeout
from ...config.device import require_compiler, require_gpus
from ...families.hf_directory import HFDirectory
from ...host_memory import return_freed
from ...policy import WeightSet
from ...tensors import Block, Digest, Entries, Hasher, HeldStream, LazyTensors, Stream
from ...types import Rollout
from ..engine.request import GenerationRequest, Progress
from .interface import TEACHER, ReplicaSettings, RolloutPool, identity
from .local import LocalPool
from .ray_cluster import RayNodes, prepare_environment, start_ray
from .ray_driver import Driver, Sent, Work
from .transport import pack, sync_dtype, travels_in, unpack
from .vllm import EngineDied, VllmPool

# Chunks per actor: more spread the load better and lose less to a death, fewer keep its rows fuller.
CHUNKS_PER_ACTOR = 4
# How long the end of the actors is waited for, seconds.
CLOSE_S = 30.0
# Finished answers per trace or score call.
READ_CHUNK = 128
log = logging.getLogger(__name__)


class Replica:
    """An actor's pool of one replica, which works only for callers that expect its current weights."""

    def __init__(self, settings: ReplicaSettings):
        self.held: tuple[int, str] | None = None
        self._device = settings.device
        self._refusal: ValueError | None = None
        vllm = settings.rollout.backend == "vllm"
        try:
            if settings.device == "cuda":
                require_gpus(settings.rollout.tensor, "device=cuda")
                if vllm and settings.rollout.vllm:
                    require_compiler(settings.rollout.vllm.python, "rollout.backend=vllm")
        except ValueError as error:
            # Raised here it would count as a death, and the next actor would be tried: the first load raises it.
            self._refusal = error
            return
        self.pool = VllmPool(settings) if vllm else LocalPool.of(settings)

    def load(
        self, wanted: tuple[int, str], chunks: Sequence[Any] | None, timeout_s: float
    ) -> tuple[tuple[int, str], int, str]:
        """Fetch and load a version's chunks (None: the teacher); returns that version, process id, Ray's node id.

        Until that is done it holds nothing. Chunks are immutable in the object store, so their bytes are those that the
        sender hashed. Raises ValueError if this node lacks the GPU that it was to use.
        """
        import ray

        if self._refusal is not None:
            raise self._refusal
        self.held, weights = None, None
        if chunks is not None:
            tensors = {}
            for reference in chunks:
                tensors.update(unpack(ray.get(reference, timeout=timeout_s)))
            weights = WeightSet(wanted[0], tensors, wanted[1])
        self.pool.load(weights)
        self.held = identity(weights)
        return self.held, os.getpid(), str(ray.get_runtime_context().get_node_id())

    def call(self, expected: tuple[int, str], method: str, arguments: tuple) -> Any:
        """Call a method of the pool. Raises ValueError if other weights are loaded than the caller expects."""
        if self.held != expected:
            held = "no weights" if self.held is None else f"version {self.held[0]} ({self.held[1][:12]})"
            raise ValueError(
                f"replica holds weights {held}, expected version {expected[0]} ({expected[1][:12]}); load them"
            )
        try:
            return getattr(self.pool, method)(*arguments)
        except EngineDied as error:
            # As if this actor had died: another one takes over its work.
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        finally:
            if self._device == "cpu":
                # The learner, or another actor, works next, here too.
                return_freed()


def actor_needs(device: str, device_share: float) -> dict[str, float]:
    """Resources of an actor by Ray's names: a share of a GPU on a GPU, else of a core as Ray counts them."""
    if device.startswith("cuda"):
        return {"CPU": 1.0, "GPU": device_share}
    return {"CPU": device_share, "GPU": 0.0}


def create_replica(ray: Any, settings: ReplicaSettings, needs: dict[str, float]) -> Any:
    """Start an actor with these resources on a node."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, settings.rollout.threads)),
        # Actors share cores with the learner, where threads that spin at barriers cost tenfold; some microseconds of it
        # are less than what sleeping costs at every small product.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "2000",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Not restarted by Ray, which would wait for room without end where a node is lost: the driver decides.
    actor = ray.remote(Replica).options(
        num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_restarts=0, runtime_env={"env_vars": environment}
    )
    return actor.remote(settings)


class PutTensors(LazyTensors):
    """A version's tensors in the object store, from which the actors read them, while this object lives."""

    def __init__(self, chunks: tuple[Any, ...], entries: Entries):
        self.chunks, self.entries = chunks, entries


class RayPool(RolloutPool):
    """A pool of `rollout.actors` Ray actors. Joins the cluster that RAY_ADDRESS names, else starts one on loopback."""

    def __init__(self, replica: ReplicaSettings):
        rollout = replica.rollout
        share = actor_share(rollout)
        source = HFDirectory(replica.model_path)
        rollout = replace(rollout, timeout_s=call_timeout(rollout))
        starting = start_timeout(replica.rollout, source.size())
        self._replica = replace(replica, start_s=starting)
        prepare_environment()
        import ray

        self._ray, self._rollout, self.sync_dtype = ray, rollout, sync_dtype(rollout)
        self._owner = not ray.is_initialized()
        if self._owner:
            shapes = replica.spec.tensor_shapes(source.dims).values() if replica.spec else []
            start_ray(ray, rollout.actors, share, 4 * sum(math.prod(shape) for shape in shapes), starting)
        # What the actors are to hold, and whose version it is before it is narrowed.
        self._sent, self._origin = Sent(TEACHER, None), TEACHER
        needs = actor_needs(replica.device, share)
        create = partial(create_replica, ray, self._replica, needs)
        self._driver = Driver(ray, create, RayNodes(ray, needs), rollout, starting)

    def store_weights(self, version: int, stream: Stream) -> WeightSet:
        """Put the tensors into the object store, chunk by chunk while the next one's arrive: the node's actors read
        them there."""
        chunks, entries = [], {}
        narrow, decoder = self.sync_dtype, self._replica.dtype
        with Hasher(0) as hasher:
            digest = Digest(hasher)
            for chunk in pack(stream, lambda name: travels_in(name, narrow, decoder)):
                for name, tensor in unpack(chunk).items():
                    entries[name] = tensor.dtype, tuple(tensor.shape)
                    digest.add_block(Block(name, tuple(tensor.shape), 0, tensor))
                chunks.append(self._ray.put(chunk))
            return WeightSet(version, PutTensors(tuple(chunks), entries), digest.hexdigest())

    def load(self, weights: WeightSet | None) -> None:
        """Load weights into all actors; returns when every one reports this version and digest."""
        self._driver.submit(Work(self._send(weights))).result()

    def generate(self, request: GenerationRequest, progress: Progress | None = None) -> list[list[Rollout]]:
        return self._generation(self._sent, request).result(progress)

    def begin(self, weights: WeightSet, request: GenerationRequest) -> Work:
        """Queue the request; each actor loads the new weights once it has no work under older ones."""
        return self._generation(self._send(weights), request)

    def read(self, reading: str, rollouts: Sequence[Rollout], settings: tuple, progress: Progress | None) -> list:
        size = max(1, min(READ_CHUNK, -(-len(rollouts) // self._rollout.actors)))
        chunks = [list(rollouts[i : i + size]) for i in range(0, len(rollouts), size)]
        work = Work(self._sent, reading, [(c, *settings) for c in chunks], [len(c) for c in chunks])
        return self._driver.submit(work).result(progress)

    def health(self) -> dict:
        """State of the pool: `alive` counts actors that have started, those that load the next weights among them;
        `pids` are theirs; `version` and `digest` are of the weights that were last requested."""
        wanted = self._sent.identity
        ready = [place for place in self._driver.places if place.pid]
        return {
            "backend": self._rollout.backend,
            "actors": self._rollout.actors,
            "alive": len(ready),
            "restarts": self._driver.deaths,
            "last_death": self._driver.last_death,
            "version": wanted[0],
            "digest": wanted[1],
            "pids": [place.pid for place in ready],
        }

    def close(self) -> None:
        """End the actors, and Ray too if this pool started it. A cluster that is being ended itself may not answer any
        more: it is waited for in a thread, for CLOSE_S seconds."""
        end = threading.Thread(target=self._end, name="rollout-pool-end", daemon=True)
        end.start()
        end.join(CLOSE_S)
        if end.is_alive():
            log.warning("Ray did not let go of the rollout actors within %g s; they end with their cluster", CLOSE_S)

    def _end(self) -> None:
        self._driver.close()
        if self._owner and self._ray.is_initialized():
            self._ray.shutdown()

    def _send(self, weights: WeightSet | None) -> Sent:
        """Put a version into the object store, unless it is there."""
        if weights is None:
            self._sent, self._origin = Sent(TEACHER, None), TEACHER
        elif identity(weights) not in (self._origin, self._sent.identity):
            put = weights
            if not isinstance(put.tensors, PutTensors):
                put = self.store_weights(weights.version, HeldStream(weights.tensors))
            assert isinstance(put.tensors, PutTensors)
            self._sent, self._origin = Sent(identity(put), put.tensors.chunks), identity(weights)
        return self._sent

    def _generation(self, sent: Sent, request: GenerationRequest) -> Work:
        # By the number of actors that there should be: answers must not depend on who is alive.
        rows, actors, prompts = self._rollout.max_num_seqs, self._rollout.actors, request.prompts
        # Several rules make more chunks, not larger ones: a chunk's time has a limit.
        spread = CHUNKS_PER_ACTOR * actors * len(request.rules)
        size = max(-(-2 * rows // request.per_prompt), -(-len(prompts) // spread))
        size = max(1, min(size, -(-len(prompts) // actors)))
        chunks = [replace(request, prompts=prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return self._driver.submit(Work(sent, "generate", [(c,) for c in chunks], [c.answers for c in chunks]))
