"""The command line, run as a user runs it: help at once, one-line errors, a dry run that starts nothing."""

from __future__ import annotations

import contextlib
import io
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ee_megatron import cli, convert
from ee_megatron.config import load as loading
from ee_megatron.config.validate import validate
from ee_megatron.scaling import command as scaling
from ee_megatron.sweeps import command as sweeps
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
    ("arguments", "named"),
    [
        (["rl", "experiment=demo_cpu", "rl.lamda_exit=1"], "rl.lamda_exit"),
        (["rl", "experiment=nothing"], "experiment=nothing"),
        (["run", "experiment=demo_cpu", "rl.group_size=1"], "rl.group_size=1"),
        (["calibrate", "experiment=demo_cpu", "model.path=no/where"], "model.path=no/where"),
        (["generate", "--model", "configs", "--prompt", "x", "--temperature", "-1"], "--temperature -1"),
        (["generate", "--model", "configs", "--prompt", "x", "--temperature", "nan"], "--temperature nan"),
        (["generate", "--model", "configs", "--prompt", "x", "--temperature", "inf"], "--temperature inf"),
        (["rl", "--nonsense"], "--nonsense"),
        (["report", "--dry-run"], "--dry-run"),
        ([], "<command>"),
        (["sing"], "sing"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], named: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    try:
        code = cli.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    out, err = capfd.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err, err


def test_commands_by_their_older_names_are_taken_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["name=x", f"runs={tmp_path}", "model.path=no/such", "model.checkpoint=no/such", "device=cpu"]
    for older, newer in (
        (["imported"], ["import-checkpoint"]),
        (["job", "imported"], ["slurm-spec", "import-checkpoint"]),
    ):
        assert cli.main([*newer, *settings]) == 2
        refused = capsys.readouterr().err
        assert "no/such" in refused and "warning" not in refused
        assert cli.main([*older, *settings]) == 2
        *warnings, rest = capsys.readouterr().err.splitlines(keepends=True)
        assert rest == refused and len(warnings) == len(older)
        assert all(map(lambda line, word: word in line, warnings, newer))


def test_debug_shows_the_traceback() -> None:
    done = ee_megatron("rl", "experiment=nothing", env={"EE_DEBUG": "1"})
    assert done.returncode != 0 and "Traceback" in done.stderr


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
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 0


def quoted() -> Iterator[tuple[str, list[str], bool]]:
    """Commands in code blocks of README and docs: (where, words after `ee-megatron`, whether an error follows)."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if page.name == "lab-log.md":  # what was run once, with the settings of then
            continue
        lines, fenced = page.read_text().splitlines(), False
        for number, line in enumerate(lines):
            fenced ^= line.lstrip().startswith("```")
            found = re.search(r"(?:^|\s)ee-megatron ([a-z].*)", line) if fenced or line.startswith("    ") else None
            if found is None:
                continue
            text, last = found[1], number
            # Ends of lines within quotes and behind backslashes are not the command's.
            while (words := words_of(text)) is None:
                last += 1
                text = f"{text.removesuffix(chr(92))}\n{lines[last]}"
            fails = last + 1 < len(lines) and lines[last + 1].strip().startswith("error:")
            yield f"{page.name}:{number + 1}", words, fails


def words_of(text: str) -> list[str] | None:
    """None: not all of it. Comments, and what a pipe leads to, are left out."""
    if text.endswith("\\"):
        return None
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return None
    return words[: words.index("|")] if "|" in words and "convert" not in words else words


def examples() -> Iterator[tuple[str, list[str], bool]]:
    """Commands that end the `--help` of each command, as `quoted` has them."""
    inner = {"convert": ("import", "export", "reshard", "verify", "inspect", "roundtrip")}
    for name in (*cli.COMMANDS, *cli.HANDED_ON):
        for words in ([name], *([name, sub] for sub in inner.get(name, ()))):
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                cli.main([*words, "--help"])
            shown = re.findall(r"^  ee-megatron (.*)", out.getvalue(), re.MULTILINE)
            assert shown or words == ["convert"], f"{' '.join(words)} --help has no example"
            yield from ((f"{' '.join(words)} --help", words_of(text) or [], False) for text in shown)


QUOTED = [*quoted(), *examples()]


def check_quoted(name: str, *words: str) -> None:
    """As the command reads its options and settings, before it looks at any file."""
    if name == "sweep" and words[0] not in ("status", "collect"):
        grid = sweeps.read_grid((read := sweeps.parse_arguments(list(words))).settings, read.zip)
        points = grid.points()
        for point in (points[0], points[-1]):
            validate(loading.load(grid.overrides(point)), None)
    elif name == "convert" and not any("[" in word for word in words):
        convert._parser().parse_args(words)
    elif name == "scaling" and not any("[" in word for word in words):
        scaling._parser().parse_args(words)
    elif name not in cli.HANDED_ON:
        options, rest = cli.build_parser().parse_known_args([name, *words])
        assert not [word for word in rest if word.startswith("-")]
        settings = [word for word in [*getattr(options, "overrides", []), *rest] if "=" in word]
        if settings:
            validate(loading.load(settings), None)


@pytest.mark.parametrize(("words", "fails"), [pytest.param(*rest, id=where) for where, *rest in QUOTED])
def test_commands_that_pages_and_help_quote_are_taken(words: list[str], fails: bool) -> None:
    try:
        check_quoted(*words)
    except (ValueError, SystemExit) as error:
        assert fails or getattr(error, "code", 1) == 0, f"{' '.join(words)}: {error}"
    else:
        assert not fails


def test_commands_that_the_pages_quote_are_found() -> None:
    names = {words[0] for _, words, _ in QUOTED}
    assert {"run", "rl", "evaluate", "generate", "serve", "plan", "report", "sweep", "convert"} <= names
    assert any(fails for *_, fails in QUOTED)


@pytest.mark.parametrize("experiment", ["demo_cpu", "demo_gpu", "smollm2"])
@pytest.mark.parametrize("task", ["tom", "reasoning_gym", "sums", "hops", "arithmetic"])
def test_what_an_experiment_sets_for_its_task_goes_with_the_task(experiment: str, task: str) -> None:
    own, other = loading.load([f"experiment={experiment}"]), loading.load([f"experiment={experiment}", f"task={task}"])
    validate(own, None)
    validate(other, None)
    assert own.rl.wide_operands and other.task.name == task and other.calibrate == own.calibrate
