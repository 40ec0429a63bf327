"""vLLM with exits against the embedded engine, token for token and depth for depth, and against vLLM without exits."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from vllm_setup import (
    ASKED,
    FIRST,
    FULL,
    LAYERS,
    LORA,
    MODELS,
    PROMPTS,
    SAMPLINGS,
    TOKENS,
    Engines,
    Own,
    answers,
    assert_same,
    by_vllm,
    make_model,
    policy_of,
    request,
)

from ee_megatron.exit_rules import ExitRule, Fixed, Off, Prescribed, Threshold
from ee_megatron.families import VLLM
from ee_megatron.rollout.engine.request import GenerationRequest
from ee_megatron.rollout.engine.sampling import SamplingParams
from ee_megatron.rollout.pool.vllm import packed
from ee_megatron.rollout.vllm.engine import EngineSettings
from ee_megatron.types import Prompt

# Few positions at a time: the graph is tried with as many as a step may have.
COMPILED = {"compile": True, "max_num_batched_tokens": 256}
CHUNKS = {"rows": 16, "max_num_batched_tokens": 16}
# A request that is resumed reads prompt and answer again, in chunks.
FEW_BLOCKS = {"rows": 16, "num_gpu_blocks_override": 10, "block_size": 32, "max_num_batched_tokens": 24}
# Two blocks of 32.
BLOCKS = " ".join(map(str, range(10, 31))) + "  "
SPECS = {"prompts never exit": LORA, "first token exits": FIRST}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> tuple[Path, Own]:
    path = make_model(request.param, tmp_path_factory.mktemp(request.param))
    own = Own(path, MODELS[request.param][-1])
    own.decoder.load_policy(policy_of(path))
    return path, own


@pytest.fixture(scope="module", params=SPECS)
def llama(request, tmp_path_factory) -> tuple[Path, Own]:
    path = make_model("llama", tmp_path_factory.mktemp("llama"))
    return path, Own(path, SPECS[request.param])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rule", ASKED)
def test_every_rule_gives_the_answers_of_the_embedded_engine(rule, sampling, model, engines: Engines):
    path, own = model
    asked = own.request(rule, sampling)
    expected = own.answers(asked)
    assert_same(answers(engines(path, policy_of(path), own.spec), asked), expected)
    assert len({depth for answer in expected for depth in answer.exit_depths.tolist()}) > (rule not in ("off", "fixed"))
    first = min(answer.exit_depths[0] for answer in expected)
    assert (first < LAYERS) == (own.spec.first_token and rule != "off")


@pytest.mark.parametrize("model", VLLM, indirect=True)
@pytest.mark.parametrize("rule", ["threshold", "sample", "prescribed", "confidence"])
def test_compiled_it_gives_the_same_answers(rule, model, engines: Engines):
    """Confidence, which has to see readouts, leaves the graph aside."""
    path, own = model
    asked = own.request(rule)
    assert_same(answers(engines(path, policy_of(path), own.spec, **COMPILED), asked), own.answers(asked))
    assert list(engines.cache.glob("torch_compile_cache/torch_aot_compile/*/rank_0_0/model")), "nothing was compiled"


@pytest.mark.parametrize("llama", ["first token exits"], indirect=True)
@pytest.mark.parametrize("wrapper", ["cuda_graph.CUDAGraphWrapper", "breakable_cudagraph.BreakableCUDAGraphWrapper"])
def test_a_model_that_vllm_wraps_for_its_graphs_gives_the_same_answers(wrapper, llama, vllm_python, tmp_path: Path):
    """On a GPU the model runner wraps the model once it is loaded."""
    job, expected = alone(llama, tmp_path, {})
    assert by_vllm(vllm_python, tmp_path, "wrapped", job, wrapper) == expected


@pytest.mark.parametrize("how", [{}, {"compile": True}], ids=["eager", "compiled"])
def test_devices_that_would_decide_otherwise_follow_the_first(how, llama, vllm_python, tmp_path: Path):
    """Sums over devices need not have the same bits on each; here the second's gates say something else altogether."""
    job, expected = alone(llama, tmp_path, {"tensor": 2, **how})
    assert min(depth for _, depths in expected for depth in depths) < 6
    assert by_vllm(vllm_python, tmp_path, "disagreeing", job) == expected


