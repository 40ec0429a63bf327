"""Whatever goes wrong in a conversion: one line, an exit code that says so, nothing that looks complete, the source as
it was."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ee_megatron.checkpoint.manifest import read_manifest
from ee_megatron.checkpoint.megatron_io import WEIGHTS
from ee_megatron.checkpoint.workspace import JOURNAL
from ee_megatron.convert import main
from tests.tiny import tiny_hf


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sharded(path: Path, family: str = "llama", **sizes) -> Path:
    """A model in three files and an index."""
    tiny_hf(family, path, **sizes)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + 3 * i // len(names):05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def put(key: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(key, value)


LAST = "model-00003-of-00003.safetensors"
NORM = "model.norm.weight"


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM][5] = float("nan")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "extra tensor": (lambda p: edit(p / LAST, put("model.layers.0.mlp.extra.weight", torch.zeros(3))), "unexpected"),
    "missing tensor": (lambda p: edit(p / LAST, lambda tensors: tensors.pop(NORM)), "lacks model.norm.weight"),
    "wrong shape": (lambda p: edit(p / LAST, put(NORM, torch.ones(65))), "config.json implies [64]"),
    "integers": (lambda p: edit(p / LAST, put(NORM, torch.ones(64, dtype=torch.int32))), "is stored as I32"),
    "truncated shard": (lambda p: (p / LAST).write_bytes((p / LAST).read_bytes()[:-100]), "truncated"),
    "missing shard": (lambda p: (p / LAST).unlink(), "no such file"),
    "not a number": (lambda p: edit(p / LAST, poison), "holds NaN"),
    "pickle": (lambda p: (p / LAST).write_bytes(pickle.dumps({NORM: 1})), "not a safetensors file"),
    "torch pickle": (lambda p: torch.save({NORM: torch.ones(64)}, p / LAST), "not a safetensors file"),
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "config cut off": (lambda p: (p / "config.json").write_text('{"model_type": "lla'), "not valid JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_models_are_refused(tmp_path, capsys, kind):
    base = sharded(tmp_path / "base")
    damage, message = DAMAGE[kind]
    damage(base)
    before = contents(base)
    capsys.readouterr()
    assert run("import", "--hf", base, "--out", tmp_path / "out") == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert contents(base) == before


def test_a_head_that_the_config_ties_but_that_differs_is_not_dropped(tmp_path, capsys):
    base = tiny_hf("llama", tmp_path / "base")
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    edit(base / "model.safetensors", put("lm_head.weight", embedding.clone()))
    assert run("import", "--hf", base, "--out", tmp_path / "same") == 0
    edit(base / "model.safetensors", put("lm_head.weight", embedding + 1))
    assert run("import", "--hf", base, "--out", tmp_path / "other") == 2
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().err


def recorded_layout(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["layout"]["tensor"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def swap_bytes(folder: Path) -> None:
    file = max((folder / WEIGHTS).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 1 for byte in content[middle : middle + 8])
    file.write_bytes(content)


MEGATRON_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "file gone": (lambda p: (p / WEIGHTS / "__3_0.distcp").unlink(), "missing"),
    "file cut": (lambda p: os.truncate(p / WEIGHTS / "__3_0.distcp", 2000), "2000 bytes"),
    "bytes changed": (swap_bytes, "damaged"),
    "metadata gone": (lambda p: (p / WEIGHTS / ".metadata").unlink(), "cannot be read"),
    "no manifest of mine": (lambda p: (p / "manifest.json").write_text("{"), "not valid JSON"),
    "layout untrue": (recorded_layout, "says tensor-parallel degree 1"),
    "policy changed": (lambda p: edit(p / "policy.safetensors", put("gates.2.fc2.bias", torch.ones(1))), "digest"),
}


@pytest.mark.parametrize("command", ["export", "reshard", "inspect"])
@pytest.mark.parametrize("kind", MEGATRON_DAMAGE)
def test_damaged_checkpoints_are_refused(tmp_path, capsys, kind, command):
    base = tiny_hf("qwen2", tmp_path / "base", tied=False)
    source = tmp_path / "megatron"
    assert run("import", "--hf", base, "--out", source, "--tp", 2, "--exit-depths", "2,4") == 0
    damage, message = MEGATRON_DAMAGE[kind]
    damage(source)
    before = contents(source)
    options = (
        ["inspect", source] if command == "inspect" else [command, "--checkpoint", source, "--out", tmp_path / "o"]
    )
    capsys.readouterr()
    assert run(*options) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1, shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "megatron"]
    assert contents(source) == before


def child(arguments: list[str], limit: int) -> None:
    """A converter of its own; a `limit` on the size of its files is what a full disk looks like."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os._exit(main(arguments))


