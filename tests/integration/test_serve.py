"""The server in a process of its own, asked through the official client: same answers as the engine's, and limits."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from ee_megatron.exit_rules import ExitRule, Off, Prescribed, Sample
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, initial_policy, save_policy
from ee_megatron.rollout import LocalPool, SamplingParams
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.server.protocol import BadRequest
from ee_megatron.rollout.server.worker import ServingEngine, Ticket
from ee_megatron.types import Rollout
from tests.covering import EXTENDED
from tests.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
KEY = "a key for tests"
# Address space that leaves the engine little beside torch's libraries.
LIMIT_KIB = 2_000_000
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
# Greedy answers of the tiny model run in circles: nothing ends them but their length.
ENDLESS = {"prompt": "Once upon", "temperature": 0, "extra_body": {"exit_policy": {"kind": "off"}}}


class Served:
    """`ee-megatron serve` on a tiny model with a policy whose gates fire about half of the time."""

    def __init__(self, directory: Path, *options: str, key: str | None = None, memory_kib: int | None = None):
        self.model, self.policy = directory / "tiny", directory / "policy"
        if not self.model.is_dir():
            make_model(self.model, self.policy)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"EE_API_KEY": key} if key else {}
        command = ["serve", "--model", str(self.model), "--policy", str(self.policy), "--port", "0", *options]

        def limit() -> None:
            if memory_kib is not None:
                resource.setrlimit(resource.RLIMIT_AS, (memory_kib << 10,) * 2)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "ee_megatron.cli", *command, "model.dtype=float32"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
            preexec_fn=limit,
        )
        # A server that never says where it is must not hold the tests up.
        overdue = threading.Timer(300, self.process.kill)
        overdue.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        overdue.cancel()
        found = re.fullmatch(
            r"serving tiny-policy on (http://127\.0\.0\.1:\d+)/v1 \(cache: (\d+) MiB by (.+), (\d+) tokens; "
            r"a request: (\d+), its prompt (\d+)\)\n",
            line,
        )
        if found is None:
            self.process.kill()
            pytest.fail(f"the server said {line!r}")
        self.url, self.cache_mib, self.limit, self.longest = found[1], int(found[2]), found[3], int(found[5])
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=60)

    def health(self) -> dict:
        headers = {"Authorization": f"Bearer {self.client.api_key}"}
        return httpx.get(f"{self.url}/health", headers=headers, timeout=10).json()

    def until(self, what, seconds: float = 20) -> dict:
        deadline = time.monotonic() + seconds
        while not what(health := self.health()):
            assert time.monotonic() < deadline, health
            time.sleep(0.02)
        return health

    def complete(self, prompt="1 + 1 =", **options):
        options = {"max_tokens": 24, "seed": 5, **options}
        return self.client.completions.create(model="tiny-policy", prompt=prompt, **options)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def make_model(model: Path, policy: Path) -> None:
    tiny_hf("llama", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20000}))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    tensors = initial_policy(HFDirectory(model).dims, SPEC, 0)
    generator = torch.Generator().manual_seed(1)
    tensors = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    policy.mkdir()
    save_policy(policy, SPEC, {n: t + 4 if n.endswith("fc2.bias") else t for n, t in tensors.items()})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--rows", "4", "--queue", "4", "--exits", "sample", "--max-length", "16000")
    served = Served(tmp_path_factory.mktemp("serve"), *options, key=KEY)
    yield served
    served.stop()


def engine_answers(
    served: Served, prompt: str, samples: int, sampling: SamplingParams, exits: ExitRule
) -> list[Rollout]:
    from ee_megatron.policy import load_policy

    pool = LocalPool(served.model, SPEC)
    pool.decoder.load_policy(load_policy(served.policy)[1])
    scheduler = Scheduler(pool.decoder, pool.tokenizer, 4)
    ids = [scheduler.add(Request(prompt, sampling, exits, 5, "", k)) for k in range(samples)]
    while scheduler.busy:
        scheduler.advance()
    return [scheduler.take(i, 0) for i in ids]


def test_answers_streamed_or_not_are_the_engines_with_depths_and_logprobs(served: Served):
    expected = engine_answers(served, "1 + 1 =", 3, SamplingParams(0.8, 24, top_p=0.9), Sample())
    options = {"n": 3, "temperature": 0.8, "top_p": 0.9, "logprobs": 0}
    whole = served.complete(**options)
    assert [choice.text for choice in whole.choices] == [r.text for r in expected]
    assert {d for r in expected for d in r.exit_depths.tolist()} == {2, 4, 6}
    for choice, rollout in zip(whole.choices, expected, strict=True):
        assert choice.early_exit["depths"] == rollout.exit_depths.tolist()
        assert choice.early_exit["token_ids"] == rollout.tokens.tolist()
        assert choice.early_exit["logprobs"] == pytest.approx(rollout.token_logprobs.tolist(), abs=1e-4)
        assert choice.logprobs.token_logprobs == pytest.approx(rollout.full_logprobs.tolist(), abs=1e-4)
        assert choice.finish_reason == ("stop" if rollout.finished else "length")
    assert whole.usage.completion_tokens == sum(r.length for r in expected) and whole.usage.prompt_tokens == 7
    texts, depths, usages = ["", "", ""], [[], [], []], []
    for chunk in served.complete(stream=True, stream_options={"include_usage": True}, **options):
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            depths[choice.index] += choice.early_exit["depths"]
    assert texts == [r.text for r in expected] and depths == [r.exit_depths.tolist() for r in expected]
    assert usages[0].completion_tokens == whole.usage.completion_tokens


def test_vllms_fields_mean_what_they_mean_to_the_engine(served: Served):
    penalties = {"repetition_penalty": 1.3, "min_p": 0.2}
    own = {"presence_penalty": 0.5, "frequency_penalty": -0.3}
    sampling = SamplingParams(0.8, 24, **penalties, **own, stop_token_ids=(101,))
    expected = engine_answers(served, "1 + 1 =", 2, sampling, Sample())
    asked = {"n": 2, "temperature": 0.8, "logprobs": 0, **own}
    found = served.complete(**asked, extra_body={**penalties, "stop_token_ids": [101]})
    for choice, rollout in zip(found.choices, expected, strict=True):
        assert choice.text == rollout.text and choice.early_exit["token_ids"] == rollout.tokens.tolist()
        assert choice.early_exit["logprobs"] == pytest.approx(rollout.token_logprobs.tolist(), abs=1e-4)
        assert choice.logprobs.token_logprobs == pytest.approx(rollout.full_logprobs.tolist(), abs=1e-4)
    assert [choice.text for choice in served.complete(**asked).choices] != [choice.text for choice in found.choices]


def test_chat_goes_through_the_models_template(served: Served):
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": [{"type": "text", "text": "9"}]}]
    asked = {"model": "tiny-policy", "messages": messages, "max_completion_tokens": 16, "seed": 5, "logprobs": True}
    (expected,) = engine_answers(served, "[system]Count.\n[user]9\n[assistant]", 1, SamplingParams(1.0, 16), Sample())
    answer = served.client.chat.completions.create(**asked)
    choice = answer.choices[0]
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(
        expected.full_logprobs.tolist(), abs=1e-4
    )
    pieces = list(served.client.chat.completions.create(stream=True, **asked))
    assert "".join(piece.choices[0].delta.content for piece in pieces) == expected.text
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].choices[0].finish_reason


def test_exit_policies_stop_strings_and_lists_of_prompts(served: Served):
    def depths(kind: str, value: float = 0.5) -> list[int]:
        answer = served.complete(extra_body={"exit_policy": {"kind": kind, "value": value}})
        return answer.choices[0].early_exit["depths"]

    assert set(depths("off")) == {6} and set(depths("fixed", 2)[1:]) == {2} and depths("fixed", 2)[0] == 6
    assert set(depths("threshold", 0.0)[1:]) == {2}
    full = served.complete(extra_body={"exit_policy": "off"}).choices[0]
    speculated = served.complete(extra_body={"exit_policy": "speculate:4"}).choices[0]
    assert speculated.text == full.text and set(speculated.early_exit["depths"]) == {6}
    text = served.complete().choices[0].text
    stop = text[4:6]
    cut = served.complete(stop=[stop])
    assert cut.choices[0].text == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    both = served.complete(prompt=["1 + 1 =", "2 + 2 ="], n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3] and both.choices[0].text == text
    assert served.complete(prompt=[ord(c) for c in "1 + 1 ="]).choices[0].text == text
    assert served.complete(seed=None).choices[0].text != served.complete(seed=None).choices[0].text
    assert {m.id for m in served.client.models.list()} == {"tiny-policy"}


def test_requests_join_running_ones_and_answer_as_if_alone(served: Served):
    alone = served.complete().choices[0].text
    with served.complete(max_tokens=15000, stream=True, **ENDLESS) as long:
        iterator = iter(long)
        next(iterator)
        for _ in range(3):
            assert served.complete().choices[0].text == alone
        # The long one was under way all the time.
        assert served.health()["running"] == 1
        assert next(iterator).choices[0].finish_reason is None


def test_a_client_that_leaves_frees_its_place(served: Served):
    before = served.until(lambda health: health["running"] == 0)
    with served.complete(max_tokens=15000, stream=True, **ENDLESS) as answer:
        next(iter(answer))
        assert served.health()["running"] == 1
    served.until(lambda health: health["running"] == 0)
    with pytest.raises(openai.APITimeoutError):
        served.complete(max_tokens=15000, timeout=1.0, **ENDLESS)
    after = served.until(lambda health: health["running"] == 0)
    assert after["cancelled"] == before["cancelled"] + 2
    assert 0 < after["mean_depth"] <= 1


def test_a_full_queue_is_429_and_empties_again(served: Served):
    before = served.until(lambda health: health["running"] == 0)
    with served.complete(max_tokens=15000, n=8, stream=True, **ENDLESS) as answer:
        next(iter(answer))
        health = served.health()
        assert (health["running"], health["queue"]) == (4, 4)
        with pytest.raises(openai.RateLimitError):
            served.complete()
    served.until(lambda health: health["running"] == 0)
    assert served.complete().choices[0].text
    assert served.health()["refused"] == before["refused"] + 1


@EXTENDED
def test_sigterm_lets_a_running_request_finish_and_ends_one_that_takes_too_long(tmp_path: Path):
    for max_tokens, finishes in ((1500, True), (19000, False)):
        served = Served(tmp_path, "--grace", "60" if finishes else "1")
        received, reason, told, started = "", None, "", time.monotonic()
        try:
            for number, chunk in enumerate(served.complete(max_tokens=max_tokens, stream=True, **ENDLESS)):
                if number == 3:
                    served.process.send_signal(signal.SIGTERM)
                received += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason
        except openai.APIError as error:
            # The last event says why there is no more.
            told = str(error)
        assert (reason == "length") == finishes and received
        assert ("the server is stopping" in told) == (not finishes)
        assert served.process.wait(30) == 0
        assert finishes or time.monotonic() - started < 25
        with pytest.raises(openai.APIConnectionError):
            served.complete()


def test_a_failure_in_the_engine_ends_the_request_that_caused_it_and_no_other(tmp_path: Path):
    pool = LocalPool(tiny_hf("llama", tmp_path), SPEC)
    engine = ServingEngine(pool.decoder, pool.tokenizer, rows=2, queue_limit=8)
    try:
        told: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(4)]
        # A replay without depths fails once it is under way.
        wrong = Request("1", SamplingParams(0, 400), Prescribed(), prompt_id="wrong")
        right = Request("2", SamplingParams(0, 400), Off())
        tickets = [Ticket(request, line.put) for request, line in zip((wrong, right, right), told, strict=False)]
        engine.submit(tickets)
        while not isinstance(outcome := told[0].get(timeout=30), Exception):
            assert outcome.finished is None
        # Its neighbours in the batch go on to their ends.
        for line in told[1:3]:
            assert [line.get(timeout=30).finished for _ in range(400)] == [None] * 399 + ["length"]
        engine.submit([Ticket(Request("2", SamplingParams(0, 5), Off()), told[3].put)])
        # Cancelled after its end, under a number that another request has by now.
        engine.cancel(tickets)
        assert [told[3].get(timeout=30).finished for _ in range(5)] == [None] * 4 + ["length"]
        health = engine.health()
        assert (health["failed"], health["answered"], health["running"], health["queue"]) == (1, 3, 0, 0)
    finally:
        engine.close()
    with pytest.raises(BadRequest):
        engine.submit([Ticket(right, told[0].put)])


@EXTENDED
def test_under_a_memory_limit_long_requests_are_refused_or_wait_and_nobody_elses_stream_ends(tmp_path: Path):
    served = Served(tmp_path, "--rows", "64", memory_kib=LIMIT_KIB)
    try:
        assert served.limit == "ulimit -v" and 0 < served.cache_mib < 64 * 20000 * 1536 / 2**20
        streams = [served.complete(max_tokens=1500, stream=True, seed=i, **ENDLESS) for i in range(3)]
        begun = [next(iter(stream)) for stream in streams]
        assert begun[0].choices
        hostile = [threading.Thread(target=ask_for_all, args=(served,)) for _ in range(6)]
        for thread in hostile:
            thread.start()
        for stream in streams:
            *_, last = stream
            assert last.choices[0].finish_reason == "length"
        assert served.complete().choices[0].text and served.health()["failed"] == 0
    finally:
        served.process.kill()
        served.process.wait(30)


def ask_for_all(served: Served) -> None:
    with contextlib.suppress(openai.APIError, httpx.HTTPError):
        served.complete(max_tokens=served.longest - 16, n=4, **ENDLESS)


def test_generate_takes_a_model_and_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from ee_megatron import cli

    make_model(tmp_path / "tiny", tmp_path / "policy")
    where = ["--model", str(tmp_path / "tiny"), "--policy", str(tmp_path / "policy"), "model.dtype=float32"]
    assert cli.main(["generate", "--prompt", "1 + 1 =", "--max-new-tokens", "9", "--exits", "fixed:2", *where]) == 0
    # The first token reads the prompt, at full depth.
    assert "tiny-policy model, 9 tokens, mean depth 2.4 of 6 layers" in capsys.readouterr().out
    shutil.copy(ROOT / "tests/qwen3.jinja", tmp_path / "tiny/chat_template.jinja")
    chat = ["generate", "--prompt", "9", "--temperature", "1", "--chat", "--chat-template-kwargs"]
    answers = []
    for given in ('{"enable_thinking": true}', "{}", '{"enable_thinking": false}'):
        assert cli.main([*chat, given, *where]) == 0
        answers.append(capsys.readouterr().out.splitlines()[0])
    assert answers[0] == answers[1] != answers[2]
    for given in ('{"enable_thinkin": true}', "enable_thinking", "[1]"):
        with contextlib.suppress(SystemExit):
            assert cli.main([*chat, given, *where]) == 2
        assert "chat-template-kwargs" in capsys.readouterr().err.replace("_", "-")


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from ee_megatron import cli

    model, none = str(tiny_hf("llama", tmp_path / "m")), str(tmp_path / "none")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        busy = str(taken.getsockname()[1])
        for arguments, named in (
            (["--model", none], "none"),
            (["--model", model, "--policy", str(tmp_path)], "policy"),
            (["--model", model, "--port", "70000"], "port"),
            (["--model", model, "--port", busy], f"port {busy}"),
            (["--model", model, "--host", "no.such.host.invalid"], "host"),
            (["--model", model, "--host", "192.0.2.1", "--port", "0"], "192.0.2.1"),
            (["--model", model, "--allow-origin", "example.org"], "allow-origin"),
            (["--model", model, "--grace", "nan"], "grace"),
            (["--model", model, "--max-length", "4096"], "max-length"),
            (["--model", model, "--cache-gib", "-1"], "cache-gib"),
            (["--model", model, "--cache-gib", "1e6"], "cache-gib"),
            (["--model", model, "--exits", "fixed:2", "--port", "0"], "depth"),
        ):
            try:
                code = cli.main(["serve", *arguments])
            except SystemExit as stopped:
                code = stopped.code
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert code == 2 and error.startswith("error: ") and named in error, error
