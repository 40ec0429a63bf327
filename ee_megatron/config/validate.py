"""Validates settings: each by the rules on its field, then against each other and the model.

All faults are reported at once. A fault of a single setting hides those that follow from it: a check of several
settings runs with the default in place of a faulty one, and reports nothing about that one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..objectives.depth import CREDITS, DEPTH_COSTS
from ..objectives.policy_gradient import KL_TERMS
from ..objectives.schedules import LAMBDA_MAX
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
from .fields import MANDATORY, NAME, code_file, environment, fault, find, settings, wrong_name
from .schema import HOPS, KEYS, SEQUENCE_MULTIPLE, WORDED, DatasetNames, RunConfig

if TYPE_CHECKING:
    from ..families import ModelDims

# Those of reasoning_gym are the package's, which is not loaded here.
TASK_FAMILIES = {
    "arithmetic": ("product", "sum", "word", "chain"),
    "tom": ("first_order", "second_order", "true_belief", "reality", "memory"),
    **{name: tuple(f"hop{hops}" for hops in range("secret" not in name, 9 - ("secret" in name))) for name in HOPS},
    **{name: tuple(f"hop{hops}" for hops in range(1, 5 if name == "sums" else 7)) for name in WORDED},
}
STYLED = (*HOPS, *WORDED)
"""Tasks whose answers have several styles."""


class Clash(NamedTuple):
    """Settings that contradict each other: one line with their values and the remedy, and their keys."""

    text: str
    keys: tuple[str, ...]


Rule = tuple[object, str, str]
"""(whether it is broken, keys of the settings, what is expected). The line begins with the keys' values; those behind
a semicolon matter, too, but are not shown."""


def validate(cfg: RunConfig, dims: ModelDims | None) -> None:
    """Check everything that can be checked without looking at files; `dims` None skips what needs the model.

    Raises Faults (a ValueError), one line per fault: the setting, what was found, what was expected.
    """
    wrong = alone(cfg)
    trusted = repaired(cfg, wrong)
    together = [*clashes(trusted), *(model_faults(trusted, dims) if dims is not None else ())]
    refuse([*wrong.values(), *unless_about(together, wrong)])


def alone(cfg: RunConfig) -> dict[str, str]:
    """Settings that violate their own field's rules: key -> fault."""
    faults = {key: text for key, value, rules in settings(cfg) if (text := fault(key, value, rules))}
    return faults if cfg.model.path else faults | {"model.path": "model.path: empty; expected a Hugging Face directory"}


def check_name(what: str, text: str) -> None:
    """Raises ValueError unless the name is plain. Names become directories, jobs and lines of job scripts."""
    if not NAME.fullmatch(text):
        raise ValueError(wrong_name(what, text))


def check_template(what: str, variables: Mapping[str, Any], template: object) -> None:
    """Raises ValueError, which begins with `what`, for a variable that the model's chat template doesn't read."""
    own = ("messages", "add_generation_prompt")
    unread = [name for name in variables if name in own or not re.search(rf"\b{re.escape(name)}\b", str(template))]
    if unread:
        raise ValueError(f"{what}: the model's chat template takes no {', '.join(unread)}; correct or leave it out")


def repaired(cfg: RunConfig, keys: Collection[str]) -> RunConfig:
    """A copy with defaults for these keys; a section without its one mandatory setting is switched off."""
    cfg = copy.deepcopy(cfg)
    for k in KEYS:
        if k.key in keys:
            off = k.default == MANDATORY and k.inside
            *path, name = (k.inside[-1] if off else k.key).split(".")
            setattr(find(cfg, ".".join(path)) if path else cfg, name, None if off else copy.copy(k.default))
    return cfg


def unless_about(entries: Iterable[Clash | str], keys: Collection[str]) -> list[str]:
    """Lines of entries that don't involve these settings; a plain line is about the setting that it begins with."""
    each = [entry if isinstance(entry, Clash) else Clash(entry, (re.split("[=:]", entry)[0],)) for entry in entries]
    return [text for text, about in each if not set(about).intersection(keys)]