def test_a_step_waits_for_the_device_once(llama, vllm_python, tmp_path: Path):
    job, expected = alone(llama, tmp_path, {})
    assert by_vllm(vllm_python, tmp_path, "waiting", job) == [expected, 1]


def alone(llama: tuple[Path, Own], folder: Path, how: dict) -> tuple[str, list]:
    """A job for inside.py, and the answers that it is to give."""
    path, own = llama
    own.decoder.load_policy(policy_of(path))
    others = (("max_model_len", 256), ("max_num_batched_tokens", 256))
    settings = EngineSettings(str(path), own.spec, torch.float32, others=others, **how)
    requests = [own.request(rule) for rule in ("sample", "confidence")]
    (folder / "job").write_bytes(pickle.dumps((settings, packed(policy_of(path)), requests)))
    expected = [[one.tokens.tolist(), one.exit_depths.tolist()] for each in requests for one in own.answers(each)]
    return str(folder / "job"), expected


@pytest.mark.parametrize("how", [{}, COMPILED], ids=["eager", "compiled"])
def test_without_exits_it_is_vllm_to_the_bit(how, model, engines: Engines, vllm_python, tmp_path: Path):
    path, own = model
    shut = policy_of(path)
    shut = {
        n: torch.full_like(t, -1e4) if n.endswith("fc2.bias") else 0 * t if "gates." not in n else t
        for n, t in shut.items()
    }
    asked = replace(request("sample", "greedy"), samples=1, sampling=SamplingParams(0.0, TOKENS))
    found = answers(engines(path, shut, own.spec, **how), asked)
    encoded = [own.tokenizer(prompt.text)["input_ids"] for prompt in PROMPTS]
    stated = {"prompts": encoded, "tokens": TOKENS, "rows": 64, "compile": how == COMPILED}
    (tmp_path / "asked.json").write_text(json.dumps(stated))
    engines.__exit__()
    stock = by_vllm(vllm_python, tmp_path, "stock", str(path), str(tmp_path / "asked.json"))
    for answer, plain in zip(found, stock, strict=True):
        assert answer.tokens.tolist() == plain["tokens"][: answer.length] and answer.length > 1
        assert np.array_equal(answer.token_logprobs, np.float32(plain["logprobs"])[: answer.length])


@pytest.mark.parametrize(
    "settings",
    [{"rows": 1}, {"rows": 64}, CHUNKS, FEW_BLOCKS],
    ids=["one at a time", "64 in flight", "prompts in chunks", "few blocks"],
)
def test_how_it_is_scheduled_changes_nothing(settings, llama, engines: Engines):
    path, own = llama
    own.decoder.load_policy(policy_of(path))
    engine = engines(path, policy_of(path), own.spec, **settings)
    before = engine.call("counter", "vllm:num_preemptions")
    for rule in ASKED:
        asked = replace(own.request(rule), prompts=[replace(p, id=f"{p.id}.{i}") for p in PROMPTS for i in range(3)])
        if rule == "prescribed":
            asked = own.request(rule)
        assert_same(answers(engine, asked), own.answers(asked))
    assert (engine.call("counter", "vllm:num_preemptions") > before) == ("num_gpu_blocks_override" in settings)


