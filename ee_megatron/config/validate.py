"""Whether settings can be right: each by the rules on its field, then whether they fit each other and the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..objectives.depth import CREDITS, DEPTH_COSTS
from ..objectives.policy_gradient import KL_TERMS
from .cluster import job_shape, seats
from .derive import actor_share, check_cache, has_actors, ranks, resolve_exits, scoring, stage_sizes, vllm_vocabulary
from .device import asks_for_gpus
from .schema import SEQUENCE_MULTIPLE, Rules, RunConfig, settings

if TYPE_CHECKING:
    from ..families import ModelDims

# Those of reasoning_gym are the package's, which is not loaded here.
TASK_FAMILIES = {
    "arithmetic": ("product", "sum", "word", "chain"),
    "tom": ("first_order", "second_order", "true_belief", "reality", "memory"),
    "hops": ("hop1", "hop2", "hop3", "hop4"),
}


def validate(cfg: RunConfig, dims: ModelDims | None) -> None:
    """Check everything that can be checked before a process starts; `dims` None skips what needs the model.

    Raises ValueError, one line: the setting, what was found, what was expected.
    """
    for key, value, rules in settings(cfg):
        _check_value(key, value, rules)
    _check_names(cfg)
    _check_task(cfg)
    _check_training(cfg)
    _check_parallel(cfg)
    share = cfg.rollout.device_share
    if share > 1 and share != int(share):
        raise ValueError(f"rollout.device_share={share}: expected a fraction up to 1, or whole devices")
    _check_engine(cfg, dims)
    _check_cluster(cfg)
    if dims is not None:
        _check_tensor(cfg, dims)
        exits = resolve_exits(cfg, dims)
        stage_sizes(cfg.parallel, exits)
        if cfg.rl.fixed_depth and cfg.rl.fixed_depth not in exits.outcomes:
            raise ValueError(f"rl.fixed_depth={cfg.rl.fixed_depth}: expected 0 or one of {list(exits.outcomes)}")
        # Late, because it brings torch.
        from ..exits import gate_units

        gate_units(cfg.exits.gate_width, dims.hidden)


def _check_value(key: str, value: Any, rules: Rules) -> None:
    least, named = rules.at_least, [choice or "nothing" for choice in rules.choices]
    for wrong, expected in (
        (isinstance(value, float) and not math.isfinite(value), "a finite number"),
        (rules.choices and value not in rules.choices, f"one of {', '.join(named)}"),
        (rules.positive and value <= 0, "a number > 0"),
        (least is not None and value < least, f"a number >= {least}"),
        (rules.share and not 0 <= value <= 1, "a share from 0 to 1"),
    ):
        if wrong:
            raise ValueError(f"{key}={value}: expected {expected}")


def _check_names(cfg: RunConfig) -> None:
    if not cfg.name or Path(cfg.name).name != cfg.name or cfg.name in (".", ".."):
        raise ValueError(f"name={cfg.name!r}: expected a plain name without slashes; it is a directory in {cfg.runs}")
    if not cfg.model.path:
        raise ValueError("model.path: empty; expected a Hugging Face model directory")


def _check_task(cfg: RunConfig) -> None:
    task = cfg.task
    if cfg.rl.families and (task.path or not set(cfg.rl.families) <= set(task.families)):
        raise ValueError(
            f"rl.families={cfg.rl.families}: expected some of task.families, "
            f"{', '.join(task.families) if not task.path else f'which task.name={task.name} has none of'}"
        )
    if task.name in (*TASK_FAMILIES, "reasoning_gym"):
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
    for key, share in (("keep", cfg.calibrate.keep), ("keep_upper", cfg.calibrate.keep_upper)):
        if share < 1 and not cfg.calibrate.settle:
            raise ValueError(
                f"calibrate.{key}={share}: moves the weights under the gates; give calibrate.settle, .1 say, for these "
                "to learn again"
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
    _check_objective(cfg)
    outside = [threshold for threshold in cfg.evaluate.thresholds if not 0 <= threshold <= 1]
    if outside:
        raise ValueError(f"evaluate.thresholds: {outside} are no hazards; expected values from 0 to 1")
    if cfg.evaluate.control_policy and not cfg.evaluate.controls:
        raise ValueError(
            f"evaluate.control_policy={cfg.evaluate.control_policy}: only controls use it; set evaluate.controls=true"
        )
    if cfg.evaluate.choice and cfg.task.name != "hops":
        raise ValueError(
            f"evaluate.choice={cfg.evaluate.choice}: task.name={cfg.task.name} has no styles to choose from; expected "
            "task.name=hops, or evaluate.choice left out"
        )


def _check_objective(cfg: RunConfig) -> None:
    rl = cfg.rl
    if CREDITS[rl.credit].to_go and DEPTH_COSTS[rl.depth_cost].largest:
        raise ValueError(
            f"rl.credit={rl.credit} with rl.depth_cost={rl.depth_cost}: the largest depth is no sum over tokens, so "
            "none has a part of it; set rl.credit=exit or answer"
        )
    if rl.kl_sum and not KL_TERMS[rl.kl].in_reward:
        raise ValueError(f"rl.kl_sum=true: only the reward holds a sum over an answer; set rl.kl=reward, not {rl.kl}")
    if rl.fixed_depth and CREDITS[rl.credit].local:
        raise ValueError(
            f"rl.fixed_depth={rl.fixed_depth} with rl.credit={rl.credit}: no exit is chosen that could answer for "
            "itself; set rl.credit=answer"
        )
    if rl.importance == "mask" and rl.importance_floor >= rl.importance_cap:
        raise ValueError(
            f"rl.importance_floor={rl.importance_floor}: expected less than rl.importance_cap={rl.importance_cap}"
        )
    if rl.clip_high and rl.clip_high < rl.clip:
        raise ValueError(
            f"rl.clip_high={rl.clip_high}: expected at least rl.clip={rl.clip}, or 0 for the same bound on both sides"
        )
    if rl.accuracy_floor is not None and not -100 < rl.accuracy_floor < 100:
        raise ValueError(
            f"rl.accuracy_floor={rl.accuracy_floor}: expected percentage points below the reference, 1 for example"
        )
    if rl.accuracy_floor is not None and rl.lambda_exit > rl.lambda_max:
        raise ValueError(
            f"rl.lambda_exit={rl.lambda_exit}: with rl.accuracy_floor lambda starts there and stays below "
            f"rl.lambda_max={rl.lambda_max}; expected at most that"
        )
    if rl.accuracy_floor is not None and rl.replay:
        raise ValueError(
            "rl.accuracy_floor: recorded rollouts (rl.replay) don't tell what lambda does; set rl.accuracy_floor=null"
        )
    if not rl.skip_scoring:
        return
    wanted = scoring(rl)
    asked = {
        f"rl.epochs={rl.epochs}, rl.minibatches={rl.minibatches} (expected 1 and 1)": rl.epochs * rl.minibatches > 1,
        f"rl.importance={rl.importance} (expected none)": rl.importance != "none",
        f"rollout.max_staleness={cfg.rollout.max_staleness} (expected 0)": cfg.rollout.max_staleness > 0,
        f"rl.kl={rl.kl} with rl.beta={rl.beta} (expected exact, or 0)": wanted.reference,
        f"rl.credit={rl.credit} with rl.exit_kl={rl.exit_kl} (expected 0)": (
            CREDITS[rl.credit].local and rl.beta * rl.exit_kl > 0
        ),
    }
    found = [text for text, needs in asked.items() if needs]
    if found:
        raise ValueError(f"rl.skip_scoring=true: the objective has to know scores: {'; '.join(found)}")


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
    if cluster.rollout_nodes and not has_actors(rollout):
        raise ValueError(
            f"cluster.rollout_nodes={cluster.rollout_nodes}: needs rollout.backend=ray or vllm, found "
            f"{rollout.backend}, which generates in the learner's process; set cluster.rollout_nodes=0"
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
    if has_actors(rollout) and rollout.tensor > cluster.gpus_per_node:
        raise ValueError(
            f"rollout.tensor={rollout.tensor}: an actor lives on one node, which has cluster.gpus_per_node="
            f"{cluster.gpus_per_node} devices; lower rollout.tensor"
        )
    hosts = cluster.rollout_nodes or cluster.nodes
    room = hosts * seats(cluster.gpus_per_node, actor_share(rollout))
    if has_actors(rollout) and room < rollout.actors:
        raise ValueError(
            f"rollout.actors={rollout.actors} of {actor_share(rollout):g} device(s): {hosts} node(s) of "
            f"{cluster.gpus_per_node} devices have room for {room}; lower rollout.actors or raise "
            f"{'cluster.rollout_nodes' if cluster.rollout_nodes else 'cluster.nodes'}"
        )
    if rollout.backend == "vllm" and job_shape(cfg, "rl").shares_devices:
        raise ValueError(
            f"rollout.backend=vllm: takes nine tenths of a GPU for itself, but the {rollout.actors} actor(s) of "
            f"{rollout.tensor} device(s) would share those of the {ranks(cfg)} ranks; give cluster.rollout_nodes, "
            "fewer ranks or fewer actors"
        )


def _check_engine(cfg: RunConfig, dims: ModelDims | None) -> None:
    rollout = cfg.rollout
    if dims is not None:
        # auto: as small as it may turn out; the pool knows (rollout/pool).
        check_cache(rollout, dims, 4 if cfg.model.dtype == "float32" else 2)
    if rollout.backend != "vllm":
        if rollout.tensor > 1:
            raise ValueError(
                f"rollout.tensor={rollout.tensor}: rollout.backend={rollout.backend} has the whole model on one "
                "device; set rollout.tensor=1, or rollout.backend=vllm"
            )
        if rollout.vllm_exits == "compact":
            raise ValueError(
                f"rollout.vllm_exits=compact: is for rollout.backend=vllm, found {rollout.backend}, where exits save "
                "anyway; leave it out"
            )
        return
    if cfg.exits.first_token:
        raise ValueError(
            "exits.first_token=true: vLLM here reads whole prompts at full depth, found rollout.backend=vllm; set "
            "rollout.backend=ray or local"
        )
    if rollout.vllm_exits == "compact" and rollout.vllm_compile:
        raise ValueError(
            "rollout.vllm_exits=compact: how many positions run isn't known ahead, which a compiled model needs, found "
            "rollout.vllm_compile=true; set rollout.vllm_compile=false"
        )
    if rollout.device_share < 1 and asks_for_gpus(cfg):
        raise ValueError(
            f"rollout.device_share={rollout.device_share:g}: rollout.backend=vllm takes nine tenths of a GPU for "
            "itself; set rollout.device_share=1"
        )
    if dims is None or rollout.tensor == 1:
        return
    if not _shares_out(dims, rollout.tensor):
        valid = [degree for degree in range(1, dims.heads + 1) if _shares_out(dims, degree)]
        raise ValueError(
            f"rollout.tensor={rollout.tensor}: has to divide the model's {dims.heads} attention heads, its "
            f"intermediate size {dims.intermediate} and its vocabulary {vllm_vocabulary(dims)}, and to divide its "
            f"{dims.kv_heads} key-value heads or be a multiple of them; set one of {valid}"
        )


def _shares_out(dims: ModelDims, tensor: int) -> bool:
    """Whether vLLM can cut the model for so many devices."""
    kv_heads = max(dims.kv_heads, tensor) % min(dims.kv_heads, tensor) == 0
    return kv_heads and not any(size % tensor for size in (dims.heads, dims.intermediate, vllm_vocabulary(dims)))


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
