"""The server at its edges, over real sockets in this process: what it refuses and how, deadlines, memory, figures."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from ee_megatron.exit_rules import Off, Sample
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.server import run
from ee_megatron.rollout.server.app import MAX_BODY, Limits, Service, make_app
from ee_megatron.rollout.server.response_format import Choice
from ee_megatron.rollout.server.run import plan_memory
from ee_megatron.rollout.server.worker import ServingEngine
from tests.reference import Reference, random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
POSITION_BYTES = 2 * 6 * 2 * 16 * 4


class Running:
    """The server in threads of this process."""

    def __init__(self, path: Path, decoder: Decoder, **access):
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.engine = ServingEngine(decoder, AutoTokenizer.from_pretrained(path), rows=4, queue_limit=8, positions=4096)
        self.service = Service(self.engine, tokenizer, "tiny", Sample(), Limits(2048, 2048), **access)
        config = uvicorn.Config(make_app(self.service), port=0, log_level="critical")
        self.server = uvicorn.Server(config)
        self.server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        threading.Thread(target=self.server.run, daemon=True).start()
        while not self.server.started:
            time.sleep(0.01)
        self.address = self.server.servers[0].sockets[0].getsockname()[:2]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.address[1]}", timeout=60)

    def complete(self, body: dict, **headers: str) -> httpx.Response:
        asked = {"model": "tiny", "prompt": "1 + 1 =", "max_tokens": 4, **body}
        return self.http.post("/v1/completions", json=asked, headers=headers)

    def chat(self, messages: list, **body) -> httpx.Response:
        asked = {"model": "tiny", "messages": messages, "max_tokens": 2, **body}
        return self.http.post("/v1/chat/completions", json=asked)

    def close(self) -> None:
        self.server.should_exit = True
        self.engine.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_hf("llama", tmp_path_factory.mktemp("tiny"), tied=False, max_position_embeddings=4096)
    (made / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    return made


@pytest.fixture(scope="module")
def decoder(path: Path) -> Decoder:
    made = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    made.load_policy(random_policy(made.dims, SPEC))
    return made


@pytest.fixture(scope="module")
def running(path: Path, decoder: Decoder) -> Iterator[Running]:
    made = Running(path, decoder)
    yield made
    made.close()


def message(reply: httpx.Response, status: int) -> str:
    """The error's text, after a look at its form."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error["message"]


