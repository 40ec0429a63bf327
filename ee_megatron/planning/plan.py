"""A run's plan: layout, parameters, memory against the devices, FLOPs and seconds by phase, the command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..config.cluster import job_shape
from ..config.device import multiplies_bfloat16
from ..config.schema import RunConfig
from ..config.validate import validate
from ..families import ModelDims
from ..rollout.vllm.memory import CPU_CACHE_GIB, GPU_SHARE
from .actors import Actor, make_actor
from .devices import GIB, Device
from .generation import Round, token_round
from .layout import Layout, Parameters, rank_parameters
from .memory import Training, learner_memory, sync_bytes
from .packing import pack_pass
from .step import phase_flops, updates
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
    """Bytes by kind per pipeline rank; a rollout actor; FLOPs of all ranks by phase.

    load, longest: of an average answer, and of the longest, at full depth; item: bytes per element of the base.
    """

    cfg: RunConfig
    layout: Layout
    device: Device
    load: Workload
    longest: Workload
    item: int
    learner: list[dict[str, float]]
    actor: Actor
    flops: dict[str, float]
    roofline: Roofline

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Phase of an RL step -> likely seconds."""
        return self.roofline.phases()

    @cached_property
    def best_seconds(self) -> dict[str, float]:
        """The same with every assumption at its optimistic end."""
        return self.roofline.at_best(*self.roofline.assumed).phases()

    @cached_property
    def gains(self) -> dict[str, float]:
        """Assumption -> seconds by which a step gets shorter if it alone is at its optimistic end; most first."""
        found = {name: self.step_seconds - self.roofline.at_best(name).seconds for name in self.roofline.assumed}
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))

    @property
    def parameters(self) -> list[Parameters]:
        """Those of a rank, by pipeline rank."""
        return [rank_parameters(self.layout, p) for p in range(self.layout.pipeline)]

    @property
    def step_seconds(self) -> float:
        """Likely seconds of a whole RL step."""
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
    def generates(self) -> bool:
        """Whether there are rollouts to make: none are where recorded ones are learned from."""
        return not self.cfg.rl.replay

    @property
    def round(self) -> Round:
        """A token round of an actor with as many answers in flight as it has at a time."""
        rows = max(1, self.actor.rows)
        return token_round(self.cfg, self.layout, self.load, self.device, self.item, rows)

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Of an actor while its rows are full, and of the whole pool over the phase, prompts and waits included."""
        answers = self.cfg.rl.prompts_per_step * self.cfg.rl.group_size
        return self.actor.rows / self.round.seconds, answers * self.load.answer / self.seconds["rollouts"]

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
        device, world, rollout = self.device, self.layout.ranks, self.cfg.rollout
        stages = [self.device_bytes(kinds) for kinds in self.learner]
        actor = self.device_bytes(self.actor.kinds) if self.generates else 0.0
        worst, most = max(enumerate(stages), key=lambda stage: stage[1])
        if self.on_cpu:
            # Processes of one machine share its memory.
            taking = rollout.actors * self.actor.devices
            whole = world // len(stages) * sum(stages) + taking * actor
            needs = {f"{world} learner rank(s) and {taking} actor(s) on one machine": whole}
        elif self.shared and self.generates:
            needs = {f"a device with learner stage {worst} and a rollout actor": most + actor}
        else:
            needs = {f"a learner rank of stage {worst}": most, "a rollout actor": actor}
        for what, size in needs.items():
            if size + device.reserved > device.memory:
                return (
                    f"{what} needs {(size + device.reserved) / GIB:.1f} GiB, {device.name} has "
                    f"{device.memory / GIB:.1f} ({device.reserved / GIB:.1f} of them reserved)"
                )
        if self.generates and not self.actor.holds_a_sequence:
            return self._short_cache()
        return ""

    def _short_cache(self) -> str:
        device, actor, limit = self.device, self.actor, self.cfg.rollout.cache_gib
        if limit:
            what = f"rollout.cache_gib={limit:g}"
        elif self.on_cpu:
            what = f"vLLM's {CPU_CACHE_GIB} GiB on a CPU (rollout.cache_gib)"
        else:
            others = (sum(actor.kinds.values()) - actor.kinds["KV cache"]) / GIB
            what = (
                f"what is left of {GPU_SHARE:g} x {device.memory / GIB:.1f} GiB beside {others:.1f} for weights and a "
                f"step and {device.reserved / GIB:.1f} reserved"
            )
        return (
            f"the cache of a rollout actor needs room for one longest sequence, {actor.sequence} positions; {what} "
            f"holds {actor.positions}"
        )


def element_bytes(cfg: RunConfig, on_cpu: bool) -> int:
    """As `pick_dtype` picks on the device that is planned for."""
    if cfg.model.dtype == "auto":
        return 4 if on_cpu and not multiplies_bfloat16() else 2
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
    prompt, first = assumed.prompt_tokens, layout.spec.first_token
    load = Workload.of(prompt, answer, outcomes, assumed.mean_depth, first)
    longest = Workload.of(prompt, longest_answer, outcomes, 1.0, first)
    item = element_bytes(cfg, device.packed)
    learner = learner_kinds(cfg, layout, longest, item, device.packed)
    actor = make_actor(cfg, layout, load, longest, item, device)
    roofline = Roofline(cfg, layout, load, device, item, max(1, actor.rows), longest_answer)
    return Plan(cfg, layout, device, load, longest, item, learner, actor, phase_flops(layout, load, cfg), roofline)


def learner_kinds(cfg: RunConfig, layout: Layout, longest: Workload, item: int, on_cpu: bool) -> list[dict[str, float]]:
    """Kind -> bytes of a learner rank in an RL step, by pipeline rank."""
    _, part, how = updates(cfg)
    zero = cfg.deepspeed
    training = Training(
        item, cfg.parallel.recompute, zero.zero_stage, zero.offload_optimizer, on_cpu, divergence=how.divergence
    )
    packed = pack_pass(cfg, longest, part, cfg.rl.group_size)
    return [learner_memory(layout, packed, training, p) for p in range(layout.pipeline)]
