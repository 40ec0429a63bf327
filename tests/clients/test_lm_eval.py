"""EleutherAI's lm-evaluation-harness: an export with gates as its `hf` model and this package's server as its
`local-completions` give the numbers of plain transformers, on tasks that lie on this disk."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ee_megatron.checkpoint.hf_export import export_hf
from tests.integration.test_serve import Served

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "lm-eval" / "bin" / "python"
SCORES = Path(__file__).with_name("lm_eval_scores.py")
OFF, SHALLOW = {"kind": "off"}, {"kind": "fixed", "value": 2}

pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason="lm-eval has no environment; run: make .venv-peers/lm-eval/.made"),
    pytest.mark.timeout(1800),
]

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %(data)s}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
TEXT = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: %(data)s}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "Q"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


class Harness:
    """The tasks, the models, and a server of the same weights."""

    def __init__(self, directory: Path):
        self.directory, self.runs = directory, 0
        self.tasks = directory / "tasks"
        self.tasks.mkdir()
        data = self.tasks / "questions.jsonl"
        lines = [
            {"question": f"{a} + {b}", "choices": [f" {a + b + d}" for d in (0, 1, -1, 10)], "label": 0}
            for a, b in ((1, 2), (3, 4), (7, 8), (12, 9), (30, 5), (6, 6))
        ]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name, text in (("choice", CHOICE), ("text", TEXT)):
            (self.tasks / f"{name}.yaml").write_text(text % {"data": json.dumps(str(data))})
        self.served = Served(directory, "--exits", "off")
        self.exit = directory / "embedded"
        self.plain = directory / "plain"
        export_hf(self.served.model, self.served.policy, self.exit, gates="embed")
        export_hf(self.served.model, self.served.policy, self.plain, gates="drop")

    def run(self, model: str, arguments: dict, exits: dict | None = None) -> dict:
        self.runs += 1
        out = self.directory / f"scores-{self.runs}.json"
        command = [str(PYTHON), str(SCORES), str(self.tasks), str(out), model, json.dumps(arguments)]
        command.append(json.dumps({"exit_policy": exits} if exits else {}))
        home = self.directory / "home"
        environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "none", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text())

    def hf(self, path: Path, exits: dict | None = None) -> dict:
        arguments = {"pretrained": str(path), "trust_remote_code": True, "device": "cpu", "dtype": "float32"}
        return self.run("hf", {**arguments, "batch_size": 1, "max_length": 512}, exits)

    def server(self, exits: dict | None = None, **options) -> dict:
        arguments = {
            "model": "tiny-policy",
            "base_url": f"{self.served.url}/v1/completions",
            "tokenizer": str(self.served.model),
            "tokenizer_backend": "huggingface",
            "max_length": 512,
            **options,
        }
        return self.run("local-completions", arguments, exits)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    made = Harness(tmp_path_factory.mktemp("harness"))
    yield made
    made.served.stop()


@pytest.fixture(scope="module")
def transformers_scores(harness: Harness) -> dict:
    """The adapters merged into a plain Llama: transformers' own class, without anything of this package."""
    return harness.hf(harness.plain)


def same(found: dict, expected: dict) -> None:
    assert found["scores"] == expected["scores"]
    pairs = zip(found["answers"]["local_choice"], expected["answers"]["local_choice"], strict=True)
    for ours, theirs in pairs:
        flat_ours, flat_theirs = ([number for resp in resps for number in resp[0]] for resps in (ours, theirs))
        assert [float(x) for x in flat_ours] == pytest.approx([float(x) for x in flat_theirs], abs=2e-4)
    assert found["answers"]["local_text"] == expected["answers"]["local_text"]


def test_the_export_scores_as_transformers_does_at_full_depth(harness: Harness, transformers_scores: dict):
    assert len({json.dumps(a) for a in transformers_scores["answers"]["local_text"]}) > 1
    same(harness.hf(harness.exit, OFF), transformers_scores)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "num_concurrent": 1}, {"num_concurrent": 4}], ids=str)
def test_the_server_scores_as_transformers_does_at_full_depth(
    harness: Harness, transformers_scores: dict, options: dict
):
    same(harness.server(**options), transformers_scores)


def test_exits_are_an_argument_and_change_what_is_generated_alike(harness: Harness, transformers_scores: dict):
    export, server = harness.hf(harness.exit, SHALLOW), harness.server(SHALLOW)
    same(server, export)
    # What is read as a prompt runs at full depth, so likelihoods stay; what is generated leaves at the exit.
    assert server["scores"]["local_choice"] == transformers_scores["scores"]["local_choice"]
    assert server["answers"]["local_text"] != transformers_scores["answers"]["local_text"]
