"""Actors with a vLLM each, behind the pool's interface: the embedded engine's answers, kills survived, nothing left."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from vllm_setup import LORA, PROMPTS, SAMPLINGS, assert_same, make_model, policy_of, request

from ee_megatron.config.derive import position_bytes
from ee_megatron.config.load import load
from ee_megatron.config.schema import RolloutConfig, VllmConfig
from ee_megatron.config.validate import validate
from ee_megatron.exit_rules import Off, Sample, Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import WeightSet
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams, make_pool
from ee_megatron.rollout.pool.interface import ReplicaSettings
from ee_megatron.rollout.pool.ray_pool import RayPool
from ee_megatron.rollout.pool.vllm import PROCESS, VllmPool
from ee_megatron.types import Prompt, Rollout

LONG = SamplingParams(1.0, 160)
MANY = [Prompt(f"q{i}", f"{i} times {i + 1}", "", "t") for i in range(12)]


def settings(python: str, **more) -> RolloutConfig:
    return RolloutConfig(backend="vllm", max_num_seqs=8, threads=1, timeout_s=300, device_share=0.5,
    vllm=VllmConfig(python=python, compile=False), **more)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pool(path: Path, vllm_python: str) -> Iterator[RayPool]:
    made = make_pool(settings(vllm_python, actors=2, failure_budget=100), path, LORA, torch.float32, "cpu")
    assert isinstance(made, RayPool)
    yield made
    made.close()


@pytest.fixture(scope="module")
def local(path: Path) -> LocalPool:
    return LocalPool(path, LORA)


def flat(answers: list[list[Rollout]]) -> list[Rollout]:
    return [answer for group in answers for answer in group]


def engines() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if PROCESS in (process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_versions_are_loaded_checked_and_answer_as_the_embedded_engine_does(path, pool: RayPool, local: LocalPool):
    for version in (1, 2):
        weights = WeightSet(version, policy_of(path, seed=version))
        pool.load(weights)
        local.load(weights)
        pool.check(weights)
        found = flat(pool.generate(request("sample")))
        assert_same(found, flat(local.generate(request("sample"))))
        assert {answer.weight_version for answer in found} == {version}
    several = request("sample").by(Sample(), Threshold(0.5), Off())
    assert_same(flat(pool.generate(several)), flat(local.generate(several)))
    other = WeightSet(2, policy_of(path, seed=3))
    with pytest.raises(ValueError, match="not this version 2"):
        pool.check(other)
    assert pool.health()["backend"] == "vllm"


def test_the_teacher_answers_and_finished_answers_are_read_again(path, pool: RayPool, local: LocalPool):
    for each in (pool, local):
        each.load(None)
    asked = GenerationRequest(PROMPTS, 1, SAMPLINGS["whole"], Off(), 0)
    answers = flat(pool.generate(asked))
    assert_same(answers, flat(local.generate(asked)))
    found, expected = pool.trace(answers, top_k=4), local.trace(answers, top_k=4)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.divergences, right.divergences, rtol=1e-4, atol=1e-5)


def test_a_model_without_exits_answers_too(path, vllm_python: str):
    """The teacher's stage has no policy yet."""
    asked = GenerationRequest(PROMPTS, 1, SAMPLINGS["whole"], Off(), 0)
    plain = LocalPool(path, None)
    pool = VllmPool(ReplicaSettings(str(path), None, torch.float32, "cpu", settings(vllm_python)))
    try:
        pool.load(None)
        assert_same(flat(pool.generate(asked)), flat(plain.generate(asked)))
    finally:
        pool.close()


def test_a_cache_with_a_limit_holds_what_it_says_and_refuses_what_it_can_never_hold(path, vllm_python: str):
    """vLLM by itself wants room for the longest sequence that the model takes."""
    dims, held = HFDirectory(path).dims, 384
    assert dims.max_positions > held
    limit = held * position_bytes(dims, 4) / 2**30
    asked = GenerationRequest(PROMPTS, 2, SAMPLINGS["whole"], Off(), 0)
    pool = VllmPool(ReplicaSettings(str(path), None, torch.float32, "cpu", settings(vllm_python, cache_gib=limit)))
    try:
        pool.load(None)
        assert_same(flat(pool.generate(asked)), flat(LocalPool(path, None, cache_gib=limit).generate(asked)))
        # vLLM cuts it into blocks of 128 positions on a CPU, and keeps one empty.
        for each, fit in ((pool, 256), (pool.reader, held)):
            with pytest.raises(ValueError, match=f"prompt and answer take up to 4.. positions, the cache has {fit}"):
                each.generate(replace(asked, sampling=SamplingParams(1.0, held)))
    finally:
        pool.close()


@pytest.mark.timeout(1800)
def test_ten_kills_lose_no_answer_and_leave_no_engine(path, pool: RayPool, local: LocalPool):
    """Actors and engines by turns; every prompt is answered once, with the tokens of an undisturbed run."""
    weights = WeightSet(5, policy_of(path, seed=5))
    pool.load(weights)
    local.load(weights)
    asked = GenerationRequest(MANY, 2, LONG, Sample(), 7)
    expected = flat(local.generate(asked))
    chance, struck, done = random.Random(0), [], threading.Event()

    def strike() -> None:
        while len(struck) < 10 and not done.is_set():
            actors = [place for place in pool._driver.places if place.pid and place.pid not in struck]
            if done.wait(chance.uniform(0, 0.5)) or len(actors) < 2:
                continue
            victim = chance.choice(actors).pid
            owned = [p.pid for p in engines() if p.ppid() == victim]
            os.kill(owned[0] if owned and len(struck) % 2 else victim, signal.SIGKILL)
            struck.append(victim)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        rounds = 0
        while len(struck) < 10:
            assert_same(flat(pool.generate(asked)), expected)
            rounds += 1
    finally:
        done.set()
        thread.join()
    assert_same(flat(pool.generate(asked)), expected)
    assert pool.health()["restarts"] >= 10
    # The last victim's place is being taken.
    end = time.monotonic() + 180
    while len(engines()) != 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert len(engines()) == 2
    print(f"{len(struck)} kills in {rounds} batches")


@pytest.mark.parametrize("found", ["", "0.31.2"])
def test_without_a_vllm_that_was_tested_nothing_starts(found: str, path: Path, tmp_path: Path):
    python = tmp_path / "python"
    with pytest.raises(ValueError, match=r"rollout.vllm.python=.*no such file; make the environment with: make vllm"):
        make_pool(settings(str(python)), path, LORA, torch.float32, "cpu")
    python.write_text(f"#!/bin/sh\necho {found}\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match=f"{f'vLLM {found}' if found else 'no vLLM'} there, expected version 0.32"):
        make_pool(settings(str(python)), path, LORA, torch.float32, "cpu")


def test_devices_of_an_actor_share_the_heads_evenly(path: Path):
    dims = HFDirectory(path).dims
    for overrides, message in (
        (
            (["rollout=ray", "rollout.vllm.tensor=2"], "rollout.vllm, rollout.backend=ray: "),
            "rollout.vllm.tensor=3: has to divide the model's 4 attention heads",
        ),
        (["rollout=ray", "rollout.vllm.tensor=2"], "rollout.vllm.tensor=2: rollout.backend=ray has the whole model"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(load(["name=x", f"model.path={path}", *overrides]), dims)