def start(arguments: list[object], limit: int = 0) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=child, args=([str(a) for a in arguments], limit))
    process.start()
    return process


def finished(process: multiprocessing.process.BaseProcess, timeout: float = 120) -> int | None:
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError("the converter did not end")
    return process.exitcode


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_leaves_nothing_and_resume_goes_on(tmp_path, capfd, command):
    base = tiny_hf("llama", tmp_path / "base", layers=12, vocab=4000, tied=False)
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    assert run("import", "--hf", base, "--out", megatron) == 0
    options = {
        "import": ["import", "--hf", base, "--out", out],
        "export": ["export", "--checkpoint", megatron, "--out", out, "--max-shard-size", "300KB"],
    }[command]
    before = contents(base) | contents(megatron)
    capfd.readouterr()
    assert finished(start(options, limit=400_000)) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    # Which disk is full, if there are several.
    assert f"{tmp_path / '.out.partial'}/" in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "megatron"]
    assert contents(base) | contents(megatron) == before
    assert run(*options) == 0


def test_killed_at_random_moments_and_resumed(tmp_path, capsys):
    assert kills_and_resumes(tmp_path, capsys, kills=3) > 0


def kills_and_resumes(tmp_path: Path, capsys, kills: int, **sizes) -> int:
    """Kill imports and exports at random moments, until `kills` of each hit one under way (within a bound); at the end
    each is what one go makes. Returns the kills that hit."""
    base = sharded(tmp_path / "base", layers=24, hidden=128, intermediate=256, tied=False, **sizes)
    chance, hits, before = random.Random(0), 0, contents(base)
    straight = tmp_path / "straight"
    began = time.monotonic()
    assert finished(start(["import", "--hf", base, "--out", straight, "--tp", 2])) == 0
    took = time.monotonic() - began
    steps = (
        (["import", "--hf", base, "--tp", 2], straight),
        (["export", "--checkpoint", straight, "--max-shard-size", "500KB"], tmp_path / "plain"),
    )
    assert run("export", "--checkpoint", straight, "--out", tmp_path / "plain", "--max-shard-size", "500KB") == 0
    for arguments, expected in steps:
        out = tmp_path / f"{arguments[0]}-out"
        partial = tmp_path / f".{out.name}.partial"
        goal = hits + kills
        for _ in range(4 * kills):
            if hits == goal:
                break
            process = start([*arguments, "--out", out, "--resume"])
            time.sleep(chance.uniform(0.05, 0.7) * took)
            process.kill()
            process.join()
            if out.exists():
                # It was through before the blow: once more from the start.
                assert_same(out, expected)
                shutil.rmtree(out)
                continue
            hits += 1
            assert not partial.exists() or (partial / JOURNAL).is_file()
        # What was left is no checkpoint to anybody.
        if partial.exists():
            capsys.readouterr()
            assert run("inspect", partial) == 2
        assert finished(start([*arguments, "--out", out, "--resume"])) == 0
        assert_same(out, expected)
        assert not partial.exists()
    assert contents(base) == before
    return hits


def assert_same(out: Path, expected: Path) -> None:
    assert read_manifest(out)["sha256"] == read_manifest(expected)["sha256"]
    a, b = contents(out), contents(expected)
    for volatile in ("manifest.json", f"{WEIGHTS}/.metadata"):
        a.pop(volatile, None)
        b.pop(volatile, None)
    assert a == b


def test_resume_does_not_write_again_what_was_finished(tmp_path):
    base = sharded(tmp_path / "base", layers=8)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    # The embedding fits, the first layer does not.
    assert finished(start(["import", "--hf", base, "--out", out, "--resume"], limit=100_000)) == 2
    lines = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]
    assert [line.get("file") for line in lines] == [None, f"{WEIGHTS}/__0_0.distcp"]
    stamp = (partial / WEIGHTS / "__0_0.distcp").stat().st_mtime_ns
    assert run("import", "--hf", base, "--out", out, "--resume") == 0
    assert (out / WEIGHTS / "__0_0.distcp").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_resume_refuses_another_source(tmp_path, capsys):
    base = sharded(tmp_path / "base", layers=8, vocab=4000)
    out = tmp_path / "out"
    assert finished(start(["import", "--hf", base, "--out", out, "--resume"], limit=100_000)) == 2
    edit(base / LAST, put(NORM, torch.full((64,), 2.0)))
    capsys.readouterr()
    assert run("import", "--hf", base, "--out", out, "--resume") == 2
    assert "was made from another source or with other options" in capsys.readouterr().err
    assert run("import", "--hf", base, "--out", out) == 0
