"""Plans: the arithmetic agrees with the modules that are really built; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron import cli
from ee_megatron.config.load import load
from ee_megatron.config.schema import RunConfig, VllmConfig
from ee_megatron.families import ModelDims, dims_from_config
from ee_megatron.planning.command import launch_command, launch_commands
from ee_megatron.planning.devices import Device, find_device
from ee_megatron.planning.flops import exits_read_cost
from ee_megatron.planning.layout import Layout, rank_parameters
from ee_megatron.planning.memory import actor_memory
from ee_megatron.planning.plan import Assumptions, RunPlan, make_plan, published_config
from ee_megatron.planning.roofline import PhaseTime
from ee_megatron.planning.workload import Workload, pack_pass, tilted
from ee_megatron.rollout.engine.cache import KVCache
from tests.processes import ee_megatron

SEVEN, SEVENTY, SMOL = "DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Llama-70B", "SmolLM2-135M"
# The published number of parameters, tied weights counted once.
PARAMETERS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000, SEVEN: 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664, "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248, SEVENTY: 70_553_706_496, "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360, "Qwen3-32B": 32_762_123_264, SMOL: 134_515_008,
}  # fmt: skip


def dims_of(name: str) -> ModelDims:
    return dims_from_config(published_config(name))


def config(tensor=1, pipeline=1, data=1, **settings) -> RunConfig:
    cfg = RunConfig(name="x")
    for key, value in dict(tensor=tensor, pipeline=pipeline, data=data).items():
        setattr(cfg.parallel, key, value)
    for key, value in settings.items():
        *path, name = key.split("__")
        setattr(functools.reduce(getattr, path, cfg), name, value)
    return cfg


def plan_of(name: str, cfg: RunConfig, device: str = "H100", *assumed, **more) -> RunPlan:
    return make_plan(cfg, dims_of(name), find_device(device), Assumptions(*assumed, **more))


@pytest.mark.parametrize("name", PARAMETERS)
def test_named_dimensions_are_the_published_ones(name: str) -> None:
    assert sum(torch.Size(shape).numel() for shape in dims_of(name).tensor_shapes().values()) == PARAMETERS[name]


# ---- the run's modules, built without memory ----


def built(layout: Layout, tensor_rank: int, pipeline_rank: int) -> int:
    """Parameters of a rank's modules as `Learner` builds them, of fake tensors, in a world that nobody else joins."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ee_megatron.model.config import megatron_config
    from ee_megatron.model.gpt import build_stage
    from ee_megatron.parallel import cpu_shims, groups

    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    cpu_shims.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # megatron-core's order of ranks: tensor fastest, then data, pipeline slowest.
    rank = tensor_rank + layout.tensor * layout.data * pipeline_rank
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    try:
        parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        config = megatron_config(
            layout.dims, layout.spec, layout.sizes, tensor=layout.tensor,
            sequence_parallel=layout.sequence_parallel, on_cpu=True,
        )  # fmt: skip
        with FakeTensorMode():
            return sum(parameter.numel() for parameter in build_stage(config).parameters())
    finally:
        groups.finish()


# Tied and untied, biases, head norms, odd vocabularies, sequence parallelism, full, gates alone.
CASES = [
    (SEVEN, config(4, 2, 1, parallel__sequence_parallel=True)),
    (SEVENTY, config(8, 4, 2, adapter__full=True)),
    ("Qwen3-0.6B", config(2, 3)),
    (SMOL, config(3, 2, adapter__targets="attention")),
    (SMOL, config(1, 3, adapter__rank=0)),
]


