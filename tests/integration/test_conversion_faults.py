"""A conversion that is interrupted, killed or out of disk: what it says, what it leaves, what --resume goes on from."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ee_megatron.checkpoint import workspace
from ee_megatron.checkpoint.sources import WEIGHTS
from ee_megatron.checkpoint.store import read_manifest
from ee_megatron.checkpoint.workspace import JOURNAL, Workspace, partial_of
from tests.conversion import LAST, contents, edit, in_shards, made, refused, run
from tests.covering import EXTENDED
from tests.tiny import tiny_hf


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A limit on the size of files is what a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_leaves_nothing_and_the_same_command_succeeds_later(tmp_path, capsys, command):
    base = tiny_hf("llama", tmp_path / "base", layers=2, vocab=4000, tied=False)
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    made("import --hf", base, "--out", megatron)
    words = {
        "import": ("import --hf", base, "--out", out),
        "export": ("export --max-shard-size 300KB --checkpoint", megatron, "--out", out),
    }[command]
    before = contents(tmp_path)
    with full_disk(400_000):
        # Which disk is full, if there are several.
        refused(capsys, *words, names=(f"{tmp_path / '.out.partial'}/",))
    assert contents(tmp_path) == before
    made(*words)


def test_resume_writes_only_what_is_missing_and_only_of_the_same_source(tmp_path, capsys):
    base, out, partial = tmp_path / "base", tmp_path / "out", tmp_path / ".out.partial"
    words = ("import --hf", in_shards(tiny_hf("llama", base, layers=2)), "--out", out)
    # The embedding fits, the first layer does not.
    with full_disk(100_000):
        refused(capsys, *words, "--resume", names=(f"{partial}/",))
    lines = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]
    assert [line.get("file") for line in lines] == [None, f"{WEIGHTS}/__0_0.distcp"]
    stamp = (partial / WEIGHTS / "__0_0.distcp").stat().st_mtime_ns
    shutil.copytree(base, tmp_path / "kept")
    edit(base / LAST, lambda tensors: tensors["model.norm.weight"].fill_(2.0))
    refused(capsys, *words, "--resume", names=(str(out), partial.name, "--resume"))
    shutil.rmtree(base)
    (tmp_path / "kept").rename(base)
    made(*words, "--resume")
    assert (out / WEIGHTS / "__0_0.distcp").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_an_interrupted_conversion_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    base, out = tiny_hf("llama", tmp_path / "base"), tmp_path / "out"
    partial, finish = partial_of(out), Workspace.finish

    def interrupted(space: Workspace, file: str, facts: dict) -> None:
        finish(space, file, facts)
        if file.endswith("__2_0.distcp"):
            os.kill(os.getpid(), signal.SIGINT)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "finish", interrupted)
        assert run("import --hf", base, "--out", out) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("interrupted") and str(partial) in error and "--resume" in error
    assert (partial / JOURNAL).read_text().count("\n") > 2 and not out.exists()
    made("import --resume --quiet --hf", base, "--out", out)
    assert not partial.exists()


def test_all_files_there_but_not_yet_published_is_no_checkpoint(tmp_path, capsys, monkeypatch):
    base = tiny_hf("llama", tmp_path / "base")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for words in (("import --hf", base), ("export --checkpoint", tmp_path / "import")):
        out = tmp_path / words[0].split()[0]
        with monkeypatch.context() as patch:
            patch.setattr(workspace, "_publish", stopped)
            assert run(*words, "--out", out) == 130
        refused(capsys, "inspect", partial_of(out), names=(str(partial_of(out)), "--resume"))
        made(*words, "--resume --out", out)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=EXTENDED)])
def test_killed_at_random_moments_and_resumed(tmp_path, capsys, kills):
    assert kills_and_resumes(tmp_path, capsys, kills) > 0


def kills_and_resumes(tmp_path: Path, capsys, kills: int, **sizes) -> int:
    """Kill imports and exports at random moments, until `kills` of each hit one under way (within a bound); at the end
    each is what one go makes. Returns the kills that hit."""
    base = in_shards(tiny_hf("llama", tmp_path / "base", layers=12, hidden=128, intermediate=256, tied=False, **sizes))
    chance, hits, before = random.Random(0), 0, contents(base)
    straight, plain = tmp_path / "straight", tmp_path / "plain"
    made("import --tp 2 --hf", base, "--out", straight)
    export = ("export --max-shard-size 500KB --checkpoint", straight)
    made(*export, "--out", plain)
    for number, (words, expected) in enumerate(((("import --tp 2 --hf", base), straight), (export, plain))):
        out, partial = tmp_path / f"out{number}", tmp_path / f".out{number}.partial"
        goal, took = hits + kills, seconds(*words, "--out", tmp_path / "timed")
        shutil.rmtree(tmp_path / "timed")
        for _ in range(4 * kills):
            if hits == goal:
                break
            process = multiprocessing.get_context("fork").Process(target=run, args=(*words, "--resume --out", out))
            process.start()
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
            refused(capsys, "inspect", partial, names=(str(partial),))
        made(*words, "--resume --out", out)
        assert_same(out, expected)
        assert not partial.exists()
    assert contents(base) == before
    return hits


def seconds(*words: object) -> float:
    """Time of a command in a process like those that are killed: what it imports is there already."""
    began = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=run, args=words)
    process.start()
    process.join()
    return time.monotonic() - began


def assert_same(out: Path, expected: Path) -> None:
    assert read_manifest(out)["sha256"] == read_manifest(expected)["sha256"]
    volatile = {"manifest.json": None, f"{WEIGHTS}/.metadata": None}
    assert contents(out) | volatile == contents(expected) | volatile
