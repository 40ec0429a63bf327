"""Environments of the real verifiers library: problems, scores and refusals, with packages of this test's own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "verifiers" / "bin" / "python"
ENVIRONMENT = """
import socket
import verifiers.v1 as vf
class Data(vf.TaskData):
    answer: str
class Config(vf.TasksetConfig):
    numbers: int = 60
class Turned(vf.Task[Data]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        assert trace.num_turns == 1 and [m.role for m in trace.messages] == ["system", "user", "assistant"]
        return float(trace.last_reply == self.data.answer)
    @vf.reward(weight=0.25)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 9)
class Tools(Turned):
    @classmethod
    def toolsets(cls, config):
        return [vf.Toolset(vf.ToolsetConfig())]
class Runtime(Turned):
    @vf.reward
    async def ran(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 1.0
class Judge(Turned):
    @vf.reward
    async def asked(self, trace: vf.Trace) -> float:
        socket.create_connection(("127.0.0.1", 9))
        return 1.0
class Turns(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task, agents):
        pass
class Set(vf.Taskset[KIND, Config]):
    def load(self):
        for n in range(self.config.numbers):
            said = {"prompt": f"Turn {n:03d} round.", "system_prompt": "Digits only.", "answer": f"{n:03d}"[::-1]}
            yield KIND(Data(**said), self.config.task)
__all__ = EXPORTED
"""
PLAIN, OLD = (("Turned", ["Set"]), "def load_environment():\n    pass\n")
PACKAGES = {"turned": PLAIN, "turns": ("Turned", ["Set", "Turns"])}
PACKAGES |= {kind: (kind.title(), ["Set"]) for kind in ("tools", "runtime", "judge")}
SCRIPT = """
import json, sys
from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import VerifierPool, make_task, try_reward
def made(path, **arguments):
    sizes = {"train": 6, "validation": 4, "evaluation": 8}
    return make_task(TaskConfig("verifiers", path=path, arguments=arguments, **sizes), str)
def refusal(path, **arguments):
    try:
        task = made(path, **arguments)
        try_reward(task, task.prompts("train")[0])
    except ValueError as error:
        return str(error)
task, again = made("own/turned@1.0"), made("turned", numbers=40)
prompt = task.prompts("train")[0]
texts = [prompt.answer, f"<think>Hm.</think>{prompt.answer}", "x", "x" * 9]
with VerifierPool(task, deadline_s=60) as pool:
    verdicts = pool.verify_many([(prompt, text) for text in texts])
splits = [[p.text for p in task.prompts(split)] for split in ("train", "validation", "evaluation")]
refused = {path: refusal(path) for path in sys.argv[1:]} | {"argument": refusal("turned", letters=2)}
print(json.dumps([prompt.text, [[v.score, v.correct] for v in verdicts], splits, len(again._entries), refused]))
"""

pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment; run: make .venv-peers/verifiers/.made"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environments")
    for name, (kind, exported) in PACKAGES.items():
        (folder / name).mkdir()
        text = ENVIRONMENT.replace("KIND", kind).replace("EXPORTED", repr(exported))
        (folder / name / "__init__.py").write_text(text)
    (folder / "old.py").write_text(OLD)
    return folder


def run(packages: Path, *words: str) -> subprocess.CompletedProcess[str]:
    outside = {**os.environ, "PYTHONPATH": f"{packages}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(PYTHON), *words], capture_output=True, text=True, env=outside, cwd=packages, timeout=900)


@pytest.fixture(scope="module")
def found(packages: Path) -> list:
    done = run(packages, "-c", SCRIPT, *PACKAGES, "old", "nowhere")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_problems_are_messages_and_rewards_add_up(found: list):
    text, scores, splits, fewer, _ = found
    said, turn = "{'role': 'system', 'content': 'Digits only.'}", "{'role': 'user', 'content': 'Turn "
    assert text.startswith(f"[{said}, {turn}") and text.endswith(" round.'}]")
    assert scores == [[1.0, True], [1.0, True], [0.25, False], [0.0, False]]
    assert [len(split) for split in splits] == [6, 4, 8] and len({t for split in splits for t in split}) == 18
    assert fewer == 40


@pytest.mark.parametrize(
    ("path", "named"),
    {
        "turns": "has agents of its own", "tools": "has tools", "runtime": "has a container or runtime",
        "judge": "no score for a reference answer", "old": "no `__all__`", "argument": "letters",
        "nowhere": "the package nowhere is not installed; prime env install nowhere",
    }.items(),
)  # fmt: skip
def test_what_a_text_alone_cannot_be_scored_by_is_refused_in_one_line(found: list, path: str, named: str):
    refused = found[-1]
    assert refused["turned"] is None
    assert refused[path].startswith("task.path=") and named in refused[path] and "\n" not in refused[path]


def test_a_dry_run_takes_one_and_a_run_refuses_tools_before_anything_starts(packages: Path, tmp_path: Path):
    words = ["-m", "ee_megatron.cli", "run", "experiment=your_data", "task=verifiers", "task.arguments={numbers:50}"]
    words += ["task.validation=4", "task.evaluation=8", "device=cpu", "model.dtype=float32", "exits.depths=[2,4]"]
    words += ["rollout.prompt_template=plain", "rollout.max_new_tokens=32", f"runs={tmp_path / 'runs'}"]
    words += [f"model.path={tiny_hf('llama', tmp_path / 'model')}", "traces.problems=16", "calibrate.batch_size=8"]
    taken = run(packages, *words, "task.path=own/turned", "--dry-run")
    assert taken.returncode == 0 and "not ready here" not in taken.stdout, taken.stdout + taken.stderr
    refused = run(packages, *words, "task.path=own/tools")
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert refused.returncode == 2 and "has tools; expected single turns" in line, refused.stdout + refused.stderr
    assert not (tmp_path / "runs").exists()
