"""Models and data by hub id: the real libraries against a hub on 127.0.0.1, then from their cache alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ee_megatron.config import hub as ids
from tests.covering import EXTENDED
from tests.hub import Hub
from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
RUN = (
    "device=cpu", "rollout=local", "rollout.max_new_tokens=8", "teacher=null", "task=dataset", "task.validation=4",
    "task.evaluation=8", "traces.problems=8", "calibrate.epochs=1",
)  # fmt: skip
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: other
  data_files: [{split: train, path: other/train.jsonl}]
---
"""
# Several commands in one process: imports are paid once.
DRIVER = """
import contextlib, io, json, sys
from ee_megatron import cli
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def stages(self) -> dict[str, str]:
        """The directories that a dry run names."""
        return dict(re.findall(r"^# (\w+): (?:\S*/)?\w+-([0-9a-f]{8})$", self.out, re.MULTILINE))


def rows(count: int, text: str = "What is {} + 1?") -> str:
    return "".join(json.dumps({"question": text.format(i), "answer": f"so #### {i + 1}"}) + "\n" for i in range(count))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def hub(tmp_path: Path, model: Path) -> Iterator[Hub]:
    served = Hub(tmp_path / "hub")
    served.commit("models/org/tiny", model)
    config = (model / "config.json").read_text()
    for name, other in (("pickle", "pytorch_model.bin"), ("gated", "model.safetensors")):
        served.commit(f"models/org/{name}", {"config.json": config, other: "x"})
    served.gated.add("models/org/gated")
    data = {"main/train.jsonl": rows(80), "main/test.jsonl": rows(20, "And {} + 1?"), "other/train.jsonl": rows(9)}
    served.commit("datasets/org/sums", {"README.md": CARD, **data})
    served.commit("datasets/org/two", {"README.md": CARD.replace("main\n", "first\n"), **data})
    yield served
    served.close()


def run(hub: Hub, folder: Path, *commands: list[str], **environment: str) -> list[Done]:
    """Commands, several in one process, whose cache is folder/home and working directory `folder`."""
    words = ["-m", "ee_megatron.cli", *commands[0]] if len(commands) == 1 else ["-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=240,
        env=hub.environment(folder / "home", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **environment),
    )  # fmt: skip
    if len(commands) == 1:
        return [Done(done.returncode, done.stdout, done.stderr)]
    results = [Done(*json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(results) == len(commands), done.stderr
    return results


def settings(model: str = "org/tiny", data: str = "org/sums", *more: str) -> list[str]:
    return ["name=x", f"model.path={model}", f"task.path={data}", *RUN, *more]


def test_a_dry_run_names_the_commits_and_fetches_neither_weights_nor_rows(hub: Hub, tmp_path: Path) -> None:
    (done,) = run(hub, tmp_path, ["run", *settings(), "--dry-run"])
    assert done.code == 0, done.err
    wanted = (
        f"model.path=org/tiny@{hub.refs['models/org/tiny']['main']}",
        f"task.path=org/sums@{hub.refs['datasets/org/sums']['main']}",
    )
    (command,) = re.findall(r"^# command: (.*)$", done.out, re.MULTILINE)
    assert all(command.split().count(text) == 1 for text in wanted) and "org/tiny " not in command
    assert re.search(r"^# org/tiny: 0\.\d+ MB", done.out, re.MULTILINE)
    assert re.search(r"^# org/sums: 0\.\d+ MB", done.out, re.MULTILINE) and "refused" not in done.out
    assert not [line for line in hub.asked if line.endswith((".safetensors", ".jsonl"))]
    # What it left at the hub is missed where there is no network.
    (offline,) = run(hub, tmp_path, ["traces", *settings()], HF_HUB_OFFLINE="1")
    assert offline.code == 2 and re.search(
        r"^error: model\.path=org/tiny@\w+: .*hf download", offline.err, re.MULTILINE
    )
    assert not (tmp_path / "runs").exists()


def test_what_the_hub_does_not_give_is_one_line_and_nothing_is_written(hub: Hub, tmp_path: Path) -> None:
    cases: dict[str, tuple[list[str], str]] = {
        "unknown model": (["rl", *settings("org/none")], r"model\.path=org/none: .*HF_TOKEN"),
        "unknown data": (["traces", *settings(data="org/none")], r"task\.path=org/none: .*HF_TOKEN"),
        "revision": (["plan", *settings("org/tiny@nowhere")], r"model\.path=org/tiny@nowhere: .*branch"),
        "gated": (["traces", *settings("org/gated")], r"model\.path=org/gated: gated.*HF_TOKEN"),
        "no safetensors": (["traces", *settings("org/pickle")], r"model\.path=org/pickle@\w+: .*safetensors"),
        "no such configuration": (
            ["traces", *settings(data="org/sums:x")],
            r"task\.path=org/sums:x@\w+: .*main, other",
        ),
        "which configuration": (["traces", *settings(data="org/two")], r"task\.path=org/two@\w+: .*org/two:first"),
        "generate": (["generate", "--model", "org/none", "--prompt", "x"], r"--model=org/none: "),
        "convert": (["convert", "roundtrip", "--hf", "org/none"], r"--hf=org/none: "),
        "sweep": (["sweep", *settings("org/none"), "rl.steps=1,2", "--dry-run"], r".*: model\.path=org/none: "),
    }
    for (name, (_, wanted)), done in zip(
        cases.items(), run(hub, tmp_path, *(words for words, _ in cases.values())), strict=True
    ):
        said = [line for line in done.err.splitlines() if "downloading" not in line]
        assert done.code == 2 and len(said) == 1 and re.match(f"error: {wanted}", said[0]), (name, done)
    assert not (tmp_path / "runs").exists()


def test_a_hub_that_does_not_answer_is_given_up_on_and_asked_once(hub: Hub, tmp_path: Path) -> None:
    hub.silent = True
    words = ["traces", *settings(data=str(ROOT / "README.md"))]
    for done in run(hub, tmp_path, words, words, HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1"):
        assert done.code == 2 and re.search(r"^error: model\.path=org/tiny: .*network", done.err, re.MULTILINE)
    assert [line for line in hub.asked if "org/tiny" in line] == ["GET /api/models/org/tiny"]
    offline = run(hub, tmp_path, words, HF_HUB_OFFLINE="1")[0]
    assert offline.code == 2 and re.search(r"^error: model\.path=org/tiny: .*HF_HUB_OFFLINE", offline.err, re.MULTILINE)
    assert not (tmp_path / "runs").exists()


def test_a_moved_branch_is_another_stage_and_the_old_one_is_found_by_its_commit(
    hub: Hub, tmp_path: Path, model: Path
) -> None:
    first = hub.refs["models/org/tiny"]["main"]
    dry = ["run", *settings(), "--dry-run"]
    (before,) = run(hub, tmp_path, dry)
    hub.commit("models/org/tiny", model)
    now, then = run(hub, tmp_path, dry, ["run", *settings(f"org/tiny@{first}"), "--dry-run"])
    assert before.stages and then.stages == before.stages
    assert not {*now.stages.values()} & {*before.stages.values()}


def test_local_paths_are_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("", "gpt2", "/a/b", "a/b/c", "./a", "models/x", "runs/x", "my/rows.jsonl", "a/b:c@d e", "../a"):
        assert ids.parse(path) is None and ids.pin("model.path", path) == path and ids.directory(path) == Path(path)
    assert ids.parse("a/b-1.5:c@refs/pr/1") == ("a/b-1.5", "c", "refs/pr/1") and ids.parse("org/tiny") is not None
    (tmp_path / "org/tiny").mkdir(parents=True)
    assert ids.parse("org/tiny") is None and ids.pin("model.path", "org/tiny") == "org/tiny"


@pytest.mark.parametrize("answers", ["generate", pytest.param("convert", marks=EXTENDED)])
def test_what_was_fetched_serves_without_a_network(hub: Hub, tmp_path: Path, answers: str) -> None:
    prompt = ["--prompt", "x", "--max-new-tokens", "4"]
    command = {"generate": ["generate", "--model", "org/tiny", *prompt], "convert": ["convert", "inspect", "org/tiny"]}
    online = run(hub, tmp_path, command[answers])[0]
    asked = len(hub.asked)
    plan = ["plan", "name=x", "model.path=org/tiny", "--mean-depth=1"]
    offline, dry = run(hub, tmp_path, command[answers], plan, HF_HUB_OFFLINE="1")
    assert online.code == offline.code == dry.code == 0 and len(hub.asked) == asked, (online, offline, dry)
    assert online.out == offline.out and (answers == "convert" or "tiny-base model" in online.out)


@EXTENDED
def test_stages_and_their_ranks_run_by_id_and_resume_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    traces, calibrated = (
        run(hub, tmp_path, ["traces", *settings()])[0],
        run(hub, tmp_path, ["calibrate", *settings(), "parallel.data=2"], HF_HUB_OFFLINE="1")[0],
    )
    assert traces.code == 0 and calibrated.code == 0, (traces, calibrated)
    stages = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs/x").glob("*-*"))
    assert stages == ["calibrate", "traces"]
    asked = len(hub.asked)
    commit = hub.refs["models/org/tiny"]["main"]
    again, spec, sweep = run(
        hub, tmp_path, ["traces", *settings(f"org/tiny@{commit}")], ["slurm-spec", "traces", *settings()],
        ["sweep", *settings(), "rl.steps=1,2", "--last", "rl", "--dry-run"], HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert "finished before" in again.out and "done=yes" in spec.out and sweep.code == 0, (again, spec, sweep)
    assert len(hub.asked) == asked
