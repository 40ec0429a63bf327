"""Which problems the teacher answers for calibration, and RL."""

import shutil
from pathlib import Path

import pytest

from ee_megatron.config.identity import stage_dir, to_yaml
from ee_megatron.config.load import load, read_saved, settings_of
from ee_megatron.config.validate import validate
from ee_megatron.tasks import task_of
from ee_megatron.training.collect import training_problems, wide_problems, wider_problems
from tests.tiny import tiny_hf


@pytest.mark.parametrize("limit", [None, 300])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_wide_operands_add_pairs_that_no_split_holds_out(share, limit):
    cfg = load(["experiment=smollm2", "task.train=500"])
    task = task_of(cfg, Path(cfg.model.path))
    own = task.prompts("train")
    chosen = training_problems(cfg, Path(cfg.model.path), task, share, limit)
    wide = [p for p in chosen if p.id.endswith("/wide")]
    assert chosen == [*own[: len(chosen) - len(wide)], *wide]
    assert len(wide) == round(share * len(chosen))
    assert len(chosen) == limit or limit is None
    assert len({p.id for p in chosen}) == len(chosen) == len({p.text for p in chosen})
    known, held_out = pairs(own), pairs([*task.prompts("validation"), *task.prompts("evaluation")])
    assert not held_out & pairs(chosen)
    assert len(pairs(chosen) - known) > len(wide) / 2 if wide else pairs(chosen) <= known


def test_validation_on_wide_operands_has_pairs_that_no_other_split_has():
    cfg = load(["experiment=smollm2", "task.train=500", "task.validation=300"])
    task = task_of(cfg, Path(cfg.model.path))
    own = task.prompts("validation")
    wide = wider_problems(cfg, Path(cfg.model.path), task, "validation")
    assert 280 < len(wide) <= 300 and not {p.text for p in own} & {p.text for p in wide}
    assert len(pairs(wide) - pairs(own)) > 100
    assert not pairs(wide) & pairs([*task.prompts("train"), *task.prompts("evaluation")])


def test_what_is_measured_on_wide_operands_shares_no_pair_with_what_is_trained_or_chosen_on():
    cfg = load(["experiment=smollm2", "evaluate.wide_problems=200", "evaluate.wide_test=300"])
    model = Path(cfg.model.path)
    task = task_of(cfg, model)
    measured, own = wide_problems(cfg, model, task, "evaluation"), task.prompts("evaluation")
    assert 250 < len(measured) <= 300 and not {p.text for p in own} & {p.text for p in measured}
    assert len(pairs(measured) - pairs(own)) > 80
    trained = training_problems(cfg, model, task, 0.5)
    assert not pairs(measured) & pairs(
        [*trained, *wide_problems(cfg, model, task, "validation"), *task.prompts("validation")]
    )
    cfg.evaluate.wide_test = 0
    assert wide_problems(cfg, model, task, "evaluation") == []


def test_without_a_limit_all_of_the_scarcer_kind_are_used():
    cfg = load(["experiment=smollm2", "task.train=500"])
    task = task_of(cfg, Path(cfg.model.path))
    chosen = training_problems(cfg, Path(cfg.model.path), task, 0.2)
    assert chosen[:500] == task.prompts("train") and len(chosen) == 625


@pytest.mark.parametrize("thinks", [True, False])
def test_thinking_is_switched_by_a_setting_that_stages_are_named_by(tmp_path, thinks):
    path = tiny_hf("qwen3", tmp_path)
    shutil.copy(Path(__file__).parents[1] / "qwen3.jinja", path / "chat_template.jinja")

    def configured(variables: str):
        given = ["experiment=demo_cpu", f"model.path={path}", "rollout.prompt_template=chat"]
        cfg = load([*given, f"rollout.chat_template_kwargs={variables}"])
        validate(cfg, None)
        assert settings_of(cfg) is not None and load(settings_of(cfg)) == cfg
        (tmp_path / "saved.yaml").write_text(to_yaml(cfg))
        assert read_saved(tmp_path / "saved.yaml") == cfg
        return cfg

    cfg, plain = configured(f"{{enable_thinking:{str(thinks).lower()}}}"), configured("{}")
    begun = task_of(plain, path).prompts("train")[0].text
    assert begun.endswith("<|im_start|>assistant\n")
    assert task_of(cfg, path).prompts("train")[0].text == begun + ("" if thinks else "<think>\n\n</think>\n\n")
    for stage in ("teacher", "rl", "evaluate"):
        assert stage_dir(cfg, stage) != stage_dir(plain, stage)
    for wrong in ("enable_thinkin", "messages"):
        with pytest.raises(ValueError, match=f"rollout.chat_template_kwargs.* {wrong}"):
            task_of(configured(f"{{{wrong}:false}}"), path)


def pairs(prompts):
    return {pair for prompt in prompts for pair in prompt.group.split(";")}
