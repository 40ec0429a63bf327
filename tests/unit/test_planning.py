"""Plans: the arithmetic agrees with the modules that are really built; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron import cli
from ee_megatron.config.derive import position_bytes
from ee_megatron.config.load import load
from ee_megatron.config.schema import ExitCredit, RunConfig
from ee_megatron.planning.actors import shard_elements
from ee_megatron.planning.command import launch_command, launch_commands
from ee_megatron.planning.construct import build_ranks, check_sums
from ee_megatron.planning.devices import find_device
from ee_megatron.planning.entry import scale
from ee_megatron.planning.flops import PassMode, exits_read_cost, whole_pass
from ee_megatron.planning.generation import ARITHMETIC, MEMORY, REDUCING, ROWS, STARTING, all_reduce, embedded_round
from ee_megatron.planning.layout import Layout, rank_parameters
from ee_megatron.planning.memory import actor_memory, in_flight
from ee_megatron.planning.packing import pack_pass
from ee_megatron.planning.plan import Assumptions, Plan, make_plan
from ee_megatron.planning.published import PUBLISHED, published_dims
from ee_megatron.planning.workload import Workload, tilted
from ee_megatron.rollout.engine.cache import KVCache
from tests.processes import ee_megatron

ROOT = Path(__file__).parents[2]
SEVEN = "DeepSeek-R1-Distill-Qwen-7B"


def config(tensor=1, pipeline=1, data=1, virtual=1, **settings) -> RunConfig:
    cfg = RunConfig(name="x")
    cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.data, cfg.parallel.virtual = (
        tensor,
        pipeline,
        data,
        virtual,
    )
    for key, value in settings.items():
        *path, name = key.split("__")
        setattr(functools.reduce(getattr, path, cfg), name, value)
    return cfg


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_dimensions_are_the_published_ones(name: str) -> None:
    shapes = published_dims(name).tensor_shapes().values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == PUBLISHED[name][1]


# (model, layout): tied and untied, biases, head norms, odd vocabularies, virtual stages, sequence parallelism, full
CASES = [
    ("DeepSeek-R1-Distill-Qwen-1.5B", config(data=4)),
    (SEVEN, config(2, 2, 2)),
    (SEVEN, config(4, 2, 1, 2, parallel__sequence_parallel=True)),
    ("DeepSeek-R1-Distill-Qwen-32B", config(4, 4)),
    ("DeepSeek-R1-Distill-Llama-70B", config(8, 4, 2, adapter__full=True)),
    ("Qwen3-0.6B", config(2, 3)),
    ("SmolLM2-135M", config(3, 2, adapter__targets="attention")),
    ("SmolLM2-135M", config(1, 3, adapter__rank=0)),
]


@pytest.mark.parametrize(("name", "cfg"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_rank_is_built_and_holds_what_the_plan_counts(name: str, cfg: RunConfig) -> None:
    layout = Layout.of(cfg, published_dims(name))
    found = build_ranks(layout)
    assert set(found) == {(t, p) for t in range(layout.tensor) for p in range(layout.pipeline)}
    assert all(found[t, p] == rank_parameters(layout, p) for t, p in found)
    assert not torch.distributed.is_initialized()
    gates = sum(torch.Size(s).numel() for s in layout.spec.gate_shapes(layout.dims).values())
    assert sum(found[0, p].gates for p in range(layout.pipeline)) == gates
    # One parameter more anywhere is noticed.
    found[0, 0] = dataclasses.replace(found[0, 0], base=found[0, 0].base + 1)
    with pytest.raises(RuntimeError, match="ranks"):
        check_sums(layout, found)


@given(
    st.lists(st.integers(1, 80), min_size=1, max_size=9, unique=True).map(sorted),
    st.floats(0, 1),
)
def test_depths_are_spread_with_the_mean_that_is_asked_for(outcomes: list[int], where: float) -> None:
    mean = outcomes[0] + where * (outcomes[-1] - outcomes[0])
    shares = tilted(outcomes, mean)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert sum(s * o for s, o in zip(shares, outcomes, strict=True)) == pytest.approx(mean, abs=0.01 * outcomes[-1])


def test_a_mean_depth_below_the_first_exit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--mean-depth 0\.1.*0\.18"):
        Workload.of(10, 1000, (5, 28), 0.1)


def test_the_reference_costs_two_flops_per_parameter_and_position() -> None:
    layout = Layout.of(config(2, 2, 1), published_dims(SEVEN))
    load = Workload.of(200, 600, layout.spec.layout.outcomes, 0.5)
    dims, sequences = layout.dims, 8
    found = whole_pass(layout, load, sequences, PassMode(train=False, policy=False))
    linears = dims.num_layers * sum(a * b for a, b in dims.linear_shapes().values())
    length = load.prompt + load.answer
    attention = dims.num_layers * 4 * dims.heads * dims.head_dim * length**2 / 2
    head = 2 * dims.vocab * dims.hidden * load.answer
    assert found == pytest.approx(sequences * (2 * linears * length + attention + head), rel=0.005)


def test_less_depth_costs_less_and_recomputing_more() -> None:
    layout = Layout.of(config(), published_dims(SEVEN))

    def cost(depth: float, how: PassMode) -> float:
        return whole_pass(layout, Workload.of(50, 900, layout.spec.layout.outcomes, depth), 16, how)

    step = PassMode(train=True)
    assert cost(0.5, step) < 0.65 * cost(1.0, step)
    assert cost(1.0, PassMode(train=True, recompute=True)) > 1.3 * cost(1.0, step)
    assert cost(1.0, step) > 1.9 * cost(1.0, PassMode(train=False))


def test_micro_batches_in_flight() -> None:
    layout = Layout.of(config(1, 4, exits__depths=[7, 14, 21]), published_dims(SEVEN))
    assert [in_flight(layout, p, 8) for p in range(4)] == [4, 3, 2, 1]
    assert [in_flight(layout, p, 2) for p in range(4)] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    "change",
    [{"parallel__recompute": True}, {"parallel__tokens_per_micro_batch": 512}, {"deepspeed__offload_optimizer": True}],
)
def test_settings_that_save_memory_save_it(change: dict) -> None:
    dims, device = published_dims(SEVEN), find_device("H100")
    plain = make_plan(config(2, 2, 2), dims, device, Assumptions(answer_tokens=48))
    saving = make_plan(config(2, 2, 2, **change), dims, device, Assumptions(answer_tokens=48))
    assert saving.device_bytes(saving.learner[0]) < plain.device_bytes(plain.learner[0])


def test_an_actor_holds_the_cache_that_its_rows_take_at_their_longest() -> None:
    """What the engine's own cache says, sized without memory; a page's rest and the spare pages are little."""
    layout = Layout.of(config(), published_dims(SEVEN))
    load = Workload.of(100, 900, layout.spec.layout.outcomes, 1.0)
    found = actor_memory(layout, load, 2, 64, packed=False)
    cache = KVCache(layout.dims, 64, torch.bfloat16, torch.device("meta"))
    cache.hold(range(64), [100 + 900 - 1] * 64)
    assert found["KV cache"] == sum(layer.nbytes for layer in cache.layers) == cache.pages * cache.page_bytes
    assert 1 < found["KV cache"] / (2 * 28 * 2 * 4 * 128 * 64 * 999) < 1.05
    assert found["weights"] == 2 * PUBLISHED[SEVEN][1]


def test_gates_cost_what_they_are_made_of_and_travel_in() -> None:
    """Biases and second products are fp32; a gate of an eighth of the width takes an eighth of the bytes."""
    dims, device = published_dims(SEVEN), find_device("H100")

    def planned(**change):
        return make_plan(config(adapter__rank=0, teacher=None, **change), dims, device, Assumptions(answer_tokens=48))

    plain, narrow, small = planned(), planned(rollout__sync_dtype="bfloat16"), planned(exits__gate_width=0.25)
    matrices = len(plain.layout.spec.exit_depths) * 2 * dims.hidden**2
    small_parts = plain.trained - matrices
    assert plain.sync == 4 * plain.trained and narrow.sync == 2 * matrices + 4 * small_parts
    assert plain.actor.kinds["gates"] == 2 * matrices + 4 * small_parts
    assert planned(rollout__sync_dtype="bfloat16", model__dtype="float32").sync == plain.sync
    assert small.sync == pytest.approx(plain.sync / 8, rel=1e-3)
    assert small.flops["update"] < plain.flops["update"] and small.round.parts[MEMORY] < plain.round.parts[MEMORY]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *arguments])
    return code, *capsys.readouterr()


def proposed(err: str) -> list[str]:
    """The settings that end a refusal."""
    found = re.search(r"(\S+=\S+\s+)+$", err)
    assert found, err
    return found[0].split()


def test_what_does_not_fit_is_refused_with_settings_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["experiment=rl_7b", "parallel.recompute=false", "--dims", SEVEN, "--memory-gib", "22", "--no-build"]
    code, out, err = run(capsys, *wanted)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert "GiB" in out
    proposal = proposed(err)
    assert proposal and all("=" in setting for setting in proposal)
    code, out, err = run(capsys, *wanted, *proposal)
    assert code == 0, err


def test_a_model_that_no_device_holds_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    model = "DeepSeek-R1-Distill-Llama-70B"
    code, _, err = run(capsys, "experiment=rl_7b", "exits.depths=[40]", "--dims", model, "--no-build", "--on", "H100")
    assert code == 2 and "rollout actor" in err and err.count("\n") == 1
    # Half of its 8 devices each, and what is proposed is accepted.
    proposal = proposed(err)
    assert proposal == ["rollout.backend=vllm", "rollout.tensor=4", "rollout.actors=2"]
    code, _, err = run(capsys, "experiment=rl_7b", "exits.depths=[40]", "--dims", model, "--no-build", *proposal)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--dims", "GPT-9"], "--dims GPT-9"),
        (["--dims", SEVEN, "--on", "abacus"], "--on abacus"),
        (["--dims", SEVEN, "--tflops", "-1"], "--tflops -1.0"),
        (["--dims", SEVEN, "--answer-tokens", "8193"], "--answer-tokens 8193"),
        (["--dims", SEVEN, "--scaling", "one"], "--scaling one"),
        (["--dims", SEVEN, "parallel.tensor=3", "parallel.data=1"], "parallel.tensor=3"),
        ([], "config.json"),
    ],
)
def test_bad_input_to_plan_is_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "experiment=rl_7b", "--no-build", *arguments)
    assert code == 2 and part in err and err.count("\n") == 1 and out == ""


def test_a_plan_builds_prints_and_starts_nothing(tmp_path: Path) -> None:
    done = ee_megatron("plan", "experiment=rl_7b", "--dims", SEVEN, "--json", cwd=tmp_path, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b4\b", done.stderr) and done.stderr.count("\n") == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 8 and found["layout"]["layers_per_stage"] == [14, 14]
    assert found["gates"] == [[5, 10], [14, 15, 20, 25]]
    assert found["command"].startswith("sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        ("rl", ["experiment=rl_7b", "rl.depth_penalty.weight=0.3"],
         "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/rl_7b.sh rl.depth_penalty.weight=0.3"),
        ("calibrate", ["experiment=rl_7b"],
         "sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/calibrate_7b.sh"),
        ("traces", ["experiment=rl_7b"],
         "sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/traces_7b.sh"),
        ("evaluate", ["experiment=rl_7b"],
         "sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/eval.sh experiment=rl_7b"),
        ("rl", ["experiment=rl_32b", "task.path=a b"],
         "sbatch --nodes=3 --ntasks-per-node=8 --gpus-per-node=8 slurm/stage.sh rl experiment=rl_32b 'task.path=a b'"),
        ("rl", ["experiment=demo_cpu"],
         "torchrun --nnodes=1 --nproc-per-node=2 -m ee_megatron.cli rl experiment=demo_cpu"),
        ("rl", ["experiment=demo_cpu", "cluster.nodes=2"],
         "sbatch --nodes=2 --ntasks-per-node=1 slurm/stage.sh rl experiment=demo_cpu cluster.nodes=2"),
        ("rl", ["experiment=demo_gpu"], "ee-megatron rl experiment=demo_gpu"),
    ],
)  # fmt: skip
def test_the_command(stage: str, overrides: list[str], expected: str) -> None:
    assert launch_command(load(overrides), stage, overrides) == expected


def test_the_whole_method_on_a_cluster_is_one_job_per_stage() -> None:
    found = launch_commands(load(["experiment=rl_7b"]), "run", ["experiment=rl_7b"])
    assert [line.split("slurm/")[1].split(".sh")[0] for line in found] == ["traces_7b", "calibrate_7b", "rl_7b", "eval"]
    assert launch_commands(load(["experiment=demo_gpu"]), "run", ["experiment=demo_gpu"]) == [
        "ee-megatron run experiment=demo_gpu"
    ]


def test_a_dry_run_with_a_model_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = PUBLISHED["SmolLM2-135M"][0]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert cli.main(["rl", "experiment=demo_cpu", f"model.path={tmp_path}", "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    for start in ("# parameters: ", "# memory: ", "# estimate ", "# command: torchrun "):
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_more_nodes_help_less_and_less() -> None:
    cfg = load(["experiment=rl_7b"])
    plans = scale(cfg, published_dims(SEVEN), find_device("H100"), Assumptions(), [1, 2, 4, 8])
    seconds = [plan.step_seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    gains = [a / b for a, b in itertools.pairwise(seconds)]
    assert gains == sorted(gains, reverse=True) and gains[-1] < 1.3
    with pytest.raises(ValueError, match=r"\b16\b"):
        big = load(["experiment=rl_32b"])
        scale(big, published_dims("DeepSeek-R1-Distill-Qwen-32B"), find_device("H100"), Assumptions(), [1])


# ---- actors of vLLM's, and rounds ----

SEVENTY = "DeepSeek-R1-Distill-Llama-70B"


def seventy(*overrides: str, device: str = "H100", **assumed) -> Plan:
    cfg = load(["experiment=rl_70b", "rollout.max_new_tokens=900", *overrides])
    return make_plan(cfg, published_dims(SEVENTY), find_device(device), Assumptions(**assumed))


@pytest.mark.parametrize(
    ("name", "tensor", "heads_each"),
    [(SEVENTY, 8, 1), (SEVENTY, 2, 4), (SEVEN, 4, 1), ("DeepSeek-R1-Distill-Qwen-1.5B", 4, 1), ("SmolLM2-135M", 1, 3)],
)
def test_devices_share_the_model_as_vllm_cuts_it(name: str, tensor: int, heads_each: int) -> None:
    """Heads, MLP and vocabulary, biases with their matrices; norms, and sums' biases, are everywhere. 1.5B has two
    key-value heads for four devices."""
    dims = published_dims(name)
    kv = heads_each * dims.head_dim
    layer = dims.hidden * (2 * dims.q_size // tensor + 2 * kv + 3 * dims.intermediate // tensor) + 2 * dims.hidden
    layer += (dims.q_size // tensor + 2 * kv) if dims.qkv_bias else 0
    vocabulary = dims.vocab // tensor * dims.hidden * (1 if dims.tied else 2)
    assert dims.vocab % 64 == 0
    assert shard_elements(dims, tensor) == dims.num_layers * layer + vocabulary + dims.hidden
    assert position_bytes(dims, 2, tensor) == 2 * 2 * dims.num_layers * kv
    if tensor == 1:
        assert shard_elements(dims, 1) == PUBLISHED[name][1]


def test_the_cache_of_a_vllm_is_what_is_left_of_its_share() -> None:
    plan = seventy()
    kinds, device = plan.actor.kinds, plan.device
    assert sum(kinds.values()) == pytest.approx(0.9 * device.memory - device.reserved)
    assert kinds["gates"] == 4 * (plan.trained - seventy("exits.depths=[20,40,60]").trained) / 4 * 7
    page = 16 * 2 * 2 * 80 * 2 * 128
    assert plan.actor.positions == (int(kinds["KV cache"] / page) - 1) * 16
    assert plan.actor.sequence == 1104 and plan.actor.rows == plan.actor.wanted == 32
    # Of longer answers fewer have room: by their mean length, for rows that vLLM runs short of are read again later.
    long = seventy("rollout.max_new_tokens=30000", "rl.prompts_per_step=64", answer_tokens=15000)
    assert long.actor.rows == long.actor.positions // 15200 < long.actor.wanted == 128
    half = seventy("rollout.cache_gib=10")
    assert half.actor.kinds["KV cache"] == 10 * 2**30 and half.device_bytes(half.actor.kinds) < 50 * 2**30


def test_a_vllm_without_room_for_one_longest_sequence_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["experiment=rl_70b", "--dims", SEVENTY, "--no-build", "--memory-gib", "45"]
    code, out, err = run(capsys, *wanted)
    assert code == 2 and err.count("\n") == 1 and "KV cache" in out
    assert all(figure in err for figure in ("8400", "0.9", "45.0 GiB", "37.9")), err
    proposal = proposed(err)
    assert "rollout.tensor=8" in proposal
    assert run(capsys, *wanted, *proposal)[0] == 0
    code, _, err = run(capsys, "experiment=rl_70b", "--dims", SEVENTY, "--no-build", "rollout.cache_gib=0.64")
    assert code == 2 and "rollout.cache_gib=0.64" in err and "8368" in err, err


def test_recorded_rollouts_need_no_actor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan and a dry run say the same: whether it fits, what it takes, how many nodes it asks for."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[SEVENTY][0]))
    # A whole replica on one device, which no H100 holds.
    wanted = ["experiment=rl_70b", "rollout.backend=ray", "rollout.tensor=1", f"model.path={tmp_path}"]
    code, _, err = run(capsys, *wanted, "--no-build")
    assert code == 2 and "rollout actor" in err
    assert cli.main(["rl", *wanted, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert err.removeprefix("error: ").split(";")[0] in said and "GiB per rollout actor" in said

    replayed = [*wanted, f"rl.replay={tmp_path}", "rl.depth_penalty.target=null"]
    code, out, err = run(capsys, *replayed, "--no-build")
    assert code == 0 and str(tmp_path) in out and "weight sync" not in out, err
    assert cli.main(["rl", *replayed, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^# rollouts: .*{re.escape(str(tmp_path))}", said, re.MULTILINE)
    assert "rollout actor" not in said and "pool" not in said and "weight sync" not in said
    assert "sbatch --nodes=4 " in out and "sbatch --nodes=4 " in said
    assert json.loads(run(capsys, *replayed, "--no-build", "--json")[1])["tokens_per_s"] == {}


def test_what_is_read_again_needs_room_for_a_whole_replica(capsys: pytest.CaptureFixture[str]) -> None:
    """A 7B replica has room beside vLLM's if the cache leaves it; one of 70B never has."""
    arguments = ["experiment=rl_7b", "rollout=vllm", "--dims", SEVEN, "--no-build"]
    _, out, _ = run(capsys, *arguments)
    (limit,) = re.findall(r"rollout\.cache_gib=4[\d.]*\d", out)

    def advice(*arguments: str) -> list[str]:
        """The settings that a plan names for the replica that reads answers again."""
        (found,) = re.findall(r"whole replica of .*\n(.*)", run(capsys, *arguments)[1])
        return re.findall(r"(\S+)=\S+", found)

    assert advice(*arguments) == ["rollout.cache_gib"] and advice(*arguments, limit) == []
    assert "rollout.backend" in advice("experiment=rl_70b", "--dims", SEVENTY, "--no-build")
    assert "replica" not in run(capsys, "experiment=rl_7b", "--dims", SEVEN, "--no-build")[1]


