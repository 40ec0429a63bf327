"""An export under every way that transformers generates, against this package's own decoder."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, StaticCache

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.exit_rules import ExitRule, Fixed, Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, Request, SamplingParams, Scheduler
from ee_megatron.types import Rollout
from tests.reference import random_policy
from tests.tiny import ONE_EACH, tiny_hf

LAYERS, DEPTHS, NEW = 4, (1, 3), 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
DRAWN = {**GREEDY, "do_sample": True, "top_k": 0}


class Sides:
    """One policy: the export in transformers, and the decoder. `draft`: another model, for assisted decoding."""

    def __init__(self, folder: Path, first_token: bool):
        base = tiny_hf("qwen3", folder / "base", layers=LAYERS, hidden=32)
        spec = PolicySpec(LAYERS, DEPTHS, rank=2, alpha=4.0, first_token=first_token)
        tensors = random_policy(HFDirectory(base).dims, spec, seed=1, size=0.2)
        self.folder = export_hf(base, (spec, tensors), folder / "out")
        self.model = load(self.folder)
        self.plain = load(export_hf(base, (spec, tensors), folder / "plain", gates="drop"))
        self.draft = load(tiny_hf("qwen3", folder / "draft", layers=2, hidden=32, seed=3))
        self.exiting_draft = load(self.folder)
        self.exiting_draft.generation_config.exit_policy = "fixed:1"
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
    "own cache": (2, lambda sides, ids: {"past_key_values": StaticCache(sides.model.config, max_cache_len=40)}),
    "no cache": (3, lambda sides, ids: {"use_cache": False}),
    "prompt lookup": (1, lambda sides, ids: {"prompt_lookup_num_tokens": 4}),
    "another model's drafts": (1, lambda sides, ids: {"assistant_model": sides.draft}),
    "its own drafts": (1, lambda sides, ids: {"assistant_model": sides.plain}),
    "drafts that exit elsewhere": (1, lambda sides, ids: {"assistant_model": sides.exiting_draft}),
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_text_and_depths_are_the_decoders(sides, mode):
    rows, options = MODES[mode]
    rule = Fixed(3) if mode == "prompt in pieces" else Threshold(0.5)
    ids = prompts(rows)
    if mode == "prompt lookup":
        ids = torch.cat([ids, ids, ids[:, :4]], dim=1)
    made = sides.model.generate(ids, exit_policy=str(rule), **options(sides, ids), **GREEDY)
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


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7}], ids=["greedy", "sampled"])
def test_speculation_drafts_by_the_first_layers_and_answers_as_full_depth(sides, sampling):
    ids, layers = prompts(1), list[int]()
    handles = [
        layer.register_forward_hook(lambda *_, depth=depth: layers.append(depth))
        for depth, layer in enumerate(sides.model.model.layers)
    ]
    made = sides.model.generate(ids, exit_policy="speculate:3", **{**GREEDY, **sampling})
    for handle in handles:
        handle.remove()
    # Layers that drafts skip run less often, and every token is full depth's.
    assert 0 < layers.count(LAYERS - 1) < layers.count(2) <= layers.count(0)
    assert (sides.model.last_exit_depths == LAYERS).all()
    torch.manual_seed(3)
    full = sides.model.generate(ids, exit_policy="off", **{**GREEDY, **sampling})
    torch.manual_seed(3)
    assert torch.equal(full, sides.model.generate(ids, exit_policy="speculate:3", **{**GREEDY, **sampling}))
    assert sampling or torch.equal(made, full)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (1, {"repetition_penalty": 3.0, "min_new_tokens": 6}),
        (1, {"max_length": 14, "max_new_tokens": None}),
        (1, {"do_sample": True, "top_k": 5, "eos_token_id": list(range(0, 128, 4))}),
        (3, {}),
        (3, {"do_sample": True}),
        (1, {"num_beams": 2}),
        (1, {"use_cache": False}),
        (1, {"cache_implementation": "static"}),
        (1, {"return_dict_in_generate": True, "output_scores": True}),
        (1, {"prompt_lookup_num_tokens": 4}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_speculation_changes_no_token_in_any_mode(sides, rows, options):
    """Where drafts can't be made, full depth answers without them."""
    ids, found = prompts(rows), []
    for policy in ("off", "speculate:3", "speculate:1"):
        torch.manual_seed(3)
        made = sides.model.generate(ids, exit_policy=policy, **{**GREEDY, **options})
        found.append(made if isinstance(made, Tensor) else made.sequences)
        depths = sides.model.last_exit_depths
        assert depths is None or set(depths.unique().tolist()) <= {LAYERS, -1}
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(("family", "tied"), ONE_EACH)
def test_speculation_in_every_family(family: str, tied: bool, tmp_path):
    """Streamed, and on top of a cache that has read most of the prompt."""
    base = tiny_hf(family, tmp_path / "base", layers=LAYERS, hidden=32, tied=tied)
    spec = PolicySpec(LAYERS, DEPTHS, rank=2, alpha=4.0)
    tensors = random_policy(HFDirectory(base).dims, spec, seed=1, size=0.2)
    model, ids, streamed = load(export_hf(base, (spec, tensors), tmp_path / "out")), prompts(1), list[int]()

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            streamed.extend(tokens.reshape(-1).tolist())

        def end(self) -> None:
            streamed.append(-1)

    full = model.generate(ids, exit_policy="off", **GREEDY)
    assert torch.equal(full, model.generate(ids, exit_policy="speculate:3", streamer=Streamer(), **GREEDY))
    assert streamed == [*full[0].tolist(), -1]
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache, use_cache=True)
    assert torch.equal(full, model.generate(ids, exit_policy="speculate:3", past_key_values=cache, **GREEDY))


