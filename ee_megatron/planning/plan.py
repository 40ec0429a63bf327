"""A run's plan: layout, parameters, memory against the devices, FLOPs and seconds by phase, the command."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.cluster import job_shape
from ..config.schema import RunConfig
from ..config.validate import validate
from ..families import ModelDims
from .devices import Device
from .layout import Layout, Parameters, rank_parameters
from .memory import Training, actor_memory, learner_memory, sync_bytes
from .step import phase_flops
from .timing import Roofline
from .workload import Workload

HOST = "optimizer (host)"


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted of the data: prompt tokens, mean answer tokens (0: rollout.max_new_tokens), mean
    depth as a share of the layers. Memory is planned for the longest answers at full depth."""

    prompt_tokens: int = 200
    answer_tokens: int = 0
    mean_depth: float = 0.7


@dataclass(frozen=True)
class Plan:
    """Bytes by kind per pipeline rank and per rollout actor; FLOPs of all ranks and seconds by phase.

    load, longest: of an average answer, and of the longest, at full depth; item: bytes per element of the base.
    """

    cfg: RunConfig
    layout: Layout
    device: Device
    load: Workload
    longest: Workload
    item: int
    learner: list[dict[str, float]]
    actor: dict[str, float]
    flops: dict[str, float]
    seconds: dict[str, float]

    @property
    def parameters(self) -> list[Parameters]:
        """Those of a rank, by pipeline rank."""
        return [rank_parameters(self.layout, p) for p in range(self.layout.pipeline)]

    @property
    def step_seconds(self) -> float:
        """Seconds of a whole RL step."""
        return sum(self.seconds.values())

    @property
    def shared(self) -> bool:
        """Whether rollout actors have to share the learner's devices."""
        return self.on_cpu or job_shape(self.cfg, "rl").shares_devices

    @property
    def on_cpu(self) -> bool:
        """Whether the learner runs on CPUs."""
        return self.device.packed

    @property
    def sync(self) -> int:
        """Bytes of the weights that one sync sends to the pool."""
        return sync_bytes(self.layout, self.item, self.cfg.rollout.sync_dtype)

    @property
    def trained(self) -> int:
        """Parameters of the policy, all ranks together."""
        return sum(math.prod(shape) for shape in self.layout.spec.tensor_shapes(self.layout.dims).values())

    def device_bytes(self, kinds: dict[str, float]) -> float:
        """Bytes that count against a device: on a GPU without what lies in the host's memory."""
        return sum(size for kind, size in kinds.items() if kind != HOST or self.on_cpu)

    def shortage(self) -> str:
        """Which device lacks how much memory, in words; empty if everything fits."""
        device, world, actors = self.device, self.layout.ranks, self.cfg.rollout.actors
        stages, actor = [self.device_bytes(kinds) for kinds in self.learner], self.device_bytes(self.actor)
        worst, most = max(enumerate(stages), key=lambda stage: stage[1])
        if self.on_cpu:
            # Processes of one machine share its memory.
            whole = world // len(stages) * sum(stages) + actors * actor
            needs = {f"{world} learner rank(s) and {actors} actor(s) on one machine": whole}
        elif self.shared:
            needs = {f"a device with learner stage {worst} and a rollout actor": most + actor}
        else:
            needs = {f"a learner rank of stage {worst}": most, "a rollout actor": actor}
        for what, size in needs.items():
            if size + device.reserved > device.memory:
                return (
                    f"{what} needs {(size + device.reserved) / 2**30:.1f} GiB, {device.name} has "
                    f"{device.memory / 2**30:.1f} ({device.reserved / 2**30:.1f} of them reserved)"
                )
        return ""


def element_bytes(cfg: RunConfig, on_cpu: bool) -> int:
    """As training/session.py picks the dtype."""
    if cfg.model.dtype == "auto":
        import torch

        return 4 if on_cpu and not torch.cpu._is_amx_tile_supported() else 2
    return 4 if cfg.model.dtype == "float32" else 2


def make_plan(cfg: RunConfig, dims: ModelDims, device: Device, assumed: Assumptions) -> Plan:
    """By arithmetic alone; construct.py builds what this counts. Raises ValueError for a configuration that does not
    fit the model (config/validate.py) or assumptions that no data can meet."""
    validate(cfg, dims)
    layout = Layout.of(cfg, dims)
    outcomes, longest_answer = layout.spec.layout.outcomes, cfg.rollout.max_new_tokens
    answer = assumed.answer_tokens or longest_answer
    if answer > longest_answer:
        raise ValueError(f"--answer-tokens {answer}: longer than rollout.max_new_tokens={longest_answer} allows")
    load = Workload.of(assumed.prompt_tokens, answer, outcomes, assumed.mean_depth)
    load = load.in_groups(cfg.rl.group_size, cfg.parallel.micro_batch_size)
    longest = Workload.of(assumed.prompt_tokens, longest_answer, outcomes, 1.0)
    item = element_bytes(cfg, device.packed)
    learner, actor = memory(cfg, layout, longest, item, device.packed)
    flops, seconds = phase_flops(layout, load, cfg), Roofline(cfg, layout, load, device, item).phases()
    return Plan(cfg, layout, device, load, longest, item, learner, actor, flops, seconds)


def actor_rows(cfg: RunConfig) -> int:
    """Cache slots that an actor asks for: as many as it may have in flight, no more than it is given."""
    answers = -(-cfg.rl.prompts_per_step // cfg.rollout.actors) * cfg.rl.group_size
    return min(cfg.rollout.rows, answers)


def memory(
    cfg: RunConfig, layout: Layout, longest: Workload, item: int, on_cpu: bool
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Kind -> bytes in an RL step: of a learner rank, by pipeline rank, and of a rollout actor."""
    per_update = -(-cfg.rl.prompts_per_step * cfg.rl.group_size // cfg.rl.minibatches)
    batches = max(1, -(-per_update // (cfg.parallel.micro_batch_size * layout.data)))
    parallel, zero = cfg.parallel, cfg.deepspeed
    training = Training(
        item, parallel.micro_batch_size, parallel.recompute, zero.zero_stage, zero.offload_optimizer, on_cpu
    )
    learner = [learner_memory(layout, longest, training, p, batches) for p in range(layout.pipeline)]
    return learner, actor_memory(layout, longest, item, actor_rows(cfg), on_cpu)
