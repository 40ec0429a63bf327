"""`vllm serve` on an export with embedded gates, asked through the official client: the embedded engine's answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from vllm_setup import ENVIRONMENT, FIRST, LORA, SAMPLINGS, START_S, TEXTS, TOKENS, Own, by_vllm, make_model, policy_of

from ee_megatron.checkpoint.hf_export import DEFAULT_EXIT_POLICY, export_hf
from ee_megatron.exit_rules import OFFERED, ExitRule, Off, Sample, Threshold
from ee_megatron.rollout import Request, SamplingParams, Scheduler
from ee_megatron.types import Rollout
from tests.tiny import exit_rules

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
# The export's own; other than every default in between.
DEFAULT = Threshold(0.3)
RULES: dict[str, ExitRule | None] = {
    "the export's": None,
    **{kind: rule for kind, rule in exit_rules({}).items() if kind in OFFERED},
}
GREEDY = {"temperature": 0, "max_tokens": TOKENS}
EITHER = pytest.mark.parametrize("export", [None, FIRST], ids=["", "first token exits"], indirect=True)
ENDLESS = {**GREEDY, "extra_body": {"ignore_eos": True}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    def __init__(self, python: str, export: Path, directory: Path, *options: str):
        self.log = directory / "log"
        names = directory / "names"
        names.mkdir()
        subprocess.run([python, str(ROOT / "tools" / "name_vllm.py"), str(names)], check=True, timeout=60)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            str(Path(python).with_name("vllm")), "serve", str(export), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "256",
            "--block-size", "32", *options,
        ]  # fmt: skip
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{names}"}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        pytest.fail(f"no server after {START_S:.0f} s:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            # Its engine, too, which a killed server leaves behind.
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)

    def complete(self, prompt="1 2 3", exits: ExitRule | None = None, **options):
        extra = {**({"exit_policy": exits.to_json()} if exits else {}), **options.pop("extra_body", {})}
        return self.client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **options)

    def chat(self, content: str, **options):
        return self.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], **options
        )


@pytest.fixture(scope="module")
def export(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Own]:
    """A policy whose prompts never exit, or of the spec that a test is parametrised with."""
    directory, spec = tmp_path_factory.mktemp("export"), getattr(request, "param", None) or LORA
    base = make_model("llama", directory / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    policy = policy_of(base)
    export_hf(base, (spec, policy), directory / "export", gates="embed", exit_policy=DEFAULT.to_json())
    own = Own(base, spec)
    own.decoder.load_policy(policy)
    return directory / "export", own


@pytest.fixture(scope="module")
def served(export: tuple[Path, Own], vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(vllm_python, export[0], tmp_path_factory.mktemp("served"), "--enable-prompt-tokens-details")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def own(export: tuple[Path, Own]) -> Own:
    return export[1]


def expected(own: Own, prompt: str, rule: ExitRule, sampling: SamplingParams, samples: int = 1) -> list[Rollout]:
    """What this package's server answers with seed 5."""
    scheduler = Scheduler(own.decoder, own.tokenizer, samples)
    ids = [scheduler.add(Request(prompt, sampling, rule, 5, "", k)) for k in range(samples)]
    while scheduler.busy:
        scheduler.advance()
    return [scheduler.take(i, 0) for i in ids]


def assert_same(told: dict, rollout: Rollout) -> None:
    assert told["token_ids"] == rollout.tokens.tolist() and told["depths"] == rollout.exit_depths.tolist()
    assert told["logprobs"] == pytest.approx(rollout.token_logprobs.tolist(), abs=1e-4)
    assert told["exit_logprobs"] == pytest.approx(rollout.exit_logprobs.tolist(), abs=1e-4)


