"""The server at its edges, over real sockets in this process: what it refuses and how, deadlines, memory, figures."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from transformers import AutoTokenizer

from ee_megatron.exit_rules import Off, Prescribed, Sample
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine.model_runner import PREFILL_POSITIONS
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.sampling import sample_tokens
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.server import guard, memory
from ee_megatron.rollout.server.app import Limits, Service, make_app
from ee_megatron.rollout.server.choices import Choice
from ee_megatron.rollout.server.guard import Access, Bodies, Connection
from ee_megatron.rollout.server.memory import Free, plan_memory
from ee_megatron.rollout.server.run import ServerSettings
from ee_megatron.rollout.server.texts import Texts
from ee_megatron.rollout.server.worker import Engine
from tests.reference import Reference, random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
HEAD_S = 0.6


class Running:
    """The server in threads of this process."""

    def __init__(self, path: Path, decoder: Decoder, **access):
        tokenizers = [AutoTokenizer.from_pretrained(path) for _ in range(3)]
        self.engine = Engine(decoder, tokenizers[0], rows=4, queue_limit=8, positions=4096)
        self.service = Service(
            self.engine,
            Texts(tokenizers[1], tokenizers[2], 2048),
            "tiny",
            Sample(),
            Limits(2048, 2048),
            Access(**access),
            {"policy": "/where/it/lies"},
            bodies=Bodies(longest=1 << 16, deadline_s=HEAD_S),
        )
        config = uvicorn.Config(make_app(self.service), http=Connection, port=0, log_level="critical")
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "HEAD_S", HEAD_S)
        patch.setattr(guard, "STALLED_S", HEAD_S)
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
    ("body", "expected"),
    [
        ({"tools": [{"type": "function"}]}, "tools: this server makes text and never calls functions"),
        ({"functions": [{}]}, "functions: this server makes text"),
        ({"logit_bias": {"5": 1}}, "logit_bias: log-probabilities and exits are those of the model itself"),
        ({"presence_penalty": 0.5}, "presence_penalty: log-probabilities"),
        ({"best_of": 3}, "best_of: answers are not ranked"),
        ({"response_format": {"type": "json_object"}}, "response_format: the output's form can't be forced"),
        ({"temprature": 1}, "temprature: Extra inputs"),
        ({"stop": ["x"] * 17}, "at most 16 items"),
        ({"stop": "x" * 257}, "at most 256 characters"),
        ({"logprobs": 21}, "less than or equal to 20"),
        ({"n": 129}, "1 prompts x n=129: at most 128 answers"),
        ({"prompt": ["1"] * 129}, "129 prompts x n=1"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": "x" * 40000}, "40000 characters; this server reads 2048 tokens and no more than 32768"),
        ({"prompt": "x" * 2048}, "takes 2048 in all"),
        ({"max_tokens": 0}, "max_tokens: 0 makes nothing, unless echo"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1 << 70}, "seed"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(running: Running, body: dict, expected: str):
    assert expected in message(running.complete(body), 400)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "exit_policy"])
def test_numbers_that_are_none_are_refused(running: Running, field: str, number: str):
    value = f'{{"kind": "threshold", "value": {number}}}' if field == "exit_policy" else number
    body = f'{{"model": "tiny", "prompt": "1", "{field}": {value}}}'
    reply = running.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert field in message(reply, 400)


def test_the_smallest_temperature_and_top_p_are_greedy_and_nothing_is_nan(running: Running):
    def said(**options) -> list[int]:
        reply = running.complete({"exit_policy": {"kind": "off"}, "logprobs": 2, **options})
        assert reply.status_code == 200, reply.text
        assert not re.search("NaN|Infinity", reply.text)
        return reply.json()["choices"][0]["early_exit"]["token_ids"]

    greedy = said(temperature=0)
    assert said(temperature=1e-40) == greedy and said(temperature=1, top_p=1e-320) == greedy
    assert said(temperature=1e-5, top_k=3) == greedy
    logits = torch.randn(3, 50)
    tokens, logprobs, _ = sample_tokens(logits, SamplingParams(top_p=1e-320), torch.rand(3, dtype=torch.float64))
    assert tokens.tolist() == logits.argmax(-1).tolist() and logprobs.tolist() == [0, 0, 0]


def test_neutral_and_null_fields_and_content_that_is_null_or_in_parts_are_taken(running: Running):
    neutral = {"tools": None, "logit_bias": {}, "presence_penalty": 0, "best_of": 1, "temperature": None, "n": None}
    assert running.complete(neutral).status_code == 200
    history = [
        {"role": "user", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
    ]
    asked = {"model": "tiny", "messages": history, "max_tokens": 2, "tool_choice": "none"}
    reply = running.http.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200 and reply.json()["usage"]["prompt_tokens"] == len("[user]42[assistant]")
    called = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert "tool_calls: this server" in message(
        running.http.post("/v1/chat/completions", json={**asked, "messages": called}), 400
    )
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert "messages.0.content" in message(
        running.http.post("/v1/chat/completions", json={**asked, "messages": image}), 400
    )


def test_errors_of_every_kind_are_json(running: Running, monkeypatch: pytest.MonkeyPatch):
    http, plain = running.http, {"Content-Type": "application/json"}
    assert "GET /nowhere" in message(http.get("/nowhere"), 404)
    assert "GET /v1/completions" in message(http.get("/v1/completions"), 405)
    assert "Invalid JSON" in message(http.post("/v1/completions", content=b"{", headers=plain), 400)
    assert "should be an object" in message(http.post("/v1/completions", content=b"[]", headers=plain), 400)
    assert "model: Field required" in message(http.post("/v1/completions", json={"prompt": "1"}), 400)
    assert "larger than 65536 bytes" in message(running.complete({"user": "x" * (1 << 16)}), 413)
    monkeypatch.setattr(running.service, "limits", None)
    assert "its log says why" in message(running.complete({}), 500)
    with closing(socket.create_connection(running.address)) as line:
        line.sendall(b"\x00\x01 nonsense\r\n\r\n")
        head, _, body = line.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and "not HTTP" in json.loads(body)["error"]["message"]


# ---- who asks ----


def test_foreign_pages_may_not_ask(running: Running):
    asked = {"model": "tiny", "prompt": "1", "max_tokens": 1}
    text = running.http.post("/v1/completions", content=json.dumps(asked), headers={"Content-Type": "text/plain"})
    assert "send the body as" in message(text, 415)
    assert "is not this server's" in message(running.complete({}, Host="rebound.example.org"), 403)
    for origin in ("https://evil.example.org", "null", "http://127.0.0.1:1"):
        assert "may not ask here" in message(running.complete({}, Origin=origin), 403)
    host = f"localhost:{running.address[1]}"
    own = running.complete({}, Host=host, Origin=f"http://{host}")
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_pages_that_are_named_may_ask_and_the_key_is_taken_however_its_scheme_is_written(path: Path, decoder: Decoder):
    origin = "https://chat.example.org"
    running = Running(path, decoder, origins=frozenset({origin}), key="secret")
    try:
        preflight = running.http.options("/v1/completions", headers={"Origin": origin, "Host": "chat.example.org"})
        assert preflight.status_code == 204 and "Authorization" in preflight.headers["access-control-allow-headers"]
        for scheme in ("Bearer", "bearer", "BEARER"):
            reply = running.complete({}, Authorization=f"{scheme} secret", Origin=origin)
            assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
        for given in ("Basic secret", "secret", "Bearer", "Bearer secrets"):
            assert "API key" in message(running.complete({}, Authorization=given), 401)
        closed = running.http.get("/health").json()
        assert closed == {"status": "ok", "model": "tiny"}
        assert "API key" in message(running.http.get("/metrics"), 401)
        opened = running.http.get("/health", headers={"Authorization": "bearer secret"}).json()
        assert opened["policy"] == "/where/it/lies" and opened["answered"] == 3
    finally:
        running.close()


# ---- time and memory ----


def test_slow_connections_are_closed_and_others_are_answered_meanwhile(running: Running):
    started = time.monotonic()
    silent, half, slow_body = (socket.create_connection(running.address) for _ in range(3))
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    slow_body.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    assert running.complete({}).status_code == 200
    for line in (silent, half, slow_body):
        line.settimeout(30)
        head, _, body = line.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408") and json.loads(body)["error"]["type"] == "invalid_request_error"
        line.close()
    # HEAD_S and a little, where nothing else runs.
    assert time.monotonic() - started < 30


def test_a_reader_who_does_not_read_is_cut_off(running: Running):
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    line.connect(running.address)
    # The likeliest tokens of random weights go round in circles and never end: 14 MB, where buffers hold half a one.
    asked = {
        "model": "tiny",
        "prompt": "1",
        "n": 8,
        "max_tokens": 2000,
        "stream": True,
        "logprobs": 20,
        "temperature": 0,
    }
    body = json.dumps(asked)
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    before = running.engine.health()["cancelled"]
    line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    deadline = time.monotonic() + 60
    while running.engine.health()["cancelled"] == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running.engine.health()["cancelled"] > before
    line.close()


def test_long_prompts_are_tokenised_beside_the_event_loop(running: Running, monkeypatch: pytest.MonkeyPatch):
    inside, release = threading.Event(), threading.Event()

    def slow(tokenizer, text):
        if len(text) > 20000:
            inside.set()
            release.wait(30)
        return [5]

    monkeypatch.setattr("ee_megatron.rollout.server.app.encode_text", slow)
    long = threading.Thread(target=lambda: running.complete({"prompt": "x" * 30000}))
    long.start()
    assert inside.wait(30)
    # Another client isn't kept waiting by the one whose prompt is being read.
    assert running.http.get("/health").status_code == 200 and running.complete({}).status_code == 200
    release.set()
    long.join(30)


def fail_for(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, what: str, owner: object, is_bad) -> None:
    real = getattr(owner, what)

    def failing(*args, **kwargs):
        if is_bad(*args):
            raise MemoryError("no memory for this")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, what, failing)


@pytest.mark.parametrize("where", ["reading", "a segment", "the cache", "the readout"])
def test_who_finds_no_memory_ends_alone_and_the_others_answer_as_if_it_had_never_come(
    path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, where: str
):
    tokenizer = AutoTokenizer.from_pretrained(path)

    def answers(bad: int | None) -> tuple[list, list[int]]:
        failed: list[int] = []
        made = Scheduler(decoder, tokenizer, 4, failed=lambda request, error: failed.append(request))
        prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9], [7, 7, 7, 7, 7]]
        ids = [
            made.add(Request(prompt, SamplingParams(1.0, 40), Sample(), 5, str(i))) for i, prompt in enumerate(prompts)
        ]
        with monkeypatch.context() as patch:
            if bad is not None:
                slot = {"bad": -1}

                def rows_are_bad(*args) -> bool:
                    return any(row.id == ids[bad] and len(row.tokens) >= 7 for row in args[-1])

                if where == "reading":
                    fail_for(made, patch, "prefill", decoder, lambda tokens, *_: len(prompts[bad]) in map(int, _[0]))
                elif where == "a segment":
                    fail_for(made, patch, "leave", made.steps, lambda _, rows, *rest: rows_are_bad(rows))
                elif where == "the cache":
                    fail_for(made, patch, "hold", made.slots, lambda rows, *_: rows_are_bad(rows))
                else:
                    fail_for(made, patch, "sample", made.steps, lambda rows, *_: rows_are_bad(rows))
                assert slot
            while made.busy:
                made.advance()
        kept = [made.take(i, 0).tokens.tolist() for i in ids if i not in failed]
        assert made.cache.used == 0 and made.free == 4
        return kept, failed

    everyone, nobody = answers(None)
    assert not nobody and len(everyone) == 4
    others, failed = answers(1)
    assert failed == [1] and others == [everyone[0], *everyone[2:]]


def test_memory_is_counted_before_the_first_request(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plenty = plan_memory(decoder, 4, 2048, 0, Free(8 << 30, "plenty"))
    assert plenty.positions == 4 * 2048 and plenty.longest_prompt == 2048 and plenty.reading == PREFILL_POSITIONS
    position = 2 * 6 * 2 * 16 * 4
    assert plenty.cache_bytes == plenty.positions * position
    scarce = plan_memory(decoder, 4, 2048, 0, Free((258 << 20), "little"))
    assert scarce.limit == "little" and 0 < scarce.positions < plenty.positions
    taken = scarce.cache_bytes + scarce.longest_prompt * memory.reading_bytes(decoder.dims, 4)
    assert taken <= (258 << 20) - memory.MARGIN
    with pytest.raises(ValueError, match=r"little leaves 100 MiB beside the model"):
        plan_memory(decoder, 4, 2048, 0, Free(100 << 20, "little"))
    # With what is said to be needed it starts.
    with pytest.raises(ValueError, match=r"a request of \d+ tokens needs \d+,") as refused:
        plan_memory(decoder, 64, 2048, 0, Free(100 << 20, "little"))
    needed = int(str(refused.value).split("needs ")[1].split(",")[0])
    assert plan_memory(decoder, 64, 2048, 0, Free(needed << 20, "enough")).positions > 0
    with pytest.raises(ValueError, match=r"cache-gib 9: plenty leaves 7\.75 GiB"):
        plan_memory(decoder, 4, 2048, 9, Free(8 << 30, "plenty"))
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == Free(3000000, "the control group's limit")


def test_a_request_that_does_not_fit_now_waits_and_the_cache_keeps_to_its_size(path: Path, decoder: Decoder):
    """Of two that take 2/3 of the cache each, the second begins when the first has ended."""
    engine = Engine(decoder, AutoTokenizer.from_pretrained(path), rows=4, queue_limit=8, positions=192)
    try:
        from ee_megatron.rollout.server.worker import Ticket

        order: list[tuple[int, bool]] = []
        over = threading.Event()

        def sink(number: int):
            def tell(event) -> None:
                order.append((number, event.finished is not None))
                if number == 1 and event.finished:
                    over.set()

            return tell

        engine.submit([Ticket(Request([5], SamplingParams(0, 120), Off(), prompt_id=str(i)), sink(i)) for i in (0, 1)])
        assert over.wait(60)
        assert order.index((0, True)) < order.index((1, False))
    finally:
        engine.close()


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
    for body in ({"max_tokens": 0}, {"max_tokens": 3, "seed": 1}, {"max_tokens": 0, "exit_policy": {"kind": "off"}}):
        reply = running.complete({"prompt": [prompt, prompt[:5]], "echo": True, "logprobs": 3, **body})
        assert reply.status_code == 200, reply.text
        choice, short = reply.json()["choices"]
        found, count = choice["logprobs"], body["max_tokens"]
        own = [expected[i, token].item() for i, token in enumerate(prompt[1:])]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(prompt)] == pytest.approx(own, abs=1e-4)
        best = expected.topk(3).values
        for i, entry in enumerate(found["top_logprobs"][1 : len(prompt)]):
            assert sorted(entry.values())[-3:] == pytest.approx(sorted(best[i].tolist()), abs=1e-4)
            # A token that is the most probable one has the very same number in both places.
            assert (found["token_logprobs"][i + 1] == max(entry.values())) == (expected[i].argmax() == prompt[i + 1])
        assert choice["text"].startswith("What is 7 times 8?") and len(found["tokens"]) == len(prompt) + count
        assert found["text_offset"][: len(prompt)] == list(range(len(prompt)))
        assert short["logprobs"]["token_logprobs"][1:5] == pytest.approx(own[:4], abs=1e-4)
        assert reply.json()["usage"]["completion_tokens"] == 2 * count
        if not count:
            assert choice["finish_reason"] == "length" and choice["text"] == "What is 7 times 8?"
    pieces = [
        json.loads(line.removeprefix("data: "))
        for line in running.complete({"prompt": prompt, "echo": True, "logprobs": 1, "stream": True}).text.splitlines()
        if line.startswith("data: {")
    ]
    assert pieces[0]["choices"][0]["text"] == "What is 7 times 8?"
    streamed = [token for piece in pieces for token in piece["choices"][0]["logprobs"]["tokens"]]
    assert streamed[: len(prompt)] == found["tokens"][: len(prompt)]
    plain = running.complete({"prompt": "ab", "echo": True, "max_tokens": 0}).json()["choices"][0]
    assert plain["text"] == "ab" and plain["logprobs"] is None


def test_what_echo_repeats_is_bounded_over_the_whole_request(running: Running, monkeypatch: pytest.MonkeyPatch):
    long = {"prompt": [5] * 2000, "echo": True, "max_tokens": 0}
    for more in (
        {"n": 7, "logprobs": 20},
        {"prompt": [[5] * 2000] * 7, "logprobs": 20},
        {"n": 12, "logprobs": 10, "stream": True},
    ):
        said = message(running.complete({**long, **more}), 400)
        assert "262144" in said and all(field in said for field in ("echo", "n=", "logprobs="))
    monkeypatch.setattr(running.service, "limits", replace(running.service.limits, max_echoed=50))
    five = {"prompt": [5] * 5, "echo": True, "max_tokens": 0}
    for asked in ({"n": 2, "logprobs": 4}, {"n": 10}, {"n": 10, "logprobs": 0}):
        assert running.complete({**five, **asked}).status_code == 200
    for asked in (
        {"n": 2, "logprobs": 5},
        {"n": 11},
        {"n": 3, "logprobs": 4},
        {"prompt": [[5] * 5] * 3, "logprobs": 4},
    ):
        message(running.complete({**five, **asked}), 400)
    # What isn't repeated isn't counted.
    assert running.complete({"prompt": [5] * 5, "n": 4, "logprobs": 5, "max_tokens": 1}).status_code == 200


def test_what_a_streamed_prompt_has_to_say_is_written_beside_the_event_loop(
    running: Running, monkeypatch: pytest.MonkeyPatch
):
    real, inside, release = Choice.prompt_piece, threading.Event(), threading.Event()

    def slow(choice: Choice) -> dict:
        inside.set()
        release.wait(30)
        return real(choice)

    monkeypatch.setattr(Choice, "prompt_piece", slow)
    replies: list[httpx.Response] = []
    asked = {"echo": True, "logprobs": 1, "max_tokens": 0, "stream": True}
    long = threading.Thread(target=lambda: replies.append(running.complete(asked)))
    long.start()
    assert inside.wait(30)
    assert running.http.get("/health", timeout=15).status_code == 200
    release.set()
    long.join(30)
    assert "1 + 1 =" in replies[0].text


def test_a_prompt_is_scored_once_for_all_its_answers(
    running: Running, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    real, read = decoder.forward_parallel, list[int]()

    def counting(tokens, *rest):
        read.append(len(tokens))
        return real(tokens, *rest)

    monkeypatch.setattr(decoder, "forward_parallel", counting)
    body = {"prompt": ["What is 7?", "And 8?"], "n": 4, "echo": True, "logprobs": 2, "seed": 1}
    for tokens in (0, 3):
        read.clear()
        choices = running.complete({**body, "max_tokens": tokens}).json()["choices"]
        assert sum(read) == 2
        for prompt, group in zip(body["prompt"], (choices[:4], choices[4:]), strict=True):
            found = [choice["logprobs"]["token_logprobs"][: len(prompt)] for choice in group]
            assert found == [found[0]] * 4 and None not in found[0][1:]
            for choice in group:
                answer = choice["early_exit"]["token_ids"]
                assert bool(answer) == bool(tokens) and len(choice["logprobs"]["tokens"]) == len(prompt) + len(answer)


def test_the_most_probable_tokens_are_those_of_the_exit_that_was_taken(running: Running, path: Path, decoder: Decoder):
    asked = {"messages": [{"role": "user", "content": "7"}], "model": "tiny", "max_tokens": 6, "seed": 3}
    asked["exit_policy"] = {"kind": "fixed", "value": 2}
    reply = running.http.post("/v1/chat/completions", json={**asked, "logprobs": True, "top_logprobs": 4})
    choice = reply.json()["choices"][0]
    prompt, exits = [ord(c) for c in "[user]7"], choice["early_exit"]
    depths = torch.full((1, len(prompt) + 6), 6)
    depths[0, len(prompt) - 1 : -1] = torch.tensor(exits["depths"])
    assert set(exits["depths"]) - {6}
    tokens = torch.tensor([prompt + exits["token_ids"]])
    reference = Reference(path, SPEC, random_policy(decoder.dims, SPEC))
    expected = reference.logits(tokens, depths)[0, len(prompt) - 1 :].log_softmax(-1)
    for i, entry in enumerate(choice["logprobs"]["content"]):
        assert entry["logprob"] == pytest.approx(expected[i, exits["token_ids"][i]].item(), abs=1e-4)
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == pytest.approx(expected[i].topk(4).values.tolist(), abs=1e-4)
    wrong = running.http.post("/v1/chat/completions", json={**asked, "top_logprobs": 4})
    assert "needs logprobs" in message(wrong, 400)


def test_metrics_count_what_clients_saw(path: Path, decoder: Decoder):
    running = Running(path, decoder)
    try:
        body = {"prompt": ["1 + 1 =", "2"], "max_tokens": 9, "seed": 2}
        choices = running.complete(body).json()["choices"]
        running.complete({"nonsense": 1})
        reply = running.http.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        values = {}
        for line in reply.text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) \S+ .+|\w+(\{\w+="[^"]*"\})? [-+.e\d]+', line), line
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                values[name.removeprefix("ee_megatron_")] = float(value)
        depths = [depth for choice in choices for depth in choice["early_exit"]["depths"]]
        assert values["generation_tokens_total"] == len(depths) and values["prompt_tokens_total"] == 8
        assert values["layers_run_total"] == sum(depths)
        for depth in (2, 4, 6):
            assert values[f'exit_depth_tokens_total{{depth="{depth}"}}'] == depths.count(depth)
        assert values["mean_depth_share"] == pytest.approx(sum(depths) / len(depths) / 6)
        assert values['requests_total{outcome="answered"}'] == 2
        assert values['http_responses_total{status="200"}'] == 1 == values['http_responses_total{status="400"}']
        assert values["time_to_first_token_seconds_count"] == 2
        assert values["time_per_output_token_seconds_count"] == len(depths) - 2
        assert values['time_per_output_token_seconds_bucket{le="+Inf"}'] == len(depths) - 2
        assert values["cache_used_bytes"] == 0 and values["cache_limit_bytes"] == 4096 * 2 * 6 * 2 * 16 * 4
        assert values["requests_running"] == values["requests_queued"] == 0
    finally:
        running.close()


# ---- before the model is read ----


def test_an_address_that_cannot_be_had_is_noticed_before_the_model_is_read():
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} on 127\.0\.0\.1: Address already in use"):
            ServerSettings(port=port).bind()
    with pytest.raises(ValueError, match=r"host 'no\.such\.host\.invalid' is unknown"):
        ServerSettings(host="no.such.host.invalid").bind()
    with pytest.raises(ValueError, match="Cannot assign"):
        ServerSettings(host="192.0.2.1", port=0).bind()
    with pytest.raises(ValueError, match=r"grace nan: expected a number >= 0"):
        ServerSettings(grace_s=float("nan"))
    with pytest.raises(ValueError, match=r"allow-origin 'example\.org': expected a page's origin"):
        replace(ServerSettings(), origins=("example.org",))


def test_prescribed_exits_that_are_missing_end_only_their_request(path: Path, decoder: Decoder):
    failed: dict[int, Exception] = {}
    made = Scheduler(decoder, AutoTokenizer.from_pretrained(path), 4, failed=failed.__setitem__)
    bad = made.add(Request("1", SamplingParams(0, 20), Prescribed(), prompt_id="bad"))
    good = made.add(Request("2", SamplingParams(0, 20), Off()))
    while made.busy:
        made.advance()
    assert set(failed) == {bad} and "prescribed exits" in str(failed[bad]) and made.take(good, 0).length