def clashes(cfg: RunConfig) -> Iterator[Clash]:
    """Settings that contradict each other. Each must be valid by itself."""
    for rules in (_task, _families, _files, _stages, _rl, _scoring, _rollout, _parallel, _cluster):
        yield from _broken(cfg, rules(cfg))


def _broken(cfg: RunConfig, rules: Iterable[Rule]) -> Iterator[Clash]:
    for wrong, keys, expected in rules:
        if wrong:
            shown = ", ".join(_shown(key, find(cfg, key)) for key in keys.split(";")[0].split())
            yield Clash(f"{shown}: {expected}", tuple(keys.replace(";", " ").split()))


def _shown(key: str, value: Any) -> str:
    """A setting as on a command line; of a section that is on its key."""
    if is_dataclass(value):
        return key
    return f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"


# fmt: off
def _task(cfg: RunConfig) -> Iterator[Rule]:
    task, name = cfg.task, cfg.task.name
    some = task.families if not task.path else "which this task has none of"
    strange = cfg.rl.families and (task.path or not set(cfg.rl.families) <= set(task.families))
    yield strange, "rl.families task.name; task.families", f"expected some of task.families, {some}"
    for key in ("traces.wide_operands", "rl.wide_operands", "evaluate.wide_problems", "evaluate.wide_test"):
        yield (find(cfg, key) and (name, task.operands) != ("arithmetic", "small"), f"{key} task.name task.operands",
               f"the task has no separate wide operands; set {key}=0")
    yield (cfg.evaluate.style_choice and name not in STYLED, "evaluate.style_choice task.name",
           f"has no styles to choose from; expected task.name={' or '.join(STYLED)}, or evaluate.style_choice=null")


def _families(cfg: RunConfig) -> Iterator[Rule]:
    task, name, families = cfg.task, cfg.task.name, list(cfg.task.families)
    if name not in (*TASK_FAMILIES, "reasoning_gym"):
        return
    known, about = TASK_FAMILIES.get(name, ()), "task.families task.name"
    unknown = [family for family in families if known and family not in known]
    which = f", not {', '.join(unknown)}" if unknown else ""
    yield not families or unknown, about, f"expected some of {', '.join(known) or 'its families'}{which}"
    yield not unknown and len(set(families)) < len(families), about, "expected each family once"
    foreign = not known and set(families) & set(TASK_FAMILIES["arithmetic"])
    yield foreign, about, "belong to task.name=arithmetic; expected reasoning-gym's, as [chain_sum,gcd]"
    if name in STYLED:
        most = int(known[-1].removeprefix("hop"))
        yield task.slots > most, "task.slots task.name", f"expected at most {most}"
        longer = known[known.index(f"hop{min(task.slots, most)}") + 1 :]
        yield (beyond := [family for family in families if family in longer], f"task.slots {about}",
               f"a prompt has no room for {', '.join(beyond)}; expected families up to hop{task.slots}, or more slots")
        worded = name in WORDED and task.tokens_per_step != 1
        yield worded, "task.tokens_per_step task.name", "its steps are in words; leave it out"


def _files(cfg: RunConfig) -> Iterator[Rule]:
    task, names = cfg.task, cfg.task.dataset or DatasetNames()
    yield task.arguments and task.name != "verifiers", "task.arguments task.name", "the task takes none; leave it out"
    if task.name == "verifiers":
        yield not environment(task.path), "task.path task.name", "expected an environment's id, NAME or OWNER/NAME"
        return
    if task.name in (*TASK_FAMILIES, "reasoning_gym") or code_file(task.name):
        unread = task.path and not code_file(task.name)
        yield unread, "task.path task.name", "the task reads no file; set task=dataset too, or leave task.path out"
        return
    kinds = "expected a .jsonl or .parquet file, a directory of them, or a data set saved to disk or on the hub"
    yield not task.path, "task.path task.name", kinds
    for key in ("question_column", "answer_column", "train_split"):
        yield not getattr(names, key), f"task.dataset.{key}", f"empty; expected its name in {task.path}"
    yield (names.train_split == names.evaluation_split, "task.dataset.evaluation_split; task.dataset.train_split",
           "is the train split too; expected another, or nothing, which divides the train split")


