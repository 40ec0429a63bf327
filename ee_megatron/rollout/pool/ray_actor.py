"""What runs in an actor's process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from ...config.device import require_gpus
from ...host_memory import return_freed
from ...policy import WeightSet
from ..vllm.ipc import EngineDied
from .interface import ReplicaSettings, identity
from .local import LocalPool
from .transport import unpack
from .vllm import VllmPool


class Replica:
    """A pool of one replica, which works only for a caller who expects the weights that it holds."""

    def __init__(self, settings: ReplicaSettings):
        self.held: tuple[int, str] | None = None
        self._device = settings.device
        self._refusal: ValueError | None = None
        try:
            if settings.device == "cuda":
                require_gpus(settings.rollout.tensor, "device=cuda")
        except ValueError as error:
            # Raised here it would count as a death, and the next actor would be tried: the first load raises it.
            self._refusal = error
            return
        vllm = settings.rollout.backend == "vllm"
        self.pool = VllmPool(settings) if vllm else LocalPool.of(settings)

    def load(
        self, wanted: tuple[int, str], chunks: Sequence[Any] | None, timeout_s: float
    ) -> tuple[tuple[int, str], int, str]:
        """Fetch a version's chunks (None: the teacher) and load it: what is held now, process id and Ray's node id.

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
        """Run a method of the pool. Raises ValueError if other weights are held than the caller expects."""
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
    """What an actor takes of a node, by Ray's names: a share of a GPU on a GPU, else of a core as Ray counts them."""
    if device.startswith("cuda"):
        return {"CPU": 1.0, "GPU": device_share}
    return {"CPU": device_share, "GPU": 0.0}


def create_replica(ray: Any, settings: ReplicaSettings, needs: dict[str, float]) -> Any:
    """Start an actor on what it `needs` of a node."""
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