def test_a_bounded_cache_bounds_memory_and_rows() -> None:
    """The engine lets a row begin when what it may come to need is free."""
    dims, device = published_dims(SEVEN), find_device("H100")
    many = dict(rl__prompts_per_step=16, rl__group_size=8, rollout__max_num_seqs=128, rollout__max_new_tokens=1000)
    free = make_plan(config(**many), dims, device, Assumptions())
    bound = make_plan(config(**many, rollout__cache_gib=2.0), dims, device, Assumptions())
    page = 16 * 2 * 2 * 28 * 4 * 128
    assert bound.actor.kinds["KV cache"] <= 2 * 2**30 < free.actor.kinds["KV cache"]
    assert bound.actor.rows == 2 * 2**30 // page // 75 and free.actor.rows == 128
    assert bound.seconds["rollouts"] > 2 * free.seconds["rollouts"]


def test_exits_save_the_embedded_engine_work_and_vllm_none() -> None:
    dims, device = published_dims(SEVEN), find_device("H100")

    def each(backend: str, depth: float) -> Plan:
        return make_plan(
            config(rollout__backend=backend), dims, device, Assumptions(answer_tokens=48, mean_depth=depth)
        )

    for part in (MEMORY, ARITHMETIC, STARTING):
        assert each("ray", 0.4).round.parts[part] < each("ray", 0.9).round.parts[part]
    assert each("vllm", 0.4).round == each("vllm", 0.9).round
    assert (
        each("vllm", 0.4).flops["rollouts"] == each("vllm", 1.0).flops["rollouts"] == each("ray", 1.0).flops["rollouts"]
    )


