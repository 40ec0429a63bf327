"""A run that starts from a Megatron checkpoint: what is imported, what is refused before anything starts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_convert_foreign import foreign, hashes, run

from ee_megatron.config.faults import faults_of
from ee_megatron.config.identity import stage_dir, stage_order
from ee_megatron.config.load import attempt, load
from ee_megatron.sweeps.measured import imported
from ee_megatron.training import stages
from ee_megatron.training.imported import import_model
from ee_megatron.training.launch import run_stage
from ee_megatron.training.preflight import Preflight


def settings(tmp: Path, base: Path, checkpoint: Path, *more: str) -> list[str]:
    given = [f"model.path={base}", f"model.checkpoint={checkpoint}", f"runs={tmp / 'runs'}", "name=from", *more]
    return [*given, "teacher.enabled=false", "exits.depths=[1]", "device=cpu", "task=arithmetic"]


def shape_of(base: Path, tmp: Path) -> Path:
    """config.json and tokenizer alone, as somebody has them whose weights are Megatron's."""
    (tmp / "shape").mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, tmp / "shape" / file.name)
    assert not list((tmp / "shape").glob("*.safetensors"))
    return tmp / "shape"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The model, its shape alone, and what Megatron-LM saved of it after ten updates of 4 sequences to 64 positions."""
    base, saved = foreign(tmp_path)
    common = saved / "iter_0000010" / "common.pt"
    state = torch.load(common, weights_only=False)
    state["iteration"], state["args"].consumed_train_samples, state["args"].seq_length = 10, 40, 64
    torch.save(state, common)
    return base, shape_of(base, tmp_path), saved


def test_the_model_is_the_checkpoints_to_the_bit_and_others_start_from_it(tmp_path, made):
    base, shape, saved = made
    given = settings(tmp_path, shape, saved)
    cfg = load(given)
    assert stage_order(cfg)[:2] == ["imported", "traces"]
    with pytest.raises(FileNotFoundError, match="`ee-megatron imported`"):
        stages.base_model(cfg)
    run_stage("imported", cfg, given)
    model = stages.base_model(cfg)
    assert model == stage_dir(cfg, "imported") / "model" and hashes(model) == hashes(base)
    assert (model / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    figures = json.loads((stage_dir(cfg, "imported") / "imported.json").read_text())
    assert figures == {"iteration": 10, "tokens": 10 * 4 * 64}
    assert imported(figures) == {"iteration": 10, "tokens_pretrain": 2560}
    # Gone from where it was: what has been imported is enough.
    shutil.rmtree(saved)
    assert not Preflight().faults(attempt(given), ["imported", "traces"])


def test_a_stage_that_ended_behind_the_model_goes_on_from_there(tmp_path, made, monkeypatch):
    base, shape, saved = made
    cfg = load(settings(tmp_path, shape, saved))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ee_megatron.checkpoint.megatron_settings.trained_for", killed)
        with pytest.raises(KeyboardInterrupt):
            import_model(cfg)
    assert not stages.is_done(cfg, "imported")
    written = (stage_dir(cfg, "imported") / "model" / "config.json").stat().st_mtime_ns
    model = import_model(cfg)
    assert stages.is_done(cfg, "imported") and hashes(model) == hashes(base)
    assert (model / "config.json").stat().st_mtime_ns == written


def test_only_runs_that_name_a_checkpoint_are_named_after_it(tmp_path, made):
    _, shape, saved = made
    plain = load([text for text in settings(tmp_path, shape, saved) if "checkpoint" not in text])
    named, other = (load(settings(tmp_path, shape, path)) for path in (saved, saved / "iter_0000010"))
    assert "imported" not in stage_order(plain)
    for stage in ("traces", "evaluate"):
        assert len({stage_dir(cfg, stage) for cfg in (plain, named, other)}) == 3


def without_tokenizer(base: Path, saved: Path, tmp: Path) -> None:
    for file in base.glob("tokenizer.*"):
        file.unlink()


def other_shape(base: Path, saved: Path, tmp: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def gone(base: Path, saved: Path, tmp: Path) -> None:
    shutil.rmtree(saved)


def with_gates(base: Path, saved: Path, tmp: Path) -> None:
    shutil.rmtree(saved)
    assert run("import", "--hf", tmp / "base", "--out", saved, "--exit-depths", "1") == 0


def ours_of_another_shape(base: Path, saved: Path, tmp: Path) -> None:
    shutil.rmtree(saved)
    assert run("import", "--hf", tmp / "base", "--out", saved) == 0
    other_shape(base, saved, tmp)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without_tokenizer, "tokenizer.*model\\.checkpoint"),
        (other_shape, "norm_epsilon=1e-06.*0\\.5.*model\\.path"),
        (gone, "saved"),
        (with_gates, "gates.*model\\.path"),
        (ours_of_another_shape, "shape.*config\\.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_a_line_before_anything_starts(tmp_path, made, harm, message):
    _, shape, saved = made
    harm(shape, saved, tmp_path)
    given = settings(tmp_path, shape, saved)
    (found,) = Preflight().faults(attempt(given), ["imported", "traces"])
    (said,) = faults_of(lambda: import_model(load(given)))
    assert found == said and "\n" not in said
    assert re.search(message, said)
    assert not list((tmp_path / "runs").rglob("model*"))


def test_ours_is_taken_as_it_is_too(tmp_path, made):
    base, shape, _ = made
    assert run("import", "--hf", base, "--out", tmp_path / "ours", "--tp", "2") == 0
    cfg = load(settings(tmp_path, shape, tmp_path / "ours"))
    assert hashes(import_model(cfg)) == hashes(base)
    # What wasn't trained there has no number of updates.
    assert json.loads((stage_dir(cfg, "imported") / "imported.json").read_text()) == {}


def test_the_stage_without_a_checkpoint_says_what_is_missing(tmp_path, made):
    base, _, _ = made
    given = [text for text in settings(tmp_path, base, base) if "checkpoint" not in text]
    (said,) = Preflight().faults(attempt(given), ["imported"], inputs=True)
    assert said.startswith("model.checkpoint")


def test_two_models_to_start_from_are_a_contradiction(tmp_path, made):
    _, shape, saved = made
    (said,) = Preflight().faults(attempt(settings(tmp_path, shape, saved, "pretrain.enabled=true")), ["imported"])
    assert "model.checkpoint" in said and "pretrain.enabled" in said
