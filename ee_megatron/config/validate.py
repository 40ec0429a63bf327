"""What the schema's types cannot say: choices, ranges, and whether model, exits and parallel layout fit each other.

torch is imported only where exits or dimensions are built, so that checks without a model cost nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..objectives.advantages import ADVANTAGES
from ..objectives.distillation import GATE_TARGETS
from ..objectives.divergences import KL_DIRECTIONS, TEACHERS
from ..objectives.policy_gradient import KL_TERMS
from ..objectives.rewards import DEPTH_COSTS, DEPTH_CREDITS
from ..objectives.schedules import DECAYS
from ..objectives.surrogates import SURROGATES
from .cluster import seats
from .schema import RunConfig

if TYPE_CHECKING:
    from ..exits import ExitLayout
    from ..families import ModelDims
    from ..policy import PolicySpec

CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "exits.gate_input": ("normalised", "raw"),
    "adapter.targets": ("attention", "all"),
    "task.name": ("arithmetic", "gsm8k", "tom", "reasoning_gym", "dataset", "jsonl"),
    "calibrate.kl_direction": tuple(KL_DIRECTIONS),
    "calibrate.teacher": tuple(TEACHERS),
    "calibrate.gate_targets": tuple(GATE_TARGETS),
    "rl.depth_cost": tuple(DEPTH_COSTS),
    "rl.depth_credit": tuple(DEPTH_CREDITS),
    "rl.kl": tuple(KL_TERMS),
    "rl.decay": tuple(DECAYS),
    "rl.advantage": tuple(ADVANTAGES),
    "rl.surrogate": tuple(SURROGATES),
    "rollout.backend": ("ray", "local"),
    "rollout.prompt_template": ("plain", "chat"),
    "rollout.partial": ("finish", "continue", "drop"),
    "rollout.sync_dtype": ("float32", "bfloat16"),
    "evaluate.split": ("train", "validation", "evaluation"),
    "tracker.wandb": ("auto", "online", "offline", "disabled"),
}
# Sequences of a batch are padded to a multiple of this (learner/batch.py).
SEQUENCE_MULTIPLE = 8
# Those of reasoning_gym are the package's, which is not loaded here.
TASK_FAMILIES = {
    "arithmetic": ("product", "sum", "word", "chain"),
    "tom": ("first_order", "second_order", "true_belief", "reality", "memory"),
}

POSITIVE: dict[str, tuple[str, ...]] = {
    "parallel": (
        "tensor",
        "pipeline",
        "data",
        "virtual",
        "micro_batch_size",
        "timeout_s",
    ),
    "exits": ("gate_width",),
    "adapter": ("alpha",),
    "task": (
        "validation",
        "evaluation",
        "verifier_workers",
        "verifier_deadline_s",
    ),
    "pretrain": (
        "steps",
        "batch_size",
        "learning_rate",
        "checkpoint_every",
    ),
    "teacher": (
        "problems",
        "samples",
        "temperature",
        "epochs",
        "batch_size",
        "learning_rate",
    ),
    "traces": (
        "problems",
        "samples",
        "temperature",
        "top_k",
    ),
    "calibrate": (
        "epochs",
        "patterns",
        "batch_size",
        "kl_factor",
        "checkpoint_every",
    ),
    "rl": (
        "steps",
        "prompts_per_step",
        "group_size",
        "temperature",
        "cost_length",
        "importance_cap",
        "epochs",
        "minibatches",
        "checkpoint_every",
    ),
    "checkpoint": ("keep", "bad_steps"),
    "rollout": (
        "actors",
        "threads",
        "rows",
        "device_share",
        "max_new_tokens",
        "start_timeout_s",
        "timeout_s",
    ),
    "cluster": ("nodes",),
}
NOT_NEGATIVE: dict[str, tuple[str, ...]] = {
    "adapter": ("rank",),
    "task": (
        "train",
        "seed",
        "verifier_memory_mb",
    ),
    "pretrain": ("seed",),
    "teacher": (
        "shots",
        "seed",
    ),
    "traces": ("seed",),
    "calibrate": (
        "seed",
        "adapter_lr",
        "gate_lr",
        "gate_weight",
        "depth_power",
    ),
    "rl": (
        "seed",
        "lambda_exit",
        "beta",
        "adapter_lr",
        "gate_lr",
        "clip",
        "entropy_bonus",
        "warmup",
    ),
    "rollout": (
        "failure_budget",
        "max_staleness",
    ),
    "evaluate": (
        "tolerance",
        "answers",
        "externalisation_prompts",
        "seed",
    ),
    "deepspeed": (
        "gradient_clipping",
        "weight_decay",
    ),
    "cluster": (
        "gpus_per_node",
        "rollout_nodes",
        "requeue_limit",
    ),
}


def validate(cfg: RunConfig, dims: ModelDims | None) -> None:
    """Check everything that can be checked before a process starts; `dims` None skips what needs the model.

    Raises ValueError, one line: the setting, what was found, what was expected.
    """
    values = dict(_settings(cfg, ""))
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value}: expected a finite number")
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ValueError(f"{key}={values[key]}: expected one of {', '.join(choices)}")
    for key in _dotted(POSITIVE):
        if values[key] <= 0:
            raise ValueError(f"{key}={values[key]}: expected a number > 0")
    for key in _dotted(NOT_NEGATIVE):
        if values[key] < 0:
            raise ValueError(f"{key}={values[key]}: expected a number >= 0")
    _check_names(cfg)
    _check_task(cfg)
    _check_training(cfg)
    _check_parallel(cfg)
    share = cfg.rollout.device_share
    if share > 1 and share != int(share):
        raise ValueError(f"rollout.device_share={share}: expected a fraction up to 1, or whole devices")
    _check_cluster(cfg)
    if dims is not None:
        _check_tensor(cfg, dims)
        stage_sizes(cfg, resolve_exits(cfg, dims))


def ranks(cfg: RunConfig) -> int:
    """Learner processes: tensor x pipeline x data."""
    return cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.data


def read_dims(cfg: RunConfig) -> ModelDims:
    """Dimensions from the model directory's config.json; weights are not looked at.

    Raises FileNotFoundError (no such directory or file) or ValueError (not JSON, unsupported architecture).
    """
    from ..families import dims_from_config

    file = Path(cfg.model.path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"model.path={cfg.model.path}: no config.json there; expected a Hugging Face model directory: "
            "give model.path=<directory>, or run `make demo` once, which fetches the demo's"
        )
    try:
        return dims_from_config(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); copy the model again") from None


def resolve_exits(cfg: RunConfig, dims: ModelDims) -> ExitLayout:
    """The model's exits: exits.depths, or every fifth layer and the stage boundaries where none are given."""
    from ..exits import ExitLayout

    if cfg.exits.depths:
        return ExitLayout(dims.num_layers, tuple(cfg.exits.depths))
    sizes = cfg.parallel.stage_layers
    if not sizes:
        return ExitLayout.default(dims.num_layers, cfg.parallel.pipeline * cfg.parallel.virtual)
    edges = {sum(sizes[: stage + 1]) for stage in range(len(sizes) - 1)}
    depths = edges | set(ExitLayout.default(dims.num_layers).depths)
    return ExitLayout(dims.num_layers, tuple(sorted(depths)))