def test_weights_are_read_for_whoever_is_left() -> None:
    """One row reads what it runs; among many somebody goes on to the last layer nearly always."""
    dims, device = published_dims(SEVEN), dataclasses.replace(find_device("H100"), launch=0.0, row=0.0)
    layout = Layout.of(config(), dims)

    def read(rows: int, depth: float) -> float:
        load = Workload.of(1, 600, layout.spec.layout.outcomes, depth)
        return embedded_round(layout, load, device, 2, rows).parts[MEMORY]

    assert read(1, 0.5) == pytest.approx(0.5 * read(1, 1.0), rel=0.1)
    assert read(64, 0.5) > 0.85 * read(1, 1.0)


def test_a_round_by_vllm_is_shared_but_for_what_every_device_does() -> None:
    four, eight = seventy().round, seventy("rollout.tensor=8", "rollout.actors=1", "rl.prompts_per_step=8").round
    assert eight.parts[MEMORY] < 0.7 * four.parts[MEMORY]
    assert eight.parts[ARITHMETIC] < four.parts[ARITHMETIC] and eight.parts[REDUCING] > four.parts[REDUCING] > 0
    assert eight.parts[ROWS] == four.parts[ROWS]
    alone = make_plan(config(rollout__backend="vllm"), published_dims(SEVEN), find_device("H100"), Assumptions(200, 48))
    assert alone.round.parts[REDUCING] == 0
    assert alone.round.seconds < sum(alone.round.parts.values())


