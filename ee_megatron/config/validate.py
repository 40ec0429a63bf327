"""Whether settings can be right: each by the rules on its field, then whether they fit each other and the model.

All that is wrong is said at once. What is wrong with a setting by itself hides what follows from that: a check of
several settings runs with the default in place of a faulty one, and says nothing of that one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ..objectives.policy_gradient import KL_TERMS
from .cluster import job_shape, seats
from .derive import (
    actor_share,
    check_cache,
    draws_weights,
    exits_judged,
    exits_read,
    has_actors,
    ranks,
    resolve_exits,
    stage_sizes,
    vllm_vocabulary,
)
from .device import asks_for_gpus
from .errors import faults_of, refuse
from .fields import MANDATORY, NAME, Clash, clash, fault, find, settings, wrong_name
from .schema import KEYS, SEQUENCE_MULTIPLE, RunConfig

if TYPE_CHECKING:
    from ..families import ModelDims

# Those of reasoning_gym are the package's, which is not loaded here.
TASK_FAMILIES = {
    "arithmetic": ("product", "sum", "word", "chain"),
    "tom": ("first_order", "second_order", "true_belief", "reality", "memory"),
    "hops": tuple(f"hop{hops}" for hops in range(1, 9)),
    "sums": tuple(f"hop{hops}" for hops in range(1, 5)),
}
STYLED = ("hops", "sums")
"""Tasks whose answers have styles to choose from."""


def validate(cfg: RunConfig, dims: ModelDims | None) -> None:
    """Check everything that can be checked without looking at files; `dims` None skips what needs the model.

    Raises Faults (a ValueError), one line per fault: the setting, what was found, what was expected.
    """
    wrong = alone(cfg)
    trusted = repaired(cfg, wrong)
    together = [*clashes(trusted), *(model_faults(trusted, dims) if dims is not None else ())]
    refuse([*wrong.values(), *unless_about(together, wrong)])


def alone(cfg: RunConfig) -> dict[str, str]:
    """Settings that are wrong by themselves: key -> fault."""
    found = {key: text for key, value, rules in settings(cfg) if (text := fault(key, value, rules))}
    return found if cfg.model.path else found | {"model.path": "model.path: empty; expected a Hugging Face directory"}


def check_name(what: str, text: str) -> None:
    """Raises ValueError for what is no plain name. Names become directories, jobs and lines of job scripts."""
    if not NAME.fullmatch(text):
        raise ValueError(wrong_name(what, text))


def repaired(cfg: RunConfig, keys: Collection[str]) -> RunConfig:
    """A copy with defaults for these keys; a section without its one mandatory setting is switched off."""
    cfg = copy.deepcopy(cfg)
    for k in KEYS:
        if k.key in keys:
            off = k.default == MANDATORY and k.inside
            *path, name = (k.inside[-1] if off else k.key).split(".")
            setattr(find(cfg, ".".join(path)) if path else cfg, name, None if off else copy.copy(k.default))
    return cfg


def unless_about(found: Iterable[Clash | str], keys: Collection[str]) -> list[str]:
    """The lines of those that have nothing to do with these settings; a plain line is about the one that it begins
    with."""
    each = [entry if isinstance(entry, Clash) else clash(entry, re.split("[=:]", entry)[0]) for entry in found]
    return [text for text, about in each if not set(about).intersection(keys)]


def clashes(cfg: RunConfig) -> Iterator[Clash]:
    """Settings that don't fit one another. Each has to be right by its own rules."""
    yield from _of_sections(cfg)
    for check in (_task, _stages, _scoring, _parallel, _cluster, _vllm):
        yield from check(cfg)


def _of_sections(part: Any) -> Iterator[Clash]:
    yield from part.clashes() if hasattr(part, "clashes") else ()
    for entry in fields(part):
        if is_dataclass(value := getattr(part, entry.name)):
            yield from _of_sections(value)


