"""An export with embedded gates is trained as the plain model is: by Trainer, with PEFT, with every kind of input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.reference import random_policy
from tests.tiny import tiny_hf

LAYERS, DEPTHS = 4, (1, 3)
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """One model with its exits, and without."""
    folder = tmp_path_factory.mktemp("training")
    base = tiny_hf("llama", folder / "base", layers=LAYERS, hidden=32)
    spec = PolicySpec(LAYERS, DEPTHS, rank=2, alpha=4.0)
    policy = spec, random_policy(HFDirectory(base).dims, spec, seed=1, size=0.2)
    return export_hf(base, policy, folder / "embed"), export_hf(base, policy, folder / "plain", gates="drop")


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True, **options).eval()


def tokens(rows: int, length: int = 10) -> Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(3))


def examples() -> list[dict]:
    """Eight sequences of which different shares count: a mean of means isn't the mean."""
    rows = []
    for row, ids in enumerate(tokens(8)):
        labels = ids.clone()
        labels[: row + 1] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def train(model: nn.Module, folder: Path, batch: int, accumulate: int, **options) -> tuple[float, dict[str, Tensor]]:
    """One step of plain gradient descent: its loss, and where the weights went."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        **QUIET,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=examples())
    trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return loss, {name: value.detach().clone() for name, value in model.named_parameters()}


def test_trainer_takes_the_same_step_however_the_batch_is_divided(folders, tmp_path):
    expected, moved = train(load(folders[1]), tmp_path / "plain", 8, 1)
    start = dict(load(folders[0]).named_parameters())
    for batch, accumulate, again in ((8, 1, False), (1, 8, False), (2, 4, True)):
        options = {"gradient_checkpointing": again}
        loss, found = train(load(folders[0]), tmp_path / f"{batch}", batch, accumulate, **options)
        assert loss == pytest.approx(expected, rel=1e-4)
        for name, value in moved.items():
            assert (found[name] - value).abs().max() < 1e-5, name
        assert all(torch.equal(found[name], start[name]) for name in start if name.startswith("gates."))
    assert max(float((moved[name] - start[name].detach()).abs().max()) for name in moved) > 1e-2


def test_trainer_evaluates(folders, tmp_path):
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, **QUIET)
    shapes = []

    def measure(made) -> dict:
        shapes.append(made.predictions.shape)
        return {}

    found = Trainer(load(folders[0]), arguments, eval_dataset=examples(), compute_metrics=measure).evaluate()
    plain = Trainer(load(folders[1]), arguments, eval_dataset=examples()).evaluate()
    assert shapes == [(8, 10, 130)] and found["eval_loss"] == pytest.approx(plain["eval_loss"])


def test_peft_adapters_learn_on_top_of_an_export(folders, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(load(folders[0]), config)
    loss, found = train(model, tmp_path, 2, 4, gradient_checkpointing=True)
    start = dict(load(folders[0]).named_parameters())
    learnt = [name for name, value in found.items() if "lora_B" in name and value.abs().max() > 0]
    assert len(learnt) == 2 * LAYERS and loss > 1
    assert all(torch.equal(found[f"base_model.model.{name}"], start[name]) for name in start if "gates" in name)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = model.generate(input_ids=tokens(2), exit_policy="fixed:1", **options)
    assert model.last_exit_depths.tolist() == [[LAYERS, *[1] * 5]] * 2
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert torch.equal(again.generate(tokens(2), exit_policy="fixed:1", **options), out)


@torch.no_grad()
def test_a_model_that_is_training_samples_as_deep_as_it_trains(folders):
    """What trains on its own answers (GRPO) generates between steps, with the model as it is."""
    model, ids = load(folders[0]), tokens(2)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = load(folders[1]).generate(ids, **options)
    model.generate(ids, **options)
    assert (model.last_exit_depths < LAYERS).any()
    model.train()
    for given in ({}, {"generation_config": GenerationConfig(**options)}):
        assert torch.equal(model.generate(ids, **(given or options)), expected)
        assert (model.last_exit_depths == LAYERS).all()
    # So does a loop of one's own.
    cache = DynamicCache()
    model(ids[:, :-1], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits, model(ids).logits[:, -1:])
    # What a call asks for is done.
    for asked in ({"exit_policy": "fixed:1"}, {"generation_config": GenerationConfig(exit_policy="fixed:1")}):
        model.generate(ids, **asked, **options)
        assert (model.last_exit_depths[:, 1:] == 1).all()


@torch.no_grad()
def test_outputs_are_the_plain_models_and_a_skipped_layer_gives_what_was_before_it(folders):
    model, plain = (load(folder) for folder in folders)
    ids, mask = tokens(3), torch.ones(3, 10, dtype=torch.long)
    mask[1, :4] = 0
    found, expected = (one(ids, attention_mask=mask, output_hidden_states=True) for one in (model, plain))
    assert len(found.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one[mask.bool()], other[mask.bool()], atol=2e-5, rtol=1e-4)
    assert isinstance(model(ids, return_dict=False), tuple)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    depths = torch.full(ids.shape, LAYERS)
    depths[0, 3:] = 1
    out = model(ids, exit_depths=depths, output_hidden_states=True)
    for index in range(1, LAYERS):
        assert torch.equal(out.hidden_states[index][0, 3:], out.hidden_states[1][0, 3:])
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


@torch.no_grad()
def test_masks_of_four_dimensions_and_packed_sequences(folders):
    model, ids = load(folders[0]), tokens(2)
    banned = torch.ones(10, 10).tril().bool()
    banned[5:, :2] = False
    added = torch.zeros(1, 1, 10, 10).masked_fill(~banned, torch.finfo(torch.float32).min)
    expected = load(folders[1])(ids, attention_mask=added.expand(2, 1, 10, 10)).logits
    for mask in (added, banned[None, None].expand(2, 1, 10, 10)):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, atol=2e-5, rtol=1e-4)
    # Two sequences in one row, told apart by their positions, as Trainer's collator for packing has them.
    packed = torch.cat([ids[0, :6], ids[1, :4]])[None]
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    logits = model(packed, position_ids=positions).logits[0]
    torch.testing.assert_close(logits[:6], model(ids[:1, :6]).logits[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits[6:], model(ids[1:, :4]).logits[0], atol=2e-5, rtol=1e-4)


def test_what_cannot_be_right_is_refused_in_one_line(folders):
    for kind in ("flex_attention", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError)) as raised:
            load(folders[0], attn_implementation=kind)
        text = str(raised.value).lower()
        assert "\n" not in text and ("attn_implementation" in text or "attention" in text)
    model, ids = load(folders[0]), tokens(1)
    window = DynamicCache()
    window.layers = [DynamicSlidingWindowLayer(sliding_window=4) for _ in range(LAYERS)]
    for error, words, options in (
        (ValueError, "DynamicSlidingWindowLayer", {"past_key_values": window}),
        (TypeError, "cu_seq_lens_q", {"cu_seq_lens_q": torch.tensor([0, 4, 10])}),
        (ValueError, "inputs_embeds", {"inputs_embeds": torch.zeros(1, 10, 32)}),
        (ValueError, r"attention_mask .*\(1, 7\).*\(1, 10\)", {"attention_mask": torch.ones(1, 7)}),
        (ValueError, "attention_mask .*torch.int64", {"attention_mask": torch.ones(1, 1, 10, 10).long()}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            model(ids, **options)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"device_map .*0, 1"):
        model(ids)


@torch.no_grad()
def test_attention_weights_are_those_of_the_plain_export(folders):
    given = {"attention_mask": torch.tensor([[0] * 3 + [1] * 7, [1] * 10]), "output_attentions": True}
    ids = tokens(2)
    plain = load(folders[1], attn_implementation="eager")(ids, **given)
    for model in (load(folders[0], attn_implementation="eager"), load(folders[0])):
        made = model(ids, **given)
        torch.testing.assert_close(made.logits[:, 3:], plain.logits[:, 3:], atol=2e-5, rtol=1e-4)
        for ours, theirs in zip(made.attentions, plain.attentions, strict=True):
            # A query that is padding looks at itself here.
            torch.testing.assert_close(ours[:, :, 3:], theirs[:, :, 3:], atol=1e-5, rtol=1e-4)
    first, second = (
        DEPTHS[0],
        load(folders[0])(ids, exit_depths=torch.tensor([[DEPTHS[0]] * 10, [LAYERS] * 10]), **given),
    )
    assert all(bool((a[0] == 0).all()) == (layer >= first) for layer, a in enumerate(second.attentions))
    assert all(bool((a[1] > 0).any()) for a in second.attentions)


@torch.no_grad()
def test_the_model_without_its_head_runs_as_the_bases_own(folders):
    """As TRL's trainers call it."""
    model, plain = load(folders[0]), load(folders[1])
    torch.testing.assert_close(model.model(tokens(2))[0], plain.model(tokens(2))[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_accelerate_places_and_offloads(folders, tmp_path):
    expected = load(folders[0]).generate(tokens(2), max_new_tokens=6, do_sample=False)
    whole = load(folders[0], device_map="cpu")
    assert torch.equal(whole.generate(tokens(2), max_new_tokens=6, do_sample=False), expected)
    accelerate = pytest.importorskip("accelerate")
    split = accelerate.disk_offload(load(folders[0]), str(tmp_path), torch.device("cpu"))
    assert torch.equal(split.generate(tokens(2), max_new_tokens=6, do_sample=False), expected)


def test_the_tokenizer_runs_no_code_of_the_export(folders, monkeypatch):
    """Newer transformers read config.json before the tokenizer, and ask whether the class that it names may be run."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    for options in ({}, {"trust_remote_code": False}):
        assert AutoTokenizer.from_pretrained(folders[0], **options)("abc").input_ids == [97, 98, 99]
    assert len(asked) <= 1