@pytest.mark.parametrize(
    ("tensor", "size", "measured"),
    [(2, 512, 9.5), (8, 512, 10.1), (8, 262144, 24.1), (2, 1048576, 26.6), (4, 1048576, 40.2), (8, 1048576, 45.0)],
)
def test_all_reduces_take_what_was_published(tensor: int, size: int, measured: float) -> None:
    """vLLM's kernel on H100s, microseconds (sgl-project/sglang#2904)."""
    assert all_reduce(size, find_device("H100"), tensor) * 1e6 == pytest.approx(measured, rel=0.25)


def test_the_report_names_tokens_per_second_and_what_weighs_most(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "experiment=rl_7b", "--dims", SEVEN, "--no-build", "--json")
    found = json.loads(out)
    prompts = 16 * 4 * 8192
    assert found["tokens_per_s"]["pool"] == pytest.approx(prompts / found["seconds"]["rollouts"])
    assert found["tokens_per_s"]["actor"] == pytest.approx(8 / found["round"]["seconds"])
    _, out, _ = run(capsys, "experiment=rl_7b", "--dims", SEVEN, "--no-build")
    assert f"{found['tokens_per_s']['actor']:,.0f} tokens/s" in out
    assert "starting kernels" in out and "7.5 us" in out and "4 us" in out
    _, out, _ = run(capsys, "experiment=rl_70b", "--dims", SEVENTY, "--no-build")
    assert "65% of 3.35 TB/s" in out