@pytest.mark.parametrize(("name", "cfg"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_rank_is_built_with_the_parameters_that_the_plan_counts(name: str, cfg: RunConfig) -> None:
    layout = Layout.of(cfg, dims_of(name))
    planned = [rank_parameters(layout, p) for p in range(layout.pipeline)]
    for p, t in itertools.product(range(layout.pipeline), (0, layout.tensor - 1)):
        assert built(layout, t, p) == sum(vars(planned[p]).values())
    gates = sum(torch.Size(s).numel() for s in layout.spec.gate_shapes(layout.dims).values())
    assert sum(counted.gates for counted in planned) == gates


# ---- FLOPs ----


@given(st.lists(st.integers(1, 80), min_size=1, max_size=9, unique=True).map(sorted), st.floats(0, 1))
def test_depths_are_spread_with_the_mean_that_is_asked_for(outcomes: list[int], where: float) -> None:
    mean = outcomes[0] + where * (outcomes[-1] - outcomes[0])
    shares = tilted(outcomes, mean)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert sum(s * o for s, o in zip(shares, outcomes, strict=True)) == pytest.approx(mean, abs=0.01 * outcomes[-1])


@pytest.mark.parametrize("first_token", [False, True], ids=["prompts never exit", "first token exits"])
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_reading_exits_again_costs_what_a_walk_over_positions_and_layers_counts(taken: int, first_token: bool) -> None:
    dims, prompt, answer, group = dims_of(SMOL), 7, 5, 3
    layout = Layout.of(config(exits__depths=[5, 15], exits__first_token=first_token), dims)
    outcomes, shares = (5, 15, dims.num_layers), tuple(float(i == taken) for i in range(3))
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
    products += group * (answer + (answer - (not first_token)) * (taken + 1)) * dims.vocab * dims.hidden
    load = Workload(prompt, answer, outcomes, shares, first_token=first_token)
    assert group * exits_read_cost(layout, load, group) == pytest.approx(2 * products, rel=1e-12)


@given(
    st.integers(1, 300), st.integers(1, 6000), st.integers(1, 64), st.integers(1, 16), st.integers(1, 4),
    st.integers(64, 20000), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_micro_batches_hold_all_sequences_and_keep_within_the_budget(
    prompt, answer, groups, group, data, budget, pipeline
):
    cfg = config(pipeline=pipeline, data=data, parallel__tokens_per_micro_batch=budget)
    packed = pack_pass(cfg, Workload(prompt, answer, (4,), (1.0,)), groups * group, group)
    count, longest, positions = data * packed.micro_batches, prompt + answer - 1, groups * group * packed.load.written
    assert count * packed.width >= positions >= groups * (group * answer + prompt - 1) - 1e-6
    assert packed.width <= 1.04 * max(budget, longest) + 8
    assert packed.micro_batches < -(-groups * group // data) + pipeline
    assert positions > (packed.micro_batches - 1) * data * budget


# ---- memory ----


def test_an_actor_holds_the_cache_that_its_rows_take_at_their_longest() -> None:
    """What the engine's own cache says, sized without memory; a page's rest and the spare pages are little."""
    layout = Layout.of(config(), dims_of(SEVEN))
    found = actor_memory(layout, Workload.of(100, 900, layout.spec.layout.outcomes, 1.0), 2, 64, on_cpu=False)
    cache = KVCache(layout.dims, 64, torch.bfloat16, torch.device("meta"))
    cache.hold(range(64), [100 + 900 - 1] * 64)
    assert found["KV cache"] == sum(layer.nbytes for layer in cache.layers) == cache.pages * cache.page_bytes
    assert 1 < found["KV cache"] / (2 * 28 * 2 * 4 * 128 * 64 * 999) < 1.05
    assert found["weights"] == 2 * PARAMETERS[SEVEN]


def test_the_cache_of_a_vllm_is_what_is_left_of_its_share_and_a_bounded_one_bounds_rows() -> None:
    def seventy(*overrides: str, **assumed) -> RunPlan:
        return plan_of(SEVENTY, load(["experiment=rl_70b", "rollout.max_new_tokens=900", *overrides]), **assumed)

    plan = seventy()
    assert sum(plan.actor.kinds.values()) == pytest.approx(0.9 * plan.device.memory - plan.device.reserved)
    page = 16 * 2 * 2 * 80 * 2 * 128
    assert plan.actor.positions == (int(plan.actor.kinds["KV cache"] / page) - 1) * 16
    assert plan.actor.sequence == 1104 and plan.actor.rows == plan.actor.wanted == 32
    # Of longer answers fewer have room: by their mean length, for rows that vLLM runs short of are read again later.
    long = seventy("rollout.max_new_tokens=30000", "rl.prompts_per_step=64", answer_tokens=15000)
    assert long.actor.rows == long.actor.positions // 15200 < long.actor.wanted == 128
    # The embedded engine lets a row begin when what it may come to need is free.
    many = dict(rl__prompts_per_step=16, rl__group_size=8, rollout__max_num_seqs=128, rollout__max_new_tokens=1000)
    free, bound = (plan_of(SEVEN, config(**many, rollout__cache_gib=gib)) for gib in (0.0, 2.0))
    assert bound.actor.kinds["KV cache"] <= 2 * 2**30 < free.actor.kinds["KV cache"]
    assert bound.actor.rows == 2 * 2**30 // (16 * 2 * 2 * 28 * 4 * 128) // 75 and free.actor.rows == 128
    assert bound.phases["rollouts"].likely > 2 * free.phases["rollouts"].likely


# ---- the command ----


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *arguments])
    return code, *capsys.readouterr()


SEVENS, SEVENTIES = ["experiment=rl_7b", "--dims", SEVEN], ["experiment=rl_70b", "--dims", SEVENTY]


@pytest.mark.parametrize(
    ("arguments", "parts", "planned"),
    [
        (["experiment=rl_7b", "--dims", "GPT-9"], "--dims GPT-9", False),
        ([*SEVENS, "--on", "abacus"], "--on abacus", False),
        ([*SEVENS, "--tflops", "-1"], "--tflops -1.0", False),
        ([*SEVENS, "--answer-tokens", "8193"], "--answer-tokens 8193", False),
        ([*SEVENS, "--mean-depth", "0.1"], "--mean-depth 0.1", False),
        ([*SEVENS, "parallel.tensor=3", "parallel.data=1"], "parallel.tensor=3", False),
        (["experiment=rl_7b"], "config.json", False),
        # The plan is printed all the same, to see what takes the room.
        ([*SEVENS, "parallel.recompute=false", "--memory-gib", "22"], "learner rank,parallel.recompute=true", True),
        ([*SEVENTIES, "rollout=ray", "rollout.vllm=null"], "rollout actor,rollout.backend=vllm", True),
        ([*SEVENTIES, "--memory-gib", "45"], "cache,8400,rollout.vllm.tensor", True),
        ([*SEVENTIES, "rollout.cache_gib=0.64"], "rollout.cache_gib=0.64,8368", True),
    ],
)
def test_what_can_not_be_planned_or_does_not_fit_is_refused_in_one_line(
    arguments: list[str], parts: str, planned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts.split(",")) and ("KV cache" in out) == planned


def test_a_plan_prints_and_starts_nothing(tmp_path: Path) -> None:
    done = ee_megatron("plan", "experiment=rl_7b", "--dims", SEVEN, "--json", cwd=tmp_path, env={"PATH": ""})
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    assert found["ranks"] == 8 and found["layout"]["layers_per_stage"] == [14, 14]
    assert found["gates"] == [[5, 10], [14, 15, 20, 25]]
    assert found["command"].startswith("sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 ")
    assert found["tokens_per_s"] == pytest.approx(16 * 4 * 8192 / found["seconds"]["rollouts"]["likely"])
    assert list(tmp_path.iterdir()) == []


def test_rollouts_one_step_ahead_take_the_time_of_the_longer_side(capsys: pytest.CaptureFixture[str]) -> None:
    def likely(name: str, out: str) -> float:
        row = re.search(rf"^  {name} {{2,}}(.*)$", out, re.MULTILINE)
        assert row is not None, out
        return float(re.findall(r"\d[\d.]*", row[1])[-1])

    _, ahead, _ = run(capsys, *SEVENS)
    _, after, _ = run(capsys, *SEVENS, "rollout.max_staleness=0")
    whole, made = likely("one after another", ahead), likely("rollouts", ahead)
    assert likely("rollouts beside the rest", ahead) == pytest.approx(max(made, whole - made), rel=0.01)
    assert "rollouts beside the rest" not in after and likely("one after another", after) == whole


def test_a_plan_and_a_dry_run_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it fits, what it takes, how many nodes it asks for."""
    (tmp_path / "config.json").write_text(json.dumps(published_config(SEVENTY)))
    # A whole replica on one device, which no H100 holds.
    wanted = ["experiment=rl_70b", "rollout.backend=ray", "rollout.vllm=null", f"model.path={tmp_path}"]
    code, _, err = run(capsys, *wanted)
    assert code == 2 and "rollout actor" in err
    assert cli.main(["rl", *wanted, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert err.removeprefix("error: ").strip() in printed
    for start in ("# parameters: ", "# memory: ", "# estimate ", "# command: sbatch "):
        assert re.search(f"^{start}", printed, re.MULTILINE), start


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        ("rl", ["experiment=rl_7b", "rl.depth_penalty.weight=0.3"],
         "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/rl_7b.sh rl.depth_penalty.weight=0.3"),
        ("calibrate", ["experiment=rl_7b"],
         "sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/calibrate_7b.sh"),
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
    # The whole method on a cluster is one job per stage.
    jobs = launch_commands(load(overrides), "run", overrides)
    assert len(jobs) == (1 if "demo_gpu" in overrides[0] or overrides == ["experiment=demo_cpu"] else len(set(jobs)))


# ---- seconds ----


@pytest.mark.parametrize(
    ("name", "cfg", "device"),
    [(SEVEN, config(2, 2, 2), "H100"),
     (SEVENTY, config(8, 4, 1, rollout__backend="vllm", rollout__vllm=VllmConfig(tensor=8)), "A100"),
     (SMOL, config(data=2), "cpu")],
)  # fmt: skip
def test_an_estimate_is_a_range(name: str, cfg: RunConfig, device: str) -> None:
    cfg.rollout.max_new_tokens = 1000
    phases = plan_of(name, cfg, device, 200, 300).phases
    assert all(0 < phase.best < phase.likely and phase.bound_by for phase in phases.values())


def test_exits_save_the_embedded_engine_work_and_vllm_none() -> None:
    def each(backend: str, depth: float) -> tuple[float, float]:
        plan = plan_of(SEVEN, config(rollout__backend=backend), "H100", answer_tokens=48, mean_depth=depth)
        return plan.phases["rollouts"].likely, plan.flops["rollouts"]

    assert all(less < more for less, more in zip(each("ray", 0.4), each("ray", 0.9), strict=True))
    assert each("vllm", 0.4) == each("vllm", 0.9) and each("vllm", 0.4)[1] == each("ray", 1.0)[1]


def test_a_step_waits_for_its_longest_answer() -> None:
    def rollouts(longest: int, rows: int) -> float:
        cfg = config(rollout__max_new_tokens=longest, rollout__max_num_seqs=rows)
        return plan_of(SEVEN, cfg, "H100", 200, 200).phases["rollouts"].likely

    assert rollouts(800, 64) == pytest.approx(4 * rollouts(200, 64), rel=0.15)
    # With few rows at a time the rest of the answers fill the time.
    assert rollouts(800, 4) == pytest.approx(rollouts(200, 4), rel=0.01)


# SmolLM2 on one core (docs/measurements/speed.md, docs/plans.md), by dtype and mean depth. Tokens/s
# by answers in flight, at 230 GFLOP/s in float32, 460 in bfloat16 and 36 GB/s; CPU seconds of a forward and backward
# pass over 8 x 256 tokens at 112 GFLOP/s.
IN_FLIGHT = (1, 8, 32, 128)
ENGINE = {
    ("float32", 1.0): (55.8, 280, 450, 484), ("float32", 0.65): (73.1, 292, 521, 577),
    ("bfloat16", 1.0): (94.8, 481, 793, 897), ("bfloat16", 0.65): (126.9, 500, 897, 1007),
}  # fmt: skip
LEARNER = {1.0: 15.4, 0.7: 12.0, 0.5: 9.3, 0.3: 6.8}


def test_the_speed_that_was_measured_on_a_cpu_is_in_the_planned_range() -> None:
    def phase(name: str, core: Device, prompts: int, dtype: str, *assumed) -> PhaseTime:
        cfg = config(
            model__dtype=dtype, exits__depths=[5, 10, 15, 20, 25], adapter__rank=32, rollout__max_num_seqs=prompts,
            rollout__max_new_tokens=assumed[1], rl__prompts_per_step=prompts, rl__group_size=1,
            rl__minibatches=1, rl__loss__advantage="none",
        )  # fmt: skip
        return make_plan(cfg, dims_of(SMOL), core, Assumptions(*assumed)).phases[name]

    core = dataclasses.replace(find_device("cpu"), tflops=0.46, fp32=0.23, bandwidth=36e9, cores=1)
    for (dtype, depth), speeds in ENGINE.items():
        for rows, measured in zip(IN_FLIGHT, speeds, strict=True):
            found = phase("rollouts", core, rows, dtype, 24, 64, depth)
            assert found.best < rows * 64 / measured < found.likely, (dtype, depth, rows)
    busy = dataclasses.replace(core, fp32=0.112)
    for depth, measured in LEARNER.items():
        found = phase("update", busy, 8, "float32", 1, 255, depth)
        assert found.best < measured < found.likely, depth
