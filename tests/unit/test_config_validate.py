"""Validation and identity: each rule is shown to bite, and a directory changes exactly when a result could."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ee_megatron.config import identity
from ee_megatron.config.derive import policy_spec, read_dims, resolve_exits, scoring
from ee_megatron.config.identity import to_yaml
from ee_megatron.config.load import load
from ee_megatron.config.schema import RunConfig, TracesConfig, setting, settings
from ee_megatron.config.validate import validate
from ee_megatron.families import ModelDims
from ee_megatron.policy import ATTENTION, MLP, PolicySpec

TWO_NODES = ("cluster.nodes=2", "cluster.rollout_nodes=1", "cluster.gpus_per_node=8")
# Settings under which nothing has to be scored first.
SKIPPING = ("rl.skip_scoring=true", "rl.importance=none", "rl.kl=exact")
# With everything that an evaluation may do without.
MEASURED = ("evaluate.controls=true", "evaluate.externalisation=true", "evaluate.choice=all")
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
    for key, value, rules in settings(RunConfig()):
        kind = type(value)
        if isinstance(value, float):
            yield key, float("nan"), "finite"
        if rules.choices:
            yield key, "nonsense", ", ".join(choice or "nothing" for choice in rules.choices)
        if rules.positive:
            yield key, kind(0), "0"
        if rules.at_least is not None:
            yield key, kind(rules.at_least - 1), str(rules.at_least)
        if rules.share:
            yield from ((key, share, "1") for share in (-0.5, 1.5))


@pytest.mark.parametrize(("key", "value", "expected"), broken())
def test_every_rule_on_a_field_is_enforced(key: str, value: Any, expected: str) -> None:
    cfg = config()
    assign(cfg, key, value)
    with pytest.raises(ValueError) as caught:
        validate(cfg, None)
    said, instead = str(caught.value).split(": ", 1)
    assert said == f"{key}={value}" and expected in instead


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rl.temperature=0"], ["rl.temperature=0"]),
        (["rl.beta=-1"], ["rl.beta=-1"]),
        (["rl.lambda_exit=nan"], ["rl.lambda_exit=nan"]),
        (["rl.group_size=1"], ["rl.group_size=1", "rl.advantage=none"]),
        (["rl.group_size=1", "rl.advantage=grpo"], ["rl.group_size=1", "rl.advantage=grpo"]),
        (["adapter.dropout=1"], ["adapter.dropout=1"]),
        (["adapter.rank=0"], ["adapter.rank=0", "teacher.enabled=false"]),
        (["calibrate.student_patterns=2"], ["calibrate.student_patterns=2"]),
        (["calibrate.keep=0.8"], ["calibrate.keep=0.8", "calibrate.settle"]),
        (["rl.gate_centre=1"], ["rl.gate_centre=1"]),
        (["rl.gate_sharpness=0"], ["rl.gate_sharpness=0"]),
        (["calibrate.uniform_patterns=1.5"], ["calibrate.uniform_patterns=1.5"]),
        (["calibrate.full_patterns=2"], ["calibrate.full_patterns=2"]),
        (
            ["calibrate.uniform_patterns=0.6", "calibrate.full_patterns=0.5"],
            ["calibrate.uniform_patterns=0.6", "calibrate.full_patterns=0.5"],
        ),
        (["calibrate.reach=1", "calibrate.depth_power=0"], ["calibrate.reach=1", "calibrate.depth_power=0"]),
        (["traces.wide_operands=0.5", "task.operands=wide"], ["traces.wide_operands=0.5", "task.operands", "wide"]),
        (["rl.wide_operands=0.5", "task.operands=wide"], ["rl.wide_operands=0.5", "task.operands", "wide"]),
        (["evaluate.wide_problems=5", "task.operands=wide"], ["evaluate.wide_problems=5", "task.operands", "wide"]),
        (["evaluate.wide_test=5", "task.operands=wide"], ["evaluate.wide_test=5", "task.operands", "wide"]),
        (
            ["traces.wide_operands=0.5", "task.name=hops", "task.families=[hop1]"],
            ["traces.wide_operands=0.5", "task.name", "hops"],
        ),
        (["evaluate.thresholds=[0.5,2]"], ["evaluate.thresholds", "2"]),
        (["evaluate.externalisation_prompts=-1"], ["evaluate.externalisation_prompts=-1"]),
        (["evaluate.choice=all"], ["evaluate.choice=all", "task.name=arithmetic", "task.name=hops"]),
        (["evaluate.control_policy=runs/x"], ["evaluate.control_policy=runs/x", "evaluate.controls=true"]),
        (["task.families=[product,quotient]"], ["task.families", "quotient", "chain"]),
        (["task.name=jsonl"], ["task.path", "task.name=jsonl"]),
        (["task=dataset"], ["task.path", "task.name=dataset"]),
        (["task=dataset", "task.path=x", "task.answer_column="], ["task.answer_column"]),
        (["task=dataset", "task.path=x", "task.evaluation_split=train"], ["task.evaluation_split=train"]),
        (["task.name=tom"], ["product", "first_order", "second_order"]),
        (["task=tom", "task.families=[memory,memory]"], ["task.families", "memory"]),
        (["task=reasoning_gym", "task.families=[]"], ["task.families=[]"]),
        (["task.name=reasoning_gym"], ["product", "reasoning_gym", "chain_sum"]),
        (["name=a/b"], ["name='a/b'"]),
        (["parallel.pipeline=0"], ["parallel.pipeline=0"]),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "parallel.tensor"]),
        (["parallel.sequence_parallel=true", "parallel.tensor=3"], ["parallel.tensor=3", "2, 4"]),
        (["parallel.virtual=2"], ["parallel.virtual=2", "parallel.pipeline"]),
        (["deepspeed.zero_stage=4"], ["deepspeed.zero_stage=4"]),
        (
            ["deepspeed.zero_stage=3", "parallel.tensor=2"],
            ["deepspeed.zero_stage=3", "parallel.tensor", "deepspeed.zero_stage=2"],
        ),
        (
            ["deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true"],
            ["deepspeed.offload_optimizer=true", "deepspeed.zero_stage"],
        ),
        (["rl.minibatches=99"], ["rl.minibatches=99", "rl.prompts_per_step"]),
        (["rollout.device_share=1.5"], ["rollout.device_share=1.5"]),
        (["rollout.max_staleness=-1"], ["rollout.max_staleness=-1"]),
        (["rl.lambda_warmup=2"], ["rl.lambda_warmup=2"]),
        (["parallel.data=9", "cluster.gpus_per_node=8"], ["cluster.gpus_per_node=8", "9"]),
        (["parallel.data=16", *TWO_NODES], ["cluster.gpus_per_node=8", "cluster.rollout_nodes", "16"]),
        (["rollout.actors=9", *TWO_NODES], ["rollout.actors=9", "8", "cluster.rollout_nodes"]),
        (
            ["rollout.actors=5", "rollout.device_share=2", *TWO_NODES],
            ["rollout.actors=5", "4", "cluster.rollout_nodes"],
        ),
        (["rollout.actors=17", "rollout.device_share=0.5", "cluster.gpus_per_node=8"], ["rollout.actors=17", "16"]),
        (["cluster.rollout_nodes=1"], ["cluster.rollout_nodes=1", "cluster.nodes=2"]),
        (["rollout=local", *TWO_NODES], ["cluster.rollout_nodes=1", "rollout.backend", "local"]),
        (["cluster.rollout_nodes=-1"], ["cluster.rollout_nodes=-1"]),
        (["rollout=vllm", "rollout.tensor=16", *TWO_NODES], ["rollout.tensor=16", "cluster.gpus_per_node=8"]),
        (
            ["rollout=vllm", "rollout.tensor=4", "rollout.actors=3", *TWO_NODES],
            ["rollout.actors=3", "2", "cluster.rollout_nodes"],
        ),
        (
            ["rollout=vllm", "parallel.data=8", "cluster.gpus_per_node=8"],
            ["rollout.backend=vllm", "cluster.rollout_nodes", "8"],
        ),
        (["rl.credit=token", "rl.depth_cost=max"], ["rl.credit=token", "rl.depth_cost=max", "rl.credit=exit"]),
        (["rl.importance=mask", "rl.importance_floor=2"], ["rl.importance_floor=2", "rl.importance_cap=2"]),
        (["rl.clip_high=0.1"], ["rl.clip_high=0.1", "rl.clip=0.2"]),
        (["rl.accuracy_floor=100"], ["rl.accuracy_floor=100"]),
        (["rl.accuracy_floor=-100"], ["rl.accuracy_floor=-100"]),
        (["rl.accuracy_floor=1", "rl.replay=runs/x"], ["rl.accuracy_floor", "rl.replay"]),
        (["rl.accuracy_floor=1", "rl.lambda_exit=5"], ["rl.lambda_exit=5", "rl.accuracy_floor"]),
        ([*SKIPPING, "rl.epochs=2"], ["rl.skip_scoring=true", "rl.epochs=2"]),
        ([*SKIPPING, "rl.minibatches=2"], ["rl.skip_scoring=true", "rl.minibatches=2"]),
        ([*SKIPPING, "rl.importance=truncate"], ["rl.skip_scoring=true", "rl.importance=truncate"]),
        ([*SKIPPING, "rollout.max_staleness=1"], ["rl.skip_scoring=true", "rollout.max_staleness=1"]),
        ([*SKIPPING, "rl.kl=reward"], ["rl.skip_scoring=true", "rl.kl=reward", "rl.beta=0.05"]),
        ([*SKIPPING, "rl.kl=loss"], ["rl.skip_scoring=true", "rl.kl=loss", "rl.beta=0.05"]),
        ([*SKIPPING, "rl.credit=exit"], ["rl.skip_scoring=true", "rl.credit=exit", "rl.exit_kl=1.0"]),
        (["rl.credit=exit", "rl.exit_divergence=all", "rl.replay=runs/x"], ["rl.exit_divergence=all", "rl.replay"]),
        (
            ["rl.credit=exit", "rl.exit_divergence=all", "rl.temperature=0.7"],
            ["rl.exit_divergence=all", "rl.temperature=0.7"],
        ),
        (
            ["rl.credit=exit", "rl.exit_divergence=all", "rollout.max_staleness=1"],
            ["rl.exit_divergence=all", "rollout.max_staleness=1"],
        ),
        (["rl.skip_scoring=true", "rl.epochs=2"], ["rl.epochs=2", "rl.importance=truncate", "rl.kl=reward"]),
        (["rollout.vllm_exits=compact"], ["rollout.vllm_exits=compact", "rollout.backend=vllm", "ray"]),
        (["rollout=vllm", "exits.first_token=true"], ["exits.first_token=true", "rollout.backend=vllm"]),
        (["rollout=vllm", "rollout.vllm_exits=compact"], ["rollout.vllm_exits=compact", "rollout.vllm_compile=false"]),
        (
            ["rollout=vllm", "rollout.device_share=0.5", *TWO_NODES],
            ["rollout.device_share=0.5", "rollout.backend=vllm"],
        ),
    ],
)
def test_rules_without_a_model(overrides: list[str], parts: list[str]) -> None:
    message = refused(*overrides)
    assert all(part in message for part in parts), message


def test_what_the_rules_let_through() -> None:
    validate(config("parallel.data=8", "rollout.actors=8", *TWO_NODES), None)
    validate(config("rollout.actors=24", "rollout.device_share=0.333", *TWO_NODES), None)
    validate(config("rollout=vllm", "rollout.tensor=4", "rollout.actors=2", "parallel.data=8", *TWO_NODES), dims())
    validate(config("rollout=vllm", "parallel.data=7", "cluster.gpus_per_node=8"), dims())
    validate(config("rollout=vllm", "rollout.device_share=0.5"), dims())
    validate(config("rollout=vllm", "rollout.vllm_exits=compact", "rollout.vllm_compile=false"), dims())
    # More devices than key-value heads: each has one of them.
    validate(config("rollout=vllm", "rollout.tensor=8"), dims(heads=32, kv_heads=4))
    validate(config("rl.group_size=1", "rl.advantage=none"), None)
    validate(config("rl.credit=exit", "rl.depth_cost=max", "rl.importance_floor=2", "rl.clip_high=0.2"), None)
    validate(config("rl.credit=exit", "rl.exit_kl_power=2", "rl.kl=exact"), None)
    validate(config("rl.credit=exit", "rl.exit_kl_power=2", "rl.exit_divergence=all"), None)
    validate(config("rl.credit=exit", "rl.exit_divergence=all", "rl.gate_pull=0.2"), None)
    validate(config("rl.credit=exit", "rl.exit_divergence=all", "rl.exit_later=1"), None)
    validate(config("rl.credit=exit", "rl.exit_divergence=all", "rl.beta=0", "rollout.max_staleness=1"), None)
    validate(config(*SKIPPING, "rl.credit=exit", "rl.exit_divergence=all"), None)
    validate(config("rl.accuracy_floor=0", "rl.lambda_exit=4"), None)
    validate(config("rl.accuracy_floor=-1.5", "rl.lambda_exit=0"), None)
    validate(config(*SKIPPING), None)
    validate(config(*SKIPPING, "rl.credit=exit", "rl.exit_kl=0"), None)
    validate(config(*SKIPPING, "rl.kl=reward", "rl.beta=0", "rl.credit=exit"), None)
    validate(config("rl.epochs=2", "rl.minibatches=2", "rollout.max_staleness=1", "rl.credit=exit"), None)
    validate(config("task=tom"), None)
    validate(config("task=reasoning_gym"), None)
    validate(config("task=dataset", "task.path=rows.jsonl", "task.evaluation_split="), None)
    validate(config("adapter.rank=0", "teacher.enabled=false"), None)
    validate(config("deepspeed=zero2", "parallel.data=4"), dims())
    validate(config("parallel=tp2_pp2", "parallel.sequence_parallel=true", "deepspeed=zero2"), dims())


# The passes before the first update: the policy's, with it the exact divergence, the reference's.
POLICY, WITH_DIVERGENCE, AND_REFERENCE = (True, False, False), (True, True, False), (True, False, True)
NOTHING, REFERENCE_ALONE = (False, False, False), (False, False, True)


@pytest.mark.parametrize("credit", ["answer", "token", "exit"])
@pytest.mark.parametrize("kl", ["reward", "loss", "exact"])
def test_what_is_scored_before_the_first_update(kl: str, credit: str) -> None:
    def passes(*overrides: str) -> tuple[bool, bool, bool]:
        return tuple(scoring(config(f"rl.kl={kl}", f"rl.credit={credit}", *overrides).rl))

    exact, local = kl == "exact", credit == "exit"
    if exact:
        assert passes() == (WITH_DIVERGENCE if local else POLICY)
        # What nothing asks for isn't computed.
        assert passes("rl.beta=0") == passes("rl.exit_kl=0") == passes("rl.exit_divergence=all") == POLICY
        assert passes("rl.skip_scoring=true") == NOTHING
    else:
        # Without a use for it the reference is scored for the metrics, unless nothing is to be.
        assert passes() == passes("rl.beta=0") == passes("rl.exit_kl=0") == AND_REFERENCE
        assert passes("rl.skip_scoring=true") == passes("rl.skip_scoring=true", "rl.exit_kl=0") == REFERENCE_ALONE
        assert passes("rl.skip_scoring=true", "rl.beta=0") == NOTHING


@pytest.mark.parametrize(
    ("overrides", "model", "parts"),
    [
        (["parallel.tensor=3"], dims(), ["parallel.tensor=3", "28", "2, 4"]),
        (["parallel.tensor=4"], dims(intermediate=110), ["parallel.tensor=4", "110", "1, 2"]),
        (["rollout=vllm", "rollout.tensor=3"], dims(), ["rollout.tensor=3", "28", "[1, 2, 4]"]),
        (["rollout=vllm", "rollout.tensor=4"], dims(intermediate=110), ["rollout.tensor=4", "110", "[1, 2]"]),
        (["rollout=vllm", "rollout.tensor=7"], dims(), ["rollout.tensor=7", "[1, 2, 4]"]),
        (["exits.depths=[5,28]"], dims(), ["exits.depths", "1..27"]),
        (["exits.depths=[0]"], dims(), ["exits.depths", "1..27"]),
        (
            ["exits.depths=[5,10]", "parallel.pipeline=2", "parallel.stage_layers=[14,14]"],
            dims(),
            ["exits.depths", "14"],
        ),
        (["exits.depths=[5]", "parallel.pipeline=4"], dims(), ["parallel.pipeline", "parallel.virtual", "4"]),
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
    validate(config(shared, "rollout=vllm", "rollout.tensor=2", "rollout.max_new_tokens=40", rows[1]), dims())
    wide = dims(heads=32, positions=128)
    for tensor in (4, 8):
        limit = ("rollout=vllm", f"rollout.tensor={tensor}", shared, rows[1])
        validate(config(*limit, "rollout.max_new_tokens=99"), wide)
        assert " 100 " in refused(*limit, "rollout.max_new_tokens=100", model=wide)


def test_exits_as_given_by_default_and_at_requested_boundaries() -> None:
    assert resolve_exits(config("exits.depths=[3,9]"), dims()).depths == (3, 9)
    assert resolve_exits(config(), dims()).depths == (5, 10, 15, 20, 25)
    assert resolve_exits(config("parallel.pipeline=2"), dims()).depths == (5, 10, 14, 15, 20, 25)
    cfg = config("parallel.pipeline=2", "parallel.stage_layers=[12,16]")
    layout = resolve_exits(cfg, dims())
    assert layout.depths == (5, 10, 12, 15, 20, 25)
    assert layout.stage_sizes(2, cfg.parallel.stage_layers) == (12, 16)


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
NEVER = ("name", "runs", "device", "deterministic", "parallel", "tracker", "cluster")
EXECUTION = {
    "model.base_unchecked",
    "task.verifier_deadline_s",
    "pretrain.checkpoint_every",
    "calibrate.checkpoint_every",
    "rl.checkpoint_every",
    "rl.dump_rollouts",
    "deepspeed.zero_stage",
    "deepspeed.offload_optimizer",
    *(
        f"rollout.{name}"
        for name in (
            "backend",
            "actors",
            "threads",
            "rows",
            "cache_gib",
            "device_share",
            "tensor",
            "vllm_python",
            "vllm_compile",
            "vllm_exits",
            "check_weights",
            "timeout_s",
            "failure_budget",
        )
    ),
}
FIRST_STAGE = {
    "model": "imported",
    **dict.fromkeys(("task", "pretrain", "deepspeed"), "pretrain"),
    **dict.fromkeys(("teacher", "rollout", "adapter"), "teacher"),
    **dict.fromkeys(("traces", "exits"), "traces"),
    "calibrate": "calibrate",
    "rl": "rl",
    "start": "rl",
    "evaluate": "evaluate",
    **dict.fromkeys(("rollout.max_staleness", "rollout.sync_dtype"), "rl"),
}


def assign(cfg: RunConfig, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    setattr(functools.reduce(getattr, sections, cfg), name, value)


def changed(cfg: RunConfig, key: str) -> RunConfig:
    cfg = copy.deepcopy(cfg)
    old = {name: value for name, value, _ in settings(cfg)}[key]
    if old is None:
        new = 7.0
    else:
        new = (not old) if isinstance(old, bool) else [*old, *old, 3] if isinstance(old, list) else old + type(old)(7)
    assign(cfg, key, new)
    return cfg


def hashes(cfg: RunConfig) -> dict[str, str]:
    return {stage: identity.stage_dir(cfg, stage).name for stage in identity.STAGES}


def test_switched_off_parts_of_the_evaluation_are_not_in_its_name() -> None:
    found = identity.identity(config(), "evaluate")["evaluate"]
    assert set(found) == {"split", "thresholds", "tolerance", "answers", "seed"}
    assert hashes(config("evaluate.externalisation_prompts=7", "evaluate.choice_answers=7")) == hashes(config())


def test_the_mark_on_a_field_decides_whether_it_is_part_of_an_identity() -> None:
    """Walks the schema, so that a field that is added is asked about too."""
    base = config("pretrain.enabled=true", *MEASURED)
    in_stages = {section for sections in identity.STAGES.values() for section in sections}
    before = hashes(base)["evaluate"]
    for key, _, rules in settings(base):
        counts = key.split(".")[0] in in_stages and not rules.execution
        assert (hashes(changed(base, key))["evaluate"] != before) == counts, key


def test_a_setting_that_was_added_later_is_named_once_it_is_set() -> None:
    """Results from before there was the setting are found again."""

    @dataclasses.dataclass
    class Longer(TracesConfig):
        bottom_k: int = setting(5, added_later=True)
        words: list[str] = setting(["a"], added_later=True)

    old, new = config(), config()
    new.traces = Longer(**dataclasses.asdict(old.traces))
    assert hashes(new) == hashes(old)
    for key, value in (("traces.bottom_k", 0), ("traces.words", [])):
        differing = copy.deepcopy(new)
        assign(differing, key, value)
        assert hashes(differing)["teacher"] == hashes(old)["teacher"]
        assert hashes(differing)["traces"] != hashes(old)["traces"]


@pytest.mark.parametrize("key", sorted(key for key, _, _ in settings(RunConfig())))
def test_a_setting_changes_the_stages_that_depend_on_it_and_no_others(key: str) -> None:
    base = config("pretrain.enabled=true", *MEASURED)
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
    with pytest.raises(ValueError, match=r"training.*imported.*pretrain"):
        identity.stage_dir(cfg, "training")


@pytest.mark.parametrize("stage", ["pretrain", "teacher"])
def test_a_stage_that_is_left_out_has_no_settings(stage: str) -> None:
    off = config(f"{stage}.enabled=false")
    assert hashes(off) == hashes(changed(off, f"{stage}.batch_size"))
    assert stage not in identity.stage_order(off) and stage in identity.stage_order(config(f"{stage}.enabled=true"))


def test_what_rl_takes_of_a_task_and_where_it_leaves() -> None:
    for overrides, parts in (
        (["task=hops", "rl.families=[hop9]"], ["rl.families=['hop9']", "task.families", "hop1"]),
        (["task=gsm8k", "task.path=there", "rl.families=[product]"], ["rl.families", "task.name=gsm8k"]),
        (["task.name=hops"], ["task.families=['product', 'sum', 'word']", "hop1"]),
        (["rl.kl_sum=true", "rl.kl=exact"], ["rl.kl_sum=true", "rl.kl=reward"]),
        (["rl.fixed_depth=5", "rl.credit=exit"], ["rl.fixed_depth=5", "rl.credit=answer"]),
        (["task=hops", "task.families=[hop4,hop5,hop6]"], ["hop5", "hop6", "task.slots=4"]),
        (["task=hops", "task.slots=9"], ["task.slots=9", "8"]),
        (["pretrain.layers=3"], ["pretrain.layers=3"]),
        (["pretrain.enabled=true", "pretrain.init=model", "pretrain.width=64"], ["pretrain.width=64"]),
        (["pretrain.enabled=true", "rollout.prompt_template=chat"], ["rollout.prompt_template=chat"]),
        (["task=sums", "task.families=[hop4]"], ["hop4", "task.slots=3"]),
        (["task=sums", "task.tokens_per_step=4"], ["task.tokens_per_step=4", "task.name=sums"]),
    ):
        message = refused(*overrides)
        assert all(part in message for part in parts), message
    message = refused("rl.fixed_depth=3", model=dims())
    assert "rl.fixed_depth=3" in message and "[5, 10, 15, 20, 25, 28]" in message
    validate(config("pretrain.enabled=true", "pretrain.init=model", "rollout.prompt_template=chat"), dims())
    validate(config("rl.fixed_depth=28", "task=hops", "rl.families=[hop3]"), dims())
    validate(config("task=sums", "evaluate.choice=all"), dims())