@pytest.mark.parametrize(
    ("name", "cfg", "device"),
    [(SEVEN, config(2, 2, 2), "H100"), (SEVENTY, config(8, 4, 1, rollout__backend="vllm", rollout__tensor=8), "A100"),
     ("SmolLM2-135M", config(data=2), "cpu")],
)  # fmt: skip
def test_a_plan_is_a_range_and_names_what_it_hangs_on(name: str, cfg: RunConfig, device: str) -> None:
    cfg.rollout.max_new_tokens = 1000
    plan = make_plan(cfg, published_dims(name), find_device(device), Assumptions(200, 300))
    assert all(plan.best_seconds[phase] <= seconds for phase, seconds in plan.seconds.items())
    assert all(gain >= 0 for gain in plan.gains.values()) and sum(plan.best_seconds.values()) < plan.step_seconds
    # What weighs most is what changes the step most, moved alone.
    most, gain = next(iter(plan.gains.items()))
    assert gain == max(plan.gains.values()) == pytest.approx(plan.step_seconds - plan.roofline.at_best(most).seconds)
    # Answers of one length have no longest to wait for.
    equal = make_plan(cfg, published_dims(name), find_device(device), Assumptions(200, 1000))
    assert "lengths" in plan.gains and "lengths" not in equal.gains
    # Who names the efficiency leaves nothing to assume.
    named = make_plan(cfg, published_dims(name), find_device(device, efficiency=0.5), Assumptions(200, 300))
    assert "efficiency" not in named.gains


