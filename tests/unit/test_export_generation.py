"""An export under every way that transformers generates, against this package's own decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StaticCache

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.exit_rules import ExitRule, Fixed, Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, Request, SamplingParams, Scheduler
from ee_megatron.types import Rollout
from tests.tiny import tiny_hf

LAYERS, DEPTHS, NEW = 4, (1, 3), 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
DRAWN = {**GREEDY, "do_sample": True, "top_k": 0}


class Sides:
    """One policy: the export in transformers, and the decoder. `draft`: another model, for assisted decoding."""

    def __init__(self, folder: Path, first_token: bool):
        base = tiny_hf("qwen3", folder / "base", layers=LAYERS, hidden=32)
        spec = PolicySpec(LAYERS, DEPTHS, rank=2, alpha=4.0, first_token=first_token)
        generator = torch.Generator().manual_seed(1)
        shapes = spec.tensor_shapes(HFDirectory(base).dims)
        tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.folder = export_hf(base, (spec, tensors), folder / "out")
        self.model = load(self.folder)
        self.plain = load(export_hf(base, (spec, tensors), folder / "plain", gates="drop"))
        self.draft = load(tiny_hf("qwen3", folder / "draft", layers=2, hidden=32, seed=3))
        self.decoder = Decoder.from_hf(base, spec, torch.float32, "cpu")
        self.decoder.load_policy(tensors)
        self.decoder.eos_ids = frozenset({10**6})
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.first_token = first_token

    def answer(self, prompt: list[int], rule: ExitRule, given: list[int] = []) -> Rollout:  # noqa: B006
        """The decoder's greedy answer, or what it makes of one that is given."""
        scheduler = Scheduler(self.decoder, self.tokenizer, in_flight=1)
        # What is given may not be all: the decoder adds a token of its own.
        sampling = SamplingParams(1.0, NEW + 1) if given else SamplingParams(0.0, NEW)
        request = scheduler.add(Request(prompt, sampling, rule, prefill=given))
        while scheduler.busy:
            scheduler.advance()
        return scheduler.take(request, 0)


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["prompts never exit", "first token exits"])
def sides(request, tmp_path_factory) -> Sides:
    return Sides(tmp_path_factory.mktemp("sides"), request.param)


def prompts(rows: int, length: int = 9, seed: int = 5) -> Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


# Mode -> rows, and the arguments of `generate` that make it.
MODES = {
    "batch": (3, lambda sides, ids: {}),
    "prompt in pieces": (2, lambda sides, ids: {"prefill_chunk_size": 4}),
    "static cache": (2, lambda sides, ids: {"cache_implementation": "static"}),
    "a cache of one's own": (
        2,
        lambda sides, ids: {"past_key_values": StaticCache(sides.model.config, max_cache_len=40)},
    ),
    "no cache": (3, lambda sides, ids: {"use_cache": False}),
    "eager": (2, lambda sides, ids: {"output_attentions": True, "return_dict_in_generate": True}),
    "prompt lookup": (1, lambda sides, ids: {"prompt_lookup_num_tokens": 4}),
    "another model's drafts": (1, lambda sides, ids: {"assistant_model": sides.draft}),
    "its own drafts": (1, lambda sides, ids: {"assistant_model": sides.plain}),
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_text_and_depths_are_the_decoders(sides, mode):
    rows, options = MODES[mode]
    rule = Fixed(3) if mode == "prompt in pieces" else Threshold(0.5)
    ids = prompts(rows)
    if mode == "prompt lookup":
        ids = torch.cat([ids, ids, ids[:, :4]], dim=1)
    if mode == "eager":
        sides.model.set_attn_implementation("eager")
    try:
        made = sides.model.generate(ids, exit_policy=str(rule), **options(sides, ids), **GREEDY)
    finally:
        sides.model.set_attn_implementation("sdpa")
    made = made if isinstance(made, Tensor) else made.sequences
    answers = [sides.answer(row.tolist(), rule) for row in ids]
    assert made[:, ids.shape[1] :].tolist() == [answer.tokens.tolist() for answer in answers]
    assert sides.model.last_exit_depths.tolist() == [answer.exit_depths.tolist() for answer in answers]
    assert (sides.model.last_exit_depths < LAYERS).any()


def test_drafts_are_accepted_and_thrown_away(sides):
    """What the test above would not see: a draft that is never accepted, or never offered."""
    calls: list[int] = []
    handle = sides.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    sides.model.generate(prompts(1), exit_policy="threshold:0.5", assistant_model=sides.plain, **GREEDY)
    handle.remove()
    assert len(calls) < NEW and max(calls[1:]) > 1


def test_left_padded_rows_and_embedded_prompts(sides):
    rule, ids = Threshold(0.5), prompts(3)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 6)):
        ids[row, :pad], mask[row, :pad] = 129, 0
    answers = [sides.answer(row[seen.bool()].tolist(), rule) for row, seen in zip(ids, mask, strict=True)]
    texts, depths = (
        [list(map(int, part)) for part in parts]
        for parts in zip(*((a.tokens, a.exit_depths) for a in answers), strict=True)
    )
    embeds = sides.model.get_input_embeddings()(ids)
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds}, {"input_ids": ids, "use_cache": False}):
        made = sides.model.generate(**inputs, attention_mask=mask, exit_policy="threshold:0.5", **GREEDY)
        assert made[:, -NEW:].tolist() == texts
        assert sides.model.last_exit_depths.tolist() == depths


