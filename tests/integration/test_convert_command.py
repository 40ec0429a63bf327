"""The converter's command line: no gates unless asked for, one vocabulary, and errors that say what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ee_megatron.checkpoint.manifest import read_manifest
from ee_megatron.checkpoint.workspace import JOURNAL
from ee_megatron.convert import main
from ee_megatron.policy import load_policy
from tests.processes import Command
from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
SIZES = {"hidden": 32, "intermediate": 48}


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_hf("llama", tmp_path_factory.mktemp("model") / "base", **SIZES)


def test_a_plain_model_goes_there_and_back_without_a_word_of_gates(base, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    assert run("import", "--hf", base, "--out", there, "--pp", 4) == 0
    shown = capsys.readouterr()
    assert "no gates" in shown.out and "layers per stage: [2, 1, 1, 2]" in shown.out and not shown.err
    assert not list(there.glob("policy.*")) and read_manifest(there)["exit_depths"] == []
    assert run("reshard", "--checkpoint", there, "--out", tmp_path / "again", "--pp", 2) == 0
    assert read_manifest(tmp_path / "again")["layout"]["stage_layers"] == [3, 3]
    assert run("export", "--checkpoint", there, "--out", back) == 0
    assert json.loads((back / "config.json").read_text())["model_type"] == "llama"
    ours, theirs = load_file(back / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    capsys.readouterr()
    for gates in ("embed", "sidecar"):
        assert run("export", "--checkpoint", there, "--out", tmp_path / "x", "--gates", gates) == 2
        assert "has no gates" in capsys.readouterr().err


def test_gates_come_when_they_are_asked_for_and_are_not_exported_untrained(base, tmp_path, capsys):
    asked = {"fresh": ("--gates", "fresh"), "depths": ("--exit-depths", "2,3")}
    for name, options in asked.items():
        assert run("import", "--hf", base, "--out", tmp_path / name, *options) == 0
    assert load_policy(tmp_path / "fresh")[0].exit_depths == (5,)
    assert load_policy(tmp_path / "depths")[0].exit_depths == (2, 3)
    capsys.readouterr()
    export = ("export", "--checkpoint", tmp_path / "depths", "--out", tmp_path / "out")
    assert run(*export) == 2
    error = capsys.readouterr().err
    assert "its gates were never trained" in error and "--gates drop" in error and not (tmp_path / "out").exists()
    assert run(*export, "--gates", "embed") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["exit_depths"] == [2, 3]
    # An export brings its gates along, unless they are to be dropped.
    assert run("import", "--hf", tmp_path / "out", "--out", tmp_path / "taken") == 0
    assert load_policy(tmp_path / "taken")[0].exit_depths == (2, 3)
    assert run("import", "--hf", tmp_path / "out", "--out", tmp_path / "left", "--gates", "drop") == 0
    assert not (tmp_path / "left" / "policy.json").exists()


@pytest.mark.parametrize(("short", "long"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_dtypes_have_the_same_names_in_both_directions(base, tmp_path, short, long):
    for name in (short, long):
        assert run("import", "--hf", base, "--out", tmp_path / name, "--dtype", name) == 0
        assert run("export", "--checkpoint", tmp_path / name, "--out", tmp_path / f"{name}-hf", "--dtype", name) == 0
        assert {line["dtype"] for line in read_manifest(tmp_path / name)["tensors"].values()} == {long}
        assert json.loads((tmp_path / f"{name}-hf" / "config.json").read_text())["dtype"] == long
    assert read_manifest(tmp_path / short)["sha256"] == read_manifest(tmp_path / long)["sha256"]


def edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


INDEX = "model.safetensors.index.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "null": (edit(lambda c: c.update(num_hidden_layers=None)), "config.json: llama: num_hidden_layers=None, expected"),
    "text": (edit(lambda c: c.update(hidden_size="64")), "hidden_size='64', expected a whole number"),
    "zero": (edit(lambda c: c.update(num_key_value_heads=0)), "num_key_value_heads=0, expected a whole number"),
    "list": (lambda p: (p / "config.json").write_text("[1]"), "config.json: holds a JSON list, expected an object"),
    "not UTF-8": (lambda p: (p / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json: not UTF-8 text"),
    "bad JSON": (lambda p: (p / "config.json").write_text("{"), "config.json: not valid JSON"),
    "index is a list": (lambda p: (p / INDEX).write_text("[]"), f"{INDEX}: holds a JSON list"),
    "index without a map": (lambda p: (p / INDEX).write_text('{"metadata": {}}'), f"{INDEX}: no weight_map"),
    "index of numbers": (lambda p: (p / INDEX).write_text('{"weight_map": {"a": 1}}'), f"{INDEX}: no weight_map"),
    "pickles": (pickled, "only pytorch_model.bin and the like; save it as safetensors"),
    "shards without index": (without_index, f"without {INDEX}; copy the index too"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_directory_is_refused_in_one_line_that_names_the_file(tmp_path, capsys, kind):
    base = tiny_hf("llama", tmp_path / "base", layers=2, **SIZES)
    damage, message = DAMAGE[kind]
    damage(base)
    capsys.readouterr()
    for command in (("import", "--hf", base, "--out", tmp_path / "out"), ("inspect", base)):
        assert run(*command) == 2
        error = capsys.readouterr().err
        assert message in error and str(base) in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "-1"), "--rank -1: expected a rank of at least 1"),
        (("--rank", "2"), "--rank 2: fresh adapters come with gates"),
        (("--gates", "drop", "--exit-depths", "2"), "--gates drop makes a plain checkpoint"),
        (("--pp", "7"), "--pp 7 --vpp 1: 7 stages, but the model has 6 layers"),
        (("--pp", "0"), "--pp 0: must be at least 1"),
        (("--pp", "4", "--exit-depths", "3"), "--pp x --vpp = 4 stages need 3 boundaries at exits, but --exit-depths"),
        (("--exit-depths", "2,9"), "--exit-depths: [9] outside 1..5"),
    ],
)
def test_errors_name_the_flags(base, tmp_path, capsys, options, message):
    assert run("import", "--hf", base, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_an_output_that_cannot_appear_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "empty")
    for name in ("dangling", "linked"):
        # There is no model: the output alone is what is found wrong.
        assert run("import", "--hf", tmp_path / "no-model", "--out", tmp_path / name) == 2
        assert "is a symbolic link to" in capsys.readouterr().err


def test_lopsided_stages_are_announced(base, tmp_path, capsys):
    assert run("import", "--hf", base, "--out", tmp_path / "a", "--pp", 2, "--exit-depths", "1,2") == 0
    shown = capsys.readouterr()
    assert "layers per stage: [2, 4]" in shown.out
    assert shown.err.startswith("warning: layers per stage [2, 4]") and "exits near [3]" in shown.err
    assert run("import", "--hf", base, "--out", tmp_path / "b", "--pp", 2, "--exit-depths", "1,3") == 0
    shown = capsys.readouterr()
    assert "layers per stage: [3, 3]" in shown.out and not shown.err


def test_an_interrupted_conversion_says_how_to_go_on(tmp_path):
    base = tiny_hf("llama", tmp_path / "base", layers=16, hidden=512, intermediate=1024)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    process = Command(["convert", "import", "--hf", base, "--out", out])
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (partial / JOURNAL).is_file() and (partial / JOURNAL).read_text().count("\n") > 1:
            os.kill(process.pid, signal.SIGINT)
            break
        time.sleep(0.001)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert (
        error == f"interrupted; what was finished is in {partial}: the same command with --resume goes on from there\n"
    )
    assert run("import", "--hf", base, "--out", out, "--resume", "--quiet") == 0
    assert not partial.exists()


@pytest.mark.parametrize("options", [["--help"], ["import", "--help"], ["import", "--hf", "x", "--out", "y", "--pp"]])
def test_help_and_usage_need_no_heavy_module(options):
    code = (
        "import sys\n"
        "from ee_megatron.cli import main\n"
        "try: main(['convert', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'megatron'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, timeout=100)
    said = "usage: ee-megatron convert" if "--help" in options else "see `ee-megatron convert import --help`"
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