def test_a_step_waits_for_its_longest_answer() -> None:
    dims, device = published_dims(SEVEN), find_device("H100")

    def rollouts(longest: int, rows: int) -> float:
        cfg = config(rollout__max_new_tokens=longest, rollout__max_num_seqs=rows)
        return make_plan(cfg, dims, device, Assumptions(200, 200)).seconds["rollouts"]

    assert rollouts(800, 64) == pytest.approx(4 * rollouts(200, 64), rel=0.15)
    # With few rows at a time the rest of the answers fill the time.
    assert rollouts(800, 4) == pytest.approx(rollouts(200, 4), rel=0.01)


# Tokens/s of SmolLM2 at full depth and at .65, prompts of 24 tokens read, by answers in flight, on one core that does
# 230 GFLOP/s in float32 and 460 in bfloat16 and reads 32 to 36 GB/s (docs/measurements/2026-11-27-engines.md).
ENGINES = {
    ("float32", 1.0): (55.8, 280, 450, 484), ("float32", 0.65): (73.1, 292, 521, 577),
    ("bfloat16", 1.0): (94.8, 481, 793, 897), ("bfloat16", 0.65): (126.9, 500, 897, 1007),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "depth"), ENGINES)
def test_the_engine_on_a_cpu_is_as_fast_as_planned(dtype: str, depth: float) -> None:
    """Between likely and at best; at .65 with 128 in flight it is slower than likely, by 8%."""
    core = dataclasses.replace(find_device("cpu"), tflops=0.46, fp32=0.23, bandwidth=36e9, cores=1)
    for rows, measured in zip((1, 8, 32, 128), ENGINES[dtype, depth], strict=True):
        cfg = config(
            model__dtype=dtype, exits__depths=[5, 10, 15, 20, 25], adapter__rank=32, rollout__max_num_seqs=rows,
            rollout__max_new_tokens=64, rl__prompts_per_step=rows, rl__group_size=1, rl__loss__advantage="none",
        )  # fmt: skip
        plan = make_plan(cfg, published_dims("SmolLM2-135M"), core, Assumptions(24, 64, depth))
        likely, best = (rows * 64 / seconds["rollouts"] for seconds in (plan.seconds, plan.best_seconds))
        assert 0.92 * likely < measured < best, (rows, likely, measured, best)