def stage_sizes(cfg: RunConfig, exits: ExitLayout) -> tuple[int, ...]:
    """Layers per stage, parallel.pipeline * parallel.virtual of them. Raises ValueError as `ExitLayout` does."""
    return exits.stage_sizes(cfg.parallel.pipeline * cfg.parallel.virtual, cfg.parallel.stage_layers)


def policy_spec(cfg: RunConfig, dims: ModelDims) -> PolicySpec:
    """The adapters and gates that this configuration trains."""
    from ..policy import ATTENTION, MLP, PolicySpec

    return PolicySpec(
        num_layers=dims.num_layers,
        exit_depths=resolve_exits(cfg, dims).depths,
        rank=0 if cfg.adapter.full else cfg.adapter.rank,
        full=cfg.adapter.full,
        alpha=cfg.adapter.alpha,
        targets=ATTENTION if cfg.adapter.targets == "attention" else ATTENTION + MLP,
        gate_width=cfg.exits.gate_width,
        gate_input=cfg.exits.gate_input,
    )


def _settings(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _settings(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _dotted(table: dict[str, tuple[str, ...]]) -> Iterator[str]:
    return (f"{section}.{name}" for section, names in table.items() for name in names)


def _check_names(cfg: RunConfig) -> None:
    if not cfg.name or Path(cfg.name).name != cfg.name or cfg.name in (".", ".."):
        raise ValueError(f"name={cfg.name!r}: expected a plain name without slashes; it is a directory in {cfg.runs}")
    if not cfg.model.path:
        raise ValueError("model.path: empty; expected a Hugging Face model directory")


def _check_task(cfg: RunConfig) -> None:
    task = cfg.task
    if task.name in ("arithmetic", "tom", "reasoning_gym"):
        _check_families(task.name, list(task.families))
        return
    if not task.path:
        raise ValueError(
            f"task.path: not set; task.name={task.name} reads a .jsonl or .parquet file, a directory of them, or a "
            "data set saved to disk"
        )
    for key in ("question_column", "answer_column", "train_split"):
        if not getattr(task, key):
            raise ValueError(f"task.{key}: empty; expected the name that it has in {task.path}")
    if task.train_split == task.evaluation_split:
        raise ValueError(
            f"task.evaluation_split={task.evaluation_split}: is the train split too; expected another, or nothing, "
            "which divides the train split (task.evaluation_split=)"
        )


def _check_families(name: str, families: list[str]) -> None:
    known = TASK_FAMILIES.get(name, ())
    if not families or (known and not set(families) <= set(known)):
        unknown = f" ({', '.join(f for f in families if f not in known)})" if families else ""
        raise ValueError(f"task.families={families}{unknown}: expected some of {', '.join(known) or 'its families'}")
    if len(set(families)) < len(families):
        raise ValueError(f"task.families={families}: expected each family once")
    if not known and set(families) & set(TASK_FAMILIES["arithmetic"]):
        raise ValueError(
            f"task.families={families}: are arithmetic's; expected families of {name}, [chain_sum,gcd] for example"
        )


def _check_training(cfg: RunConfig) -> None:
    if not 0 <= cfg.adapter.dropout < 1:
        raise ValueError(f"adapter.dropout={cfg.adapter.dropout}: expected 0 <= dropout < 1")
    if cfg.teacher.enabled and cfg.adapter.rank == 0 and not cfg.adapter.full:
        raise ValueError(
            "adapter.rank=0: the teacher is trained through adapters; give a rank > 0 or teacher.enabled=false"
        )
    shares = {
        "calibrate.uniform_patterns": cfg.calibrate.uniform_patterns,
        "calibrate.warmup": cfg.calibrate.warmup,
        "calibrate.student_patterns": cfg.calibrate.student_patterns,
        "calibrate.keep": cfg.calibrate.keep,
        "calibrate.keep_upper": cfg.calibrate.keep_upper,
        "calibrate.settle": cfg.calibrate.settle,
        "pretrain.warmup": cfg.pretrain.warmup,
        "rl.lambda_warmup": cfg.rl.lambda_warmup,
    }
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{key}={share}: expected a share from 0 to 1")
    for key in ("calibrate.keep", "calibrate.keep_upper"):
        if shares[key] < 1 and not cfg.calibrate.settle:
            raise ValueError(
                f"{key}={shares[key]}: moves the weights under the gates; give calibrate.settle, .1 say, for these to "
                "learn again"
            )
    if not 0 < cfg.rl.gate_centre < 1 or cfg.rl.gate_sharpness <= 0:
        raise ValueError(
            f"rl.gate_centre={cfg.rl.gate_centre}, rl.gate_sharpness={cfg.rl.gate_sharpness}: expected a hazard "
            "between 0 and 1 and a factor above 0"
        )
    if cfg.pretrain.enabled and cfg.rollout.prompt_template == "chat":
        raise ValueError(
            "rollout.prompt_template=chat: a model that is pretrained here has no chat template; set plain"
        )
    if cfg.rl.minibatches > cfg.rl.prompts_per_step:
        raise ValueError(
            f"rl.minibatches={cfg.rl.minibatches}: a step has rl.prompts_per_step={cfg.rl.prompts_per_step} groups to "
            "share out; give at most as many minibatches"
        )
    if cfg.rl.advantage != "none" and cfg.rl.group_size < 2:
        raise ValueError(
            f"rl.group_size={cfg.rl.group_size}: rl.advantage={cfg.rl.advantage} compares the rollouts of one prompt; "
            "expected at least 2, or rl.advantage=none"
        )
    outside = [threshold for threshold in cfg.evaluate.thresholds if not 0 <= threshold <= 1]
    if outside:
        raise ValueError(f"evaluate.thresholds: {outside} are no hazards; expected values from 0 to 1")
    if cfg.evaluate.control_policy and not cfg.evaluate.controls:
        raise ValueError(
            f"evaluate.control_policy={cfg.evaluate.control_policy}: only controls use it; set evaluate.controls=true"
        )


def _check_parallel(cfg: RunConfig) -> None:
    parallel, stage = cfg.parallel, cfg.deepspeed.zero_stage
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise ValueError("parallel.sequence_parallel=true: needs parallel.tensor > 1, found 1")
    if parallel.sequence_parallel and SEQUENCE_MULTIPLE % parallel.tensor:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} with parallel.sequence_parallel=true: sequences are padded to "
            f"multiples of {SEQUENCE_MULTIPLE}, which it does not divide; nearest degrees that do: "
            f"{', '.join(map(str, _nearest((2, 4, 8), parallel.tensor)))}"
        )
    if parallel.virtual > 1 and parallel.pipeline == 1:
        raise ValueError(
            f"parallel.virtual={parallel.virtual}: needs parallel.pipeline > 1, found 1; set parallel.virtual=1"
        )
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_stage={stage}: expected 0, 1, 2 or 3")
    if stage == 3 and parallel.tensor * parallel.pipeline > 1:
        raise ValueError(
            f"deepspeed.zero_stage=3: needs parallel.tensor = parallel.pipeline = 1, found {parallel.tensor} and "
            f"{parallel.pipeline}; set deepspeed.zero_stage=2"
        )
    if cfg.deepspeed.offload_optimizer and stage == 0:
        raise ValueError("deepspeed.offload_optimizer=true: needs deepspeed.zero_stage >= 1, found 0; set 1")
    betas = cfg.deepspeed.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or cfg.deepspeed.eps <= 0:
        raise ValueError(
            f"deepspeed.betas={list(betas)}, eps={cfg.deepspeed.eps}: expected two numbers in [0, 1), eps > 0"
        )