# ---- what is asked ----


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [130]}, "0..129"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 2, "stream": True}, "prompt_logprobs"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"temperature": -1}, "temperature"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 129}, "n=129"),
        ({"prompt": ["1"] * 129}, "129 prompts"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "tokens"),
        ({"prompt": [5000]}, "0..129"),
        ({"prompt": "x" * 2048}, "2048"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1 << 70}, "seed"),
        ({"exit_policy": {"kind": "fixed", "value": 3}}, "[2, 4, 6]"),
        ({"exit_policy": {"kind": "fixed", "value": 2.5}}, "2.5"),
        ({"exit_policy": {"kind": "never"}}, "exit_policy.kind"),
        ({"exit_polcy": "off"}, "did you mean exit_policy"),
        ({"exits": "off"}, "did you mean exit_policy"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(running: Running, body: dict, names: str):
    assert names in message(running.complete(body), 400)


@pytest.mark.parametrize(
    ("field", "number"),
    [*itertools.product(("temperature", "top_p", "exit_policy"), ("NaN", "1e999")), ("prompt", r'"\ud800"')],
)
def test_numbers_that_are_none_are_refused(running: Running, field: str, number: str):
    value = f'{{"kind": "threshold", "value": {number}}}' if field == "exit_policy" else number
    body = f'{{"model": "tiny", "prompt": "1", "{field}": {value}}}'
    reply = running.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert field in message(reply, 400)


def test_the_smallest_temperature_and_top_p_are_greedy_and_nothing_is_nan(running: Running):
    def tokens(**options) -> list[int]:
        reply = running.complete({"exit_policy": {"kind": "off"}, "logprobs": 2, **options})
        assert reply.status_code == 200 and not re.search("NaN|Infinity", reply.text)
        return reply.json()["choices"][0]["early_exit"]["token_ids"]

    greedy = tokens(temperature=0)
    assert tokens(temperature=1e-40) == greedy and tokens(temperature=1, top_p=1e-320) == greedy
    assert tokens(temperature=1e-5, top_k=3) == greedy


def test_neutral_and_null_fields_and_content_that_is_null_or_in_parts_are_taken(running: Running):
    neutral = {"tools": None, "logit_bias": {}, "presence_penalty": 0, "best_of": 1, "temperature": None, "n": None}
    assert running.complete(neutral).status_code == 200
    defaults = {"top_k": -1, "min_tokens": 0, "ignore_eos": False, "skip_special_tokens": True, "length_penalty": 1.0}
    ignored = {"user": "me", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "request_id": "7"}
    assert running.complete(defaults | ignored).status_code == 200
    history = [
        {"role": "user", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
    ]
    reply = running.chat(history, tool_choice="none")
    assert reply.status_code == 200 and reply.json()["usage"]["prompt_tokens"] == len("[user]42[assistant]")
    assert "tool_calls" in message(running.chat([{"role": "assistant", "tool_calls": [{"id": "1"}]}]), 400)
    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert "messages.0.content" in message(running.chat([{"role": "user", "content": [image]}]), 400)
    assert "top_logprobs" in message(running.chat(history, top_logprobs=4), 400)


@pytest.fixture
def qwen3(running: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the model reads of a chat with Qwen3's template."""
    template = (Path(__file__).parents[1] / "qwen3.jinja").read_text()
    monkeypatch.setattr(running.service.tokenizer, "chat_template", template)

    def read(messages: list, **body) -> str:
        reply = running.chat(messages, prompt_logprobs=0, **body)
        assert reply.status_code == 200, reply.text
        positions = reply.json()["prompt_logprobs"]
        assert positions[0] is None and all(len(position) == 1 for position in positions[1:])
        return "<" + "".join(entry["decoded_token"] for position in positions[1:] for entry in position.values())

    return read


def test_thinking_is_switched_by_chat_template_kwargs_of_the_request_or_else_of_the_server(
    running: Running, qwen3: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    messages, off = [{"role": "user", "content": "9"}], {"enable_thinking": False}
    begun, silent = "<|im_start|>user\n9<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    assert qwen3(messages) == qwen3(messages, chat_template_kwargs={"enable_thinking": True}) == begun
    assert qwen3(messages, chat_template_kwargs=off) == begun + silent
    monkeypatch.setattr(running.service, "template_variables", off)
    assert qwen3(messages) == begun + silent
    assert qwen3(messages, chat_template_kwargs={"enable_thinking": True, "unknown": 1}) == begun
    for name in ("chat_template", "tokenize", "messages", "add_generation_prompt"):
        assert name in message(running.chat(messages, chat_template_kwargs={name: "x"}), 400)


def test_a_last_message_is_continued_and_reasoning_of_the_history_reaches_the_template(
    running: Running, qwen3: Callable[..., str]
):
    asked = {"role": "user", "content": "9"}
    said = {"role": "assistant", "content": "It is"}
    begun = "<|im_start|>user\n9<|im_end|>\n"
    continued = begun + "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nIt is"
    both = {"reasoning": "Hm.", "reasoning_content": ""}
    for reasoning in ({"reasoning": "Hm."}, {"reasoning_content": "Hm."}, both):
        history = [asked, {**said, **reasoning}]
        assert qwen3(history, continue_final_message=True) == continued
        assert qwen3(history, continue_final_message=True, add_generation_prompt=False) == continued
        assert qwen3(history) == continued + "<|im_end|>\n<|im_start|>assistant\n"
    assert qwen3([asked], add_generation_prompt=False) == begun
    reply = running.chat([asked], add_generation_prompt=False).json()
    assert reply["choices"][0]["message"]["role"] == "user" and "prompt_logprobs" not in reply
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert "add_generation_prompt" in message(running.chat([asked, said], **both), 400)


def test_errors_of_every_kind_are_json(running: Running, monkeypatch: pytest.MonkeyPatch):
    http, plain = running.http, {"Content-Type": "application/json"}
    # What clients ask that know only OpenAI's own service, or whose base URL lacks /v1.
    for path in ("/nowhere", "/v1/responses", "/chat/completions"):
        assert f"'{path}' is not served here; ask /v1/chat/completions" in message(http.post(path), 404)
    message(http.get("/v1/completions"), 405)
    assert "'gpt'" in message(running.complete({"model": "gpt"}), 404)
    for content in (b"{", b"[]"):
        assert "body" in message(http.post("/v1/completions", content=content, headers=plain), 400)
    assert "model" in message(http.post("/v1/completions", json={"prompt": "1"}), 400)
    assert running.complete({"user": "x" * MAX_BODY}).status_code == 413
    monkeypatch.setattr(running.service, "limits", None)
    broken = running.complete({})
    assert message(broken, 500) and broken.headers["connection"] == "close"


# ---- who asks ----


def test_foreign_pages_may_not_ask(running: Running):
    """A name of theirs is refused; what they may send without asking first, too; and nobody says yes when they ask."""
    asked = json.dumps({"model": "tiny", "prompt": "1", "max_tokens": 1})
    for kind in ({"Content-Type": "text/plain"}, {}):
        message(running.http.post("/v1/completions", content=asked, headers=kind), 400)
    assert running.complete({}, Host="rebound.example.org").status_code == 400
    preflight = {"Origin": "https://evil.example.org", "Access-Control-Request-Method": "POST"}
    reply = running.http.options("/v1/completions", headers=preflight)
    assert reply.status_code == 405 and "access-control-allow-origin" not in reply.headers
    for host in ("localhost", "[::1]"):
        assert running.complete({}, Host=f"{host}:{running.address[1]}").status_code == 200


def test_pages_that_are_named_may_ask_and_the_key_is_taken_however_its_scheme_is_written(path: Path, decoder: Decoder):
    origin = "https://chat.example.org"
    running = Running(path, decoder, origins=frozenset({origin}), key="secret")
    try:
        asked = {"Origin": origin, "Host": "chat.example.org", "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization, content-type"
        preflight = running.http.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200 and "Authorization" in preflight.headers["access-control-allow-headers"]
        for scheme in ("Bearer", "bearer"):
            reply = running.complete({}, Authorization=f"{scheme} secret", Origin=origin)
            assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
        for given in ("Basic secret", "secret", "Bearer", "Bearer secrets"):
            reply = running.complete({}, Authorization=given)
            assert message(reply, 401) and reply.json()["error"]["code"] == "invalid_api_key"
        assert running.http.get("/health").json() == {"status": "ok", "model": "tiny"}
        message(running.http.get("/metrics"), 401)
        opened = running.http.get("/health", headers={"Authorization": "bearer secret"}).json()
        assert opened["answered"] == 2 and 0 < opened["mean_depth"] <= 1
    finally:
        running.close()


# ---- time and memory ----


def test_others_are_answered_while_a_long_prompt_is_tokenised_or_a_streamed_one_is_written(
    running: Running, monkeypatch: pytest.MonkeyPatch
):
    inside, release = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        release.wait(30)

    def encode(_, text: str) -> list[int]:
        if len(text) > 20000:
            slow()
        return [5]

    def written(self, events, echo=False, real=Choice.add) -> dict:
        if echo and not events:
            slow()
        return real(self, events, echo)

    monkeypatch.setattr("ee_megatron.rollout.server.app.encode_text", encode)
    monkeypatch.setattr(Choice, "add", written)
    for asked in ({"prompt": "x" * 30000}, {"echo": True, "logprobs": 1, "max_tokens": 0, "stream": True}):
        inside.clear()
        release.clear()
        replies: list[httpx.Response] = []
        long = threading.Thread(target=lambda asked=asked, to=replies: to.append(running.complete(asked)))
        long.start()
        assert inside.wait(30)
        assert running.http.get("/health").status_code == 200 and running.complete({}).status_code == 200
        release.set()
        long.join(30)
        assert replies[0].status_code == 200


@pytest.mark.parametrize("where", ["prefill", "leave", "hold", "sample"])
def test_who_finds_no_memory_ends_alone_and_the_others_answer_as_if_it_had_never_come(
    path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, where: str
):
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9], [7, 7, 7, 7, 7]]

    def answers(bad: int | None) -> tuple[list, list[int]]:
        failed: list[int] = []
        made = Scheduler(decoder, tokenizer, 4, failed=lambda request, error: failed.append(request))
        owner = {"prefill": decoder, "leave": made.runner, "hold": made.slots, "sample": made.runner}[where]
        real, position = getattr(owner, where), {"leave": 1}.get(where, 0)
        sampling = SamplingParams(1.0, 40)
        ids = [made.add(Request(prompt, sampling, Sample(), 5, str(i))) for i, prompt in enumerate(prompts)]

        def failing(*args, **kwargs):
            if where == "prefill":
                hit = bad is not None and len(prompts[bad]) in map(int, args[1])
            else:
                hit = bad is not None and any(row.id == ids[bad] and len(row.tokens) >= 7 for row in args[position])
            if hit:
                raise MemoryError("no memory for this")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, where, failing)
            while made.busy:
                made.advance()
        assert made.cache.used == 0 and made.free == 4
        return [made.take(i, 0).tokens.tolist() for i in ids if i not in failed], failed

    everyone, nobody = answers(None)
    assert not nobody and len(everyone) == 4
    others, failed = answers(1)
    assert failed == [1] and others == [everyone[0], *everyone[2:]]


def test_memory_is_counted_before_the_first_request(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plenty = plan_memory(decoder, 4, 2048, 0, (8 << 30, "plenty"))
    assert plenty.positions == 4 * 2048 and plenty.longest_prompt == 2048
    assert plenty.cache_bytes == plenty.positions * POSITION_BYTES
    scarce = plan_memory(decoder, 4, 0, 0, (258 << 20, "little"))
    assert scarce.limit == "little" and 0 < scarce.positions < plenty.positions
    taken = scarce.cache_bytes + scarce.longest_prompt * run.prefill_bytes(decoder.dims, 4)
    assert taken <= (258 << 20) - run.MARGIN
    for max_length, gib, free, named in (
        (2048, 0, 100, "little"),
        (0, 0, 100, "little"),
        (2048, 0, 258, "little"),
        (2048, 9, 8 << 10, "--cache-gib"),
        (2048, 1e-4, 8 << 10, "--cache-gib"),
        (5000, 0, 8 << 10, "max-length 5000"),
    ):
        with pytest.raises(ValueError, match=named):
            plan_memory(decoder, 4, max_length, gib, (free << 20, "little"))
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    monkeypatch.setattr(run, "CGROUP", tmp_path)
    assert run.free_memory(torch.device("cpu")) == (3000000, "the control group's limit")


def test_short_requests_pass_long_ones_that_wait_for_room_and_long_ones_keep_their_order(path: Path, decoder: Decoder):
    """A cache of 64 pages: long ones take 25 each, of which one runs beside another's half, short ones a page."""
    tokenizer = AutoTokenizer.from_pretrained(path)

    def begun(passing: bool) -> list[int]:
        made, order = Scheduler(decoder, tokenizer, 8, positions=1024, passing=passing), list[int]()
        for i, tokens in enumerate((390, 390, 390, 10, 10)):
            made.add(Request([5 + i], SamplingParams(0, tokens), Off(), prompt_id=str(i)))
        while made.busy:
            order += [event.request for event in made.advance() if event.request not in order]
        return order

    # Without passing two long ones fit, and everybody waits behind the third.
    assert begun(False) == [0, 1, 2, 3, 4]
    assert begun(True) == [0, 3, 4, 1, 2]


# ---- log-probabilities and figures ----


def test_log_probabilities_of_a_prompt_are_an_independent_forwards(running: Running, path: Path, decoder: Decoder):
    prompt = [ord(c) for c in "What is 7 times 8?"]
    reference = Reference(path, SPEC, random_policy(decoder.dims, SPEC))
    tokens = torch.tensor([prompt])
    expected = reference.logits(tokens, torch.full(tokens.shape, 6))[0].log_softmax(-1)
    own = [expected[i, token].item() for i, token in enumerate(prompt[1:])]
    best = expected.topk(3).values
    for body in ({"max_tokens": 0}, {"max_tokens": 3, "seed": 1}, {"max_tokens": 0, "exit_policy": {"kind": "off"}}):
        reply = running.complete({"prompt": [prompt, prompt[:5]], "echo": True, "logprobs": 3, **body}).json()
        choice, short = reply["choices"]
        found, count = choice["logprobs"], body["max_tokens"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(prompt)] == pytest.approx(own, abs=1e-4)
        for i, entry in enumerate(found["top_logprobs"][1 : len(prompt)]):
            assert sorted(entry.values())[-3:] == pytest.approx(sorted(best[i].tolist()), abs=1e-4)
            # A token that is the most probable one has the very same number in both places.
            assert (found["token_logprobs"][i + 1] == max(entry.values())) == (expected[i].argmax() == prompt[i + 1])
        assert choice["text"].startswith("What is 7 times 8?") and len(found["tokens"]) == len(prompt) + count
        assert short["logprobs"]["token_logprobs"][1:5] == pytest.approx(own[:4], abs=1e-4)
        assert reply["usage"]["completion_tokens"] == 2 * count
        assert count or choice["finish_reason"] == "length"
    lines = running.complete({"prompt": prompt, "echo": True, "logprobs": 1, "stream": True}).text.splitlines()
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert pieces[0]["choices"][0]["text"] == "What is 7 times 8?"
    streamed = [token for piece in pieces for token in piece["choices"][0]["logprobs"]["tokens"]]
    assert streamed[: len(prompt)] == found["tokens"][: len(prompt)]
    plain = running.complete({"prompt": "ab", "echo": True, "max_tokens": 0}).json()["choices"][0]
    assert plain["text"] == "ab" and plain["logprobs"] is None


def test_prompt_logprobs_are_those_of_echo_with_ids_and_ranks(running: Running, path: Path, decoder: Decoder):
    prompt = [ord(c) for c in "What is 7 times 8?"]
    echoed = running.complete({"prompt": prompt, "echo": True, "logprobs": 3, "max_tokens": 0}).json()["choices"][0]
    reply = running.complete({"prompt": [prompt, prompt[:5]], "prompt_logprobs": 3, "n": 2, "logprobs": 1}).json()
    first, again, short, _ = (choice["prompt_logprobs"] for choice in reply["choices"])
    assert first[0] is None and again == first and short == first[:5]
    reference = Reference(path, SPEC, random_policy(decoder.dims, SPEC))
    tokens = torch.tensor([prompt])
    expected = reference.logits(tokens, torch.full(tokens.shape, 6))[0].log_softmax(-1)
    for i, position in enumerate(first[1:]):
        order, own = expected[i].argsort(descending=True).tolist(), prompt[i + 1]
        assert list(map(int, position)) == list(dict.fromkeys([own, *order[:3]]))
        for token, entry in position.items():
            assert entry["rank"] == order.index(int(token)) + 1 and entry["decoded_token"] == chr(int(token))
            assert entry["logprob"] == pytest.approx(expected[i, int(token)].item(), abs=1e-4)
        assert position[str(own)]["logprob"] == echoed["logprobs"]["token_logprobs"][i + 1]
    # The answer's own log-probabilities begin behind the prompt.
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == len(reply["choices"][0]["early_exit"]["depths"])


def test_what_a_reply_lists_is_bounded_over_the_whole_request(running: Running, monkeypatch: pytest.MonkeyPatch):
    """Tokens of answers and of echoed prompts, times n, times 1 + logprobs: 50 at most here."""
    monkeypatch.setattr(running.service, "limits", replace(running.service.limits, max_entries=50))
    five, answers = {"prompt": [5] * 5, "echo": True, "max_tokens": 0}, {"prompt": [5], "max_tokens": 10}
    for asked in ({**five, "n": 2, "logprobs": 4}, {**five, "n": 10, "logprobs": 0}, {**answers, "n": 5}):
        assert running.complete(asked).status_code == 200
    for asked in ({**five, "n": 2, "logprobs": 5}, {**five, "n": 11, "stream": True}, {**answers, "logprobs": 5}):
        text = message(running.complete(asked), 400)
        assert "50" in text and all(field in text for field in ("max_tokens", "echo", "n=", "logprobs="))
    message(running.chat([{"role": "user", "content": "1"}], max_tokens=5, logprobs=True, top_logprobs=10), 400)
    assert running.complete({"prompt": [5] * 5, "max_tokens": 10, "prompt_logprobs": 7}).status_code == 200
    message(running.complete({"prompt": [5] * 5, "max_tokens": 10, "prompt_logprobs": 8}), 400)


def test_a_prompt_is_scored_once_for_all_its_answers(
    running: Running, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    real, read = decoder.forward_parallel, list[int]()

    def counting(tokens, *rest):
        read.append(len(tokens))
        return real(tokens, *rest)

    monkeypatch.setattr(decoder, "forward_parallel", counting)
    body = {"prompt": ["What is 7?", "And 8?"], "n": 4, "echo": True, "logprobs": 2, "max_tokens": 0}
    choices = running.complete(body).json()["choices"]
    assert sum(read) == 2
    for group in (choices[:4], choices[4:]):
        found = [choice["logprobs"]["token_logprobs"] for choice in group]
        assert found == [found[0]] * 4 and None not in found[0][1:]


def test_the_most_probable_tokens_are_those_of_the_exit_that_was_taken(running: Running, path: Path, decoder: Decoder):
    options = {"max_tokens": 6, "seed": 3, "exit_policy": {"kind": "fixed", "value": 2}}
    reply = running.chat([{"role": "user", "content": "7"}], logprobs=True, top_logprobs=4, **options)
    choice = reply.json()["choices"][0]
    prompt, exits = [ord(c) for c in "[user]7"], choice["early_exit"]
    depths = torch.full((1, len(prompt) + 6), 6)
    depths[0, len(prompt) - 1 : -1] = torch.tensor(exits["depths"])
    assert set(exits["depths"]) - {6}
    reference = Reference(path, SPEC, random_policy(decoder.dims, SPEC))
    tokens = torch.tensor([prompt + exits["token_ids"]])
    expected = reference.logits(tokens, depths)[0, len(prompt) - 1 :].log_softmax(-1)
    for i, entry in enumerate(choice["logprobs"]["content"]):
        assert entry["logprob"] == pytest.approx(expected[i, exits["token_ids"][i]].item(), abs=1e-4)
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == pytest.approx(expected[i].topk(4).values.tolist(), abs=1e-4)


def test_metrics_count_what_clients_saw(path: Path, decoder: Decoder):
    running = Running(path, decoder)
    try:
        choices = running.complete({"prompt": ["1 + 1 =", "2"], "max_tokens": 9, "seed": 2}).json()["choices"]
        running.complete({"nonsense": 1})
        families = text_string_to_metric_families(running.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        values = {(s.name.removeprefix("ee_megatron_"), *s.labels.values()): s.value for s in samples}
        depths = [depth for choice in choices for depth in choice["early_exit"]["depths"]]
        expected = {
            ("generation_tokens_total",): len(depths),
            ("prompt_tokens_total",): 8,
            ("layers_run_total",): sum(depths),
            **{("exit_depth_tokens_total", str(depth)): depths.count(depth) for depth in (2, 4, 6)},
            ("requests_total", "answered"): 2,
            ("requests_total", "failed"): 0,
            ("time_to_first_token_seconds_count",): 2,
            ("time_per_output_token_seconds_count",): len(depths) - 2,
            ("cache_used_bytes",): 0,
            ("cache_limit_bytes",): 4096 * POSITION_BYTES,
            ("requests_running",): 0,
            ("requests_queued",): 0,
        }
        assert {name: values[name] for name in expected} == expected
    finally:
        running.close()