def _stages(cfg: RunConfig) -> Iterator[Rule]:
    p, c, random = cfg.pretrain, cfg.calibrate, draws_weights(cfg)
    yield (p and not random and (p.layers or p.width), "pretrain.init pretrain.layers pretrain.width",
           "a model that has weights keeps its shape; set pretrain.init=random, or leave them out")
    yield p and cfg.model.checkpoint, "model.checkpoint pretrain", "two models to start from; leave one out"
    yield (cfg.teacher and cfg.adapter.rank == 0 and not cfg.adapter.full, "adapter.rank; adapter.full teacher",
           "the teacher is trained through adapters; give a rank > 0 or teacher=null")
    yield (random and cfg.rollout.prompt_template == "chat", "rollout.prompt_template pretrain; pretrain.init",
           "a model that is pretrained here has no chat template; set plain")
    yield (c.uniform_patterns + c.full_patterns > 1, "calibrate.uniform_patterns calibrate.full_patterns",
           "shares of the same patterns; expected at most 1 together")
    yield (c.kl_scale and not c.depth_power, "calibrate.kl_scale calibrate.depth_power",
           "every KL counts in full already; give a power above 0, 1.5 say, or leave kl_scale out")
    yield (c.wise_ft_alpha < 1 and not c.gate_only_fraction, "calibrate.wise_ft_alpha calibrate.gate_only_fraction",
           "moves the weights under the gates; give a fraction, .1 say, for these to learn again")
    yield not cfg.evaluate.thresholds, "evaluate.thresholds", "one of them is chosen; expected at least one"


def _rl(cfg: RunConfig) -> Iterator[Rule]:
    rl, loss, penalty, importance = cfg.rl, cfg.rl.loss, cfg.rl.depth_penalty, cfg.rl.loss.importance
    yield (rl.minibatches > rl.prompts_per_step, "rl.minibatches rl.prompts_per_step",
           "minibatches share out a step's prompts; give at most as many")
    yield (loss.advantage != "none" and rl.group_size < 2, "rl.group_size rl.loss.advantage",
           "compares the rollouts of one prompt; expected at least 2, or rl.loss.advantage=none")
    yield (rl.fixed_depth and rl.exit_credit, "rl.fixed_depth rl.exit_credit",
           "no gate chooses an exit that could be credited; set rl.exit_credit=null")
    yield (CREDITS[penalty.credit].to_go and DEPTH_COSTS[penalty.cost].largest,
           "rl.depth_penalty.credit rl.depth_penalty.cost",
           "the largest depth is not a sum over tokens; set rl.depth_penalty.credit=answer, or rl.exit_credit=true")
    yield (penalty.target and penalty.weight > LAMBDA_MAX, "rl.depth_penalty.weight rl.depth_penalty.target",
           f"lambda starts there and stays below {LAMBDA_MAX:g}; expected at most that")
    yield (importance and importance.kind == "mask" and importance.low >= importance.high,
           "rl.loss.importance.low rl.loss.importance.high", "expected low < high")
    yield (loss.clip_high and loss.clip_high < loss.clip, "rl.loss.clip_high rl.loss.clip",
           "expected at least clip, or 0 for the same bound on both sides")


def _scoring(cfg: RunConfig) -> Iterator[Rule]:
    """Scores that exits and the objective need, and which settings provide them."""
    rl, stale, exits = cfg.rl, cfg.rollout.max_staleness, cfg.rl.exit_credit
    of_exits = "rl.exit_credit rl.exit_credit.kl_weight rl.kl_penalty.weight"
    every = exits and exits.divergence == "all" and exits_judged(rl)
    for wrong, key, why in (
        (rl.temperature != 1, "rl.temperature", "the pool reads exits at 1"),
        (stale, "rollout.max_staleness", "reading would wait for rollouts of later steps"),
    ):
        about = f"rl.exit_credit.divergence {key}; {of_exits}"
        yield every and wrong, about, f"{why}; leave that out, or set rl.exit_credit.divergence=taken"
    if not rl.skip_scoring:
        return
    kl, judged, why = rl.kl_penalty, exits_judged(rl) and not exits_read(rl), "the objective needs scores;"
    scored = KL_TERMS[kl.kind].teacher is None and (kl.weight > 0 or judged)
    yield rl.minibatches > 1, "rl.skip_scoring rl.minibatches", f"{why} expected 1"
    yield rl.loss.importance, "rl.skip_scoring rl.loss.importance.kind", f"{why} expected rl.loss.importance=null"
    yield stale > 0, "rl.skip_scoring rollout.max_staleness", f"{why} expected 0"
    about = f"rl.skip_scoring rl.kl_penalty.kind rl.kl_penalty.weight; {of_exits}"
    yield scored, about, f"{why} expected rl.kl_penalty.kind=exact, or weight 0"
    about = f"rl.skip_scoring rl.exit_credit.kl_weight; {of_exits}"
    yield judged, about, f"{why} expected 0, or rl.exit_credit.divergence=all"