@EITHER
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rule", RULES)
def test_answers_are_the_embedded_engines_token_for_token_and_depth_for_depth(rule, sampling, served, own):
    params, exits = SAMPLINGS[sampling], RULES[rule]
    options = {"temperature": params.temperature, "top_p": params.top_p, "max_tokens": TOKENS, "seed": 5}
    # vLLM takes n > 1 only where answers can differ.
    samples = options["n"] = 2 if params.temperature else 1
    names = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    more = {name: value for name in names if (value := getattr(params, name))}
    with ThreadPoolExecutor(len(TEXTS)) as threads:
        found = list(threads.map(lambda text: served.complete(text, exits, extra_body=more, **options), TEXTS))
    depths, firsts = set(), set()
    for text, answer in zip(TEXTS, found, strict=True):
        rollouts = expected(own, text, exits or DEFAULT, params, samples)
        assert [choice.text for choice in answer.choices] == [r.text for r in rollouts]
        for choice, rollout in zip(answer.choices, rollouts, strict=True):
            assert_same(choice.early_exit, rollout)
            assert choice.finish_reason == ("stop" if rollout.finished else "length")
            depths |= set(rollout.exit_depths.tolist())
            firsts.add(rollout.exit_depths[0])
        all_depths = [d for r in rollouts for d in r.exit_depths.tolist()]
        assert answer.usage.mean_depth == pytest.approx(sum(all_depths) / len(all_depths) / LORA.num_layers)
    assert (len(depths) > 1) == (rule != "off" and not (rule == "fixed" and own.spec.first_token))
    assert (min(firsts) < LORA.num_layers) == (own.spec.first_token and rule != "off")


def test_streams_say_the_same_piece_by_piece(served: Served):
    asked = {"n": 2, "seed": 5, "max_tokens": TOKENS}
    whole = served.complete("4 5 6", **asked)
    told: list[dict] = [{}, {}]
    texts, means = ["", ""], []
    for chunk in served.complete("4 5 6", stream=True, stream_options={"include_usage": True}, **asked):
        means += [chunk.usage.mean_depth] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for name, values in choice.early_exit.items():
                told[choice.index].setdefault(name, []).extend(values)
    assert texts == [choice.text for choice in whole.choices] and means == [whole.usage.mean_depth]
    for found, choice in zip(told, whole.choices, strict=True):
        assert {name: pytest.approx(values, abs=1e-5) for name, values in found.items()} == choice.early_exit
    assert told[0] != told[1]


def test_chat_has_depths_whole_and_streamed(served: Served, own: Own):
    (rollout,) = expected(own, "[user]9\n[assistant]", Sample(), SamplingParams(1.0, 16))
    asked = {"seed": 5, "max_tokens": 16, "extra_body": {"exit_policy": {"kind": "sample"}}}
    whole = served.chat("9", logprobs=True, top_logprobs=2, **asked)
    choice = whole.choices[0]
    assert choice.message.content == rollout.text
    assert_same(choice.early_exit, rollout)
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * rollout.length
    # At temperature 1 the whole distribution is what was drawn from.
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(
        choice.early_exit["logprobs"], abs=1e-4
    )
    text, depths = "", []
    chunks = list(served.chat("9", stream=True, stream_options={"include_usage": True}, **asked))
    for chunk in chunks[1:-1]:
        text += chunk.choices[0].delta.content
        depths += chunk.choices[0].early_exit["depths"]
    assert (text, depths) == (rollout.text, rollout.exit_depths.tolist())
    assert not hasattr(chunks[0].choices[0], "early_exit") and chunks[-1].usage.mean_depth == whole.usage.mean_depth


def test_without_a_seed_no_two_answers_are_the_same(served: Served):
    answers = [choice.text for _ in range(2) for choice in served.complete(n=3, max_tokens=TOKENS).choices]
    assert len(set(answers)) == 6