@pytest.mark.parametrize("kind", ["samples", "samples of a draft"])
def test_sampled_answers_are_told_as_the_decoder_tells_them(sides, kind):
    rule, ids = Threshold(0.5), prompts(1)
    options = {"num_return_sequences": 4} if kind == "samples" else {"assistant_model": sides.plain}
    torch.manual_seed(0)
    out = sides.model.generate(
        ids, exit_policy="threshold:0.5", return_dict_in_generate=True, output_logits=True, **options, **DRAWN
    )
    made = out.sequences[:, ids.shape[1] :]
    logprobs = torch.stack(out.logits, dim=1).log_softmax(-1).gather(2, made[..., None])[..., 0]
    for row, depths in enumerate(sides.model.last_exit_depths):
        answer = sides.answer(ids[0].tolist(), rule, made[row].tolist())
        assert depths.tolist() == answer.exit_depths[:NEW].tolist()
        torch.testing.assert_close(logprobs[row], torch.from_numpy(answer.full_logprobs[:NEW]), atol=2e-4, rtol=0)
    assert kind != "samples" or len(made.unique(dim=0)) == 4


@pytest.mark.parametrize("mode", ["search", "sample"])
def test_beams_are_scored_as_the_decoder_scores_them(sides, mode):
    ids = prompts(2)
    options = {**(DRAWN if mode == "sample" else GREEDY), "num_beams": 3, "num_return_sequences": 2}
    torch.manual_seed(0)
    out = sides.model.generate(
        ids, exit_policy="threshold:0.5", return_dict_in_generate=True, output_scores=True, **options
    )
    for row, tokens in enumerate(out.sequences[:, ids.shape[1] :]):
        answer = sides.answer(ids[row // 2].tolist(), Threshold(0.5), tokens.tolist())
        # The default length penalty is 1: the mean.
        assert float(out.sequences_scores[row]) == pytest.approx(answer.full_logprobs[:NEW].mean(), abs=2e-4)
        assert (answer.exit_depths[:NEW] < LAYERS).any()
    assert sides.model.last_exit_depths is None


def test_without_exits_every_mode_is_the_plain_models(sides):
    ids = prompts(2)
    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {"use_cache": False}):
        found = sides.model.generate(ids, exit_policy="off", **options, **GREEDY)
        assert torch.equal(found, sides.plain.generate(ids, **options, **GREEDY))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha \\(contrastive search\\): not supported with early exits"),
        ({"dola_layers": "high"}, "DoLa"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group beam search"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "constrained beam search"),
        ({"num_beams": 2, "use_cache": False}, "num_beams with use_cache=False"),
        ({"custom_generate": lambda model, **kwargs: None}, "a decoding loop of your own"),
        ({"assistant_early_exit": 1}, "transformers' own early exit"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"exit_policy": "threshold:high"}, "exit_policy 'threshold:high': expected \"off\""),
        ({"exit_policy": "confidence:0.5"}, "exit_policy 'confidence:0.5'"),
        ({"exit_policy": "fixed:2"}, "fixed needs a value out of"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_modes_that_exits_do_not_go_with_are_refused_by_name(sides, options, words):
    with pytest.raises(ValueError, match=words) as raised:
        sides.model.generate(prompts(1), **{"exit_policy": "sample", **options}, max_new_tokens=4)
    assert "\n" not in str(raised.value)
    assert sides.model.generate(prompts(1), **GREEDY).shape == (1, 9 + NEW)


def test_short_policies_wherever_one_may_stand(sides, tmp_path):
    model, ids = sides.model, prompts(1)
    model.generate(ids, exit_policy="off", **GREEDY)
    assert (model.last_exit_depths == LAYERS).all()
    model.generate(ids, generation_config=GenerationConfig(**GREEDY, exit_policy="fixed:1"))
    assert (model.last_exit_depths[:, 1:] == 1).all()
    config = json.loads((sides.folder / "config.json").read_text()) | {"exit_policy": "fixed:3"}
    for file in sides.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = load(tmp_path)
    other.generate(ids, **GREEDY)
    assert (other.last_exit_depths[:, 1:] == 3).all()


def test_depths_end_where_a_row_ends_whatever_is_read_beyond(sides):
    """Where ends are looked at a step late, a token more is made and taken back."""
    ids = prompts(2)
    free = sides.model.generate(ids, exit_policy="threshold:0.5", **GREEDY)[:, 9:]
    end = int(free[0, 4])
    made = sides.model.generate(
        ids[:1], exit_policy="threshold:0.5", **{**GREEDY, "eos_token_id": end}, pad_token_id=129, use_cache=False
    )
    assert sides.model.last_exit_depths.shape[1] == made.shape[1] - 9 <= 5
