"""Training from random weights: the weights that are drawn, the tokenizer that is made, the texts and their order."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_megatron.config.derive import read_dims, reshaped
from ee_megatron.config.identity import stage_dir
from ee_megatron.config.load import load
from ee_megatron.config.schema import PretrainConfig, RunConfig, TeacherConfig
from ee_megatron.objectives.weights import text_likelihood
from ee_megatron.training import stages
from ee_megatron.training.pretrain import draw_model, draw_weights, make_batch, plan, worked_texts

LADDER = ("100k", "300k", "1m", "3m", "10m")


def ladder(size: str, *settings: str) -> RunConfig:
    return load(["experiment=ladder", f"model=ladder_{size}", "task.train=600", *settings])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return draw_model(ladder("100k"), tmp_path_factory.mktemp("drawn") / "initial")


def test_the_ladder_has_the_sizes_that_it_is_named_after() -> None:
    named = {"100k": 1e5, "300k": 3e5, "1m": 1e6, "3m": 3e6, "10m": 1e7}
    for size in LADDER:
        dims = read_dims(ladder(size))
        embedding = dims.vocab * dims.hidden
        total = sum(math.prod(shape) for shape in dims.tensor_shapes().values())
        assert total - embedding == pytest.approx(named[size], rel=0.06), size


def test_weights_are_drawn_as_the_docstring_says_and_by_the_seed_alone() -> None:
    dims = read_dims(ladder("1m"))
    tensors = draw_weights(dims, seed=3)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == dims.tensor_shapes()
    deviation = math.sqrt(2 / (5 * 104))
    assert float(tensors["model.layers.5.mlp.up_proj.weight"].std()) == pytest.approx(deviation, rel=0.03)
    assert float(tensors["model.layers.5.mlp.down_proj.weight"].std()) == pytest.approx(deviation / 4, rel=0.03)
    assert (tensors["model.norm.weight"] == 1).all()
    again, other = draw_weights(dims, seed=3), draw_weights(dims, seed=4)
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors[name], again[name]) and not torch.equal(tensors[name], other[name])


def test_transformers_reads_what_is_drawn(drawn: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(drawn)
    tokenizer = AutoTokenizer.from_pretrained(drawn)
    tokens = tokenizer("Question: Compute 33 + 15.\nAnswer:", return_tensors="pt")["input_ids"]
    loss = model(tokens, labels=tokens).loss.item()
    # Before any training every token is about as likely as every other.
    assert loss == pytest.approx(math.log(512), rel=0.1)


@given(text=st.text(max_size=60))
def test_the_tokenizer_gives_back_any_text_and_cuts_numbers_into_digits(drawn: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(drawn)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert all(token < 512 for token in tokens)
    for token in tokens:
        assert sum(character.isdigit() for character in tokenizer.decode([token])) <= 1


def test_the_tokenizer_is_made_for_the_task(drawn: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(drawn)
    texts = worked_texts(ladder("100k"))
    assert len(texts) == 600 and texts[0].startswith("Question: ") and texts[0].endswith("\n")
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert sum(lengths) < 0.5 * sum(len(text) for text in texts)
    assert tokenizer.eos_token_id == json.loads((drawn / "config.json").read_text())["eos_token_id"]


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    shape = json.loads((Path(ladder("100k").model.path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": 256}))
    with pytest.raises(ValueError, match=r"vocab_size=256.*\b257\b"):
        draw_model(ladder("100k", f"model.path={tmp_path}"), tmp_path / "initial")
    assert not (tmp_path / "initial").exists()


def test_a_shape_may_be_asked_for_by_layers_and_width(tmp_path: Path) -> None:
    settings = ["pretrain.layers=3", "pretrain.width=52", "exits.depths=[1,2]"]
    cfg, plain = ladder("1m", *settings), read_dims(ladder("1m"))
    dims = read_dims(cfg)
    # 104 wide with heads of 26 and an MLP of 280: half of each.
    assert (dims.num_layers, dims.hidden, dims.heads, dims.kv_heads, dims.intermediate) == (3, 52, 2, 2, 144)
    assert dims.head_dim == plain.head_dim == 26
    model = AutoModelForCausalLM.from_pretrained(draw_model(cfg, tmp_path / "initial"))
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()}.items() >= dims.tensor_shapes().items()
    assert stage_dir(cfg, "pretrain") != stage_dir(ladder("1m"), "pretrain")


def test_a_list_by_layer_has_as_many_entries_as_there_are_layers() -> None:
    config = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    assert reshaped(config, 2, 0) == {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert reshaped(config, 0, 0) == config


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pretrain\.width=60.*\b26\b"):
        read_dims(ladder("1m", "pretrain.width=60"))


def test_every_text_comes_before_any_comes_again() -> None:
    order = plan(10, PretrainConfig(steps=5, batch_size=4, seed=1))
    assert order.shape == (5, 4)
    assert sorted(order.ravel()[:10]) == sorted(order.ravel()[10:]) == list(range(10))
    assert not np.array_equal(order, plan(10, PretrainConfig(steps=5, batch_size=4, seed=2)))


def test_every_token_but_the_first_counts_alike() -> None:
    batch = make_batch([np.arange(1, 6), np.arange(1, 4)], num_layers=8)
    assert batch.loss_mask.sum() == 6 and not batch.gate_mask.any()
    weights = text_likelihood(batch)
    assert torch.equal(weights.token[batch.loss_mask], torch.full((6,), 1 / 6))


def test_a_model_that_is_trained_on_is_the_one_at_its_path(tmp_path: Path, drawn: Path) -> None:
    cfg = ladder("100k", f"runs={tmp_path}", "pretrain.init=model", f"model.path={drawn}")
    assert stages.ready_model(cfg, "pretrain") == drawn
    assert stages.stage_dir(cfg, "pretrain").name != stages.stage_dir(ladder("100k"), "pretrain").name
    broken = tmp_path / "broken"
    shutil.copytree(drawn, broken)
    (broken / "model.safetensors").unlink()
    cfg = ladder("100k", f"runs={tmp_path}", "pretrain.init=model", f"model.path={broken}")
    for look in (lambda: stages.ready_model(cfg, "pretrain"), lambda: stages.check_given(cfg)):
        with pytest.raises(FileNotFoundError, match="safetensors"):
            look()


def test_later_stages_build_on_what_is_pretrained(tmp_path: Path) -> None:
    cfg = ladder("100k", f"runs={tmp_path}")
    with pytest.raises(FileNotFoundError, match="'pretrain'"):
        stages.base_model(cfg)
    folder = stages.stage_dir(cfg, "pretrain")
    folder.mkdir(parents=True)
    (folder / "DONE").touch()
    assert stages.base_model(cfg) == folder / "model"
    cfg.teacher = TeacherConfig()
    assert stages.source_model(cfg) == folder / "model"
    with pytest.raises(FileNotFoundError, match="'teacher'"):
        stages.base_model(cfg)
