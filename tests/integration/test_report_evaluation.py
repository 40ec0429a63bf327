"""From a model's evaluation to its page in a browser: the stage as it is, two policies on tiny weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from report_browser import EXECUTABLE, Browser, barriers, drawn

from ee_megatron.config.derive import policy_spec
from ee_megatron.config.identity import stage_dir
from ee_megatron.config.load import load
from ee_megatron.config.schema import RunConfig
from ee_megatron.exit_rules import Sample
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.observe.rundir import DONE, RunDirectory
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy, save_policy
from ee_megatron.report.page import report_run
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.tasks import make_task
from ee_megatron.training.evaluate import evaluate
from ee_megatron.training.serialization import keep_samples, sampled_steps
from ee_megatron.types import Group
from tests.tiny import tiny_hf

pytestmark = [
    pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
    pytest.mark.timeout(600),
]
PROBLEMS, LABELS = 24, ("calibrated, hazard > 0.5", "reinforced, hazard > 0.5")
SETTINGS = [
    "experiment=demo_cpu", "name=tiny", "model.dtype=float32", "parallel.data=1", "exits.depths=[2,4]",
    "adapter.rank=4", "teacher=null", "task.validation=4", f"task.evaluation={PROBLEMS}", "rl.steps=3",
    "rollout.backend=local", "rollout.threads=1", "rollout.max_new_tokens=24", "evaluate.thresholds=[0.5]",
    "evaluate.answers=3", "tracker.wandb=disabled",
]  # fmt: skip


def policies(spec: PolicySpec, model: Path) -> list[dict[str, torch.Tensor]]:
    """Adapters that change the model, and gates that fire on some positions; then the same a little further on."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = initial_policy(HFDirectory(model).dims, spec, seed=1)
    tensors = {name: t + 3.5 if name.endswith("fc2.bias") else t for name, t in tensors.items()}
    found = []
    for size in (0.1, 0.03):
        tensors = {name: t + size * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
        found.append(tensors)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two stages' policies on disk, the second's rollouts as RL keeps them, both evaluated by the stage itself."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = tiny_hf("llama", folder / "model")
    cfg = load([*SETTINGS, f"model.path={model}", f"runs={folder / 'runs'}"])
    spec = policy_spec(cfg, HFDirectory(model).dims)
    pool = LocalPool(model, spec, rows=8, threads=1)
    for tensors, stage in zip(policies(spec, model), ("calibrate", "rl"), strict=True):
        with RunDirectory(stage_dir(cfg, stage)) as directory:
            with directory.write_checkpoint(1) as path:
                save_policy(path, spec, tensors)
            if stage == "rl":
                pool.load(WeightSet(1, tensors))
                keep(directory, pool, sorted(sampled_steps(cfg.rl.steps)))
            directory.write_atomic(DONE, "\n")
    evaluate(cfg, model)
    return cfg


def keep(directory: RunDirectory, pool: LocalPool, steps: list[int]) -> None:
    prompts = make_task(load(SETTINGS).task).prompts("train")[:4]
    for step in steps:
        made = pool.generate(GenerationRequest(prompts, 2, SamplingParams(1.0, 12, ("\n",)), Sample(), step))
        groups = [Group(p, r, *torch.zeros(3, 2).numpy()) for p, r in zip(prompts, made, strict=True)]
        keep_samples(directory, step, groups, lambda token: str(pool.tokenizer.decode([token])))


@pytest.fixture(scope="module")
def page(run: RunConfig) -> Path:
    return report_run(run)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"), deadline=120)
    yield found
    found.close()


def test_it_draws_and_bars_nobody(browser: Browser, page: Path) -> None:
    drawn(browser, page, 390, False)
    assert barriers(browser, page, 390, False) == []
    drawn(browser, page, 1366, True)
    assert barriers(browser, page, 1366, True) == []
    count = str(browser.evaluate("document.getElementById('d-count').textContent"))
    assert count == f"{PROBLEMS} of {PROBLEMS} problems; 1 to 10 below"


def test_rollouts_stand_by_step_and_the_verdict_has_the_policies_figures(page: Path, run: RunConfig) -> None:
    text = page.read_text()
    for step in (1, 2, 3):
        assert f"<summary>step {step}</summary>" in text
    kept = json.loads((stage_dir(run, "rl") / "samples" / "step_2.json").read_text())["rollouts"]
    assert len(kept) == 3 and all(len(r["tokens"]) > 1 and r["left_out"] == 0 for r in kept)
    results = json.loads((stage_dir(run, "evaluate") / "results.json").read_text())
    reinforced = {c["against"]: c for c in results["compared"].values() if c["model"] == LABELS[1]}
    assert list(reinforced) == [LABELS[0], "teacher, full depth", "reinforced, full depth"]
    found = reinforced[LABELS[0]]
    assert found["n"] == PROBLEMS
    rows = {f"{row['model']}, {row['exits']}": row for row in results["rows"]}
    depth = rows[LABELS[1]]["mean_depth"] - rows[LABELS[0]]["mean_depth"]
    assert found["depth"]["value"] == pytest.approx(depth) and found["depth"]["low"] <= depth <= found["depth"]["high"]
    assert f"{depth:+.3f}" in text and f"[{found['depth']['low']:+.3f}, {found['depth']['high']:+.3f}]" in text
    assert "ee-megatron run experiment=demo_cpu" in text and "name=tiny" in text
