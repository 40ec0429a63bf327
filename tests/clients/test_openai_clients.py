"""LangChain and Inspect get the answers of the plain openai client from this package's server, or a refusal to show."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_serve import Served

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "openai-clients" / "bin" / "python"
PROMPTS = ["1 + 1 =", "2 + 2 =", "Once upon", "7 x 8 ="]
LANGCHAIN = """
import asyncio, json, sys
from langchain_openai import ChatOpenAI
from pydantic import create_model
url, prompts, stop = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
Answer = create_model("Answer", number=int)
same = {"model": "tiny-policy", "base_url": url, "api_key": "none", "temperature": 0, "max_tokens": 12}
def model(**options):
    return ChatOpenAI(**same, max_retries=0, **options)
def refusal(runnable):
    return str(runnable.batch(prompts[:1], return_exceptions=True)[0])
chat, found = model(stream_usage=True), {}
found["invoke"] = [chat.invoke(prompt).content for prompt in prompts]
found["batch"] = [answer.content for answer in chat.batch(prompts)]
found["stream"] = ["".join(chunk.content for chunk in chat.stream(prompt)) for prompt in prompts]
found["abatch"] = [answer.content for answer in asyncio.run(chat.abatch(prompts))]
first, *rest = chat.stream(prompts[0])
found["usage"] = sum(rest, first).usage_metadata
found["logprobs"] = model(logprobs=True, top_logprobs=2).invoke(prompts[0]).response_metadata["logprobs"]["content"]
found["stop"] = chat.invoke(prompts[0], stop=[stop]).content
shallow = {"exit_policy": {"kind": "fixed", "value": 2}}
found["exits"] = model(extra_body=shallow).invoke(prompts[0]).response_metadata["token_usage"]["mean_depth"]
found["tools"] = refusal(chat.bind_tools([Answer]))
for method in ("json_mode", "json_schema", "function_calling"):
    found[method] = refusal(chat.with_structured_output(Answer, method=method))
found["responses"] = refusal(model(use_responses_api=True))
print(json.dumps(found))
"""
INSPECT = """
import json, sys
from inspect_ai import Task, dataset, eval, log, scorer
from inspect_ai.model import GenerateConfig, get_model
url, prompts, target, provider = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
config = GenerateConfig(temperature=0, max_tokens=12)
model = get_model(f"{provider}/tiny-policy", base_url=url, api_key="none", config=config)
task = Task(dataset=[dataset.Sample(prompt, target=target) for prompt in prompts], scorer=scorer.includes())
read = log.read_eval_log(eval(task, model=model, display="none", log_dir="logs")[0].location)
answers = [sample.output.completion for sample in sorted(read.samples, key=lambda sample: sample.id)]
print(json.dumps([read.status, str(read.error), answers, [s.metrics["accuracy"].value for s in read.results.scores]]))
"""

pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment; run: make .venv-peers/openai-clients/.made"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("serve"), "--exits", "off")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def expected(served: Served) -> list[str]:
    ask, same = served.client.chat.completions.create, {"model": "tiny-policy", "temperature": 0, "max_tokens": 12}
    return [ask(messages=[{"role": "user", "content": p}], **same).choices[0].message.content for p in PROMPTS]


def run(folder: Path, script: str, served: Served, *arguments: str):
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("LANG", "INSPECT", "OPENAI"))}
    command = [str(PYTHON), "-c", script, f"{served.url}/v1", json.dumps(PROMPTS), *arguments]
    outside["HOME"] = str(folder)
    done = subprocess.run(command, capture_output=True, text=True, env=outside, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def langchain(served: Served, expected: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(tmp_path_factory.mktemp("langchain"), LANGCHAIN, served, expected[0][1:3])


@pytest.mark.parametrize("way", ["invoke", "batch", "stream", "abatch"])
def test_langchain_gets_the_answers_of_the_plain_client(langchain: dict, expected: list[str], way: str):
    assert langchain[way] == expected


def test_langchain_usage_logprobs_stop_and_exits(langchain: dict, expected: list[str]):
    assert langchain["usage"]["output_tokens"] == 12 and langchain["usage"]["input_tokens"] > 0
    assert "".join(entry["token"] for entry in langchain["logprobs"]) == expected[0]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in langchain["logprobs"])
    assert langchain["stop"] == expected[0][: expected[0].index(expected[0][1:3])]
    assert langchain["exits"] == pytest.approx((6 + 11 * 2) / 12 / 6)


REFUSALS = {"tools": "400 - tools: ", "function_calling": "400 - tool_choice: ", "responses": "404 - '/v1/responses'"}
REFUSALS |= dict.fromkeys(("json_mode", "json_schema"), "400 - response_format: ")


@pytest.mark.parametrize(("asked", "named"), REFUSALS.items())
def test_langchain_passes_on_what_is_refused(langchain: dict, asked: str, named: str):
    assert f"Error code: {named}" in langchain[asked]


@pytest.mark.parametrize("provider", ["openai-api/own", "vllm"])
def test_inspect_scores_the_answers_of_the_plain_client(
    served: Served, expected: list[str], tmp_path: Path, provider: str
):
    target = expected[0][1:3]
    share = sum(target in answer for answer in expected) / len(expected)
    assert run(tmp_path, INSPECT, served, target, provider) == ["success", "None", expected, [share]]
