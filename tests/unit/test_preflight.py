"""What can be known before anything starts is known: all of it at once, without torch, with nothing left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ee_megatron import cli
from ee_megatron.config.load import Attempt, load
from ee_megatron.training.preflight import Preflight
from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    model = tiny_hf("llama", tmp_path / "model")
    return [
        "name=x", f"model.path={model}", f"runs={tmp_path / 'runs'}", "device=cpu", "rollout=local",
        "rollout.max_new_tokens=8",
    ]  # fmt: skip


def problems(file: Path, count: int) -> Path:
    file.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(count)))
    return file


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in said)
    return [line.removeprefix("error: ") for line in said]


def test_everything_is_said_at_once(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(
        capsys, "run", *base, "init_policy=/nonexistent", 'rollout.stop=[""]',
        "rl.lamda_exit=1",
        "evaluate.thresholds=[]", "task=dataset", "task.path=/nonexistent", "rollout.max_new_tokens=100000",
        "evaluate.controls=true", "evaluate.controls.policy=/x", "rl.kl_penalty.weight=nan", "rl.steps=many",
        "rl.group_size=1",
        "exits.depths=[99]", "parallel.sequence_parallel=true",
    )  # fmt: skip
    wanted = (
        "rl.lamda_exit: no such setting", "rl.steps: Value 'many'",
        "rl.kl_penalty.weight=nan: expected a finite number",
        "rl.group_size=1", "evaluate.thresholds=[]", "rollout.stop=['']",
        "parallel.tensor=1, parallel.sequence_parallel=true",
        "rollout.max_new_tokens=100000", "exits.depths: [99]", "init_policy=/nonexistent",
        "evaluate.controls.policy=/x", "task.path=/nonexistent",
    )  # fmt: skip
    assert [sum(line.startswith(start) for line in found) for start in wanted] == [1] * len(wanted), found
    assert len(found) == len(wanted) and not (tmp_path / "runs").exists()


def test_a_faulty_setting_brings_no_faults_that_follow_from_it(
    base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = lines(capsys, "run", *base, "cluster.nodes=0", "cluster.rollout_nodes=2", "rollout.backend=ray")
    assert line.startswith("cluster.nodes=0")
    assert len(lines(capsys, "rl", *base, "parallel.tensor=0")) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["teacher.shots=1000"], r"teacher\.shots\b.*\b1000\b"),
        (["rollout=vllm", "rollout.vllm.python=/x"], r"rollout\.vllm\.python=/x: no such file.*make vllm"),
        (["teacher.shots=2", "teacher.batch_size=2000"], r"teacher\.batch_size=2000\b.*\b330\b"),
        (["teacher.problems=3"], r"teacher\.batch_size=16\b.*\b3\b"),
        (["task.validation=100000"], r"task\.validation\b.*\b100000\b"),
    ],
)
def test_there_have_to_be_examples_enough(
    settings: list[str], says: str, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = lines(capsys, "run", *base, *settings)
    assert re.match(says, line) and not (tmp_path / "runs").exists()


def test_calibration_needs_no_vllm(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(capsys, "calibrate", *base, "rollout=vllm", "rollout.vllm.python=/x")
    assert "has not finished" in line and "rollout.vllm" not in line


def test_so_it_is_with_files(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = problems(tmp_path / "data.jsonl", 30)
    task = ["task=dataset", f"task.path={data}", "task.validation=5", "task.evaluation=5", "teacher.batch_size=4"]
    (line,) = lines(capsys, "run", *base, *task, "teacher.shots=9")
    assert re.match(r"teacher\.shots\b.*\b9\b.*\b5\b", line), line
    (line,) = lines(capsys, "run", *base, *task, "task.evaluation=25")
    assert re.match(r"task\.evaluation\b.*\b25\b", line), line
    (line,) = lines(capsys, "run", *base, *task, "task.dataset.question_column=q")
    assert "['q']" in line and not (tmp_path / "runs").exists()
    cfg = load([*base, *task])
    assert Preflight().faults(Attempt(cfg, []), ["teacher", "traces", "rl"]) == []


HARMED: list[tuple[dict[str, str | None], str, str]] = [
    ({"tokenizer.json": None}, "", r"\S*model: .*tokenizer\.json"),
    ({"tokenizer.json": "{}"}, "", r"\S*tokenizer\.json: "),
    ({"tokenizer_config.json": '{"tokenizer_class": [1]}'}, "", r"\S*tokenizer_config\.json: tokenizer_class=\[1\]"),
    ({"generation_config.json": '{"eos_token_id": "x"}'}, "", r"\S*generation_config\.json: eos_token_id='x'"),
    ({}, "rollout.prompt_template=chat", r"rollout\.prompt_template=chat: "),
    ({"chat_template.jinja": "{% for %}"}, "rollout.prompt_template=chat", r"rollout\.prompt_template=chat: "),
    ({"r.py": "raise SystemExit(3)\ndef f(*_): return 1"}, "task.reward=model/r.py:f", r"task\.reward=.*SystemExit: 3"),
    ({"r.py": "def f(): return 1"}, "task.reward=model/r.py:f", r"task\.reward=.*TypeError"),
    ({"r.py": "def f(*_): return None"}, "task.reward=model/r.py:f", r"task\.reward=.*None"),
    ({"t.py": "from ee_megatron.tasks import Task\nclass T(Task):\n    def __init__(self, task, chat): pass"},
     "task.name=model/t.py:T", r"task\.name=.*AttributeError"),
    ({}, "task.path=data.jsonl", r"task\.path=data\.jsonl, task\.name=arithmetic: "),
    ({}, "adapter.rank=1000000000", r"adapter\.rank=1000000000: "),
    ({}, "task.families=[nope]", r"task\.families=\['nope'\], "),
]  # fmt: skip


@pytest.mark.parametrize(("files", "setting", "says"), HARMED)
def test_what_stages_would_stumble_over_is_found_before_they_start(
    files: dict[str, str | None], setting: str, says: str, base: list[str], tmp_path: Path, capsys
) -> None:
    for name, content in files.items():
        (tmp_path / "model" / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "model" / name).write_text(content)
    (line,) = lines(capsys, "run", *base, "teacher=null", *([setting] if setting else []))
    assert re.match(says, line) and not (tmp_path / "runs").exists(), line


def test_runs_need_a_place(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (line,) = lines(capsys, "run", *base, f"runs={tmp_path}/file/runs")
    assert line.startswith(f"runs={tmp_path}/file/runs: {tmp_path}/file ")


def test_a_dry_run_says_what_is_not_here(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def remarks(*arguments: str) -> list[str]:
        assert cli.main([*arguments, "--dry-run"]) == 0
        said = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
        assert said[-1].startswith("command: ") and not (tmp_path / "runs").exists()
        return [line.removeprefix("not ready here: ") for line in said if line.startswith("not ready here: ")]

    data = ["task=dataset", f"task.path={tmp_path / 'data.jsonl'}", "task.validation=5", "task.evaluation=5"]
    problems(tmp_path / "data.jsonl", 30)
    assert remarks("run", *base, *data, "teacher.batch_size=4") == []
    (line,) = remarks("run", *base, *data, "teacher.batch_size=64")
    assert re.match(r"teacher\.batch_size=64\b.*\b15\b", line), line
    found = remarks(
        "run", *base, "model.path=/no/model", "init_policy=/no/policy", "task=dataset", "task.path=/no/data"
    )
    assert [line.split(":")[0] for line in found] == [
        "model.path=/no/model",
        "init_policy=/no/policy",
        "task.path=/no/data",
    ]
    (line,) = remarks("calibrate", *base)
    assert "'teacher'" in line
    # The package's own problems are the same everywhere.
    assert lines(capsys, "run", *base, "teacher.shots=1000", "rl.lamda=1", "--dry-run")[1].startswith("teacher.shots")


def test_a_finished_stage_needs_nothing_any_more(base: list[str], tmp_path: Path) -> None:
    settings = [*base, "teacher=null", "init_policy=/nonexistent"]
    found = Preflight().faults(Attempt(load(settings), []), ["rl"])
    assert len(found) == 1
    from ee_megatron.config.identity import stage_dir

    directory = stage_dir(load(settings), "rl")
    directory.mkdir(parents=True)
    (directory / "DONE").touch()
    assert Preflight().faults(Attempt(load(settings), []), ["rl"]) == []


LATE = {"transformers", "datasets", "megatron"}


@pytest.mark.parametrize(
    ("command", "code", "never"),
    [
        (["run", "exits.depths=[99]", "teacher.shots=99", "init_policy=/x"], 2, {*LATE, "torch", "numpy.random"}),
        (["run", "--dry-run"], 0, {*LATE, "deepspeed", "ray", "wandb"}),
        (["plan", "--mean-depth", "0.9"], 0, {*LATE, "deepspeed", "ray", "wandb"}),
    ],
)
def test_no_library_that_takes_seconds_is_loaded_on_the_way(
    command: list[str], code: int, never: set[str], base: list[str]
) -> None:
    """A model is looked at, not read; only plans compute by torch."""
    script = (
        "import sys\nfrom ee_megatron import cli\n"
        f"assert cli.main({[command[0], *base, *command[1:]]!r}) == {code}\n"
        f"assert not {never!r} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(ROOT), "EE_CONFIG_DIR": str(ROOT / "configs")},
    )  # fmt: skip
    assert done.returncode == 0 and (code == 0 or done.stderr.count("\n") == 3), done.stderr


def test_on_a_login_node_the_job_is_named_instead(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\ntouch SUBMITTED\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    settings = [*base, "teacher=null", "cluster.nodes=2", "rollout.backend=ray", "device=cpu"]
    (line,) = lines(capsys, "traces", *settings)
    assert "sbatch --nodes=2" in line
    assert "slurm/stage.sh traces" in line and not (tmp_path / "SUBMITTED").exists()
    faults = Preflight().faults(Attempt(load(settings), []), ["traces"], here=[])
    assert len(faults) == 1
    # In a job, and where nobody submits, it is not a question.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert Preflight().faults(Attempt(load(settings), []), ["traces"], here=[]) == []


@pytest.mark.parametrize(
    ("stage", "setting"), [("rl", "rl.steps=0"), ("pretrain", "pretrain=null"), ("teacher", "teacher=null")]
)
def test_a_stage_that_the_settings_leave_out_is_refused(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, setting: str
) -> None:
    (line,) = lines(capsys, stage, *base, setting)
    assert line.startswith(f"{stage}: ") and "traces, calibrate" in line and not (tmp_path / "runs").exists()
