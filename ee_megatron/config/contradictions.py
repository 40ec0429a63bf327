"""Settings that don't fit one another: each by itself is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..objectives.depth import CREDITS, DEPTH_COSTS
from ..objectives.policy_gradient import KL_TERMS
from ..objectives.schedules import LAMBDA_MAX
from .cluster import job_shape, seats
from .derive import actor_share, draws_weights, exits_judged, exits_read, has_actors, ranks, scoring
from .device import asks_for_gpus
from .schema import SEQUENCE_MULTIPLE, RunConfig

# Those of reasoning_gym are the package's, which is not loaded here.
TASK_FAMILIES = {
    "arithmetic": ("product", "sum", "word", "chain"),
    "tom": ("first_order", "second_order", "true_belief", "reality", "memory"),
    "hops": tuple(f"hop{hops}" for hops in range(1, 9)),
    "sums": tuple(f"hop{hops}" for hops in range(1, 5)),
}
STYLED = ("hops", "sums")
"""Tasks whose answers have styles to choose from."""


def contradictions(cfg: RunConfig) -> Iterator[str]:
    """One line each: the settings, what was found, what was expected. Each setting has to be right by its own rules."""
    for check in (_check_task, _check_training, _check_parallel, _check_engine, _check_cluster):
        yield from check(cfg)


def _check_task(cfg: RunConfig) -> Iterator[str]:
    task = cfg.task
    if cfg.rl.families and (task.path or not set(cfg.rl.families) <= set(task.families)):
        yield (
            f"rl.families={cfg.rl.families}: expected some of task.families, "
            f"{', '.join(task.families) if not task.path else f'which task.name={task.name} has none of'}"
        )
    if task.name in (*TASK_FAMILIES, "reasoning_gym"):
        yield from _check_families(task.name, list(task.families))
        if task.name in STYLED:
            yield from _check_slots(cfg)
        if task.name == "sums" and task.tokens_per_step != 1:
            yield f"task.tokens_per_step={task.tokens_per_step}: task.name=sums writes its steps in words; leave it out"
        return
    if not task.path:
        yield (
            f"task.path: not set; task.name={task.name} reads a .jsonl or .parquet file, a directory of them, or a "
            "data set saved to disk"
        )
        return
    for key in ("question_column", "answer_column", "train_split"):
        if not getattr(task, key):
            yield (f"task.{key}: empty; expected the name that it has in {task.path}")
    if task.train_split == task.evaluation_split:
        yield (
            f"task.evaluation_split={task.evaluation_split}: is the train split too; expected another, or nothing, "
            "which divides the train split (task.evaluation_split=)"
        )


def _check_slots(cfg: RunConfig) -> Iterator[str]:
    task, known = cfg.task, TASK_FAMILIES[cfg.task.name]
    if task.slots > len(known):
        yield f"task.slots={task.slots}: expected at most {len(known)}"
    beyond = [family for family in task.families if family in known[task.slots :]]
    if beyond:
        yield (
            f"task.families: {', '.join(beyond)} with task.slots={task.slots}: a prompt has no room for as many hops; "
            f"expected families up to hop{task.slots}, or more slots"
        )


def _check_families(name: str, families: list[str]) -> Iterator[str]:
    known = TASK_FAMILIES.get(name, ())
    if not families or (known and not set(families) <= set(known)):
        unknown = f" ({', '.join(f for f in families if f not in known)})" if families else ""
        yield (f"task.families={families}{unknown}: expected some of {', '.join(known) or 'its families'}")
    elif len(set(families)) < len(families):
        yield (f"task.families={families}: expected each family once")
    if not known and set(families) & set(TASK_FAMILIES["arithmetic"]):
        yield (f"task.families={families}: are arithmetic's; expected families of {name}, [chain_sum,gcd] for example")


def _check_training(cfg: RunConfig) -> Iterator[str]:
    if not draws_weights(cfg) and (cfg.pretrain.layers or cfg.pretrain.width):
        yield (
            f"pretrain.layers={cfg.pretrain.layers}, pretrain.width={cfg.pretrain.width}: a model that has weights "
            "keeps its shape; set pretrain.enabled=true and pretrain.init=random, or leave them out"
        )
    if cfg.pretrain.enabled and cfg.model.checkpoint:
        yield (
            f"model.checkpoint={cfg.model.checkpoint} with pretrain.enabled=true: two models to start from; leave one "
            "out"
        )
    if not 0 <= cfg.adapter.dropout < 1:
        yield (f"adapter.dropout={cfg.adapter.dropout}: expected 0 <= dropout < 1")
    if cfg.teacher.enabled and cfg.adapter.rank == 0 and not cfg.adapter.full:
        yield ("adapter.rank=0: the teacher is trained through adapters; give a rank > 0 or teacher.enabled=false")
    wide = {
        "traces.wide_operands": cfg.traces.wide_operands,
        "rl.wide_operands": cfg.rl.wide_operands,
        "evaluate.wide_problems": cfg.evaluate.wide_problems,
        "evaluate.wide_test": cfg.evaluate.wide_test,
    }
    for key, asked in wide.items():
        if asked and (cfg.task.name, cfg.task.operands) != ("arithmetic", "small"):
            yield (
                f"{key}={asked}: only task.name=arithmetic with task.operands=small has wider ones; "
                f"found {cfg.task.name}, {cfg.task.operands}; set {key}=0"
            )
    if cfg.calibrate.uniform_patterns + cfg.calibrate.full_patterns > 1:
        yield (
            f"calibrate.uniform_patterns={cfg.calibrate.uniform_patterns}, "
            f"calibrate.full_patterns={cfg.calibrate.full_patterns}: shares of the same patterns; expected at most 1 "
            "together"
        )
    if cfg.calibrate.reach and not cfg.calibrate.depth_power:
        yield (
            f"calibrate.reach={cfg.calibrate.reach} with calibrate.depth_power=0: every KL counts in full already; "
            "give a power above 0, 1.5 say, or leave reach out"
        )
    if cfg.calibrate.keep < 1 and not cfg.calibrate.settle:
        yield (
            f"calibrate.keep={cfg.calibrate.keep}: moves the weights under the gates; give calibrate.settle, .1 say, "
            "for these to learn again"
        )
    if not 0 < cfg.rl.gate_centre < 1 or cfg.rl.gate_sharpness <= 0:
        yield (
            f"rl.gate_centre={cfg.rl.gate_centre}, rl.gate_sharpness={cfg.rl.gate_sharpness}: expected a hazard "
            "between 0 and 1 and a factor above 0"
        )
    if draws_weights(cfg) and cfg.rollout.prompt_template == "chat":
        yield ("rollout.prompt_template=chat: a model that is pretrained here has no chat template; set plain")
    if cfg.rl.minibatches > cfg.rl.prompts_per_step:
        yield (
            f"rl.minibatches={cfg.rl.minibatches}: a step has rl.prompts_per_step={cfg.rl.prompts_per_step} groups to "
            "share out; give at most as many minibatches"
        )
    if cfg.rl.advantage != "none" and cfg.rl.group_size < 2:
        yield (
            f"rl.group_size={cfg.rl.group_size}: rl.advantage={cfg.rl.advantage} compares the rollouts of one prompt; "
            "expected at least 2, or rl.advantage=none"
        )
    yield from _check_objective(cfg)
    if not cfg.evaluate.thresholds:
        yield "evaluate.thresholds=[]: one of them is chosen; expected at least one value from 0 to 1"
    outside = [threshold for threshold in cfg.evaluate.thresholds if not 0 <= threshold <= 1]
    if outside:
        yield (f"evaluate.thresholds: {outside} are no hazards; expected values from 0 to 1")
    if cfg.evaluate.control_policy and not cfg.evaluate.controls:
        yield (
            f"evaluate.control_policy={cfg.evaluate.control_policy}: only controls use it; set evaluate.controls=true"
        )
    if cfg.evaluate.choice and cfg.task.name not in STYLED:
        yield (
            f"evaluate.choice={cfg.evaluate.choice}: task.name={cfg.task.name} has no styles to choose from; expected "
            f"task.name={' or '.join(STYLED)}, or evaluate.choice left out"
        )


def _check_objective(cfg: RunConfig) -> Iterator[str]:
    rl = cfg.rl
    if CREDITS[rl.credit].to_go and DEPTH_COSTS[rl.depth_cost].largest:
        yield (
            f"rl.credit={rl.credit} with rl.depth_cost={rl.depth_cost}: the largest depth is no sum over tokens, so "
            "none has a part of it; set rl.credit=exit or answer"
        )
    if rl.kl_sum and not KL_TERMS[rl.kl].in_reward:
        yield (f"rl.kl_sum=true: only the reward holds a sum over an answer; set rl.kl=reward, not {rl.kl}")
    if rl.fixed_depth and CREDITS[rl.credit].local:
        yield (
            f"rl.fixed_depth={rl.fixed_depth} with rl.credit={rl.credit}: no exit is chosen that could answer for "
            "itself; set rl.credit=answer"
        )
    read = exits_read(rl)
    if rl.exit_divergence == "all" and exits_judged(rl) and rl.replay:
        yield "rl.exit_divergence=all: recorded rollouts (rl.replay) have no pool to read them; set it to taken"
    if read and rl.temperature != 1:
        yield (
            f"rl.exit_divergence=all with rl.temperature={rl.temperature}: the pool reads exits at 1; set "
            "rl.temperature=1, or rl.exit_divergence=taken"
        )
    if read and cfg.rollout.max_staleness:
        yield (
            f"rl.exit_divergence=all with rollout.max_staleness={cfg.rollout.max_staleness}: reading would wait for "
            "rollouts of later steps; set rollout.max_staleness=0, or rl.exit_divergence=taken"
        )
    if rl.importance == "mask" and rl.importance_floor >= rl.importance_cap:
        yield (f"rl.importance_floor={rl.importance_floor}: expected less than rl.importance_cap={rl.importance_cap}")
    if rl.clip_high and rl.clip_high < rl.clip:
        yield (
            f"rl.clip_high={rl.clip_high}: expected at least rl.clip={rl.clip}, or 0 for the same bound on both sides"
        )
    if rl.accuracy_floor is not None and not -100 < rl.accuracy_floor < 100:
        yield (f"rl.accuracy_floor={rl.accuracy_floor}: expected percentage points below the reference, 1 for example")
    if rl.accuracy_floor is not None and rl.lambda_exit > LAMBDA_MAX:
        yield (
            f"rl.lambda_exit={rl.lambda_exit}: with rl.accuracy_floor lambda starts there and stays below "
            f"{LAMBDA_MAX:g}; expected at most that"
        )
    if rl.accuracy_floor is not None and rl.replay:
        yield (
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
        f"rl.credit={rl.credit} with rl.exit_kl={rl.exit_kl} (expected 0, or rl.exit_divergence=all)": (
            exits_judged(rl) and not read
        ),
    }
    found = [text for text, needs in asked.items() if needs]
    if found:
        yield (f"rl.skip_scoring=true: the objective has to know scores: {'; '.join(found)}")


def _check_parallel(cfg: RunConfig) -> Iterator[str]:
    parallel, stage = cfg.parallel, cfg.deepspeed.zero_stage
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield ("parallel.sequence_parallel=true: needs parallel.tensor > 1, found 1")
    elif parallel.sequence_parallel and SEQUENCE_MULTIPLE % parallel.tensor:
        yield (
            f"parallel.tensor={parallel.tensor} with parallel.sequence_parallel=true: sequences are padded to "
            f"multiples of {SEQUENCE_MULTIPLE}, which it does not divide; nearest degrees that do: "
            f"{', '.join(map(str, nearest((2, 4, 8), parallel.tensor)))}"
        )
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield (f"parallel.virtual={parallel.virtual}: needs parallel.pipeline > 1, found 1; set parallel.virtual=1")
    if stage not in (0, 1, 2, 3):
        yield (f"deepspeed.zero_stage={stage}: expected 0, 1, 2 or 3")
    if stage == 3 and parallel.tensor * parallel.pipeline > 1:
        yield (
            f"deepspeed.zero_stage=3: needs parallel.tensor = parallel.pipeline = 1, found {parallel.tensor} and "
            f"{parallel.pipeline}; set deepspeed.zero_stage=2"
        )
    if cfg.deepspeed.offload_optimizer and stage == 0:
        yield ("deepspeed.offload_optimizer=true: needs deepspeed.zero_stage >= 1, found 0; set 1")


def _check_cluster(cfg: RunConfig) -> Iterator[str]:
    cluster, parallel, rollout = cfg.cluster, cfg.parallel, cfg.rollout
    if cluster.rollout_nodes >= cluster.nodes:
        yield (
            f"cluster.rollout_nodes={cluster.rollout_nodes}: leaves no learner node of cluster.nodes={cluster.nodes}; "
            f"set cluster.nodes={cluster.rollout_nodes + 1} or more"
        )
        return
    if cluster.rollout_nodes and not has_actors(rollout):
        yield (
            f"cluster.rollout_nodes={cluster.rollout_nodes}: needs rollout.backend=ray or vllm, found "
            f"{rollout.backend}, which generates in the learner's process; set cluster.rollout_nodes=0"
        )
    if not cluster.gpus_per_node:
        return
    learners = cluster.nodes - cluster.rollout_nodes
    if learners * cluster.gpus_per_node < ranks(cfg):
        yield (
            f"parallel: {parallel.tensor} x {parallel.pipeline} x {parallel.data} = {ranks(cfg)} ranks, but "
            f"{learners} learner node(s) (cluster.nodes - cluster.rollout_nodes) x cluster.gpus_per_node="
            f"{cluster.gpus_per_node} = {learners * cluster.gpus_per_node} devices"
        )
    if has_actors(rollout) and rollout.tensor > cluster.gpus_per_node:
        yield (
            f"rollout.tensor={rollout.tensor}: an actor lives on one node, which has cluster.gpus_per_node="
            f"{cluster.gpus_per_node} devices; lower rollout.tensor"
        )
    hosts = cluster.rollout_nodes or cluster.nodes
    room = hosts * seats(cluster.gpus_per_node, actor_share(rollout))
    if has_actors(rollout) and room < rollout.actors:
        yield (
            f"rollout.actors={rollout.actors} of {actor_share(rollout):g} device(s): {hosts} node(s) of "
            f"{cluster.gpus_per_node} devices have room for {room}; lower rollout.actors or raise "
            f"{'cluster.rollout_nodes' if cluster.rollout_nodes else 'cluster.nodes'}"
        )
    if rollout.backend == "vllm" and job_shape(cfg, "rl").shares_devices:
        yield (
            f"rollout.backend=vllm: takes nine tenths of a GPU for itself, but the {rollout.actors} actor(s) of "
            f"{rollout.tensor} device(s) would share those of the {ranks(cfg)} ranks; give cluster.rollout_nodes, "
            "fewer ranks or fewer actors"
        )


def _check_engine(cfg: RunConfig) -> Iterator[str]:
    rollout, share = cfg.rollout, cfg.rollout.device_share
    if "" in rollout.stop:
        yield (
            f"rollout.stop={list(rollout.stop)}: holds an empty text, which every answer contains; expected texts that "
            "end an answer, or none (rollout.stop=[])"
        )
    if share > 1 and share != int(share):
        yield f"rollout.device_share={share}: expected a fraction up to 1, or whole devices"
    if rollout.backend != "vllm":
        if rollout.tensor > 1:
            yield (
                f"rollout.tensor={rollout.tensor}: rollout.backend={rollout.backend} has the whole model on one "
                "device; set rollout.tensor=1, or rollout.backend=vllm"
            )
        if rollout.vllm_exits == "compact":
            yield (
                f"rollout.vllm_exits=compact: is for rollout.backend=vllm, found {rollout.backend}, where exits save "
                "anyway; leave it out"
            )
        return
    if cfg.exits.first_token:
        yield (
            "exits.first_token=true: vLLM here reads whole prompts at full depth, found rollout.backend=vllm; set "
            "rollout.backend=ray or local"
        )
    if rollout.vllm_exits == "compact" and rollout.vllm_compile:
        yield (
            "rollout.vllm_exits=compact: how many positions run isn't known ahead, which a compiled model needs, found "
            "rollout.vllm_compile=true; set rollout.vllm_compile=false"
        )
    if rollout.device_share < 1 and asks_for_gpus(cfg):
        yield (
            f"rollout.device_share={rollout.device_share:g}: rollout.backend=vllm takes nine tenths of a GPU for "
            "itself; set rollout.device_share=1"
        )


def nearest(choices: Sequence[int], wanted: int) -> list[int]:
    return sorted(sorted(choices, key=lambda choice: abs(choice - wanted))[:2])