def _check_cluster(cfg: RunConfig) -> None:
    cluster, parallel, rollout = cfg.cluster, cfg.parallel, cfg.rollout
    if cluster.rollout_nodes >= cluster.nodes:
        raise ValueError(
            f"cluster.rollout_nodes={cluster.rollout_nodes}: leaves no learner node of cluster.nodes={cluster.nodes}; "
            f"set cluster.nodes={cluster.rollout_nodes + 1} or more"
        )
    if cluster.rollout_nodes and rollout.backend != "ray":
        raise ValueError(
            f"cluster.rollout_nodes={cluster.rollout_nodes}: needs rollout.backend=ray, found {rollout.backend}, which "
            "generates in the learner's process; set cluster.rollout_nodes=0"
        )
    if not cluster.gpus_per_node:
        return
    learners = cluster.nodes - cluster.rollout_nodes
    if learners * cluster.gpus_per_node < ranks(cfg):
        raise ValueError(
            f"parallel: {parallel.tensor} x {parallel.pipeline} x {parallel.data} = {ranks(cfg)} ranks, but "
            f"{learners} learner node(s) (cluster.nodes - cluster.rollout_nodes) x cluster.gpus_per_node="
            f"{cluster.gpus_per_node} = {learners * cluster.gpus_per_node} devices"
        )
    hosts = cluster.rollout_nodes or cluster.nodes
    room = hosts * seats(cluster.gpus_per_node, rollout.device_share)
    if rollout.backend == "ray" and room < rollout.actors:
        raise ValueError(
            f"rollout.actors={rollout.actors} with rollout.device_share={rollout.device_share:g}: {hosts} node(s) of "
            f"{cluster.gpus_per_node} devices have room for {room}; lower rollout.actors or raise "
            f"{'cluster.rollout_nodes' if cluster.rollout_nodes else 'cluster.nodes'}"
        )


def _check_tensor(cfg: RunConfig, dims: ModelDims) -> None:
    tensor = cfg.parallel.tensor
    sizes = {"attention heads": dims.heads, "key-value heads": dims.kv_heads, "intermediate size": dims.intermediate}
    bad = [f"{size} {name}" for name, size in sizes.items() if size % tensor]
    if bad:
        valid = [d for d in range(1, dims.kv_heads + 1) if not any(size % d for size in sizes.values())]
        near = _nearest(valid, tensor)
        raise ValueError(
            f"parallel.tensor={tensor} does not divide {', '.join(bad)} of {cfg.model.path}; "
            f"nearest degrees that do: {', '.join(map(str, near))}"
        )


def _nearest(choices: Sequence[int], wanted: int) -> list[int]:
    return sorted(sorted(choices, key=lambda choice: abs(choice - wanted))[:2])