def _rollout(cfg: RunConfig) -> Iterator[Rule]:
    rollout, share, vllm = cfg.rollout, cfg.rollout.device_share, cfg.rollout.vllm
    yield ("" in rollout.stop, "rollout.stop",
           "holds an empty text, which every answer contains; expected texts that end an answer, or none ([])")
    yield (rollout.chat_template_kwargs and rollout.prompt_template != "chat",
           "rollout.chat_template_kwargs rollout.prompt_template",
           "only the chat template reads them; set rollout.prompt_template=chat")
    yield share > 1 and share != int(share), "rollout.device_share", "expected a fraction up to 1, or whole devices"
    if rollout.backend != "vllm":
        yield vllm, "rollout.vllm rollout.backend", "is for rollout.backend=vllm; set rollout.vllm=null"
        return
    yield (share < 1 and asks_for_gpus(cfg), "rollout.device_share rollout.backend",
           "vLLM takes nine tenths of a GPU for itself; set rollout.device_share=1")


def _parallel(cfg: RunConfig) -> Iterator[Rule]:
    parallel, zero, sequence = cfg.parallel, cfg.deepspeed.zero_stage, "parallel.tensor parallel.sequence_parallel"
    shares = parallel.sequence_parallel
    yield shares and parallel.tensor == 1, sequence, "needs parallel.tensor > 1"
    yield (shares and SEQUENCE_MULTIPLE % parallel.tensor, sequence,
           f"sequences are padded to multiples of {SEQUENCE_MULTIPLE}, which it does not divide; nearest that do: "
           f"{nearest((2, 4, 8), parallel.tensor)}")
    yield (zero == 3 and parallel.tensor * parallel.pipeline > 1,
           "deepspeed.zero_stage parallel.tensor parallel.pipeline",
           "needs parallel.tensor = parallel.pipeline = 1; set deepspeed.zero_stage=2")


def _cluster(cfg: RunConfig) -> Iterator[Rule]:
    cluster, rollout = cfg.job, cfg.rollout
    own, gpus, about = cluster.rollout_nodes, cluster.gpus_per_node, "cluster.rollout_nodes cluster.nodes"
    yield own >= cluster.nodes, about, f"leaves no node that learns; set cluster.nodes={own + 1} or more"
    yield (own and not has_actors(rollout), f"cluster.rollout_nodes rollout.backend; {about}",
           "rollouts are made in the learner's process; set cluster.rollout_nodes=0, or rollout.backend=ray or vllm")
    if not gpus or own >= cluster.nodes:
        return
    learners, hosts = cluster.nodes - own, own or cluster.nodes
    degrees = "parallel.tensor parallel.pipeline parallel.data"
    yield (learners * gpus < ranks(cfg), f"{degrees} cluster.gpus_per_node; {about}",
           f"{ranks(cfg)} ranks, but {learners} learner node(s) (cluster.nodes - cluster.rollout_nodes) have "
           f"{learners * gpus} devices")
    if not has_actors(rollout):
        return
    yield (rollout.tensor > gpus, "rollout.vllm.tensor cluster.gpus_per_node",
           "an actor lives on one node; lower rollout.vllm.tensor")
    room, about = hosts * seats(gpus, actor_share(rollout)), f"{about} rollout.vllm.tensor rollout.device_share"
    yield (room < rollout.actors, f"rollout.actors cluster.gpus_per_node; {about}",
           f"{hosts} node(s) have room for {room} of {actor_share(rollout):g} device(s) each; lower rollout.actors or "
           f"raise cluster.{'rollout_nodes' if own else 'nodes'}")
    yield (rollout.backend == "vllm" and job_shape(cfg, "rl").shares_devices,
           f"rollout.backend rollout.actors cluster.gpus_per_node; {about} {degrees}",
           f"vLLM takes nine tenths of a GPU for itself, but actors would share those of the {ranks(cfg)} ranks; give "
           "cluster.rollout_nodes, fewer ranks or fewer actors")
