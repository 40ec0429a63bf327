"""What a stage says of itself: which data it was made from, and that it is finished only if it has not diverged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ee_megatron.config.identity import digest, recorded, stage_dir
from ee_megatron.config.load import load
from ee_megatron.training.context import StageContext
from tests.tiny import tiny_hf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("llama", tmp_path_factory.mktemp("end") / "model")


def settings(model: Path, tmp_path: Path, *more: str):
    return load(["name=x", f"model.path={model}", f"runs={tmp_path / 'runs'}", "device=cpu", "tracker=disabled", *more])


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({"reward": float("nan")}, "rl.*reward.*step 2"),
        ({"loss": float("inf")}, "rl.*loss.*step 2"),
        ({"reward": 0.5, "kl": float("nan")}, ""),
    ],
)
def test_a_diverged_run_is_no_finished_one(last: dict, says: str, model: Path, tmp_path: Path) -> None:
    cfg = settings(model, tmp_path)
    for resumed in (None, 2):
        with StageContext(cfg, "rl", model, learner=False) as context:
            context.open_metrics(resume_step=resumed)
            if resumed is None:
                context.log(1, {"reward": 0.1})
                context.log(2, last)
            if says:
                with pytest.raises(RuntimeError, match=says):
                    context.finish()
            else:
                context.finish()
        # Going on after the last step changes nothing.
        assert (context.path / "DONE").exists() == (not says)


def test_the_last_update_has_to_be_one(model: Path, tmp_path: Path) -> None:
    with StageContext(settings(model, tmp_path), "calibrate", model, learner=False) as context:
        context.bad_steps = 1
        with pytest.raises(RuntimeError, match="gradient"):
            context.finish()
        context.bad_steps = 0
        context.finish()


def test_a_stage_records_its_data_and_another_data_set_has_another_directory(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "1?", "answer": "1"}) + "\n")
    cfg = settings(model, tmp_path, "task=dataset", f"task.path={data}")
    with StageContext(cfg, "traces", model, learner=False) as context:
        context.finish()
    first, made_from = context.path, digest(str(data))
    assert recorded(first) == made_from and (stage_dir(cfg, "traces") / "DONE").is_file()
    data.write_text(json.dumps({"question": "2?", "answer": "2"}) + "\n")
    assert not stage_dir(cfg, "traces").exists()
    with StageContext(cfg, "traces", model, learner=False) as context:
        context.finish()
    assert context.path != first and recorded(context.path) == digest(str(data)) != made_from == recorded(first)
