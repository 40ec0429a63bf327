"""What runs in an actor's process, and how Ray is started round it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...config.cluster import require_ray_tokens
from ...config.device import require_gpus
from ...host_memory import return_freed
from ...policy import WeightSet
from ..vllm.pipe import EngineDied
from .interface import ReplicaSettings, identity
from .local import LocalPool
from .ray_nodes import await_head, await_nodes, is_loopback
from .transport import unpack
from .vllm import VllmPool

# Calls of this group run beside the one call of the actor's own: they tell it to stop.
CONTROL = "control"


class Replica:
    """It works only for a caller who expects the weights that it holds."""

    def __init__(self, settings: ReplicaSettings):
        self.held: tuple[int, str] | None = None
        self._stopped = 0
        self._device = settings.device
        self._refusal: ValueError | None = None
        try:
            if settings.device == "cuda":
                require_gpus(settings.tensor, "device=cuda")
        except ValueError as error:
            # Raised here it would count as a death, and the next actor would be tried: the first load says it.
            self._refusal = error
            return
        self.pool = VllmPool(settings) if settings.vllm_python else LocalPool.of(settings)

    def load(
        self, wanted: tuple[int, str], chunks: Sequence[Any] | None, timeout_s: float
    ) -> tuple[tuple[int, str], int, str]:
        """Fetch a version's chunks (None: the teacher) and load it; what is held now, process id and Ray's node id.

        Until that is done it holds nothing. The digest is taken here, over what arrived. Raises ValueError if this
        node lacks the GPU that it was to use.
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

    def call(self, expected: tuple[int, str], method: str, arguments: tuple, number: int = 0) -> Any:
        """Run a method of the pool. A `generate` whose `number` is stopped returns what it has. Raises ValueError if
        other weights are held than the caller expects."""
        if self.held != expected:
            held = "no weights" if self.held is None else f"version {self.held[0]} ({self.held[1][:12]})"
            raise ValueError(
                f"replica holds weights {held}, expected version {expected[0]} ({expected[1][:12]}); load them"
            )
        try:
            if method != "generate":
                return getattr(self.pool, method)(*arguments)
            return self.pool.generate(arguments[0], None)
        except EngineDied as error:
            # The driver replaces an actor that is gone and asks another for what this one owes.
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        finally:
            if self._device == "cpu":
                # The learner, or another actor, works next, here too.
                return_freed()

    def stop(self, number: int) -> None:
        """Let call `number` end with what it has; without effect on any other."""
        self._stopped = number


def actor_needs(device: str, device_share: float) -> dict[str, float]:
    """What an actor takes of a node, by Ray's names of resources."""
    if device.startswith("cuda"):
        return {"CPU": 1.0, "GPU": device_share}
    return {"CPU": device_share, "GPU": 0.0}


def create_replica(ray: Any, settings: ReplicaSettings, device_share: float) -> Any:
    """Start an actor on a share of a device: of a GPU on a GPU, else of a core as Ray counts them."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, settings.threads)),
        # Actors share cores with the learner, where threads that spin at barriers cost tenfold; some microseconds of it
        # are less than what sleeping costs at every small product.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "2000",
        "TOKENIZERS_PARALLELISM": "false",
    }
    needs = actor_needs(settings.device, device_share)
    actor = ray.remote(concurrency_groups={CONTROL: 1})(Replica).options(
        num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_restarts=0, runtime_env={"env_vars": environment}
    )
    return actor.remote(settings)


def prepare_environment() -> None:
    """What Ray reads when it is imported or started. Without a cluster to join it stays on the loopback address: the
    variable's name speaks of other systems, but it is what decides which address a single node takes. A cluster on
    other machines is joined with a token only. Raises ValueError where there is none, or a Ray that knows none."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    elif is_remote(address):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] != "token":
            return
        require_ray_tokens()
        if not has_token():
            raise ValueError(
                f"RAY_ADDRESS={address} is another machine and there is no token for it; start its cluster with "
                "RAY_AUTH_MODE=token and set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH here (docs/serving.md)"
            )


def is_remote(address: str) -> bool:
    """Whether a Ray address, with or without scheme and port, lies beyond the loopback."""
    host = address.split("://")[-1].rsplit(":", 1)[0].strip("[]")
    return host not in ("local", "auto") and not is_loopback(host)


def has_token() -> bool:
    """Where Ray looks for a token: the variable, the file that a variable names, the file in the home directory."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).is_file()


def start_ray(ray: Any, actors: int, device_share: float, policy_bytes: int, timeout_s: float) -> None:
    """Join the cluster of RAY_ADDRESS, waiting up to `timeout_s` for its head and for its nodes, or start one of this
    machine only: loopback, no dashboard, no usage reports."""
    init = partial(ray.init, namespace=f"ee-megatron-{os.getpid()}", log_to_driver=False, logging_level="ERROR")
    if os.environ.get("RAY_ADDRESS"):
        await_head(os.environ["RAY_ADDRESS"], timeout_s)
        init(address=os.environ["RAY_ADDRESS"])
        await_nodes(ray, timeout_s)
        return
    init(
        # Without this Ray joins whatever cluster somebody else has left running on the machine.
        address="local",
        num_cpus=max(2, 1 + actors * math.ceil(device_share)),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        # Room for two versions of the weights on their way and the rollouts of a batch.
        object_store_memory=max(1 << 27, 3 * policy_bytes),
    )