def _task(cfg: RunConfig) -> Iterator[Clash]:
    task, name = cfg.task, cfg.task.name
    if cfg.rl.families and (task.path or not set(cfg.rl.families) <= set(task.families)):
        some = ", ".join(task.families) if not task.path else f"which task.name={name} has none of"
        yield clash(
            f"rl.families={cfg.rl.families}: expected some of task.families, {some}",
            "rl.families task.families task.name",
        )
    wide = ("traces.wide_operands", "rl.wide_operands", "evaluate.wide_problems", "evaluate.wide_test")
    for key in wide if (name, task.operands) != ("arithmetic", "small") else ():
        if find(cfg, key):
            yield clash(
                f"{key}={find(cfg, key)}: task.name={name} with task.operands={task.operands} has no wide operands "
                f"beside its own; set {key}=0",
                f"{key} task.name task.operands",
            )
    if cfg.evaluate.style_choice and name not in STYLED:
        yield clash(
            f"evaluate.style_choice: task.name={name} has no styles to choose from; expected "
            f"task.name={' or '.join(STYLED)}, or evaluate.style_choice=null",
            "evaluate.style_choice task.name",
        )
    if name in (*TASK_FAMILIES, "reasoning_gym"):
        yield from _families(cfg)
    else:
        yield from _files(cfg)


def _families(cfg: RunConfig) -> Iterator[Clash]:
    task, name, families = cfg.task, cfg.task.name, list(cfg.task.families)
    known, about = TASK_FAMILIES.get(name, ()), "task.families task.name"
    unknown = [family for family in families if known and family not in known]
    if not families or unknown:
        which = f" ({', '.join(unknown)})" if unknown else ""
        yield clash(f"task.families={families}{which}: expected some of {', '.join(known) or 'its families'}", about)
    elif len(set(families)) < len(families):
        yield clash(f"task.families={families}: expected each family once", about)
    if not known and set(families) & set(TASK_FAMILIES["arithmetic"]):
        text = f"task.families={families}: are arithmetic's; expected families of {name}, [chain_sum,gcd] for example"
        yield clash(text, about)
    if name not in STYLED:
        return
    if task.slots > len(known):
        yield clash(f"task.slots={task.slots}: expected at most {len(known)}", "task.slots task.name")
    if beyond := [family for family in families if family in known[task.slots :]]:
        yield clash(
            f"task.families: {', '.join(beyond)} with task.slots={task.slots}: a prompt has no room for as many hops; "
            f"expected families up to hop{task.slots}, or more slots",
            f"task.slots {about}",
        )
    if name == "sums" and task.tokens_per_step != 1:
        yield clash(
            f"task.tokens_per_step={task.tokens_per_step}: task.name=sums writes its steps in words; leave it out",
            "task.tokens_per_step task.name",
        )


def _files(cfg: RunConfig) -> Iterator[Clash]:
    task = cfg.task
    if not task.path:
        yield clash(
            f"task.path: not set; task.name={task.name} reads a .jsonl or .parquet file, a directory of them, or a "
            "data set saved to disk",
            "task.path task.name",
        )
        return
    for key in ("question_column", "answer_column", "train_split"):
        if not getattr(task, key):
            yield clash(f"task.{key}: empty; expected the name that it has in {task.path}", f"task.{key}")
    if task.train_split == task.evaluation_split:
        yield clash(
            f"task.evaluation_split={task.evaluation_split}: is the train split too; expected another, or nothing, "
            "which divides the train split (task.evaluation_split=)",
            "task.evaluation_split task.train_split",
        )