def test_a_small_model_on_a_gpu_is_bound_by_its_host() -> None:
    """Twice the tokens in a micro-batch twice as large take the learner no longer; in more micro-batches they do."""
    dims = published_dims("SmolLM2-135M")

    def update(group: int, tokens: int) -> float:
        cfg = config(rl__group_size=group, parallel__tokens_per_micro_batch=tokens)
        return make_plan(cfg, dims, find_device("H100"), Assumptions(20, 48)).roofline.phases()["update"]

    assert update(8, 16_000) == pytest.approx(update(4, 8_000), rel=0.01)
    assert update(8, 2_000) > 3 * update(4, 8_000)


def test_reading_every_exit_is_a_phase_of_the_actors_and_spares_the_learner_the_reference() -> None:
    dims = published_dims("SmolLM2-135M")

    def plan(*, group: int = 8, **settings) -> Plan:
        cfg = config(
            rl__exit_credit=ExitCredit(),
            rl__kl_penalty__kind="exact",
            rl__group_size=group,
            exits__depths=[5, 15],
            **settings,
        )
        return make_plan(cfg, dims, find_device("H100"), Assumptions(200, 48))

    taken, read = plan(), plan(rl__exit_credit__divergence="all")
    assert "exits read" not in taken.seconds and "exits read" not in taken.flops
    assert 0 < read.flops["scoring"] < taken.flops["scoring"] and read.flops["update"] == taken.flops["update"]
    answers = 8 * read.cfg.rl.prompts_per_step
    assert read.flops["exits read"] == answers * exits_read_cost(read.layout, read.load, 8)
    # A prompt more with its answers takes as much again; a larger group doesn't.
    twice = plan(group=16, rl__exit_credit__divergence="all")
    assert twice.flops["exits read"] == 2 * answers * exits_read_cost(read.layout, read.load, 16)
    assert twice.flops["exits read"] < 2 * read.flops["exits read"]
    assert "exits read" not in plan(rl__exit_credit__divergence="all", rl__kl_penalty__weight=0.0).seconds