# fmt: on


def nearest(choices: Sequence[int], wanted: int) -> str:
    return ", ".join(map(str, sorted(sorted(choices, key=lambda choice: abs(choice - wanted))[:2])))


def model_faults(cfg: RunConfig, dims: ModelDims) -> Iterator[Clash]:
    """Settings that contradict the model."""
    from ..exits import gate_units

    # auto: the smaller dtype; the pool checks again with the real one (rollout/pool).
    item = 4 if cfg.model.dtype == "float32" else 2
    layout = "exits.depths parallel.pipeline"
    for check, about in (
        (lambda: check_cache(cfg.rollout, dims, item), "rollout.cache_gib rollout.max_new_tokens rollout.vllm.tensor"),
        (lambda: stage_sizes(cfg.parallel, resolve_exits(cfg, dims)), layout),
        (lambda: gate_units(cfg.exits.gate_width, dims.hidden), "exits.gate_width"),
    ):
        yield from (Clash(text, tuple(about.split())) for text in faults_of(check))
    yield from _broken(cfg, _model(cfg, dims))


# fmt: off
def _model(cfg: RunConfig, dims: ModelDims) -> Iterator[Rule]:
    from ..families import VLLM

    rollout, tensor = cfg.rollout, cfg.parallel.tensor
    if cfg.rl.fixed_depth and not list(faults_of(lambda: resolve_exits(cfg, dims))):
        outcomes = resolve_exits(cfg, dims).outcomes
        yield cfg.rl.fixed_depth not in outcomes, "rl.fixed_depth", f"expected 0 or one of {list(outcomes)}"
    yield (rollout.max_new_tokens + 1 > dims.max_positions, "rollout.max_new_tokens; model.path",
           f"with a prompt of one token that is more than the model's {dims.max_positions} positions "
           f"(max_position_embeddings); expected at most {dims.max_positions - 1}")
    yield (not cfg.adapter.full and cfg.adapter.rank > dims.hidden, "adapter.rank; model.path",
           f"more than the model's hidden size; expected at most {dims.hidden}")
    sizes = {"attention heads": dims.heads, "key-value heads": dims.kv_heads, "intermediate size": dims.intermediate}
    bad = [f"{size} {name}" for name, size in sizes.items() if size % tensor]
    valid = [d for d in range(1, dims.kv_heads + 1) if not any(size % d for size in sizes.values())]
    degrees = f"nearest degrees that do: {nearest(valid, tensor)}"
    yield bad, "parallel.tensor", f"does not divide {', '.join(bad)} of {cfg.model.path}; {degrees}"
    if rollout.backend != "vllm":
        return
    yield (dims.family not in VLLM, "rollout.backend",
           f"{cfg.model.path} is a {dims.family}, which has no early-exit model in vLLM; expected {', '.join(VLLM)}; "
           "set rollout.backend=ray")
    valid = [degree for degree in range(1, dims.heads + 1) if _shares_out(dims, degree)]
    yield (rollout.tensor > 1 and not _shares_out(dims, rollout.tensor), "rollout.vllm.tensor",
           f"has to divide the model's {dims.heads} attention heads, its intermediate size {dims.intermediate} and its "
           f"vocabulary {vllm_vocabulary(dims)}, and to divide its {dims.kv_heads} key-value heads or be a multiple of "
           f"them; set one of {valid}")
# fmt: on


def _shares_out(dims: ModelDims, tensor: int) -> bool:
    """Whether vLLM can cut the model for so many devices."""
    kv_heads = max(dims.kv_heads, tensor) % min(dims.kv_heads, tensor) == 0
    return kv_heads and not any(size % tensor for size in (dims.heads, dims.intermediate, vllm_vocabulary(dims)))
