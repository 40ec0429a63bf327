"""Which problems the teacher answers for calibration."""

from pathlib import Path

import pytest

from ee_megatron.config.load import load
from ee_megatron.tasks import task_of
from ee_megatron.training.traces import problems


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_wide_operands_add_pairs_that_no_split_holds_out(share):
    cfg = load(["experiment=smollm2", "task.train=500", "traces.problems=300", f"traces.wide_operands={share}"])
    task = task_of(cfg, Path(cfg.model.path))
    chosen = problems(cfg, Path(cfg.model.path), task)
    wide = round(share * 300)
    assert len(chosen) == 300 == len({p.id for p in chosen}) == len({p.text for p in chosen})
    assert chosen[: 300 - wide] == task.prompts("train")[: 300 - wide]
    known = pairs(task.prompts("train"))
    held_out = pairs([*task.prompts("validation"), *task.prompts("evaluation")])
    assert not held_out & pairs(chosen)
    assert len(pairs(chosen) - known) > wide / 2 if wide else pairs(chosen) <= known


def pairs(prompts):
    return {pair for prompt in prompts for pair in prompt.group.split(";")}