def _stages(cfg: RunConfig) -> Iterator[Clash]:
    p = cfg.pretrain
    if p and p.init == "model" and (p.layers or p.width):
        yield clash(
            f"pretrain.layers={p.layers}, pretrain.width={p.width}: a model that has weights keeps its shape; set "
            "pretrain.init=random, or leave them out",
            "pretrain.init pretrain.layers pretrain.width",
        )
    if p and cfg.model.checkpoint:
        yield clash(
            f"model.checkpoint={cfg.model.checkpoint} with pretrain: two models to start from; leave one out",
            "model.checkpoint pretrain",
        )
    if cfg.teacher and cfg.adapter.rank == 0 and not cfg.adapter.full:
        yield clash(
            "adapter.rank=0: the teacher is trained through adapters; give a rank > 0 or teacher=null",
            "adapter.rank adapter.full teacher",
        )
    if draws_weights(cfg) and cfg.rollout.prompt_template == "chat":
        yield clash(
            "rollout.prompt_template=chat: a model that is pretrained here has no chat template; set plain",
            "rollout.prompt_template pretrain.init",
        )


def _scoring(cfg: RunConfig) -> Iterator[Clash]:
    """What exits and the objective have to know, and where it comes from."""
    rl, stale, exits = cfg.rl, cfg.rollout.max_staleness, cfg.rl.exit_credit
    about = "rl.exit_credit rl.exit_credit.divergence rl.exit_credit.kl_weight rl.kl_penalty.weight"
    if exits and exits.divergence == "all" and exits_judged(rl):
        for wrong, found, why in (
            (rl.replay, "rl.replay", "recorded rollouts have no pool to read them"),
            (rl.temperature != 1, f"rl.temperature={rl.temperature}", "the pool reads exits at 1"),
            (stale, f"rollout.max_staleness={stale}", "reading would wait for rollouts of later steps"),
        ):
            if wrong:
                yield clash(
                    f"rl.exit_credit.divergence=all with {found}: {why}; leave that out, or set "
                    "rl.exit_credit.divergence=taken",
                    f"{about} {found.split('=')[0]}",
                )
    if not rl.skip_scoring:
        return
    kl, importance = rl.kl_penalty, rl.loss.importance
    asked = {
        f"rl.epochs={rl.epochs}, rl.minibatches={rl.minibatches} (expected 1 and 1)": rl.epochs * rl.minibatches > 1,
        f"rl.loss.importance.kind={importance and importance.kind} (expected rl.loss.importance=null)": importance,
        f"rollout.max_staleness={stale} (expected 0)": stale > 0,
        f"rl.kl_penalty.kind={kl.kind} with rl.kl_penalty.weight={kl.weight} (expected exact, or 0)": (
            KL_TERMS[kl.kind].teacher is None and (kl.weight > 0 or (exits_judged(rl) and not exits_read(rl)))
        ),
        f"rl.exit_credit.kl_weight={exits and exits.kl_weight} (expected 0, or rl.exit_credit.divergence=all)": (
            exits_judged(rl) and not exits_read(rl)
        ),
    }
    if unmet := [text for text, needs in asked.items() if needs]:
        yield clash(
            f"rl.skip_scoring=true: the objective has to know scores: {'; '.join(unmet)}",
            f"{about} rl.skip_scoring rl.epochs rl.minibatches rl.loss.importance rollout.max_staleness "
            f"rl.kl_penalty.kind",
        )


def _parallel(cfg: RunConfig) -> Iterator[Clash]:
    parallel, zero = cfg.parallel, cfg.deepspeed.zero_stage
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield clash(
            "parallel.sequence_parallel=true: needs parallel.tensor > 1, found 1",
            "parallel.sequence_parallel parallel.tensor",
        )
    elif parallel.sequence_parallel and SEQUENCE_MULTIPLE % parallel.tensor:
        yield clash(
            f"parallel.tensor={parallel.tensor} with parallel.sequence_parallel=true: sequences are padded to "
            f"multiples of {SEQUENCE_MULTIPLE}, which it does not divide; nearest degrees that do: "
            f"{nearest((2, 4, 8), parallel.tensor)}",
            "parallel.sequence_parallel parallel.tensor",
        )
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield clash(
            f"parallel.virtual={parallel.virtual}: needs parallel.pipeline > 1, found 1; set parallel.virtual=1",
            "parallel.virtual parallel.pipeline",
        )
    if zero == 3 and parallel.tensor * parallel.pipeline > 1:
        yield clash(
            f"deepspeed.zero_stage=3: needs parallel.tensor = parallel.pipeline = 1, found {parallel.tensor} and "
            f"{parallel.pipeline}; set deepspeed.zero_stage=2",
            "deepspeed.zero_stage parallel.tensor parallel.pipeline",
        )
    if cfg.deepspeed.offload_optimizer and zero == 0:
        yield clash(
            "deepspeed.offload_optimizer=true: needs deepspeed.zero_stage >= 1, found 0; set 1",
            "deepspeed.offload_optimizer deepspeed.zero_stage",
        )


