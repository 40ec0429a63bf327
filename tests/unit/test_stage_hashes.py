"""Results that exist must be found again: the directories of every experiment's stages keep their names.

A changed hash means that everybody's finished stages of that experiment run once more. Where that is meant, because a
setting of the experiment changed, its row changes in the same commit. A new setting with a default that changes nothing
stays out of the identity until it is set (config/identity.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ee_megatron.config.config_paths import find_config_dir, list_groups
from ee_megatron.config.identity import STAGES, stage_dir, to_yaml
from ee_megatron.config.load import load, read_saved

# Per experiment the hashes of its stages, in their order. The model is not there, so default exits stay as asked for.
HASHES = {
    "demo_cpu": "4f379bd7 8be859b5 40b7871f e5d7a082 08cbed44 8373faf8",
    "demo_gpu": "4f379bd7 8be859b5 40b7871f e5d7a082 08cbed44 8373faf8",
    "externalise": "e5f39892 d61c72e7 69a625ae 17f496e3 39e656bd 850808b6",
    "ladder": "df53f41d 1099a345 2d25b37f ab53fee8 a9503910 b23fcda7",
    "rl_1.5b": "499842cd 897b6965 10e9272e d2dc8cbc ba052ecb 213874c2",
    "rl_32b": "499842cd 20643aa4 2b1b52d5 3d46b410 fa9d787d 2a04fd30",
    "rl_70b": "499842cd 20643aa4 893b9a69 1094f86c 5a7d744b 1f62a8d1",
    "rl_7b": "499842cd 20643aa4 7be09e7c 78ae0fa1 88bb1ea9 b09f22cc",
    "smollm2": "2a1a54b9 44e4ef86 6df2f3d9 1b651cf0 c07a1777 4b9f93d2",
    "speculate": "4f379bd7 f3455eba 689c181a b50a1646 d3de0362 d7218d62",
    "sums": "49aa6d65 d74e2606 60dd37f4 19e5d346 278fc500 433d98f5",
    "your_data": "7d29cc3e afdf526a fd3601ef e3a511d2 a86dac1f e3edab52",
}


# By the settings of an older version, the hashes that it gave all stages from `import-checkpoint` on.
OLDER = {
    "experiment=demo_cpu rl=long_answers":
        "90211f4d 4f379bd7 8be859b5 40b7871f e5d7a082 e783d8c1 eefa8138",
    "rl.credit=answer rl.kl=loss rl.beta=0.2 rl.advantage=grpo rl.clip=0.1 rl.clip_high=0.3 "
    "rl.loss_average=token rl.ratios=apart":
        "90211f4d 4f379bd7 6993436d ce0a0595 d74bfb07 37d72a4e 74121ca4",
    "rl.credit=exit rl.exit_task=0.3 rl.exit_kl=2 rl.exit_divergence=all":
        "90211f4d 4f379bd7 6993436d ce0a0595 d74bfb07 67b6eb49 d887e78f",
    "rl.lambda_exit=0.7 rl.lambda_warmup=0.1 rl.depth_cost=total rl.cost_length=7 rl.lambda_length=0.2 rl.charge=right":
        "90211f4d 4f379bd7 6993436d ce0a0595 d74bfb07 d8aa50cb 1007f320",
    "rl.accuracy_floor=2 rl.accuracy_window=5 rl.accuracy_samples=2 rl.lambda_rate=1":
        "90211f4d 4f379bd7 6993436d ce0a0595 d74bfb07 cfec3da5 8386a38c",
    "rl.importance=mask rl.importance_floor=0.4 rl.importance_cap=3":
        "90211f4d 4f379bd7 6993436d ce0a0595 d74bfb07 4d32e5ab 5c7d3bfc",
    "rl.epochs=1 deepspeed.weight_decay=0 rl.minibatches=2":
        "90211f4d 4f379bd7 6993436d ce0a0595 d74bfb07 8dfee1a8 a8817923",
    "rl.importance=none rl.overlong=filter rl.drop_equal_groups=true rl.kl_sum=true":
        "90211f4d 4f379bd7 6993436d ce0a0595 d74bfb07 90882f21 34a569bd",
    "calibrate.patterns=3 calibrate.keep=0.5 calibrate.settle=0.2 calibrate.reach=2 calibrate.depth_power=1":
        "90211f4d 4f379bd7 6993436d ce0a0595 41869018 3d654ec4 fddd0511",
    "evaluate.controls=true evaluate.control_policy=a/../b evaluate.externalisation=true "
    "evaluate.externalisation_prompts=7 task=hops evaluate.choice=all evaluate.choice_answers=20":
        "90211f4d 67560b39 96f94e91 8c4c1419 7af2ac50 d43a64a6 0b3ff75c",
    "evaluate.controls=true evaluate.externalisation=true task=hops evaluate.choice=reinforced":
        "90211f4d 67560b39 96f94e91 8c4c1419 7af2ac50 d43a64a6 4684ddfa",
    "pretrain.enabled=true pretrain.init=model pretrain.steps=3 pretrain.seed=2":
        "90211f4d ce2debbe 6afa7d8e e2c8027b 372b9dfe 4ea1171a 15318ff3",
    "teacher.enabled=false start=runs/x/../y rl.fixed_depth=3":
        "90211f4d 4f379bd7 b2fa6d8a f672ed90 1a21d8af ce11b5ca c0dd573c",
    "rollout.rows=3 rollout.max_staleness=1 rollout.sync_dtype=bfloat16 rollout.max_new_tokens=9 rollout.stop=[]":
        "90211f4d 4f379bd7 041c8e16 02b09f68 64574e15 0f0c41f8 2dfeb42f",
    "task=dataset task.path=no/such task.question_column=q task.choices_column=c":
        "90211f4d 80a0ff58 ce593b5d cfa50623 9af9873f 78573ff0 e59b9681",
    "exits.depths=[2,4] exits.gate_width=0.5 exits.gate_input=raw exits.first_token=true adapter.full=true "
    "adapter.rank=4":
        "90211f4d 4f379bd7 5bf076dc 9a6866e7 7e591f1a cbd6e930 fa6f8368",
    "deepspeed.gradient_clipping=0.5 deepspeed.eps=1e-6 deepspeed=zero2":
        "90211f4d 23c9a884 34cdc6b0 82d18735 7acee828 881a052c df600f83",
    "model.checkpoint=a/b model.dtype=float32":
        "a44dd9bc 14d88d95 7780623b 3e18adfd d7a6640f a54c8356 2d17ec58",
    "calibrate.seed=3 rl.seed=4 rl.decay=cosine rl.gate_centre=0.7":
        "90211f4d 4f379bd7 6993436d ce0a0595 c33d84a2 b4c5fb99 c0c63c50",
    "experiment=ladder adapter.rank=4 rl=long_answers rl.accuracy_window=2 rl.exit_divergence=all":
        "c0f49de8 df53f41d 5ff0b948 88e43ea9 9d2e9646 bcffc494 c58da0c1",
    "experiment=ladder task=hops rl=paper evaluate.controls=true evaluate.choice=all evaluate.choice_answers=8":
        "c0f49de8 227d56e8 94f2c109 e2f16886 79b27496 ab1aaa89 2d810cc5",
    "experiment=externalise rl.fixed_depth=6 rl.depth_cost=mean rl.lambda_exit=0 evaluate.choice=all":
        "c0f49de8 e5f39892 d61c72e7 69a625ae 17f496e3 f68acaff f9e01611",
}  # fmt: skip


def test_every_experiment_is_pinned() -> None:
    assert sorted(HASHES) == list_groups(find_config_dir())["experiment"]


@pytest.mark.parametrize("experiment", HASHES)
def test_stage_directories_keep_their_names(experiment: str) -> None:
    cfg = load([f"experiment={experiment}", "model.path=no/such/model", "name=pinned"])
    # No experiment starts from a Megatron checkpoint.
    stages = [stage for stage in STAGES if stage != "import-checkpoint"]
    assert [stage_dir(cfg, stage).name for stage in stages] == [
        f"{stage}-{digest}" for stage, digest in zip(stages, HASHES[experiment].split(), strict=True)
    ]


@pytest.mark.parametrize("settings", OLDER)
def test_settings_by_their_older_names_find_their_results(settings: str, tmp_path: Path) -> None:
    """From a command line, and as a stage has saved them."""
    cfg = load([*settings.split(), "model.path=no/such/model", "name=pinned"])
    first = ("imported", *list(STAGES)[1:])
    assert [stage_dir(cfg, stage).name for stage in STAGES] == [
        f"{name}-{digest}" for name, digest in zip(first, OLDER[settings].split(), strict=True)
    ]
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert read_saved(tmp_path / "config.yaml") == cfg


def test_a_setting_that_came_later_names_results_only_where_it_is_set() -> None:
    cfg = load(["experiment=demo_cpu", "model.path=no/such/model", "name=pinned"])
    before = {stage: stage_dir(cfg, stage) for stage in STAGES}
    cfg.rl.loss.ratios = "apart"
    assert {stage for stage in STAGES if stage_dir(cfg, stage) != before[stage]} == {"rl", "evaluate"}
