"""The command line, run as a user runs it: help at once, one-line errors, a dry run that starts nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ee_megatron import cli
from ee_megatron.config import load as loading
from tests.processes import ee_megatron

ROOT = Path(__file__).parents[2]
COMMANDS = ("run", "teacher", "traces", "calibrate", "rl", "evaluate", "report", "generate")


def test_help_lists_every_command_and_is_quick() -> None:
    # Of the processor: others may be busy too.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "ee_megatron.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ") and line.split()}
    assert {*COMMANDS, "convert"} <= listed
    assert "examples:" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and f"ee-megatron {name} experiment=" in text and "key=value" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rl", "experiment=demo_cpu", "rl.lamda_exit=1"], ["error: rl.lamda_exit", "did you mean rl.lambda_exit?"]),
        (["rl", "experiment=nothing"], ["error: experiment=nothing", "demo_cpu"]),
        (["run", "experiment=demo_cpu", "rl.group_size=1"], ["error: rl.group_size=1"]),
        (["calibrate", "experiment=demo_cpu", "model.path=no/where"], ["error: model.path=no/where", "no config.json"]),
        (["generate", "experiment=demo_cpu", "--prompt", "x", "--temperature", "-1"], ["error:"]),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], parts: list[str]) -> None:
    done = ee_megatron(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and all(part in done.stderr for part in parts), done.stderr


def test_debug_shows_the_traceback() -> None:
    done = ee_megatron("rl", "experiment=nothing", env={"EE_DEBUG": "1"})
    assert done.returncode != 0 and "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [["rl", "--nonsense"], ["report", "--dry-run"], [], ["sing"]])
def test_unknown_options_and_commands_are_refused(arguments: list[str]) -> None:
    done = ee_megatron(*arguments)
    assert done.returncode == 2 and "error:" in done.stderr


def test_dry_run_prints_settings_ranks_and_directories_and_starts_nothing(tmp_path: Path) -> None:
    done = ee_megatron("rl", "experiment=rl_7b", "--dry-run", "rl.steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert OmegaConf.create(done.stdout).rl.steps == 3
    comments = [line for line in done.stdout.splitlines() if line.startswith("# ")]
    assert "# ranks: 8 = tensor 2 x pipeline 2 x data 2" in comments
    assert [line.split("-")[0] for line in comments if "runs/rl_7b/" in line] == [
        f"# {stage}: runs/rl_7b/{stage}" for stage in ("traces", "calibrate", "rl")
    ]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_checks_the_layout_against_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,'
        ' "num_hidden_layers": 12, "intermediate_size": 128, "vocab_size": 100}'
    )
    model = ["name=x", f"model.path={tmp_path}"]
    assert cli.main(["run", *model, "parallel.pipeline=2", "--dry-run"]) == 0
    good = capsys.readouterr().out
    assert "# exits: [5, 6, 10] of 12 layers; layers per stage: [6, 6]" in good
    assert "# evaluate: runs/x/evaluate-" in good
    assert cli.main(["run", *model, "parallel.tensor=4", "--dry-run"]) == 2
    assert "nearest degrees that do: 1, 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 2, "error: two lines\n"),
        (FileNotFoundError("gone"), 2, "error: gone\n"),
        (RuntimeError("broke"), 1, "error: broke\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(overrides: list[str]) -> None:
        raise error

    monkeypatch.delenv("EE_DEBUG", raising=False)
    monkeypatch.setattr(loading, "attempt", fail)
    assert cli.main(["rl", "experiment=demo_cpu"]) == code
    assert capsys.readouterr().err == line


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`ee-megatron ... | head`: more than a pipe holds, of which nothing is read."""
    code = "import sys; from ee_megatron import cli; sys.exit(cli._guarded(lambda: print('x' * 2**20)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 0
