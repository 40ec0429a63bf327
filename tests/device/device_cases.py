"""What runs on the pretend GPU: every path of rollout and learner, on the CPU and on the device, in one process; and
how decoders, learners, batches and exit rules are made for it.

A path takes a `Bench` and returns what it computed as values of the CPU.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from layout_cases import split
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import transformer_block
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from transformers import AutoTokenizer

from ee_megatron.config.schema import DeepspeedConfig, ParallelConfig
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.kernels import compiled as kernels
from ee_megatron.learner import engine
from ee_megatron.learner.batch import ReplayBatch, pack
from ee_megatron.learner.learner import Learner, Scores, Update
from ee_megatron.model import layer
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.objectives.weights import Weights, mean_weights
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec, initial_policy, load_policy, save_policy
from ee_megatron.rollout.engine import linear as decoder_linear
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.rollout.engine.generation import generate
from ee_megatron.rollout.engine.request import GenerationRequest, Request
from ee_megatron.rollout.engine.sampling import SamplingParams, truncate
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.engine.scoring import inspect, score, trace
from ee_megatron.types import Prompt, Rollout
from tests.pretend_gpu import NAME, PretendGPU, register
from tests.reference import random_policy
from tests.tiny import exit_rules

LAYERS = 6
LORA = PolicySpec(LAYERS, (1, 3, 4), rank=4, alpha=8.0)
FULL = PolicySpec(LAYERS, (1, 3, 4), rank=0, full=True)
OUTCOMES = (*LORA.exit_depths, LAYERS)
TOKENS, LESSON, STRIP, MICRO_BATCHES = 10, 6, 40, 2
SINGLE = Degrees()
NO_STOP = frozenset({10**6})

TEXTS = ("Q: 1 + 1 =", "abc", "Q: 1 + 2 =", "a longer prompt than the others have")
PROMPTS = [Prompt(f"p{i}", text, "", "none") for i, text in enumerate(TEXTS)]
# A beginning in common, long enough to be read apart.
SHARED = [Prompt(f"p{i}", "Add these numbers: " + text, "", "none") for i, text in enumerate(TEXTS)]

# ---- rollouts ----

REPLAYED = {(f"p{p}", k): [LAYERS, *([1, 3, 4, 6] * TOKENS)[p + k :]] for p in range(4) for k in range(2)}
RULES = exit_rules(REPLAYED)
SAMPLINGS = {
    "whole": SamplingParams(1.0, TOKENS),
    "greedy": SamplingParams(0.0, TOKENS),
    "top_k": SamplingParams(1.0, TOKENS, top_k=9),
    "top_p": SamplingParams(0.7, TOKENS, top_p=0.6),
    "top_k_top_p": SamplingParams(1.2, TOKENS, top_k=20, top_p=0.8),
    "penalised": SamplingParams(
        1.1, TOKENS, min_p=0.5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2
    ),
}


def make_decoder(
    path: Path, device: torch.device, spec: PolicySpec = LORA, dtype: torch.dtype = torch.float32
) -> Decoder:
    """With a policy loaded, without an end of sequence."""
    decoder = Decoder.from_hf(path, spec, dtype, device)
    decoder.load_policy(start(path, spec))
    decoder.eos_ids = NO_STOP
    return decoder


def start(path: Path, spec: PolicySpec, seed: int = 0) -> dict[str, Tensor]:
    """A policy that differs from the base and whose gates matter."""
    source = HFDirectory(path)
    if not spec.full:
        return random_policy(source.dims, spec, seed)
    policy = initial_policy(source.dims, spec, 0, source.tensor)
    moved = {n: t + 0.01 * seed for n, t in policy.items()}
    return moved | {n: t for n, t in random_policy(source.dims, spec, seed).items() if n.startswith("gates.")}


def answer(
    decoder: Decoder, tokenizer: Any, prompts: Sequence[Prompt], rule: str = "sample", sampling: str = "whole",
    samples: int = 1, seed: int = 3, version: int = 0, rows: int = 6, **more: Any,
) -> list[list[Rollout]]:  # fmt: skip
    """`generate` with a rule of RULES and a sampling of SAMPLINGS."""
    request = GenerationRequest(prompts, samples, SAMPLINGS[sampling], RULES[rule], seed)
    return generate(decoder, tokenizer, request, version, rows=rows, **more)


# ---- learning ----

OBJECTIVES = ("likelihood", "soft_targets", "distill", "distill_full", "exact_kl")


def make_learner(
    path: Path, device: torch.device, spec: PolicySpec, degrees: Degrees, *, policy: dict[str, Tensor] | None = None,
    zero_stage: int = 0, recompute: bool = False, dtype: torch.dtype = torch.float32, **options: Any,
) -> Learner:  # fmt: skip
    """From `policy` or `start`; `zero_stage`: of the stand-in for DeepSpeed, 0 or on a single rank 1."""
    return Learner(
        HFDirectory(path), spec, policy or start(path, spec),
        ParallelConfig(
            degrees.tensor, degrees.pipeline, degrees.data, tokens_per_micro_batch=STRIP, recompute=recompute
        ),
        DeepspeedConfig(zero_stage=zero_stage, gradient_clipping=0.3, eps=1e-3),
        device=device, dtype=dtype, **options,
    )  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """A batch, the weights of its loss and the teacher of its divergence: what a learner asks of an objective."""

    batch: ReplayBatch
    weights: Weights
    teacher: Teacher | None


def make_lesson(objective: str = "likelihood", seed: int = 0, rows: int = LESSON) -> Lesson:
    """Sequences of which some share prompts, with what an objective of OBJECTIVES needs."""
    numbers, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    prompts = [numbers.integers(0, 128, n) for n in numbers.integers(3, 9, rows)]
    prompts[1] = prompts[0]
    answers = [numbers.integers(0, 128, n) for n in numbers.integers(2, 9, rows)]
    depths = [np.concatenate([[LAYERS], numbers.choice(OUTCOMES, len(a) - 1)]) for a in answers]
    batch = pack(prompts, answers, depths, LAYERS)
    scale = torch.linspace(0.5, 1.5, rows)[:, None]
    token, gates = scale * mean_weights(batch, batch.loss_mask), scale * mean_weights(batch, batch.gate_mask)
    targets = torch.rand(*batch.tokens.shape, 3, generator=generator)
    if objective == "distill":
        logits = torch.randn(*batch.tokens.shape, 130, generator=generator).mul(2)
        logprobs, ids = logits.log_softmax(-1).topk(8, dim=-1)
        batch = replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)
    teacher = {"distill": Teacher.STORED, "distill_full": Teacher.REFERENCE, "exact_kl": Teacher.REFERENCE}
    weights = Weights(
        token=None if objective.startswith("distill") else token,
        exit=gates,
        divergence=token if objective in teacher else None,
        target_hazards=targets if objective in ("soft_targets", "distill") else None,
    )
    return Lesson(batch, weights, teacher.get(objective))


def score_lesson(learner: Learner, lesson: Lesson, **options: Any) -> Scores:
    return learner.score(lesson.batch, teacher=lesson.teacher, **options)


def score_reference(learner: Learner, lesson: Lesson) -> Scores:
    return learner.score(lesson.batch, reference=True)


def update(learner: Learner, lesson: Lesson) -> Update:
    return learner.step(lesson.batch, lesson.weights, lesson.teacher, adapter_lr=1e-3, gate_lr=3e-3)


# ---- the device ----


def device_of(kind: str) -> torch.device:
    return torch.device("cpu") if kind == "cpu" else torch.device(NAME, 0)


@contextlib.contextmanager
def on(kind: str, degrees: Degrees = SINGLE) -> Iterator[None]:
    """Inside, what megatron-core makes "on CUDA" is made on the device, and DeepSpeed's engine is stood in for.

    Both devices run the same PyTorch, without what the CPU has of its own and rounds differently: compiled kernels,
    packed products, fused attention.
    """
    register()
    split(degrees)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(patched(kernels, library=lambda dtype: None))
        stack.enter_context(patched(decoder_linear, _packed=lambda weight, bias: None))
        stack.enter_context(torch._dynamo.config.patch(disable=True))
        stack.enter_context(patched(engine, import_deepspeed=lambda on_cpu: SimpleNamespace(initialize=_initialize)))
        if kind != "cpu":
            stack.enter_context(PretendGPU())
            device = device_of(kind)
            stack.enter_context(patched(torch.cuda, current_device=lambda: device))
            stack.enter_context(patched(schedules, torch=_Torch(device)))
            stack.enter_context(patched(torch.distributed, batch_isend_irecv=_one_by_one))
            # It assigns to `data`, which a pretend tensor can't follow; what it saves is memory of views.
            stack.enter_context(patched(transformer_block, make_viewless_tensor=lambda inp, **_: inp))
        yield


@contextlib.contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or class replaced inside. Raises AttributeError for one that isn't there."""
    kept = {name: (getattr(owner, name), name in vars(owner)) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, (value, own) in kept.items():
            setattr(owner, name, value) if own else delattr(owner, name)


def _one_by_one(operations: list[torch.distributed.P2POp]) -> list[Any]:
    """`batch_isend_irecv`, which gloo's groups don't know for this device."""
    return [op.op(op.tensor, op.peer, op.group, op.tag) for op in operations]


class _Torch:
    """`torch` as megatron-core's schedules see it: device="cuda" is the pretend one."""

    def __init__(self, device: torch.device):
        self.device = device

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("zeros", "tensor"):
            return found
        return lambda *args, **kwargs: found(*args, **kwargs | ({"device": self.device} if "device" in kwargs else {}))


def _initialize(*, model: Any, optimizer: Any, config: dict, **_: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize` for one rank, stages 0 and 1."""
    zero = config["zero_optimization"]["stage"]
    held = _Flat(optimizer, config["gradient_clipping"]) if zero else optimizer
    reduction = held.reduction if zero else contextlib.nullcontext
    return (SimpleNamespace(optimizer=held, step=held.step, coalesce_grad_reduction=reduction),)


class _Flat:
    """What ee_megatron asks of DeepSpeed's ZeRO-1 optimizer, for one rank: a flat fp32 copy per group."""

    use_grad_accum_attribute, fill_grad_accum_attribute = False, None

    def __init__(self, optimizer: torch.optim.Optimizer, clipping: float):
        self.optimizer, self.clipping = optimizer, clipping
        self.params_in_partition = [list(group["params"]) for group in optimizer.param_groups]
        self.round_robin_bit16_groups = self.params_in_partition
        self.round_robin_bit16_offsets = [
            np.cumsum([0, *(p.numel() for p in parameters)])[:-1].tolist() for parameters in self.params_in_partition
        ]
        self.single_partition_of_fp32_groups = [
            torch.cat([p.detach().float().flatten() for p in parameters]).requires_grad_()
            for parameters in self.params_in_partition
        ]
        for group, flat in zip(optimizer.param_groups, self.single_partition_of_fp32_groups, strict=True):
            group["params"] = [flat]
        self.real_dp_process_group = [torch.distributed.group.WORLD] * len(self.params_in_partition)
        self.averaged_gradients: dict[int, list[Tensor]] = {}

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @contextlib.contextmanager
    def reduction(self) -> Iterator[None]:
        yield
        for index, parameters in enumerate(self.params_in_partition):
            self.averaged_gradients[index] = [p.grad for p in parameters]  # type: ignore[misc]

    @staticmethod
    def get_grad_norm_direct(gradients: list[Tensor], _: Any) -> Tensor:
        return torch.stack([g.float().norm() for g in gradients]).norm()

    @torch.no_grad()
    def step(self) -> None:
        norms = [self.get_grad_norm_direct(g, None) for g in self.averaged_gradients.values()]
        factor = (self.clipping / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
        for index, flat in enumerate(self.single_partition_of_fp32_groups):
            flat.grad = torch.cat([g.float().flatten() for g in self.averaged_gradients[index]]) * factor
        self.optimizer.step()
        for index, flat in enumerate(self.single_partition_of_fp32_groups):
            places = zip(self.params_in_partition[index], self.round_robin_bit16_offsets[index], strict=True)
            for parameter, offset in places:
                parameter.copy_(flat.narrow(0, offset, parameter.numel()).view_as(parameter))


@dataclass
class Bench:
    """Where a path runs: "cpu" or "gpu", on the model in `path`, cut over as many ranks as `degrees` has."""

    kind: str
    path: Path
    degrees: Degrees = SINGLE

    @property
    def device(self) -> torch.device:
        return device_of(self.kind)

    def decoder(self, spec: PolicySpec = LORA, dtype: torch.dtype = torch.float32) -> Decoder:
        return make_decoder(self.path, self.device, spec, dtype)

    def learner(self, spec: PolicySpec = LORA, **options: Any) -> Learner:
        return make_learner(self.path, self.device, spec, self.degrees, **options)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)


# ---- paths of rollouts ----


def answers(
    bench: Bench, rule: str = "sample", sampling: str = "whole", prompts: Sequence[Prompt] = PROMPTS
) -> list[list[Rollout]]:
    return answer(bench.decoder(), bench.tokenizer(), prompts, rule, sampling, samples=2)


def rollouts(bench: Bench) -> list[Rollout]:
    """The same on every device: answers of the CPU, with exits of every depth."""
    return [rollout for group in answers(Bench("cpu", bench.path)) for rollout in group]


def mixed(bench: Bench, decoder: Decoder | None = None, top_logprobs: int = 0) -> list[Rollout]:
    """Every rule and every sampling in flight together, with prefills and text stops."""
    scheduler = Scheduler(decoder or bench.decoder(), bench.tokenizer(), in_flight=7, batch=5)
    cases = [(r, s) for r in RULES for s in SAMPLINGS]
    ids = []
    for i, (r, s) in enumerate(cases):
        name, prefill = f"p{i % 4}", [5, 6] if i % 5 == 0 else ()
        request = Request(TEXTS[i % 4], SAMPLINGS[s], RULES[r], 0, name, i % 2, False, top_logprobs, prefill)
        ids.append(scheduler.add(request))
    while scheduler.busy:
        scheduler.advance()
    return [scheduler.take(i, 0) for i in ids]


def nucleus_of_a_flat_distribution(bench: Bench) -> Tensor:
    """Some rows need the whole vocabulary sorted, some don't."""
    logits = torch.randn(6, 130, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 8.0] * 3)[:, None]
    return truncate(logits.to(bench.device), 0, 0.7, candidates=16).cpu()


def scored(bench: Bench, spec: PolicySpec = LORA, dtype: torch.dtype = torch.float32) -> list:
    return score(bench.decoder(spec, dtype), start(bench.path, spec), rollouts(bench))


def inspected(bench: Bench) -> list:
    return inspect(bench.decoder(), start(bench.path, LORA), rollouts(bench), streams=True)


def traced(bench: Bench) -> list:
    decoder = bench.decoder()
    decoder.load_policy(None)
    return trace(decoder, rollouts(bench), top_k=5)


def loaded(bench: Bench, spec: PolicySpec = LORA) -> list[list[Rollout]]:
    """Policies at once, in chunks and none, one after another; tensors come from the host and from the device."""
    decoder, found, tokenizer = bench.decoder(spec), [], bench.tokenizer()
    for seed in (1, 2):
        policy = start(bench.path, spec, seed)
        with tempfile.TemporaryDirectory() as folder:
            save_policy(Path(folder), spec, {name: tensor.to(bench.device) for name, tensor in policy.items()})
            policy = load_policy(folder)[1]
        for name, tensor in policy.items():
            decoder.load_chunk({name: tensor if seed == 1 else tensor.to(bench.device)})
        decoder.finish_load()
        found += answer(decoder, tokenizer, PROMPTS, version=seed)
    decoder.load_policy(None)
    return found + answer(decoder, tokenizer, PROMPTS, "off", version=3)


# ---- paths of the learner ----


def learner_scores(bench: Bench, spec: PolicySpec = LORA, objective: str = "likelihood") -> list:
    learner, lesson = bench.learner(spec), make_lesson(objective)
    return [
        score_lesson(learner, lesson),
        score_lesson(learner, lesson, hazards=True),
        score_reference(learner, lesson),
    ]


def learned(bench: Bench, spec: PolicySpec = LORA, objective: str = "likelihood", **options: Any) -> list:
    """Two updates: what they saw, and the policy after them."""
    learner, lesson = bench.learner(spec, **options), make_lesson(objective)
    return [update(learner, lesson) for _ in range(2)] + [learner.export_policy()]


def resumed(bench: Bench, spec: PolicySpec = LORA, **options: Any) -> list:
    """Two updates, everything written down, a new learner from that, two more updates."""
    learner = bench.learner(spec, **options)
    seen = [update(learner, make_lesson(seed=i)) for i in range(2)]
    written = [learner.export_policy(), learner.export_optimizer()]
    # Ranks read what the leader was sent.
    dist.broadcast_object_list(written)
    policy, state = written
    again = bench.learner(spec, policy=policy, **options)
    again.load_optimizer(state)
    seen += [update(again, make_lesson(seed=i)) for i in range(2, 4)]
    return [seen, policy, state, again.export_policy(), again.export_optimizer()]


PATHS: dict[str, Callable[[Bench], Any]] = {
    **{f"decode_{rule}": partial(answers, rule=rule) for rule in RULES},
    **{f"sampling_{sampling}": partial(answers, sampling=sampling) for sampling in SAMPLINGS},
    "decode_shared_prefix": partial(answers, prompts=SHARED),
    "decode_mixed": mixed,
    "nucleus_of_a_flat_distribution": nucleus_of_a_flat_distribution,
    "score": scored,
    "score_full": partial(scored, spec=FULL),
    "score_bfloat16": partial(scored, dtype=torch.bfloat16),
    "inspect": inspected,
    "trace": traced,
    "load": loaded,
    "load_full": partial(loaded, spec=FULL),
    **{f"learner_score_{kind}": partial(learner_scores, objective=kind) for kind in OBJECTIVES},
    "learner_score_full": partial(learner_scores, spec=FULL, objective="exact_kl"),
    **{f"learn_{kind}": partial(learned, objective=kind) for kind in OBJECTIVES},
    "learn_recompute": partial(learned, recompute=True),
    "learn_dropout": partial(learned, adapter_dropout=0.1),
    "learn_full": partial(learned, spec=FULL, objective="exact_kl"),
    "learn_full_recompute": partial(learned, spec=FULL, recompute=True),
    "learn_jensen_shannon": partial(learned, objective="distill", kl_direction="jensen_shannon"),
    "learn_bfloat16": partial(learned, dtype=torch.bfloat16),
    "learn_full_bfloat16": partial(learned, spec=FULL, zero_stage=1, dtype=torch.bfloat16),
    "resume": resumed,
    "resume_flat": partial(resumed, zero_stage=1),
    "resume_full": partial(resumed, spec=FULL),
    "resume_full_flat": partial(resumed, spec=FULL, zero_stage=1),
    "resume_bfloat16": partial(resumed, spec=FULL, zero_stage=1, dtype=torch.bfloat16),
}


def run_path(path: Path, name: str, degrees: tuple[int, ...] = ()) -> dict[str, Any]:
    """A path on both devices: what it computed on "cpu" and "gpu"."""
    found: dict[str, Any] = {}
    for kind in ("cpu", "gpu"):
        torch.manual_seed(0)
        with on(kind, Degrees(*degrees)):
            found[kind] = plain(PATHS[name](Bench(kind, path, Degrees(*degrees))))
    return found


@dataclass
class _CudaBench(Bench):
    """Its learners compute what this field of their config says as on CUDA."""

    option: str = ""

    def learner(self, spec: PolicySpec = LORA, **options: Any) -> Learner:
        learner = super().learner(spec, **options)
        setattr(learner.config, self.option, True)
        return learner


def flex_paths(path: Path) -> tuple[list[dict[str, Any]], int]:
    """What the passes of RL and calibration compute on the CPU, with attention by blocks and by FlexAttention, of which
    PyTorch compiles everything but the kernels; and the graphs that this took."""
    counter, found = CompileCounterWithBackend("aot_eager"), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(on("cpu"))
        stack.enter_context(torch._dynamo.config.patch(disable=False))
        stack.enter_context(patched(flex_attention, _validate_device=lambda *_: None))
        stack.enter_context(patched(torch, compile=partial(torch.compile, backend=counter)))
        for bench in (Bench("cpu", path), _CudaBench("cpu", path, option="flex_attention")):
            found.append(_learners_paths(bench))
    return found, counter.frame_count


def fused_paths(path: Path) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """What these passes compute without and with fused norms, rotations and SwiGLU, nothing compiled; and which of them
    were."""
    called, bench = set(), _CudaBench("cpu", path, option="fused")

    def noting(name: str, function: Callable) -> Callable:
        return lambda *args: (called.add(name), function(*args))[1]

    with on("cpu"), contextlib.ExitStack() as stack:
        plainly = _learners_paths(Bench("cpu", path))
        for owner, name in ((F, "rms_norm"), (layer, "_compiled_turn"), (layer, "bias_swiglu_impl")):
            stack.enter_context(patched(owner, **{name: noting(name, getattr(owner, name))}))
        return plainly, _learners_paths(bench), called


def _learners_paths(bench: Bench) -> dict[str, Any]:
    results = {}
    for name in FLEX_PATHS:
        torch.manual_seed(0)
        results[name] = plain(PATHS[name](bench))
    return results


FLEX_PATHS = ("learner_score_exact_kl", "learner_score_full", "learn_exact_kl", "learn_soft_targets", "learn_recompute",
              "learn_full", "learn_bfloat16")  # fmt: skip


def plain(value: Any) -> Any:
    """Dictionaries and lists of arrays, numbers and texts. Raises TypeError for a tensor left on the device."""
    if is_dataclass(value):
        return {name: plain(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.detach().float().numpy() if isinstance(value, Tensor) else value
