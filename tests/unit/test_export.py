"""Exports to Hugging Face: merged and embedded models, PEFT adapters, manifests, refusals."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_megatron.checkpoint.hf_export import EXPORT_FILES, export_hf
from ee_megatron.checkpoint.sources import HFSource, gate_spec
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import ATTENTION, MLP, PolicySpec, save_policy
from tests.reference import Reference, random_policy
from tests.tiny import MODELS, tiny_hf

DEPTHS = (2, 3, 5)
LAYERS = 6
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def made_policy(base: Path, rank: int = 4, **options) -> tuple[PolicySpec, dict[str, Tensor]]:
    spec = PolicySpec(LAYERS, DEPTHS, rank=rank, alpha=8.0, **options)
    return spec, random_policy(HFDirectory(base).dims, spec, seed=1, size=0.2)


def load(path: Path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def sequences(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(5))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def reference_logits(base: Path, policy, ids: Tensor, depths: Tensor | None = None) -> Tensor:
    return Reference(base, *policy, attention="sdpa").logits(
        ids, torch.full_like(ids, LAYERS) if depths is None else depths
    )


@pytest.mark.parametrize(("family", "tied"), MODELS)
@torch.no_grad()
def test_merged_and_embedded_models_equal_the_reference(tmp_path, family, tied):
    base = tiny_hf(family, tmp_path / "base", tied=tied)
    policy = made_policy(base)
    ids = sequences()
    plain = load(export_hf(base, policy, tmp_path / "plain", gates="drop"))
    assert_close(plain(ids).logits, reference_logits(base, policy, ids))
    out = export_hf(base, policy, tmp_path / "out")
    assert HFDirectory(out).dims == HFDirectory(base).dims
    model = load(out, trust_remote_code=True)
    choice = torch.randint(0, len(DEPTHS) + 1, ids.shape, generator=torch.Generator().manual_seed(2))
    depths = torch.tensor([*DEPTHS, LAYERS])[choice]
    expected = reference_logits(base, policy, ids, depths)
    assert_close(model(ids, exit_depths=depths).logits, expected)
    assert (expected - model(ids).logits).abs().max() > 0.1

    # One position at a time on a cache, the work of exited rows left out.
    cache, steps = None, []
    for t in range(ids.shape[1]):
        output = model(ids[:, t : t + 1], exit_depths=depths[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = getattr(output, "cache", None) or output.past_key_values
        steps.append(output.logits)
    assert_close(torch.cat(steps, dim=1), expected)


@torch.no_grad()
def test_scaled_rope_and_half_width_heads_survive_the_export(tmp_path):
    base = tiny_hf("llama", tmp_path / "base", rope_parameters=LLAMA3_ROPE, head_dim=8, attention_bias=True)
    policy = made_policy(base)
    model = load(export_hf(base, policy, tmp_path / "out"), trust_remote_code=True)
    ids = sequences(2, 90)
    depths = torch.full(ids.shape, 3)
    assert_close(model(ids, exit_depths=depths).logits, reference_logits(base, policy, ids, depths))


@torch.no_grad()
def test_qwen2_file_that_names_a_switched_off_window(tmp_path):
    base = tiny_hf("qwen2", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config.pop("layer_types", None)
    config |= {"sliding_window": 8, "use_sliding_window": False}
    (base / "config.json").write_text(json.dumps(config))
    policy = made_policy(base)
    model = load(export_hf(base, policy, tmp_path / "out"), trust_remote_code=True)
    ids = sequences(1, 20)
    plain = load(export_hf(base, policy, tmp_path / "plain", gates="drop"))
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, exit_policy={"kind": "off"}, **options), plain.generate(ids, **options))


def test_sampled_exits_differ_and_depths_that_are_no_exit_are_refused(tmp_path):
    base = tiny_hf("llama", tmp_path / "base")
    model = load(
        export_hf(base, made_policy(base), tmp_path / "out", exit_policy={"kind": "sample"}), trust_remote_code=True
    )
    depths = []
    for _ in range(2):
        model.generate(sequences(8, 4), max_new_tokens=8, do_sample=False, eos_token_id=None)
        depths.append(model.last_exit_depths)
    assert not torch.equal(*depths)
    with pytest.raises(ValueError, match="outside"):
        model(sequences(1, 4), exit_depths=torch.full((1, 4), 1))


def test_whether_the_first_token_may_exit_is_written_beside_the_gates(tmp_path):
    base = tiny_hf("qwen3", tmp_path / "base", tied=False)
    policy = made_policy(base, first_token=True)
    out = export_hf(base, policy, tmp_path / "out")
    assert HFSource(out).spec == PolicySpec(LAYERS, DEPTHS, rank=0, first_token=True)
    sidecar = export_hf(base, policy, tmp_path / "sidecar", gates="sidecar")
    assert gate_spec(HFSource(base).dims, json.loads((sidecar / "gates.json").read_text())) == HFSource(out).spec
    plain = export_hf(base, made_policy(base), tmp_path / "plain")
    assert "first_token" not in json.loads((plain / "config.json").read_text())


def test_depths_after_the_end_of_a_row_are_marked(tmp_path):
    base = tiny_hf("llama", tmp_path / "base")
    model = load(export_hf(base, made_policy(base), tmp_path / "out"), trust_remote_code=True)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 129}
    free = model.generate(sequences(2, 5), eos_token_id=None, **options)[:, 5:]
    end = int(free[0, 3])
    made = model.generate(sequences(2, 5), eos_token_id=end, **options)[:, 5:]
    for row in range(2):
        stop = made[row].tolist().index(end) + 1 if end in made[row] else made.shape[1]
        assert (model.last_exit_depths[row, :stop] > 0).all()
        assert (model.last_exit_depths[row, stop:] == -1).all()
    assert (model.last_exit_depths == -1).any()


def test_skipped_layers_do_no_work_once_every_row_has_exited(tmp_path):
    base = tiny_hf("llama", tmp_path / "base")
    model = load(export_hf(base, made_policy(base), tmp_path / "out"), trust_remote_code=True)
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda module, inputs, output, index=index: calls.append(index))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    model.generate(sequences(2, 4), exit_policy={"kind": "fixed", "value": 2}, **options)
    assert calls == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1]


@torch.no_grad()
def test_kept_adapters_load_with_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_hf("qwen3", tmp_path / "base")
    for name, targets in (("attention", ATTENTION), ("all", ATTENTION + MLP)):
        spec, tensors = made_policy(base, targets=targets)
        out = export_hf(base, (spec, tensors), tmp_path / name, adapters="keep")
        model = peft.PeftModel.from_pretrained(load(base), out)
        assert_close(model(sequences()).logits, reference_logits(base, (spec, tensors), sequences()))
        stored = load_file(out / "gates.safetensors")
        assert sorted(stored) == sorted(spec.gate_shapes(HFDirectory(base).dims))
        assert all(torch.equal(stored[gate], tensors[gate]) for gate in stored)


@pytest.mark.parametrize("gates", ["embed", "sidecar", "drop"])
def test_manifest_names_every_tensor(tmp_path, gates):
    base = tiny_hf("llama", tmp_path / "base")
    spec, tensors = made_policy(base)
    (tmp_path / "policy").mkdir()
    save_policy(tmp_path / "policy", spec, tensors)
    out = export_hf(base, tmp_path / "policy", tmp_path / "out", gates=gates, shard_bytes=100_000)
    manifest = json.loads((out / "manifest.json").read_text())["tensors"]
    stored: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        stored |= load_file(file)
    assert sorted(stored) == sorted(manifest)
    for name, line in manifest.items():
        assert line["sha256"] == hashlib.sha256(stored[name].numpy().tobytes()).hexdigest()
        assert line["shape"] == list(stored[name].shape)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").is_file()
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)("abc").input_ids == [97, 98, 99]
    assert (out / "generation_config.json").read_text() == (base / "generation_config.json").read_text()


@pytest.mark.parametrize(
    ("adapters", "gates", "library"),
    [("merge", "embed", "transformers"), ("merge", "drop", "transformers"), ("keep", "sidecar", "peft")],
)
def test_every_export_has_a_card_that_says_what_is_known_and_the_same_each_time(tmp_path, adapters, gates, library):
    base = tiny_hf("llama", tmp_path / "base")
    policy = made_policy(base)

    def card(name: str, **options) -> ModelCard:
        out = export_hf(base, policy, tmp_path / name, adapters=adapters, gates=gates, **options)
        text = (out / "README.md").read_bytes()
        assert json.loads((out / "manifest.json").read_text())["card"] == hashlib.sha256(text).hexdigest()
        return ModelCard.load(out / "README.md")

    first = card("one")
    assert str(first) == str(card("two")) and "Not measured" in first.text
    assert (first.data.license, first.data.base_model, first.data.library_name) == ("unknown", None, library)
    assert first.data.pipeline_tag == "text-generation" and ("early-exit" in first.data.tags) == (gates != "drop")
    assert ("exits after 2, 3, 5" in first.text) == (gates != "drop")
    assert card("named", base_name="org/model").data.base_model == "org/model"
    # The base's own card knows the licence; of the model it knows the parent, unless the card is one of these.
    for tags, parent in (("x", None), ("ee-megatron", "org/parent")):
        (base / "README.md").write_text(f"---\nlicense: mit\nbase_model: org/parent\ntags: [{tags}]\n---\ntext\n")
        known = card(tags)
        assert (known.data.license, known.data.base_model) == ("mit", parent) and "licence: mit" in known.text


def test_bfloat16_rounds_the_merged_weight_once(tmp_path):
    base = tiny_hf("llama", tmp_path / "base")
    spec, tensors = made_policy(base)
    out = export_hf(base, (spec, tensors), tmp_path / "out", dtype="bfloat16")
    stored = load_file(out / "model.safetensors")
    stem = "model.layers.1.mlp.down_proj"
    product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    exact = HFDirectory(base).tensor(f"{stem}.weight") + spec.scale * product
    assert torch.equal(stored[f"{stem}.weight"], exact.to(torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert model.gates["2"].fc1.weight.dtype == torch.float32
    model.generate(sequences(2, 4), max_new_tokens=3, do_sample=False)


def test_refusals_leave_nothing_behind(tmp_path):
    base, out = tiny_hf("llama", tmp_path / "base"), tmp_path / "out"
    spec, tensors = made_policy(base)
    short = dict(list(tensors.items())[1:])
    for policy, options, names in (
        ((spec, tensors), {"adapters": "keep", "gates": "embed"}, "gates='embed'"),
        ((spec, short), {}, "missing"),
        ((PolicySpec(7, DEPTHS, rank=0), {}), {}, "7 layers"),
        ((spec, tensors), {"exit_policy": {"kind": "threshold", "value": 2}}, "threshold"),
    ):
        with pytest.raises(ValueError, match=names):
            export_hf(base, policy, out, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    out.mkdir()
    save_file({"x": torch.zeros(1)}, out / "mine.safetensors")
    with pytest.raises(ValueError, match=str(out)):
        export_hf(base, (spec, tensors), out)
    assert [path.name for path in out.iterdir()] == ["mine.safetensors"]


def test_a_transformers_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.45.2")
    with pytest.raises(ImportError, match=r"transformers 4\.45\.2 is too old .*, which needs 4\.46 or newer"):
        runpy.run_path(str(EXPORT_FILES / "configuration_early_exit.py"))


@pytest.mark.parametrize("given", ["dtype", "torch_dtype", None])
def test_config_speaks_to_old_and_new_transformers(tmp_path, given):
    """Read back for real by old versions in tests/clients/test_transformers_versions.py."""
    base = tiny_hf("llama", tmp_path / "base", rope_parameters=LLAMA3_ROPE)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config | ({given: "float32"} if given else {})))
    for gates in ("drop", "embed"):
        out = export_hf(base, made_policy(base), tmp_path / gates, gates=gates)
        made = json.loads((out / "config.json").read_text())
        scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
        assert made["rope_parameters"] == LLAMA3_ROPE
        assert (made["rope_theta"], made["rope_scaling"]) == (10000.0, scaling)
        assert [made.get(name) for name in ("dtype", "torch_dtype")] == ["float32" if given else None] * 2