def test_what_vllm_does_to_logits_it_does_still(served: Served):
    biased = served.complete(logit_bias={"65": 100}, **ENDLESS)
    assert biased.choices[0].text == "A" * TOKENS and len(set(biased.choices[0].early_exit["depths"])) > 1
    drawn = served.complete(logit_bias={"65": 100}, max_tokens=TOKENS, seed=1).choices[0].early_exit
    assert drawn["logprobs"] == pytest.approx([0.0] * TOKENS, abs=1e-4)
    whole = served.complete(**ENDLESS).choices[0]
    plain = whole.text
    cut = served.complete(stop=[plain[4:6]], **ENDLESS).choices[0]
    assert cut.text == plain[: plain.index(plain[4:6])] and cut.finish_reason == "stop"
    made = len(cut.early_exit["token_ids"])
    assert 0 < made < TOKENS and cut.early_exit["depths"] == whole.early_exit["depths"][:made]
    told = served.complete(echo=True, logprobs=2, **ENDLESS).choices[0]
    assert told.text == f"1 2 3{plain}" and len(told.logprobs.tokens) == 5 + TOKENS
    one = served.complete(extra_body={"allowed_token_ids": [66, 67]}, max_tokens=TOKENS, seed=1).choices[0]
    assert set(one.text) == {"B", "C"}


def test_a_rule_may_come_as_vllm_carries_arguments_and_on_every_way_in(served: Served):
    carried = served.complete(extra_body={"vllm_xargs": {"exit_policy": "fixed:1"}, "ignore_eos": True}, **GREEDY)
    assert carried.choices[0].early_exit["depths"] == [6] + [1] * (TOKENS - 1)
    asked = {"model": "tiny", "input": "9", "max_output_tokens": 16, "temperature": 0}
    by_default = httpx.post(f"{served.url}/v1/responses", json=asked, timeout=60).json()
    (chat,) = served.chat("9", temperature=0, max_tokens=16).choices
    assert by_default["output"][0]["content"][0]["text"] == chat.message.content
    with pytest.raises(openai.BadRequestError, match="use_beam_search"):
        served.complete(extra_body={"use_beam_search": True})
    wrong = {**asked, "vllm_xargs": {"exit_policy": "never"}}
    assert httpx.post(f"{served.url}/v1/responses", json=wrong, timeout=60).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"exit_policy": {"kind": "never"}}, "never"),
        ({"exit_policy": {"kind": "threshold", "value": 1.5}}, "1.5"),
        ({"exit_policy": {"kind": "threshold", "value": "high"}}, "high"),
        ({"exit_policy": {"kind": "fixed", "value": 2}}, "2"),
        ({"exit_policy": {"kind": "off", "depth": 2}}, "depth"),
        ({"exit_policy": 7}, "7"),
        ({"exit_polcy": {"kind": "off"}}, "exit_polcy"),
        ({"vllm_xargs": {"early_exit": "x"}}, "early_exit"),
        ({"vllm_xargs": {"exit_policy": "threshold:high"}}, "threshold:high"),
    ],
)
def test_what_is_wrong_with_a_requests_exits_is_one_line(served: Served, fields: dict, named: str, stream: bool):
    for call in (lambda: served.complete(extra_body=fields, stream=stream),
                 lambda: served.chat("9", extra_body=fields, stream=stream)):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        body = caught.value.body
        assert "\n" not in body["message"] and named in body["message"] and body["param"] == "exit_policy"


