"""Results that exist must be found again: the directories of every experiment's stages keep their names.

A changed hash means that everybody's finished stages of that experiment run once more. Where that is meant, because a
setting of the experiment changed, its row changes in the same commit. A new setting with a default that changes nothing
stays out of the identity until it is set (config/identity.py).
"""

from __future__ import annotations

import pytest

from ee_megatron.config.identity import STAGES, stage_dir
from ee_megatron.config.load import load
from ee_megatron.config.shipped import find_config_dir, list_groups

# Per experiment the hashes of its stages, in their order. The model is not there, so default exits stay as asked for.
HASHES = {
    "demo_cpu": "4f379bd7 8be859b5 40b7871f e5d7a082 08cbed44 8373faf8",
    "demo_gpu": "4f379bd7 8be859b5 40b7871f e5d7a082 08cbed44 8373faf8",
    "externalise": "e5f39892 d61c72e7 69a625ae 17f496e3 39e656bd 850808b6",
    "ladder": "df53f41d 1099a345 2d25b37f ab53fee8 a9503910 b23fcda7",
    "rl_1.5b": "499842cd 897b6965 10e9272e d2dc8cbc ba052ecb 213874c2",
    "rl_32b": "499842cd 20643aa4 2b1b52d5 3d46b410 089e6aba eac8b22c",
    "rl_70b": "499842cd 20643aa4 893b9a69 1094f86c e8ada09d 57f8980c",
    "rl_7b": "499842cd 20643aa4 7be09e7c 78ae0fa1 869e1d24 145e8e94",
    "smollm2": "2a1a54b9 44e4ef86 6df2f3d9 1b651cf0 c07a1777 4b9f93d2",
    "sums": "49aa6d65 d74e2606 60dd37f4 19e5d346 278fc500 433d98f5",
    "your_data": "7d29cc3e afdf526a fd3601ef e3a511d2 a86dac1f e3edab52",
}


def test_every_experiment_is_pinned() -> None:
    assert sorted(HASHES) == list_groups(find_config_dir())["experiment"]


@pytest.mark.parametrize("experiment", HASHES)
def test_stage_directories_keep_their_names(experiment: str) -> None:
    cfg = load([f"experiment={experiment}", "model.path=no/such/model", "name=pinned"])
    # No experiment starts from a Megatron checkpoint.
    stages = [stage for stage in STAGES if stage != "imported"]
    assert [stage_dir(cfg, stage).name for stage in stages] == [
        f"{stage}-{digest}" for stage, digest in zip(stages, HASHES[experiment].split(), strict=True)
    ]


def test_a_setting_that_came_later_names_results_only_where_it_is_set() -> None:
    cfg = load(["experiment=demo_cpu", "model.path=no/such/model", "name=pinned"])
    before = {stage: stage_dir(cfg, stage) for stage in STAGES}
    cfg.rl.surrogate = "another"
    assert {stage for stage in STAGES if stage_dir(cfg, stage) != before[stage]} == {"rl", "evaluate"}
