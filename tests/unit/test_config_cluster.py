"""Who runs where in a job, for every split of its nodes."""

from __future__ import annotations

import pytest

from ee_megatron.config.cluster import JobShape, job_shape, seats, verifier_workers
from ee_megatron.config.load import load
from ee_megatron.config.validate import validate

EIGHT = ("cluster.gpus_per_node=8",)
EIGHT_RANKS = ("parallel=tp2_pp2", "parallel.data=2")


def shape(stage: str, *overrides: str) -> JobShape:
    cfg = load(["name=x", "model.path=nowhere", *overrides])
    validate(cfg, None)
    return job_shape(cfg, stage)


@pytest.mark.parametrize(
    ("experiment", "nodes", "learner_nodes", "ranks", "actors_per_node"),
    [("rl_7b", 2, 1, 8, 8), ("rl_70b", 5, 4, 32, 2)],
)
def test_the_cluster_runs_learn_on_the_first_nodes_and_generate_on_the_last(
    experiment: str, nodes: int, learner_nodes: int, ranks: int, actors_per_node: int
) -> None:
    found = job_shape(load([f"experiment={experiment}"]), "rl")
    assert found == JobShape(nodes, learner_nodes, ranks, 8, 1, actors_per_node, first_device=0, gpus_per_node=8)
    assert not found.shares_devices


def test_actors_of_several_devices_get_those_behind_the_ranks() -> None:
    behind = shape("rl", *EIGHT, "rollout=vllm", "parallel=tp2_pp2", "rollout.vllm.tensor=2", "rollout.actors=2")
    assert (behind.first_device, behind.actors_per_node, behind.shares_devices) == (4, 2, False)


def test_stages_take_only_the_nodes_that_they_use() -> None:
    nodes = ("cluster.nodes=5", "cluster.rollout_nodes=3", *EIGHT, "parallel.data=16", "rollout.actors=24")
    calibrate, traces = shape("calibrate", *nodes), shape("traces", *nodes)
    assert (calibrate.nodes, calibrate.learner_nodes, calibrate.rollout_nodes) == (2, 2, 0)
    assert (traces.nodes, traces.ranks, traces.rollout_nodes, traces.actors_per_node) == (3, 1, 3, 8)
    assert shape("rl", *nodes).nodes == 5
    # Recorded rollouts need no actors.


def test_actors_beside_the_ranks_get_the_devices_behind_them_where_there_are_enough() -> None:
    half = shape("rl", *EIGHT, "parallel=tp2_pp2", "rollout.actors=4")
    assert (half.nodes, half.rollout_nodes, half.first_device, half.shares_devices) == (1, 1, 4, False)
    full = shape("rl", *EIGHT, *EIGHT_RANKS, "rollout.actors=8")
    assert (full.first_device, full.shares_devices) == (0, True)
    packed = shape("rl", *EIGHT, "parallel=tp2_pp2", "rollout.actors=8", "rollout.device_share=0.5")
    assert packed.first_device == 4


def test_ranks_spread_evenly_over_the_learner_nodes() -> None:
    spread = shape("rl", "cluster.nodes=3", *EIGHT, "parallel.data=16", "rollout.actors=3")
    assert (spread.learner_nodes, spread.ranks_per_node, spread.first_device) == (3, 6, 6)
    single = shape("rl", "cluster.nodes=2", *EIGHT, "rollout.actors=2")
    assert (single.learner_nodes, single.ranks_per_node, single.rollout_nodes) == (1, 1, 2)


def test_a_cluster_without_gpus_has_nothing_to_share() -> None:
    cpu = shape("rl", "cluster.nodes=2", "cluster.rollout_nodes=1", "rollout.actors=3")
    assert (cpu.nodes, cpu.actors_per_node, cpu.shares_devices) == (2, 3, False)


@pytest.mark.parametrize(
    ("devices", "share", "expected"), [(8, 1.0, 8), (8, 0.5, 16), (4, 0.3333333333, 12), (8, 3.0, 2), (0, 1.0, 0)]
)
def test_seats(devices: int, share: float, expected: int) -> None:
    assert seats(devices, share) == expected


@pytest.mark.parametrize(
    ("stage", "overrides", "device", "environment", "cores", "expected"),
    [
        # All that a node's processes share: 4 ranks and an actor of 2 threads, which is the GPU's on a GPU.
        ("rl", ["parallel.data=4"], "cpu", {"LOCAL_WORLD_SIZE": "4"}, 16, 10),
        ("rl", ["parallel.data=4"], "cuda", {"LOCAL_WORLD_SIZE": "4"}, 16, 11),
        ("rl", ["parallel.data=4", "rollout=local"], "cpu", {"LOCAL_WORLD_SIZE": "4"}, 16, 12),
        ("rl", ["parallel.data=4"], "cpu", {"LOCAL_WORLD_SIZE": "4"}, 2, 1),
        ("traces", ["rollout.actors=3"], "cpu", {}, 16, 9),
        ("rl", ["cluster.nodes=2", "cluster.rollout_nodes=1", "rollout.actors=8"], "cpu", {}, 9, 8),
        # Cores of its own, as srun binds them.
        ("rl", ["parallel.data=8"], "cuda", {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "8"}, 8, 7),
        ("rl", ["parallel.data=8"], "cuda", {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "8"}, 64, 16),
    ],
)  # fmt: skip
def test_verifiers_take_the_cores_that_ranks_and_actors_leave(
    stage: str, overrides: list[str], device: str, environment: dict[str, str], cores: int, expected: int
) -> None:
    cfg = load(["name=x", "model.path=nowhere", *overrides])
    assert verifier_workers(cfg, stage, device, environment, cores) == expected