@pytest.mark.parametrize("chat", [False, True])
def test_a_client_that_leaves_frees_its_place(served: Served, chat: bool):
    def made() -> float:
        """Tokens, once there are no more."""
        counts = [-1.0]
        while len(counts) < 3 or counts[-1] != counts[-3]:
            time.sleep(0.5)
            text = httpx.get(f"{served.url}/metrics", timeout=10).text
            counts.append(sum(map(float, re.findall(r"^vllm:generation_tokens_total{.*} (\S+)$", text, re.MULTILINE))))
        return counts[-1]

    before, ask = made(), served.chat if chat else served.complete
    asked = {"max_tokens": 200, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with ask("9", stream=True, **asked) as answer:
        next(iter(answer))
    assert 0 < made() - before < 200


@EITHER
def test_blocks_of_prompts_are_found_again_and_those_of_answers_never(served: Served, own: Own):
    """An answer in the next prompt gives what it gives where nothing was read before: `cache_salt` makes it so."""
    prompt = [ord(c) for c in "3 1 4 1 5 9 2 6 5 3 5 8 9 7 9 3 2 3 8 4 6 2 6 4 3 3 8 3 2 7 9 5 "]
    asked = {"temperature": 0, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    first = served.complete(prompt, Threshold(0.4), **asked).choices[0].early_exit
    assert min(first["depths"]) < 6
    reads = [*prompt, *first["token_ids"], 65]
    assert len(prompt) == 64
    for rule, known in ((Threshold(0.4), 64 - own.spec.first_token), (Off(), 64)):
        again, found = read_on(served, reads, rule)
        assert found == known // 32 * 32
        fresh, found = read_on(served, reads, rule, cache_salt=os.urandom(8).hex())
        assert found == 0
        assert (again["token_ids"], again["depths"]) == (fresh["token_ids"], fresh["depths"])
        assert again["logprobs"] == pytest.approx(fresh["logprobs"], abs=1e-5)
        # What was read as a prompt is found as one from then on; the next rule is to begin as this one did.
        reads[len(prompt)] ^= 1


def read_on(served: Served, prompt: list[int], rule: ExitRule, **extra) -> tuple[dict, int]:
    """The next 20 tokens, and how many of the prompt were not read again."""
    options = {"temperature": 0, "max_tokens": 20, "extra_body": {"ignore_eos": True, **extra}}
    answer = served.complete(prompt, rule, **options)
    return answer.choices[0].early_exit, answer.usage.prompt_tokens_details.cached_tokens


def test_answers_at_full_depth_are_found_again(served: Served):
    prompt = [ord(c) for c in "2 7 1 8 2 8 1 8 2 8 4 5 9 0 4 5 2 3 5 3 6 0 2 8 7 4 7 1 3 5 2 6"]
    asked = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    first = served.complete(prompt, Off(), max_tokens=100, **asked).choices[0].early_exit
    # The last token of an answer is read by nobody.
    assert read_on(served, [*prompt, *first["token_ids"], 65], Off())[1] == (len(prompt) + 99) // 32 * 32


def test_what_cant_be_served_is_said_before_anything_starts(export: tuple[Path, Own], vllm_python: str, tmp_path: Path):
    path = export[0]
    bare, told = (shutil.copytree(path, tmp_path / name) for name in ("bare", "told"))
    config = json.loads((path / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "exit_depths": []}))
    policy = {"kind": "fixed", "value": 4}
    (told / "generation_config.json").write_text(json.dumps({"eos_token_id": 128, "exit_policy": policy}))
    base = make_model("qwen3", tmp_path / "base")
    other = export_hf(base, (LORA, policy_of(base)), tmp_path / "other")
    cases = [
        [str(path), {}, {}],
        [str(told), {}, {}],
        [str(other), {}, {}],
        [str(path), {"pipeline_parallel_size": 2}, {}],
        [str(path), {"enable_lora": True}, {}],
        [str(path), {"async_scheduling": True}, {}],
        [str(path), {}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}],
        [str(bare), {}, {}],
        [str(path), {}, {"VERSION": "0.33.1"}],
    ]
    found = by_vllm(vllm_python, tmp_path, "settings", json.dumps(cases))
    llama, qwen = (f"EarlyExit{family}ForCausalLM" for family in ("Llama", "Qwen3"))
    assert found[:3] == [[DEFAULT.to_json(), llama], [policy, llama], [DEFAULT_EXIT_POLICY, qwen]]
    names = ("--pipeline-parallel-size", "--enable-lora", "--async-scheduling", "MODEL_RUNNER=1")
    for said, name in zip(found[3:], (*names, "exit_depths", "vLLM 0.33.1"), strict=True):
        assert any(name in line for line in said.splitlines()), said