def test_a_draft_that_is_interrupted_leaves_the_model_whole(sides):
    """Also for another thread, which sees the same model while this one drafts."""
    ids, seen = prompts(1), list[torch.Tensor]()
    before = sides.model(ids).logits

    def interrupt(*_) -> None:
        # Of the first draft, which runs this layer after the prompt did.
        calls.append(0)
        if len(calls) == 3:
            thread = threading.Thread(
                target=lambda: seen.append(sides.model.generate(ids, exit_policy="off", **GREEDY))
            )
            handle.remove()
            thread.start()
            thread.join()
            raise KeyboardInterrupt

    calls = list[int]()
    handle = sides.model.model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sides.model.generate(ids, exit_policy="speculate:3", **GREEDY)
    assert torch.equal(sides.model(ids).logits, before)
    full = sides.model.generate(ids, exit_policy="off", **GREEDY)
    assert torch.equal(seen[0], full)


class Between:
    """A logits processor that does something else once, when `step` tokens of an answer were made."""

    def __init__(self, step: int, act: Callable[[], object]):
        self.left, self.act = step, act

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.left == 0:
            self.act()
        self.left -= 1
        return scores


def told(model, ids: Tensor, **options) -> tuple[list, list]:
    """An answer's tokens and depths."""
    made = model.generate(ids, **options, **GREEDY)
    return made.tolist(), model.last_exit_depths.tolist()


@torch.no_grad()
def by_hand(model) -> tuple[Tensor, Tensor]:
    """Logits of a pass over a whole sequence, and of one new position on top of a cache."""
    ids, cache = prompts(4, seed=7), DynamicCache()
    model(ids[:, :-1], past_key_values=cache)
    return model(ids).logits, model(ids[:, -1:], past_key_values=cache).logits


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "read again"])
def test_answers_in_two_threads_are_those_that_each_gives_alone(sides, cached):
    """The second begins while the first is under way, and ends after it."""
    model = sides.model
    first = (prompts(3), {"exit_policy": "threshold:0.5", "use_cache": cached})
    second = (prompts(2, length=6, seed=8), {"exit_policy": "fixed:1", "use_cache": cached})
    alone, policy = [told(model, ids, **options) for ids, options in (first, second)], model.exit_policy()
    paused, resume = Event(), Event()

    def pause() -> None:
        paused.set()
        assert resume.wait(60)

    with ThreadPoolExecutor(1) as pool:
        others = []

        def begin() -> None:
            others.append(pool.submit(told, model, second[0], logits_processor=[Between(2, pause)], **second[1]))
            assert paused.wait(60)

        try:
            found = [told(model, first[0], logits_processor=[Between(3, begin)], **first[1])]
        finally:
            resume.set()
        found.append(others[0].result())
    assert found == alone
    assert model.exit_policy() == policy


@pytest.mark.parametrize("thread", ["another", "the same"])
def test_a_pass_by_hand_and_an_answer_under_way_do_not_see_each_other(sides, thread):
    model, ids = sides.model, prompts(3)
    policy = "threshold:0.5"
    alone, expected, seen = told(model, ids, exit_policy=policy), by_hand(model), []
    with ThreadPoolExecutor(1) as pool:
        act = (lambda: pool.submit(by_hand, model).result()) if thread == "another" else lambda: by_hand(model)
        found = told(model, ids, exit_policy=policy, logits_processor=[Between(3, lambda: seen.extend(act()))])
    assert found == alone
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True)) and len(seen) == 2
    assert model.exit_policy() == {"kind": "threshold", "value": 0.5}


