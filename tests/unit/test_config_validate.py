"""Validation and identity: each rule is shown to bite, and a directory changes exactly when a result could."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ee_megatron.config import identity
from ee_megatron.config.derive import policy_spec, read_dims, resolve_exits, scoring
from ee_megatron.config.fields import settings
from ee_megatron.config.identity import to_yaml
from ee_megatron.config.load import load
from ee_megatron.config.schema import KEYS, RunConfig
from ee_megatron.config.validate import validate
from ee_megatron.families import ModelDims
from ee_megatron.policy import ATTENTION, MLP, PolicySpec

TWO_NODES = ("cluster.nodes=2", "cluster.rollout_nodes=1", "cluster.gpus_per_node=8")
# Settings under which nothing has to be scored first.
SKIPPING = ("rl.skip_scoring=true", "rl.loss.importance=null", "rl.kl_penalty.kind=exact")
# With every section that may be switched off.
EVERYTHING = (
    "evaluate.controls=true", "evaluate.externalisation=true", "evaluate.style_choice.models=all", "pretrain=true",
    "rl.depth_penalty.target.margin=1", "rl.exit_credit=true", "rollout.vllm.compile=false", "rollout.backend=vllm",
    "task=hops", "cluster.nodes=2", "task.dataset.question_column=q",
)  # fmt: skip
SMALL = dict(rms_eps=1e-6, rope_theta=1e4, vocab=128)


def dims(
    layers: int = 28, heads: int = 28, kv_heads: int = 4, intermediate: int = 112, positions: int = 64
) -> ModelDims:
    return ModelDims("qwen2", layers, heads * 4, intermediate, heads, kv_heads, 4, max_positions=positions, **SMALL)


@functools.cache
def composed(*overrides: str) -> RunConfig:
    return load(["name=test", "model.path=nowhere", *overrides])


def config(*overrides: str) -> RunConfig:
    return copy.deepcopy(composed(*overrides))


def refused(*overrides: str, model: ModelDims | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        validate(config(*overrides), model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_are_valid() -> None:
    validate(config(), dims())


def broken() -> Iterator[tuple[str, Any, str]]:
    """Every rule on every field of the schema: its key, a value that breaks it, the bound or choices that are named."""
    for key, value, rules in ((k.key, k.default, k.rules) for k in KEYS if k.kind is None):
        kind = float if value == "???" and not rules.choices else type(value)
        if isinstance(value, float):
            yield key, float("nan"), "finite"
        if rules.choices:
            yield key, "nonsense", ", ".join(map(str, rules.choices))
        for sign, bound, wrong in (
            (">", rules.above, 0), (">=", rules.at_least, -1), ("<", rules.below, 0), ("<=", rules.at_most, 1)
        ):  # fmt: skip
            if bound is not None:
                broken = bound + wrong
                yield key, [broken] if kind is list else kind(broken), f"{sign} {bound}"


@pytest.mark.parametrize(("key", "value", "expected"), broken())
def test_every_rule_on_a_field_is_enforced(key: str, value: Any, expected: str) -> None:
    cfg = config(*EVERYTHING)
    assign(cfg, key, value)
    with pytest.raises(ValueError) as caught:
        validate(cfg, None)
    said, instead = str(caught.value).split(": ", 1)
    assert said == f"{key}={value}" and expected in instead


# What is refused, and what the line names.
REFUSED = """
rl.group_size=1 -> rl.group_size=1 rl.loss.advantage=none
rl.group_size=1 rl.loss.advantage=grpo -> rl.group_size=1 rl.loss.advantage=grpo
adapter.dropout=1 -> adapter.dropout=1
adapter.rank=0 -> adapter.rank=0 teacher=null
calibrate.wise_ft_alpha=0.8 -> calibrate.wise_ft_alpha=0.8 calibrate.gate_only_fraction
rl.gate_centre=1 -> rl.gate_centre=1
rl.gate_sharpness=0 -> rl.gate_sharpness=0
calibrate.uniform_patterns=0.6 calibrate.full_patterns=0.5 -> calibrate.uniform_patterns=0.6 calibrate.full_patterns=0.5
calibrate.kl_scale=1 calibrate.depth_power=0 -> calibrate.kl_scale=1 calibrate.depth_power=0
traces.wide_operands=0.5 task.operands=wide -> traces.wide_operands=0.5 task.operands wide
rl.wide_operands=0.5 task.operands=wide -> rl.wide_operands=0.5 task.operands wide
evaluate.wide_problems=5 task.operands=wide -> evaluate.wide_problems=5 task.operands wide
evaluate.wide_test=5 task.name=hops task.families=[hop1] -> evaluate.wide_test=5 task.name=hops
evaluate.thresholds=[0.5,2] -> evaluate.thresholds 2
evaluate.thresholds=[] -> evaluate.thresholds
evaluate.style_choice.models=all -> evaluate.style_choice task.name=arithmetic task.name=hops
task.families=[product,quotient] -> task.families quotient chain
task.name=jsonl -> task.path task.name=jsonl
task=dataset -> task.path task.name=dataset
task=verifiers -> task.path task.name=verifiers
task=tom task.arguments={split:train} -> task.arguments task.name=tom
task=dataset task.path=x task.dataset.answer_column= -> task.dataset.answer_column
task=dataset task.path=x task.dataset.evaluation_split=train -> task.dataset.evaluation_split=train
task.name=tom -> product first_order second_order
task=tom task.families=[memory,memory] -> task.families memory
task=reasoning_gym task.families=[] -> task.families=[]
task.name=reasoning_gym -> product reasoning_gym chain_sum
task=hops rl.families=[hop9] -> rl.families=['hop9'] task.families hop1
task=gsm8k task.path=there rl.families=[product] -> rl.families task.name=gsm8k
task=hops task.families=[hop4,hop5,hop6] -> hop5 hop6 task.slots=4
task=hops task.slots=9 -> task.slots=9 8
task=sums task.families=[hop4] -> hop4 task.slots=3
task=sums task.tokens_per_step=4 -> task.tokens_per_step=4 task.name=sums
pretrain.init=model pretrain.width=64 -> pretrain.width=64
pretrain=true model.checkpoint=there -> model.checkpoint=there pretrain
pretrain=true rollout.prompt_template=chat -> rollout.prompt_template=chat
name=a/b -> name='a/b'
parallel.sequence_parallel=true -> parallel.sequence_parallel parallel.tensor
parallel.sequence_parallel=true parallel.tensor=3 -> parallel.tensor=3 2, 4
deepspeed.zero_stage=4 -> deepspeed.zero_stage=4
deepspeed.zero_stage=3 parallel.tensor=2 -> deepspeed.zero_stage=3 parallel.tensor deepspeed.zero_stage=2
rl.minibatches=99 -> rl.minibatches=99 rl.prompts_per_step
rollout.stop=[""] -> rollout.stop
rollout.chat_template_kwargs={enable_thinking:false} -> enable_thinking rollout.prompt_template=plain
rollout.device_share=1.5 -> rollout.device_share=1.5
parallel.data=9 cluster.gpus_per_node=8 -> cluster.gpus_per_node=8 9
parallel.data=16 TWO -> cluster.gpus_per_node=8 cluster.rollout_nodes 16
rollout.actors=9 TWO -> rollout.actors=9 8 cluster.rollout_nodes
rollout.actors=5 rollout.device_share=2 TWO -> rollout.actors=5 4 cluster.rollout_nodes
rollout.actors=17 rollout.device_share=0.5 cluster.gpus_per_node=8 -> rollout.actors=17 16
cluster.rollout_nodes=1 -> cluster.rollout_nodes=1 cluster.nodes=2
rollout=local TWO -> cluster.rollout_nodes=1 rollout.backend local
rollout=vllm rollout.vllm.tensor=16 TWO -> rollout.vllm.tensor=16 cluster.gpus_per_node=8
rollout=vllm rollout.vllm.tensor=4 rollout.actors=3 TWO -> rollout.actors=3 2 cluster.rollout_nodes
rollout=vllm parallel.data=8 cluster.gpus_per_node=8 -> rollout.backend=vllm cluster.rollout_nodes 8
rollout.vllm.compile=false -> rollout.vllm rollout.backend=vllm ray
rollout=vllm rollout.device_share=0.5 TWO -> rollout.device_share=0.5 rollout.backend=vllm
rl.depth_penalty.credit=token rl.depth_penalty.cost=max -> rl.depth_penalty.credit=token rl.depth_penalty.cost=max
rl.fixed_depth=5 rl.exit_credit=true -> rl.fixed_depth=5 rl.exit_credit=null
rl.loss.importance.kind=mask rl.loss.importance.low=2 -> rl.loss.importance.low=2 rl.loss.importance.high=2
rl.loss.clip_high=0.1 -> rl.loss.clip_high=0.1 rl.loss.clip=0.2
rl.depth_penalty.target.margin=100 -> rl.depth_penalty.target.margin=100
rl.depth_penalty.target.margin=-100 -> rl.depth_penalty.target.margin=-100
rl.depth_penalty.target.margin=1 rl.depth_penalty.weight=5 -> rl.depth_penalty.weight=5 rl.depth_penalty.target
rl.exit_credit.divergence=all rl.temperature=0.7 -> rl.exit_credit.divergence=all rl.temperature=0.7
rl.exit_credit.divergence=all rollout.max_staleness=1 -> rl.exit_credit.divergence=all rollout.max_staleness=1
SKIP rl.minibatches=2 -> rl.skip_scoring=true rl.minibatches=2
SKIP rl.loss.importance.kind=truncate -> rl.skip_scoring=true rl.loss.importance.kind=truncate
SKIP rollout.max_staleness=1 -> rl.skip_scoring=true rollout.max_staleness=1
SKIP rl.kl_penalty.kind=loss -> rl.skip_scoring=true rl.kl_penalty.kind=loss rl.kl_penalty.weight=0.05
SKIP rl.exit_credit=true -> rl.skip_scoring=true rl.exit_credit.kl_weight=1.0
rl.skip_scoring=true rl.minibatches=2 -> rl.minibatches=2 rl.loss.importance.kind=truncate rl.kl_penalty.kind=reward
"""
ALLOWED = """
parallel.data=8 rollout.actors=8 TWO
rollout.actors=24 rollout.device_share=0.333 TWO
rollout=vllm rollout.vllm.tensor=4 rollout.actors=2 parallel.data=8 TWO
rollout=vllm parallel.data=7 cluster.gpus_per_node=8
rollout=vllm rollout.device_share=0.5
rl.group_size=1 rl.loss.advantage=none
rl.exit_credit=true rl.depth_penalty.cost=max rl.loss.importance.low=2 rl.loss.clip_high=0.2
rl.exit_credit.divergence=all rl.kl_penalty.weight=0 rollout.max_staleness=1
SKIP rl.exit_credit.divergence=all
rl.depth_penalty.target.margin=0 rl.depth_penalty.weight=4
rl.depth_penalty.target.margin=-1.5 rl.depth_penalty.weight=0
SKIP rl.exit_credit.kl_weight=0
SKIP rl.kl_penalty.kind=reward rl.kl_penalty.weight=0 rl.exit_credit=true
rl.minibatches=2 rollout.max_staleness=1 rl.exit_credit=true
task=tom
task=reasoning_gym
task=dataset task.path=rows.jsonl task.dataset.evaluation_split=
task=verifiers task.path=own/reverse-text@0.1 task.arguments={split:train}
task=sums evaluate.style_choice.models=all
adapter.rank=0 teacher=null
pretrain.init=model rollout.prompt_template=chat
rollout.prompt_template=chat rollout.chat_template_kwargs={enable_thinking:false,effort:"low",levels:[1,2]}
rl.fixed_depth=28 task=hops rl.families=[hop3]
deepspeed=zero2 parallel.data=4
parallel=tp2_pp2 parallel.sequence_parallel=true deepspeed=zero2
"""


def spelt(line: str) -> list[str]:
    return line.replace("TWO", " ".join(TWO_NODES)).replace("SKIP", " ".join(SKIPPING)).split(" ")


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_rules_without_a_model(line: str) -> None:
    given, named = line.split(" -> ")
    message = refused(*spelt(given))
    assert all(part in message for part in named.replace(", ", ",").split(" ") if "," not in part), message


@pytest.mark.parametrize("line", ALLOWED.strip().splitlines())
def test_what_the_rules_let_through(line: str) -> None:
    validate(config(*spelt(line)), dims())


# The passes before the first update: the policy's, with it the exact divergence, the reference's.
POLICY, WITH_DIVERGENCE, AND_REFERENCE = (True, False, False), (True, True, False), (True, False, True)
NOTHING, REFERENCE_ALONE = (False, False, False), (False, False, True)


@pytest.mark.parametrize("credit", ["answer", "token", "exit"])
@pytest.mark.parametrize("kl", ["reward", "loss", "exact"])
def test_what_is_scored_before_the_first_update(kl: str, credit: str) -> None:
    def passes(*overrides: str) -> tuple[bool, bool, bool]:
        return tuple(scoring(config(f"rl.kl_penalty.kind={kl}", f"rl.credit={credit}", *overrides).rl))

    exact, local = kl == "exact", credit == "exit"
    without = ["rl.kl_penalty.weight=0", *(["rl.exit_credit.kl_weight=0"] if local else [])]
    if exact:
        assert passes() == (WITH_DIVERGENCE if local else POLICY)
        # What nothing asks for isn't computed.
        assert {passes(each) for each in without} == {POLICY}
        assert not local or passes("rl.exit_credit.divergence=all") == POLICY
        assert passes("rl.skip_scoring=true") == NOTHING
    else:
        # Without a use for it the reference is scored for the metrics, unless nothing is to be.
        assert {passes(), *map(passes, without)} == {AND_REFERENCE}
        assert passes("rl.skip_scoring=true") == REFERENCE_ALONE
        assert passes("rl.skip_scoring=true", "rl.kl_penalty.weight=0") == NOTHING


@pytest.mark.parametrize(
    ("overrides", "model", "parts"),
    [
        (["parallel.tensor=3"], dims(), ["parallel.tensor=3", "28", "2, 4"]),
        (["parallel.tensor=4"], dims(intermediate=110), ["parallel.tensor=4", "110", "1, 2"]),
        (["rollout=vllm", "rollout.vllm.tensor=3"], dims(), ["rollout.vllm.tensor=3", "28", "[1, 2, 4]"]),
        (["rollout=vllm", "rollout.vllm.tensor=4"], dims(intermediate=110), ["rollout.vllm.tensor=4", "110", "[1, 2]"]),
        (["rollout=vllm", "rollout.vllm.tensor=7"], dims(), ["rollout.vllm.tensor=7", "[1, 2, 4]"]),
        (["exits.depths=[5,28]"], dims(), ["exits.depths", "1..27"]),
        (["exits.depths=[0]"], dims(), ["exits.depths", "1..27"]),
        (["exits.depths=[5]", "parallel.pipeline=4"], dims(), ["parallel.pipeline=4"]),
    ],
)
def test_rules_that_need_the_model(overrides: list[str], model: ModelDims, parts: list[str]) -> None:
    validate(config(*overrides), None)
    message = refused(*overrides, model=model)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("auto", 2)])
def test_a_cache_that_the_longest_answer_does_not_fit_is_refused_with_the_numbers(dtype: str, item: int) -> None:
    """28 layers, 4 key-value heads of 4 elements; the size that the message names is accepted."""
    rows = ("rollout.max_new_tokens=100", f"model.dtype={dtype}")
    position = 2 * item * 28 * 4 * 4
    message = refused(f"rollout.cache_gib={100.5 * position / 2**30}", *rows, model=dims(positions=128))
    for part in ("rollout.cache_gib=", " 100 ", "rollout.max_new_tokens=100", "101"):
        assert part in message, message
    enough = max(re.findall(r"\d+\.\d+(?:e-\d+)?", message), key=float)
    validate(config(f"rollout.cache_gib={enough}", *rows), dims(positions=128))
    # Devices that share key-value heads out hold more; those that are more than the heads don't.
    shared = f"rollout.cache_gib={100.5 * position / 2**30 / 4}"
    validate(config(shared, "rollout=vllm", "rollout.vllm.tensor=2", "rollout.max_new_tokens=40", rows[1]), dims())
    wide = dims(heads=32, positions=128)
    for tensor in (4, 8):
        limit = ("rollout=vllm", f"rollout.vllm.tensor={tensor}", shared, rows[1])
        validate(config(*limit, "rollout.max_new_tokens=99"), wide)
        assert " 100 " in refused(*limit, "rollout.max_new_tokens=100", model=wide)


def test_exits_as_given_and_by_default() -> None:
    assert resolve_exits(config("exits.depths=[3,9]"), dims()).depths == (3, 9)
    assert resolve_exits(config(), dims()).depths == (5, 10, 15, 20, 25)
    assert resolve_exits(config("parallel.pipeline=2"), dims()).depths == (5, 10, 14, 15, 20, 25)


def test_policy_spec_carries_every_field() -> None:
    cfg = config(
        "adapter.targets=attention", "adapter.rank=8", "adapter.alpha=16", "exits.gate_input=raw", "exits.gate_width=3"
    )
    spec = policy_spec(cfg, dims())
    assert (spec.targets, spec.rank, spec.alpha, spec.gate_input, spec.gate_width) == (ATTENTION, 8, 16.0, "raw", 3)
    assert spec.exit_depths == (5, 10, 15, 20, 25) and spec.num_layers == 28
    plain, early = policy_spec(config(), dims()), policy_spec(config("exits.first_token=true"), dims())
    assert plain.targets == ATTENTION + MLP
    assert not plain.layout.first_token and early.layout.first_token
    # Files of before the setting stay what they are.
    assert "first_token" not in plain.to_json() and PolicySpec.from_json(early.to_json()) == early != plain


def test_gates_may_be_narrower_than_the_model() -> None:
    spec = policy_spec(config("exits.gate_width=0.5"), dims())
    shapes = spec.gate_shapes(dims())
    assert shapes["gates.5.fc1.weight"] == (56, 112) and shapes["gates.25.fc2.weight"] == (1, 56)
    assert PolicySpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    message = refused("exits.gate_width=0.3", model=dims())
    assert message.startswith("exits.gate_width=0.3") and "112" in message and "0.285714" in message
    assert refused("exits.gate_width=0", model=dims()).startswith("exits.gate_width=0")
    with pytest.raises(ValueError, match=r"exits\.gate_width.*abc"):
        config("exits.gate_width=abc")


def test_one_width_has_one_name_however_it_is_written() -> None:
    assert to_yaml(config("exits.gate_width=2.0")) == to_yaml(config())
    assert hashes(config("exits.gate_width=2.0")) == hashes(config("exits.gate_width=2")) == hashes(config())
    assert hashes(config("exits.gate_width=0.5"))["traces"] != hashes(config())["traces"]


def test_dimensions_from_a_model_directory(tmp_path: Path) -> None:
    cfg = config(f"model.path={tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_dims(cfg)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        read_dims(cfg)
    write_model(tmp_path, layers=12)
    assert read_dims(cfg).num_layers == 12


def write_model(path: Path, layers: int) -> None:
    values = dict(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=layers, intermediate_size=128, vocab_size=100
    )
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **values}))


# What does not belong to a stage's identity: it changes how a result is computed, not what it is.
NEVER = ("name", "runs", "device", "parallel", "tracker", "cluster")
EXECUTION = {
    "pretrain.checkpoint_every", "calibrate.checkpoint_every",
    "rl.checkpoint_every", "rl.dump_rollouts", "deepspeed.zero_stage", "rollout.backend",
    "rollout.vllm.python", "rollout.vllm.compile", "rollout.vllm.tensor", "rollout.actors",
    "rollout.threads", "rollout.max_num_seqs", "rollout.cache_gib", "rollout.device_share",
    "rollout.timeout_s", "rollout.failure_budget",
}  # fmt: skip
FIRST_STAGE = {
    "model": "import-checkpoint",
    **dict.fromkeys(("task", "pretrain", "deepspeed"), "pretrain"),
    **dict.fromkeys(("teacher", "rollout", "adapter"), "teacher"),
    **dict.fromkeys(("traces", "exits"), "traces"),
    "calibrate": "calibrate",
    "rl": "rl",
    "init_policy": "rl",
    "evaluate": "evaluate",
    **dict.fromkeys(("rollout.max_staleness", "rollout.sync_dtype"), "rl"),
}


def assign(cfg: RunConfig, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    setattr(functools.reduce(getattr, sections, cfg), name, value)


def changed(cfg: RunConfig, key: str) -> RunConfig:
    cfg = copy.deepcopy(cfg)
    old = {name: value for name, value, _ in settings(cfg)}[key]
    if isinstance(old, bool | dict):
        new = not old if isinstance(old, bool) else {**old, "x": 1}
    else:
        new = [*old, *old, 3] if isinstance(old, list) else old + type(old)(7)
    assign(cfg, key, new)
    return cfg


def hashes(cfg: RunConfig) -> dict[str, str]:
    return {stage: identity.stage_dir(cfg, stage).name for stage in identity.STAGES}


def test_switched_off_parts_of_the_evaluation_are_not_in_its_name() -> None:
    found = identity.identity(config(), "evaluate")["evaluate"]
    assert set(found) == {"split", "thresholds", "tolerance", "answers", "seed"}
    assert hashes(config("evaluate.externalisation_prompts=7", "evaluate.choice_answers=7")) == hashes(config())


@pytest.mark.parametrize("key", sorted(key for key, _, _ in settings(composed(*EVERYTHING))))
def test_a_setting_changes_the_stages_that_depend_on_it_and_no_others(key: str) -> None:
    base = config(*EVERYTHING)
    if key == "rl.depth_penalty.credit":
        base.rl.exit_credit = None
    before, after = hashes(base), hashes(changed(base, key))
    different = [stage for stage in before if before[stage] != after[stage]]
    section = key.split(".")[0]
    if section in NEVER or key in EXECUTION:
        assert different == []
    else:
        stages = list(identity.STAGES)
        assert different == stages[stages.index(FIRST_STAGE.get(key) or FIRST_STAGE[section]) :]


def test_default_exits_count_as_what_they_come_to(tmp_path: Path) -> None:
    write_model(tmp_path, layers=28)
    path = f"model.path={tmp_path}"
    one, two = config(path), config(path, "parallel.pipeline=2")
    spelt = config(path, "exits.depths=[5,10,14,15,20,25]")
    assert hashes(one)["traces"] != hashes(two)["traces"] == hashes(spelt)["traces"]
    assert hashes(one)["teacher"] == hashes(two)["teacher"]


def test_stage_directories_are_named_and_stable() -> None:
    cfg = config("runs=somewhere", "name=x")
    directory = identity.stage_dir(cfg, "rl")
    assert directory.parent == Path("somewhere/x")
    assert directory == identity.stage_dir(config("runs=somewhere", "name=x"), "rl")
    stage, digest = directory.name.split("-")
    assert stage == "rl" and len(digest) == 8 and int(digest, 16) >= 0
    with pytest.raises(ValueError, match=r"training.*import-checkpoint.*pretrain"):
        identity.stage_dir(cfg, "training")


@pytest.mark.parametrize("stage", ["pretrain", "teacher"])
def test_a_stage_that_is_left_out_has_no_settings(stage: str) -> None:
    off, on = config(f"{stage}=null"), config(f"{stage}=true")
    assert identity.identity(off, stage)[stage] == {"enabled": False}
    assert stage not in identity.stage_order(off) and stage in identity.stage_order(on)


def test_the_depth_that_all_leave_at_is_an_exit() -> None:
    message = refused("rl.fixed_depth=3", model=dims())
    assert "rl.fixed_depth=3" in message and "[5, 10, 15, 20, 25, 28]" in message
