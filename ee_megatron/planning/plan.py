"""A run's plan: layout, parameters, memory against the devices, FLOPs and seconds by phase, the command."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.cluster import job_shape
from ..config.derive import ranks
from ..config.schema import RunConfig
from ..config.validate import validate
from ..families import ModelDims
from . import timing
from .devices import Device
from .layout import Layout, Parameters, rank_parameters
from .memory import Training, actor_memory, learner_memory, sync_bytes
from .step import Step, phase_flops, rl_step
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
    """Bytes by kind per pipeline rank and per rollout actor; FLOPs of all ranks and seconds by phase."""

    cfg: RunConfig
    layout: Layout
    device: Device
    load: Workload
    longest: Workload
    parameters: list[Parameters]
    learner: list[dict[str, float]]
    actor: dict[str, float]
    item: int
    step: Step
    flops: dict[str, float]
    seconds: dict[str, float]

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
        return sync_bytes(self.layout)

    def device_bytes(self, kinds: dict[str, float]) -> float:
        """Bytes that count against a device: on a GPU without what lies in the host's memory."""
        return sum(size for kind, size in kinds.items() if kind != HOST or self.on_cpu)

    def shortage(self) -> str:
        """Which device lacks how much memory; empty if everything fits."""
        return shortage(self.cfg, self.device, self.learner, self.actor, self.shared)


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
    step = rl_step(cfg, item)
    learner = [learner_bytes(cfg, layout, longest, item, device.packed, p) for p in range(layout.pipeline)]
    actor = actor_memory(layout, longest, item, actor_rows(cfg), device.packed)
    seconds = {
        "rollouts": timing.rollout_seconds(layout, load, step, device),
        "scoring": timing.score_seconds(layout, load, step, device),
        "update": timing.update_seconds(layout, load, step, device),
        "weight sync": timing.sync_seconds(layout, device),
    }
    parameters = [rank_parameters(layout, p) for p in range(layout.pipeline)]
    flops = phase_flops(layout, load, step)
    return Plan(cfg, layout, device, load, longest, parameters, learner, actor, item, step, flops, seconds)


def actor_rows(cfg: RunConfig) -> int:
    """Cache slots that an actor asks for: as many as it may have in flight, no more than it is given."""
    answers = -(-cfg.rl.prompts_per_step // cfg.rollout.actors) * cfg.rl.group_size
    return min(cfg.rollout.rows, answers)


def learner_bytes(
    cfg: RunConfig, layout: Layout, longest: Workload, item: int, on_cpu: bool, pipeline_rank: int
) -> dict[str, float]:
    """Kind -> bytes of one learner rank in an RL step."""
    per_update = -(-cfg.rl.prompts_per_step * cfg.rl.group_size // cfg.rl.minibatches)
    batches = max(1, -(-per_update // (cfg.parallel.micro_batch_size * layout.data)))
    training = Training(
        item,
        cfg.parallel.micro_batch_size,
        cfg.parallel.recompute,
        cfg.deepspeed.zero_stage,
        cfg.deepspeed.offload_optimizer,
        on_cpu,
    )
    return learner_memory(layout, longest, training, pipeline_rank, batches)


def shortage(
    cfg: RunConfig, device: Device, learner: list[dict[str, float]], actor: dict[str, float], shared: bool
) -> str:
    """Which device lacks how much memory, in words; empty if everything fits."""

    def total(kinds: dict[str, float]) -> float:
        return sum(size for kind, size in kinds.items() if kind != HOST or device.packed)

    def lacks(what: str, needed: float) -> str:
        if needed <= device.memory:
            return ""
        return (
            f"{what} needs {needed / 2**30:.1f} GiB, {device.name} has {device.memory / 2**30:.1f} "
            f"({device.reserved / 2**30:.1f} of them reserved)"
        )

    if device.packed:
        # Processes of one machine share its memory.
        replicas = ranks(cfg) // len(learner)
        whole = replicas * sum(total(kinds) for kinds in learner) + cfg.rollout.actors * total(actor)
        return lacks(f"{ranks(cfg)} learner rank(s) and {cfg.rollout.actors} actor(s) on one machine",
                     whole + device.reserved)  # fmt: skip
    worst = max(range(len(learner)), key=lambda p: total(learner[p]))
    needed = total(learner[worst]) + device.reserved
    if shared:
        return lacks(f"a device with learner stage {worst} and a rollout actor", needed + total(actor))
    return lacks(f"a learner rank of stage {worst}", needed) or lacks("a rollout actor",
                                                                      total(actor) + device.reserved)  # fmt: skip