def test_a_call_that_fails_leaves_nothing_behind(sides):
    model = sides.model
    alone, expected = told(model, prompts(3), exit_policy="fixed:1"), by_hand(model)

    def fail() -> None:
        raise KeyError("a processor's")

    with pytest.raises(KeyError):
        model.generate(prompts(2), exit_policy="off", logits_processor=[Between(3, fail)], **GREEDY)
    # What is told is still the last answer's that was finished.
    assert model.last_exit_depths.tolist() == alone[1]
    assert all(torch.equal(one, other) for one, other in zip(by_hand(model), expected, strict=True))


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
    guided = {"guidance_scale": 2.0, "negative_prompt_ids": prompts(2, length=4, seed=6)}
    modes = [{}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {"use_cache": False}, guided]
    for options in (*modes, guided | {"use_cache": False}):
        found = sides.model.generate(ids, exit_policy="off", **options, **GREEDY)
        assert torch.equal(found, sides.plain.generate(ids, **options, **GREEDY))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_an_answer_ends_at_a_stop_string(sides, options):
    ids = prompts(1)
    free = sides.model.generate(ids, exit_policy="threshold:0.5", **options, **GREEDY)[0].tolist()
    word = sides.tokenizer.decode(free[9 + 4])
    made = sides.model.generate(
        ids, exit_policy="threshold:0.5", stop_strings=[word], tokenizer=sides.tokenizer, **options, **GREEDY
    )[0].tolist()
    assert made == free[: len(made)] and len(made) <= 9 + 5 and sides.tokenizer.decode(made[-1]) == word


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            (given, next(iter(given)))
            for given in (
                {"penalty_alpha": 0.6, "top_k": 4},
                {"dola_layers": "high"},
                {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5},
                {"force_words_ids": [[5]], "num_beams": 2},
                {"num_beams": 2, "use_cache": False},
                {"custom_generate": lambda model, **kwargs: None},
                {"assistant_early_exit": 1},
                {"guidance_scale": 1.5},
                {"cache_implementation": "paged"},
            )
        ),
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


def test_a_layer_that_runs_fires_its_hooks_once_and_a_skipped_one_never(sides):
    model, ids, fired = sides.model, prompts(2), []
    handles = [
        module.register_forward_hook(lambda module, args, out, name=(index, name): fired.append((name, args, out)))
        for index, layer in enumerate(model.model.layers)
        for name, module in (("layer", layer), ("attention", layer.self_attn), ("mlp", layer.mlp))
    ]
    for rule in ("threshold:0.5", f"fixed:{DEPTHS[0]}", "off"):
        fired.clear()
        model.generate(ids, exit_policy=rule, **GREEDY)
        # A step's deepest row says which layers run; without `first_token`, the prompt runs all.
        deepest = model.last_exit_depths.max(dim=0).values.tolist()
        expected = [
            (index, name) for depth in deepest for index in range(depth) for name in ("attention", "mlp", "layer")
        ]
        if sides.first_token:
            expected = expected[3 * deepest[0] :]
            del fired[: 3 * LAYERS]
        assert [name for name, _, _ in fired] == expected
    for _, args, out in fired:
        stream = out[0] if isinstance(out, tuple) else out
        assert args[0].shape == stream.shape and stream.shape[0] == 2
    for handle in handles:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("part", ["layer", "self_attn"])
def test_a_patch_moves_the_export_as_it_moves_the_plain_model_and_a_skipped_layer_ignores_it(sides, part):
    """A hook adds to the stream after one layer; at full depth the export answers as the plain export does with it."""
    plus = torch.randn(32, generator=torch.Generator().manual_seed(2)) / 4

    def patch(model, index: int):
        layer = model.model.layers[index]
        module = layer if part == "layer" else layer.self_attn
        return module.register_forward_hook(
            lambda module, args, out: (out[0] + plus, *out[1:]) if isinstance(out, tuple) else out + plus
        )

    ids = prompts(2)
    for index in (0, LAYERS - 1):
        made = []
        for model in (sides.model, sides.plain):
            with patch(model, index):
                options = {"exit_policy": "off"} if model is sides.model else {}
                made.append((model(ids).logits, model.generate(ids, **GREEDY, **options)))
        torch.testing.assert_close(made[0][0], made[1][0], atol=2e-5, rtol=1e-4)
        assert torch.equal(made[0][1], made[1][1])
    depths = torch.full_like(ids, DEPTHS[0])
    unpatched = sides.model(ids, exit_depths=depths).logits
    for index in range(LAYERS):
        with patch(sides.model, index):
            same = torch.equal(sides.model(ids, exit_depths=depths).logits, unpatched)
        assert same == (index >= DEPTHS[0])


def test_a_model_with_exits_can_be_pickled_and_copied(sides, tmp_path):
    torch.save(sides.model, tmp_path / "model.pt")
    ids = prompts(1)
    expected = sides.model(ids).logits
    for model in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(sides.model)):
        assert torch.equal(model(ids).logits, expected)