@pytest.mark.parametrize("first_token", [False, True], ids=["prompts never exit", "first token exits"])
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_reading_exits_again_costs_what_a_walk_over_positions_and_layers_counts(taken: int, first_token: bool) -> None:
    dims, prompt, answer, group = published_dims("SmolLM2-135M"), 7, 5, 3
    cfg = config(exits__depths=[5, 15], exits__first_token=first_token)
    layout, outcomes = Layout.of(cfg, dims), (5, 15, dims.num_layers)
    shares = tuple(float(i == taken) for i in range(3))
    wide, keys = dims.heads * dims.head_dim, 2 * dims.kv_size * dims.hidden
    linears = 2 * dims.hidden * wide + keys + 3 * dims.hidden * dims.intermediate
    products = 0.0
    for reader in ("reference", "policy"):
        for sequence in range(group):
            for position in range(0 if sequence == 0 else prompt - 1, prompt - 1 + answer):
                may_exit = position >= prompt - first_token
                depth = outcomes[taken] if reader == "policy" and may_exit else dims.num_layers
                for layer in range(1, dims.num_layers + 1):
                    products += linears + 2 * wide * (position + 1) if layer <= depth else keys
    # The reference's at every token, the policy's at each outcome up to the one that was taken.
    readouts = answer + (answer - (not first_token)) * (taken + 1)
    products += group * readouts * dims.vocab * dims.hidden
    load = Workload(prompt, answer, outcomes, shares, first_token=first_token)
    assert group * exits_read_cost(layout, load, group) == pytest.approx(2 * products, rel=1e-12)


# ---- packing ----


@given(
    st.integers(1, 300), st.integers(1, 6000), st.integers(1, 64), st.integers(1, 16), st.integers(1, 4),
    st.integers(64, 20000), st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
)  # fmt: skip
def test_strips_hold_all_sequences_and_keep_within_the_budget(prompt, answer, groups, group, data, budget, stages):
    pipeline, virtual = stages
    cfg = config(pipeline=pipeline, data=data, virtual=virtual, parallel__tokens_per_micro_batch=budget)
    packed = pack_pass(cfg, Workload(prompt, answer, (4,), (1.0,)), groups * group, group)
    strips, longest = data * packed.micro_batches, prompt + answer - 1
    assert strips * packed.width >= packed.positions >= groups * (group * answer + prompt - 1) - 1e-6
    assert packed.positions <= groups * group * longest
    assert packed.width <= 1.04 * max(budget, longest) + 8
    assert virtual == 1 or packed.micro_batches % pipeline == 0
    assert packed.micro_batches < -(-groups * group // data) + pipeline
    fewer = packed.micro_batches - (pipeline if virtual > 1 else 1)
    assert packed.positions > fewer * data * budget


def test_a_groups_prompt_is_held_once_per_strip() -> None:
    load = Workload(101, 50, (4,), (1.0,))
    whole = pack_pass(config(parallel__tokens_per_micro_batch=300), load, 4, 4)
    assert whole.micro_batches == 1 and whole.positions == 100 + 4 * 50
    halves = pack_pass(config(parallel__tokens_per_micro_batch=250), load, 4, 4)
    assert halves.micro_batches == 2 and halves.positions == 2 * 100 + 4 * 50
    assert pack_pass(config(parallel__tokens_per_micro_batch=250), load, 4).positions == 4 * 150
    assert whole.padding == pytest.approx(1 - 300 / 312)
