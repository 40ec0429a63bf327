"""The evaluation stage on a model that learnt a task with a choice: its answers are sampled, and styles are forced."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ee_megatron.config.derive import policy_spec
from ee_megatron.config.identity import stage_dir
from ee_megatron.config.load import load
from ee_megatron.config.schema import RunConfig
from ee_megatron.evaluation.choice import ChoiceBench, by_family, cycled
from ee_megatron.exit_rules import Off
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import initial_policy, save_policy
from ee_megatron.report.page import report_run
from ee_megatron.report.results import Results
from ee_megatron.rollout import LocalPool, SamplingParams
from ee_megatron.tasks import VerifierPool
from ee_megatron.tasks.chains import HopsTask
from ee_megatron.training import stages
from ee_megatron.training.evaluate import evaluate
from tests.covering import EXTENDED, SLOW
from tests.processes import ee_megatron

pytestmark = EXTENDED

ROOT = Path(__file__).parents[2]
STYLES = ["terse", "steps", "padded"]
LAYERS, DEPTHS, ANSWERS = 3, [1, 2], 40
# Of one hop there are more answers than problems. The gates of a policy that nobody trained are nearly shut; the centre
# opens them half.
SETTINGS = [
    "name=hops", "device=cpu", "model.dtype=float32", "task=hops", "task.families=[hop1,hop3]", "task.train=4000",
    "task.validation=10", "task.evaluation=60", "pretrain=true", "pretrain.steps=120",
    "pretrain.batch_size=64", "teacher=null", f"exits.depths={DEPTHS}", "adapter.rank=4", "rl.steps=1",
    "rl.prompts_per_step=2", "rl.group_size=2", "rl.gate_centre=0.018", "rollout.backend=local", "rollout.threads=1",
    "rollout.max_new_tokens=8", "evaluate.thresholds=[0.5]", "evaluate.answers=2",
    "tracker.wandb=disabled",
]  # fmt: skip


def run(stage: str, settings: list[str]) -> None:
    done = ee_megatron(stage, *settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Those under which a model has been pretrained and reinforced, from a policy that was never calibrated."""
    folder = tmp_path_factory.mktemp("hops")
    (folder / "model").mkdir()
    for file in (ROOT / "configs" / "hops").iterdir():
        (folder / "model" / file.name).write_text(file.read_text())
    shape = json.loads((folder / "model" / "config.json").read_text())
    shape |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    (folder / "model" / "config.json").write_text(json.dumps(shape))
    made = [*SETTINGS, f"model.path={folder / 'model'}", f"runs={folder / 'runs'}", f"init_policy={folder / 'start'}"]
    run("pretrain", made)
    cfg = load(made)
    dims = HFDirectory(stages.base_model(cfg)).dims
    spec = policy_spec(cfg, dims)
    (folder / "start").mkdir()
    save_policy(folder / "start", spec, initial_policy(dims, spec, seed=0))
    run("rl", made)
    return made


def evaluated(settings: list[str], *extra: str) -> tuple[RunConfig, dict]:
    """The stage in this process -> its configuration, its results' part."""
    cfg = load([*settings, *extra])
    evaluate(cfg, stages.base_model(cfg))
    return cfg, json.loads((stage_dir(cfg, "evaluate") / "results.json").read_text())["choice"]


