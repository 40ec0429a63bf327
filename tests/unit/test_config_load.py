"""Settings: what is accepted lands in the typed schema, everything else is one line before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ee_megatron.config import aliases
from ee_megatron.config.config_paths import find_config_dir, list_groups
from ee_megatron.config.identity import to_yaml
from ee_megatron.config.load import load, read_saved
from ee_megatron.config.schema import RunConfig
from ee_megatron.config.validate import validate

EXPERIMENTS = list_groups(find_config_dir())["experiment"]
DEMO = "experiment=demo_cpu"


def refused(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load([DEMO, *overrides], config_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_whole_valid_run(experiment: str) -> None:
    # What only the user can give.
    given = ["model.path=model", "task.path=mine.jsonl"] if experiment == "your_data" else []
    cfg = load([f"experiment={experiment}", *given])
    assert isinstance(cfg, RunConfig) and cfg.name == experiment
    validate(cfg, None)


def test_command_line_wins_over_experiment_over_default() -> None:
    plain = load(["name=a", "model.path=m"])
    assert (plain.rl.adapter_lr, plain.rl.steps) == (RunConfig().rl.adapter_lr, RunConfig().rl.steps)
    paper = load(["experiment=rl_7b", "rl=paper"])
    assert (paper.rl.adapter_lr, paper.rl.gate_lr, paper.rl.depth_penalty.weight, paper.rl.kl_penalty.weight) == (
        1e-4,
        1e-5,
        0.5,
        0.05,
    )
    # A recipe on the command line replaces the experiment's as a whole; the number of steps, and the operands, which
    # the task says, stay.
    for experiment in ("demo_cpu", "smollm2", "rl_7b"):
        mine, other = (
            load([*given, "rl=paper"]).rl for given in ([f"experiment={experiment}"], ["name=a", "model.path=m"])
        )
        for name in ("steps", "checkpoint_every", "wide_operands"):
            setattr(mine, name, getattr(other, name))
        assert mine == other
    assert load(["experiment=rl_7b", "rl.adapter_lr=3e-3"]).rl.adapter_lr == 3e-3
    assert load(["rl.adapter_lr=3e-3", "experiment=rl_7b"]).rl.adapter_lr == 3e-3


def test_group_choices_and_lists() -> None:
    cfg = load(
        [
            "experiment=rl_7b",
            "parallel=single",
            "deepspeed=zero2",
            "tracker=disabled",
            "exits.depths=[7,14]",
            "rollout=local",
        ]
    )
    assert (cfg.parallel.tensor, cfg.deepspeed.zero_stage, cfg.tracker.wandb) == (1, 2, "disabled")
    assert (cfg.exits.depths, cfg.rollout.backend, cfg.rollout.stop) == ([7, 14], "local", [])


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_an_unknown_key_names_the_nearest_one(sign: str) -> None:
    message = refused(f"{sign}rl.lamda_exit=0.3")
    assert message.startswith("rl.lamda_exit") and "rl.depth_penalty.weight" in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("lambda_exit=1", "rl.depth_penalty.weight"),
        ("rl.lamda=1", "rl.depth_penalty.weight"),
        ("lamda=1", "rl.depth_penalty.weight"),
        ("experimnt=demo_cpu", "experiment"),
        ("paralel.tensor=2", "parallel.tensor"),
        ("rl.steps.x=1", "rl.steps"),
        ("rl={stepz: 3}", "rl.steps"),
        ("hydra.verbose=true", "`--dry-run`"),
    ],
)
def test_other_unknown_keys(override: str, nearest: str) -> None:
    message = refused(override)
    assert nearest in message.removeprefix(override.split("=")[0]), message


def test_an_unknown_key_in_a_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("defaults: [_self_]\nname: a\nmodel: {path: m}\nrl: {lamda_exit: 1}\n")
    message = refused_plain(tmp_path)
    assert message.startswith("rl.lamda_exit") and "rl.depth_penalty.weight" in message


def refused_plain(directory: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load([], directory)
    return str(caught.value)


@pytest.mark.parametrize(
    ("older", "now"),
    [
        ("rollout.tensor=2", "rollout.vllm.tensor=2"),
        ("rl.kl_sum=true", "rl.kl_penalty.kind=reward_sum"),
        ("rl.beta=0.2", "rl.kl_penalty.weight=0.2"),
        ("rl.epochs=1", ""),
        ("rollout.vllm_exits=masked", ""),
        ("rollout.vllm.exits=masked", ""),
    ],
)
def test_an_older_name_is_taken_and_the_new_one_named(older: str, now: str, caplog: pytest.LogCaptureFixture) -> None:
    aliases.warn.cache_clear()
    assert load([DEMO, older]) == load([DEMO, *([now] if now else [])])
    assert older.split("=")[0] in caplog.text and now.split("=")[0] in caplog.text


@pytest.mark.parametrize("override", ["rl.epochs=2", "parallel.attention=blocks", "rl.kl_penalty.sum=false",
                                      "rollout.vllm.exits=compact"])  # fmt: skip
def test_a_setting_that_was_removed_is_refused_at_another_value(override: str) -> None:
    assert refused(override).startswith(override.split("=")[0])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rl.steps=many", ("rl.steps", "'many'")),
        ("rl.steps=1.5", ("rl.steps", "1.5")),
        ("rl.steps=null", ("rl.steps", "None")),
        ("parallel.recompute=perhaps", ("parallel.recompute", "'perhaps'")),
        ("exits.depths=[a]", ("exits.depths", "'a'")),
        ("rl=5", ("rl=5", "long_answers", "paper")),
        ("model.path=${oc.env:EE_NOT_SET_ANYWHERE}", ("EE_NOT_SET_ANYWHERE",)),
        ("rl.steps=1,2", ("rl.steps=1,2", "`ee-megatron sweep`")),
        ("~rl.steps", ("~rl.steps",)),
        ("rl.steps", ("rl.steps", "key=value")),
        ("task=chess", ("task=chess", "arithmetic", "gsm8k")),
    ],
)
def test_wrong_values_are_one_line(override: str, parts: tuple[str, ...]) -> None:
    message = refused(override)
    assert all(part in message for part in parts), message


def test_an_unknown_experiment_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match="experiment=demo") as caught:
        load(["experiment=demo"])
    assert all(name in str(caught.value) for name in EXPERIMENTS)


def test_missing_values_say_which_and_how() -> None:
    with pytest.raises(ValueError) as caught:
        load([])
    assert all(part in str(caught.value) for part in ("name=...", "model.path=...", "demo_cpu")), caught.value


def test_plus_on_a_known_key_is_an_ordinary_setting() -> None:
    assert load([f"+{DEMO}", "++rl.steps=7", "+rl.kl_penalty.weight=0.1"]).rl.steps == 7


def test_config_dir_from_argument_environment_and_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("defaults: [_self_]\nname: elsewhere\nmodel: {path: m}\n")
    assert load([], tmp_path).name == "elsewhere"
    monkeypatch.setenv("EE_CONFIG_DIR", str(tmp_path))
    assert load([]).name == "elsewhere"
    monkeypatch.setenv("EE_CONFIG_DIR", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="EE_CONFIG_DIR"):
        load([])


def test_yaml_holds_every_setting_and_loads_again(tmp_path: Path) -> None:
    cfg = load([DEMO, "rl.steps=3", 'rollout.stop=["\\n\\n"]'])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load([], tmp_path) == cfg
    assert OmegaConf.create(to_yaml(cfg)).rl.steps == 3


def test_defaults_that_older_versions_saved_switch_nothing_on(tmp_path: Path) -> None:
    cfg = load([DEMO])
    text = to_yaml(cfg).replace("cluster: null", "cluster: {nodes: 1, gpus_per_node: 0}")
    text = text.replace("  vllm: null", "  vllm_python: .venv-vllm/bin/python\n  vllm_compile: true")
    text = text.replace("  dataset: null", "  question_column: question\n  train_split: train")
    (tmp_path / "config.yaml").write_text(text)
    assert read_saved(tmp_path / "config.yaml") == cfg


def test_a_removed_setting_leaves_the_sections_around_it(tmp_path: Path) -> None:
    cfg = load([DEMO, "rollout.actors=3"])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg).replace("  vllm: null", "  vllm:\n    exits: masked"))
    assert read_saved(tmp_path / "config.yaml") == cfg


def test_loading_and_refusing_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom ee_megatron.config.load import load\nfrom ee_megatron.config.validate import validate\n"
        "from ee_megatron.config.identity import stage_dir\n"
        f"cfg = load(['{DEMO}'])\nvalidate(cfg, None)\nstage_dir(cfg, 'rl')\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])