def _cluster(cfg: RunConfig) -> Iterator[Clash]:
    cluster, parallel, rollout = cfg.cluster, cfg.parallel, cfg.rollout
    own, gpus, about = cluster.rollout_nodes, cluster.gpus_per_node, "cluster.nodes cluster.rollout_nodes"
    if own >= cluster.nodes:
        yield clash(
            f"cluster.rollout_nodes={own}: leaves no learner node of cluster.nodes={cluster.nodes}; set "
            f"cluster.nodes={own + 1} or more",
            about,
        )
        return
    if own and not has_actors(rollout):
        yield clash(
            f"cluster.rollout_nodes={own}: needs rollout.backend=ray or vllm, found {rollout.backend}, which "
            "generates in the learner's process; set cluster.rollout_nodes=0",
            f"{about} rollout.backend",
        )
    if not gpus:
        return
    about += " cluster.gpus_per_node rollout.actors rollout.tensor rollout.device_share"
    degrees = "parallel.tensor parallel.pipeline parallel.data"
    learners, hosts = cluster.nodes - own, own or cluster.nodes
    if learners * gpus < ranks(cfg):
        yield clash(
            f"parallel: {parallel.tensor} x {parallel.pipeline} x {parallel.data} = {ranks(cfg)} ranks, but {learners} "
            f"learner node(s) (cluster.nodes - cluster.rollout_nodes) x cluster.gpus_per_node={gpus} = "
            f"{learners * gpus} devices",
            f"cluster.nodes cluster.rollout_nodes cluster.gpus_per_node {degrees}",
        )
    if not has_actors(rollout):
        return
    if rollout.tensor > gpus:
        yield clash(
            f"rollout.tensor={rollout.tensor}: an actor lives on one node, which has cluster.gpus_per_node={gpus} "
            "devices; lower rollout.tensor",
            "rollout.tensor cluster.gpus_per_node",
        )
    room = hosts * seats(gpus, actor_share(rollout))
    if room < rollout.actors:
        yield clash(
            f"rollout.actors={rollout.actors} of {actor_share(rollout):g} device(s): {hosts} node(s) of {gpus} devices "
            f"have room for {room}; lower rollout.actors or raise cluster.{'rollout_nodes' if own else 'nodes'}",
            about,
        )
    if rollout.backend == "vllm" and job_shape(cfg, "rl").shares_devices:
        yield clash(
            f"rollout.backend=vllm: takes nine tenths of a GPU for itself, but the {rollout.actors} actor(s) of "
            f"{rollout.tensor} device(s) would share those of the {ranks(cfg)} ranks; give cluster.rollout_nodes, "
            "fewer ranks or fewer actors",
            f"{about} {degrees} rollout.backend",
        )


def _vllm(cfg: RunConfig) -> Iterator[Clash]:
    rollout = cfg.rollout
    if rollout.backend != "vllm":
        return
    if cfg.exits.first_token:
        yield clash(
            "exits.first_token=true: vLLM here reads whole prompts at full depth, found rollout.backend=vllm; set "
            "rollout.backend=ray or local",
            "exits.first_token rollout.backend",
        )
    if rollout.device_share < 1 and asks_for_gpus(cfg):
        yield clash(
            f"rollout.device_share={rollout.device_share:g}: rollout.backend=vllm takes nine tenths of a GPU for "
            "itself; set rollout.device_share=1",
            "rollout.device_share rollout.backend",
        )