@pytest.mark.parametrize("how", [{}, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("llama", ["first token exits"], indirect=True)
def test_weights_are_set_in_place(how, llama, engines: Engines):
    path, own = llama
    engine = engines(path, policy_of(path), own.spec, **how)
    for seed in (1, 2, 1):
        own.decoder.load_policy(policy_of(path, seed=seed))
        engine.call("load", seed, packed(policy_of(path, seed=seed)))
        assert_same(answers(engine, request("sample")), own.answers(request("sample")))
    own.decoder.load_policy(None)
    engine.call("load", 0, None)
    assert_same(answers(engine, request("off")), own.answers(request("off")))
    with pytest.raises(ValueError, match="exit policy sample needs gates"):
        answers(engine, request("sample"))


def test_prompts_of_a_group_are_read_once_under_each_policy(llama, engines: Engines):
    """What was read under other weights, or answered with exits, is never taken for a prompt's."""
    path, own = llama
    engine = engines(path, policy_of(path), own.spec, block_size=32)
    text = " ".join(str(i) for i in range(20))
    asked = replace(request("sample"), prompts=[Prompt(f"p{i}", text + " " * i, "", "t") for i in range(2)], samples=4)
    for seed in (1, 2):
        policy = policy_of(path, seed=seed)
        own.decoder.load_policy(policy)
        engine.call("load", seed, packed(policy))
        before = engine.call("counter", "vllm:prefix_cache_hits")
        expected = own.answers(asked)
        assert_same(answers(engine, asked), expected)
        # Two prompts of one block, which one of all eight answers reads.
        assert engine.call("counter", "vllm:prefix_cache_hits") - before == 7 * 32
        # Prompts that contain an answer.
        longer = [replace(p, id=f"{p.id}+", text=p.text + expected[4 * i].text) for i, p in enumerate(asked.prompts)]
        assert_same(answers(engine, replace(asked, prompts=longer)), own.answers(replace(asked, prompts=longer)))


@pytest.mark.parametrize("llama", ["first token exits"], indirect=True)
def test_a_block_that_ends_with_a_prompt_that_has_left_is_no_other_prompts(llama, engines: Engines):
    """Where nothing has left, it is everybody's, but for the prompt that ends there."""
    path, own = llama
    engine = engines(path, policy_of(path), own.spec, block_size=32)
    policy = policy_of(path)
    own.decoder.load_policy(policy)

    def hits(text: str, exits: ExitRule) -> int:
        asked = GenerationRequest([Prompt(text, text, "", "t")], 1, SAMPLINGS["greedy"], exits, 0)
        before = engine.call("counter", "vllm:prefix_cache_hits")
        assert_same(answers(engine, asked), own.answers(asked))
        return engine.call("counter", "vllm:prefix_cache_hits") - before

    for rule in (Fixed(1), Threshold(0.5), Prescribed({(BLOCKS, 0): [3] * TOKENS})):
        engine.call("load", 1, packed(policy))
        assert [hits(BLOCKS, rule), hits(BLOCKS, rule), hits(BLOCKS + " 4", Off())] == [0, 32, 32]
    for rule in (Fixed(1), Off()):
        engine.call("load", 1, packed(policy))
        assert [hits(BLOCKS, Off()), hits(BLOCKS, rule), hits(BLOCKS + " 4", rule)] == [0, 32, 64]


@pytest.mark.parametrize("how", [{}, COMPILED], ids=["eager", "compiled"])
def test_two_devices_share_the_model(how, llama, engines: Engines):
    """Ranks that disagreed on an exit would be reported; new weights reach every rank."""
    path, own = llama
    engine = engines(path, policy_of(path), own.spec, tensor=2, **how)
    for seed in (0, 1):
        own.decoder.load_policy(policy_of(path, seed=seed))
        engine.call("load", seed, packed(policy_of(path, seed=seed)))
        for rule in ("sample", "threshold", "prescribed", "confidence"):
            assert_same(answers(engine, own.request(rule)), own.answers(own.request(rule)))
    ranks = psutil.Process(engine.pid).children(recursive=True)
    assert len(ranks) >= 2
    engines.__exit__()
    assert not psutil.wait_procs(ranks, timeout=30)[1]


def test_a_whole_model_is_taken_over(tmp_path: Path, engines: Engines):
    path = make_model("qwen2", tmp_path / "model")
    own = Own(path, FULL)
    engine = engines(path, policy_of(path, FULL), spec=FULL)
    for seed in (0, 1):
        own.decoder.load_policy(policy_of(path, FULL, seed))
        engine.call("load", seed, packed(policy_of(path, FULL, seed)))
        assert_same(answers(engine, request("sample")), own.answers(request("sample")))


def test_given_tokens_are_part_of_the_answer(llama, engines: Engines):
    path, own = llama
    own.decoder.load_policy(policy_of(path))
    prompts = [replace(prompt, prefill="42 ") for prompt in PROMPTS]
    asked = own.request("sample", prompts=prompts)
    found = answers(engines(path, policy_of(path), own.spec), asked)
    assert_same(found, own.answers(asked))
    assert all(answer.text.startswith("42 ") for answer in found)