@pytest.mark.timeout(600)
def test_every_model_is_measured_and_the_results_read_back(settings, capsys):
    cfg, found = evaluated(settings, "evaluate.style_choice.models=all", f"evaluate.style_choice.answers={ANSWERS}")
    assert (found["styles"], found["num_layers"], found["answers_per_family"]) == (STYLES, LAYERS, ANSWERS)
    assert found["weights"] == pytest.approx([0.4, 0.4, 0.2]) and found["tokens_per_step"] == 1
    exits = {"teacher": "full depth", "start": "sampled", "reinforced": "sampled"}
    assert {model: of["exits"] for model, of in found["models"].items()} == exits
    for model, of in found["models"].items():
        assert [(f, e["hops"]) for f, e in of["families"].items()] == [("hop1", 1), ("hop3", 3)]
        for family, entry in of["families"].items():
            shares = entry["free"]["share"]
            assert list(shares) == [*STYLES, "other"] and sum(shares.values()) == pytest.approx(1)
            # Greedily, one style alone would be written: what comes first doesn't depend on the problem.
            assert all(shares[style] > 0 for style in STYLES), (model, family, shares)
            parts = [entry["free"], *entry["forced"].values(), *entry["forced_full"].values()]
            assert all(figures["n"] == ANSWERS for figures in parts)
            assert all(figures["max_depth"] == 1 for figures in entry["forced_full"].values())
            assert ("fixed" in entry) == (model == "start")
            for depth, styles in entry.get("fixed", {}).items():
                # The first token's depth is no choice.
                assert all(figures["max_depth"] == pytest.approx(int(depth) / LAYERS) for figures in styles.values())
            wrong = entry["corrupted"]
            assert (wrong is None) == (family == "hop1")
            assert wrong is None or (wrong["n"] == ANSWERS and wrong["correct"] + wrong["followed"] <= 1)
    start = found["models"]["start"]["families"]
    assert list(start["hop1"]["fixed"]) == ["1", "2", "3"]
    assert 1 / LAYERS < start["hop1"]["free"]["max_depth"] < 1, "gates half open leave at every depth"
    data = json.loads((stage_dir(cfg, "evaluate") / "results.json").read_text())
    assert Results.from_json(data).choice == found
    assert len(data["rows"]) == 7, "the rest is there as ever"
    assert f"{start['hop3']['free']['total_depth']:.3f}" in capsys.readouterr().out
    page = report_run(cfg).read_text()
    assert "Choice of style" in page and f"{start['hop3']['free']['total_depth']:.3f}" in page


@SLOW
@pytest.mark.timeout(600)
def test_under_a_fixed_depth_every_answer_is_sampled_at_it(settings):
    """These settings have no reinforced policy: the last is the one that RL would start from."""
    for depth, label, first in ((2, "fixed 2", True), (3, "full depth", False)):
        extra = (
            f"rl.fixed_depth={depth}",
            "evaluate.style_choice.models=reinforced",
            "evaluate.style_choice.answers=8",
        )
        _, found = evaluated(settings, *extra, f"exits.first_token={first}", "rl.families=[hop3]")
        (start,) = found["models"].values()
        assert list(found["models"]) == ["start"] and start["exits"] == label
        assert list(start["families"]) == ["hop3"], "the families that RL answers"
        (entry,) = start["families"].values()
        for figures in (entry["free"], *entry["forced"].values()):
            # Both, so that the first token is at that depth, too.
            assert figures["max_depth"] == figures["mean_depth"] == pytest.approx(depth / LAYERS)
        assert entry["fixed"]["3"] == entry["forced_full"]
    _, other = evaluated(settings, *extra, f"exits.first_token={first}", "rl.families=[hop3]", "rl.seed=1")
    assert other["models"]["start"]["families"]["hop3"]["free"] != entry["free"], "drawn with random numbers of its own"


@pytest.mark.timeout(300)
def test_forced_answers_have_the_style_and_one_prompts_answers_differ(settings):
    cfg = load(settings)
    task = HopsTask(cfg.task)
    pool = LocalPool(stages.base_model(cfg), None, rows=64, threads=1)
    with VerifierPool(task, deadline_s=30) as verifier:
        sampling = SamplingParams(cfg.rl.temperature, 8, ("\n",))
        bench = ChoiceBench(
            pool=pool, verifier=verifier, task=task, sampling=sampling, num_layers=LAYERS, first_exits=False,
            answers=ANSWERS,
        )  # fmt: skip
        (prompt,) = by_family(task.prompts("evaluation"))["hop3"][:1]
        wanted = cycled([prompt], ANSWERS)
        sets = {("hop3", s): [replace(p, prefill=task.openings[s]) for p in wanted] for s in STYLES}
        answers = bench.ask({("hop3", "free"): wanted, **sets}, Off())
    for style in STYLES:
        found = Counter(task.style_of(a.prompt, a.rollout.text) for a in answers["hop3", style])
        assert found[style] > ANSWERS / 2 and set(found) <= {style, None}
        assert all(a.rollout.text.startswith(task.openings[style]) for a in answers["hop3", style])
    texts = {a.rollout.text for a in answers["hop3", "free"]}
    assert len(texts) > 2, "the same prompt, other random numbers"
    for answer in answers["hop3", "steps"]:
        assert answer.correct == task.verify(prompt, answer.rollout.text).correct