def nearest(choices: Sequence[int], wanted: int) -> str:
    return ", ".join(map(str, sorted(sorted(choices, key=lambda choice: abs(choice - wanted))[:2])))


def model_faults(cfg: RunConfig, dims: ModelDims) -> Iterator[Clash]:
    """What does not fit the model."""
    from ..exit_layout import gate_units
    from ..families import VLLM

    rollout, path, tensor = cfg.rollout, cfg.model.path, cfg.parallel.tensor
    longest = rollout.max_new_tokens + 1
    # auto: as small as it may turn out; the pool knows (rollout/pool).
    item = 4 if cfg.model.dtype == "float32" else 2
    layout = "exits.depths parallel.pipeline parallel.virtual parallel.stage_layers"
    for check, about in (
        (lambda: check_cache(rollout, dims, item), "rollout.cache_gib rollout.max_new_tokens rollout.tensor"),
        (lambda: stage_sizes(cfg.parallel, resolve_exits(cfg, dims)), layout),
        (lambda: gate_units(cfg.exits.gate_width, dims.hidden), "exits.gate_width"),
    ):
        yield from (clash(text, about) for text in faults_of(check))
    if cfg.rl.fixed_depth and not list(faults_of(lambda: resolve_exits(cfg, dims))):
        outcomes = resolve_exits(cfg, dims).outcomes
        if cfg.rl.fixed_depth not in outcomes:
            yield clash(f"rl.fixed_depth={cfg.rl.fixed_depth}: expected 0 or one of {list(outcomes)}", "rl.fixed_depth")
    if longest > dims.max_positions:
        yield clash(
            f"rollout.max_new_tokens={rollout.max_new_tokens}: {longest} positions with a prompt of one token, but "
            f"{path} has {dims.max_positions} (max_position_embeddings); expected at most {dims.max_positions - 1}",
            "rollout.max_new_tokens",
        )
    sizes = {"attention heads": dims.heads, "key-value heads": dims.kv_heads, "intermediate size": dims.intermediate}
    if bad := [f"{size} {name}" for name, size in sizes.items() if size % tensor]:
        valid = [d for d in range(1, dims.kv_heads + 1) if not any(size % d for size in sizes.values())]
        yield clash(
            f"parallel.tensor={tensor} does not divide {', '.join(bad)} of {path}; nearest degrees that do: "
            f"{nearest(valid, tensor)}",
            "parallel.tensor",
        )
    if rollout.backend != "vllm":
        return
    if dims.family not in VLLM:
        yield clash(
            f"rollout.backend=vllm: {path} is a {dims.family}, which has no early-exit model in vLLM; expected "
            f"{', '.join(VLLM)}; set rollout.backend=ray",
            "rollout.backend",
        )
    if rollout.tensor > 1 and not _shares_out(dims, rollout.tensor):
        valid = [degree for degree in range(1, dims.heads + 1) if _shares_out(dims, degree)]
        yield clash(
            f"rollout.tensor={rollout.tensor}: has to divide the model's {dims.heads} attention heads, its "
            f"intermediate size {dims.intermediate} and its vocabulary {vllm_vocabulary(dims)}, and to divide its "
            f"{dims.kv_heads} key-value heads or be a multiple of them; set one of {valid}",
            "rollout.tensor",
        )


def _shares_out(dims: ModelDims, tensor: int) -> bool:
    """Whether vLLM can cut the model for so many devices."""
    kv_heads = max(dims.kv_heads, tensor) % min(dims.kv_heads, tensor) == 0
    return kv_heads and not any(size % tensor for size in (dims.heads, dims.intermediate, vllm_vocabulary(dims)))
