"""Pretraining by real ranks: the same under any layout and after a kill, and the held-out loss by transformers."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_megatron.config.schema import TaskConfig
from ee_megatron.observe.metrics import read_metrics
from ee_megatron.tasks import make_task
from tests.covering import EXTENDED, SLOW
from tests.processes import Command

pytestmark = EXTENDED

SETTINGS = [
    "experiment=ladder", "model=ladder_100k", "task.train=300", "task.validation=30",
    "parallel.tokens_per_micro_batch=256",
    "pretrain.steps=6", "pretrain.batch_size=16", "pretrain.checkpoint_every=2",
]  # fmt: skip


def start(runs: Path, *extra: str) -> Command:
    return Command(["pretrain", *SETTINGS, f"runs={runs}", *extra])


def finish(process: Command) -> Path:
    output = process.communicate(timeout=240)
    assert process.returncode == 0, output
    (runs,) = [word.removeprefix("runs=") for word in process.args if str(word).startswith("runs=")]
    (found,) = Path(runs).glob("ladder/pretrain-*")
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return finish(start(tmp_path_factory.mktemp("one")))


@pytest.mark.timeout(300)
def test_the_held_out_loss_is_what_transformers_computes(trained: Path) -> None:
    figures = json.loads((trained / "pretrain.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    task = make_task(
        TaskConfig("arithmetic", families=["sum", "word", "chain"], train=300, validation=30, evaluation=600)
    )
    losses, answers = [], []
    for prompt, answer in task.worked("validation"):
        asked, told = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt.text, f"{answer}\n"))
        tokens = torch.cat([asked, told], dim=1)
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        each = -logprobs.gather(1, tokens[0, 1:, None]).squeeze(1)
        losses.append(each)
        answers.append(each[-told.size(1) :])
    assert figures["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=2e-5)
    assert figures["answer_loss"] == pytest.approx(float(torch.cat(answers).mean()), abs=2e-5)
    rows = read_metrics(trained / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert figures["sequences"] == 6 * 16 and figures["tokens"] == round(figures["length"] * 96) - 96


@pytest.mark.timeout(300)
def test_a_model_that_has_weights_is_trained_on(trained: Path, tmp_path: Path) -> None:
    """A learning rate of nearly nothing leaves it as it is; its first loss is what its last update left."""
    still = ["pretrain.init=model", f"model.path={trained / 'model'}", "pretrain.learning_rate=1e-12"]
    other = finish(start(tmp_path, *still))
    want, got = (json.loads((path / "pretrain.json").read_text()) for path in (trained, other))
    assert got["loss"] == pytest.approx(want["loss"], abs=1e-6)
    assert not (other / "initial").exists() and (other / "model" / "tokenizer.json").is_file()


@SLOW
@pytest.mark.timeout(300)
def test_other_layouts_train_the_same_model(trained: Path, tmp_path: Path) -> None:
    """Two pipeline ranks, whose first stage is drawn before they start."""
    other = finish(start(tmp_path, "parallel.pipeline=2"))
    want, got = (load_file(path / "model" / "model.safetensors") for path in (trained, other))
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, atol=1e-5), name
    first = load_file(trained / "initial" / "model.safetensors")
    assert not torch.allclose(want["model.embed_tokens.weight"], first["model.embed_tokens.weight"], atol=1e-3)


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("ladder/pretrain-*/checkpoints/step_2/COMPLETE")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    again = finish(start(tmp_path))
    assert (again / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert (again / "pretrain.json").read_bytes() == (trained / "pretrain.json").read_bytes()
    name = "model/model.safetensors"
    assert (again / name).read_bytes() == (trained / name).read_bytes()
