"""The Python API: what a path may name, answers with their depths, a readout that equals an independent reference."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ee_megatron
from ee_megatron import EarlyExitModel, cli
from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.config.identity import to_yaml
from ee_megatron.config.schema import RunConfig
from ee_megatron.exit_rules import Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.inference.answering import wants_chat
from ee_megatron.observe.rundir import DONE, seal
from ee_megatron.policy import PolicySpec, save_policy
from ee_megatron.rollout import GenerationRequest, SamplingParams, generate
from ee_megatron.types import Prompt
from tests.reference import Reference, random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=2, alpha=4.0)
FLOAT32 = {"dtype": "float32", "device": "cpu"}
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def add_checkpoint(stage: Path, cfg: RunConfig, policy: dict[str, torch.Tensor]) -> None:
    """A finished stage with one checkpoint, as training leaves it."""
    folder = stage / "checkpoints" / "step_3"
    folder.mkdir(parents=True)
    save_policy(folder, SPEC, policy)
    seal(folder)
    (stage / "config.yaml").write_text(to_yaml(cfg))
    (stage / DONE).touch()


class House:
    """One tiny model in every form that `load` takes."""

    def __init__(self, root: Path):
        self.base = tiny_hf("llama", root / "models" / "m")
        dims = HFDirectory(self.base).dims
        self.policy, self.other = random_policy(dims, SPEC, 0), random_policy(dims, SPEC, 1)
        self.run = root / "runs" / "one"
        # As a run saves it that was started in `root`.
        cfg = RunConfig(name="one")
        cfg.model.path, cfg.model.dtype, cfg.teacher = "models/m", "float32", None
        add_checkpoint(self.run / "calibrate-00000000", cfg, self.other)
        add_checkpoint(self.run / "rl-00000000", cfg, self.policy)
        self.checkpoint = self.run / "rl-00000000" / "checkpoints" / "step_3"
        said = Threshold(0.6).to_json()
        self.embed = export_hf(self.base, (SPEC, self.policy), root / "embed", exit_policy=said)
        self.sidecar = export_hf(self.base, (SPEC, self.policy), root / "sidecar", gates="sidecar")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def model(house: House) -> EarlyExitModel:
    return EarlyExitModel.load(house.base, house.checkpoint, **FLOAT32)


def test_importing_the_package_imports_no_torch_and_no_unknown_name() -> None:
    code = "import sys, ee_megatron; print('torch' in sys.modules, 'EarlyExitModel' in dir(ee_megatron))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError):
        _ = ee_megatron.EarlyExit


@pytest.mark.parametrize("form", ["run", "stage", "checkpoint", "embed", "sidecar"])
def test_every_form_of_a_model_gives_the_same_answer(house: House, model: EarlyExitModel, form: str) -> None:
    path = {"stage": house.run / "rl-00000000"}.get(form) or getattr(house, form)
    loaded = EarlyExitModel.load(path, **FLOAT32)
    expected, found = (m.generate("1 + 1 =", "threshold:0.5", max_new_tokens=12)[0] for m in (model, loaded))
    assert len(set(expected.depths.tolist())) > 1
    assert found.tokens.tolist() == expected.tokens.tolist() and found.depths.tolist() == expected.depths.tolist()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert (loaded.settings is not None) == (form in ("run", "stage", "checkpoint"))


def test_the_converter_takes_a_run_or_a_stage_of_it_with_its_base(house: House, tmp_path: Path) -> None:
    def convert(*arguments: object) -> int:
        return cli.main(["convert", *map(str, arguments)])

    def contents(folder: Path) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("manifest.json", "README.md")
        }

    stage, megatron = house.run / "rl-00000000", tmp_path / "megatron"
    assert convert("export", "--checkpoint", house.checkpoint, "--hf", house.base, "--out", tmp_path / "parts") == 0
    expected = contents(tmp_path / "parts")
    for form in (house.run, stage, house.checkpoint):
        out = tmp_path / f"of-{form.name}"
        assert convert("export", "--checkpoint", form, "--out", out) == 0
        assert contents(out) == expected and "model.safetensors" in expected
    assert convert("import", "--policy", house.run, "--out", megatron, "--quiet") == 0
    assert convert("verify", megatron, stage, "--no-logits") == 0
    assert convert("inspect", house.run) == 0
    # What holds no policy, or one whose base isn't known, is refused as before.
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone").mkdir()
    save_policy(tmp_path / "alone", SPEC, house.policy)
    for wrong in ("empty", "alone"):
        assert convert("export", "--checkpoint", tmp_path / wrong, "--out", tmp_path / "none") == 2
    assert convert("import", "--out", tmp_path / "none") == 2
    assert not (tmp_path / "none").exists()


def test_a_run_without_reinforced_policy_gives_the_calibrated_one(house: House, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    cfg = RunConfig(name="one")
    cfg.model.path, cfg.teacher = str(house.base), None
    add_checkpoint(run / "calibrate-00000000", cfg, house.other)
    calibrated = EarlyExitModel.load(run, **FLOAT32)
    direct = EarlyExitModel.load(house.base, run / "calibrate-00000000", **FLOAT32)
    assert calibrated.name == "moved-calibrated" and calibrated.checkpoint == direct.checkpoint
    (run / "calibrate-00000000" / DONE).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(run))):
        EarlyExitModel.load(run)


def test_an_export_is_asked_by_its_own_rule(house: House) -> None:
    exported, plain = EarlyExitModel.load(house.embed, **FLOAT32), EarlyExitModel.load(house.base, **FLOAT32)
    assert exported.default_exits == Threshold(0.6)
    assert EarlyExitModel.load(house.sidecar).default_exits == Threshold(0.5)
    own, said = (exported.generate("abc", rule, max_new_tokens=9)[0] for rule in (None, "threshold:0.6"))
    assert own.depths.tolist() == said.depths.tolist()
    assert set(plain.generate("abc", max_new_tokens=5)[0].depths.tolist()) == {6} and not plain.has_gates


def test_answers_are_the_engines(model: EarlyExitModel) -> None:
    sampling = SamplingParams(0.8, 10, ("x",), 0, 0.9)
    asked = GenerationRequest(
        [Prompt("", "abc", "", ""), Prompt("1", "12 + 3", "", "")], 2, sampling, Threshold(0.5), 7
    )
    expected = [r for group in generate(model.decoder, model.tokenizer, asked, 0) for r in group]
    made = model.generate(
        ["abc", model.encode("12 + 3")], "threshold:0.5", n=2, seed=7,
        temperature=0.8, top_p=0.9, max_new_tokens=10, stop="x",
    )  # fmt: skip
    assert [(a.prompt, a.sample) for a in made] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.text == theirs.text and ours.finished == ("stop" if theirs.finished else "length")
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.depths.tolist() == theirs.exit_depths.tolist()
        np.testing.assert_array_equal(ours.exit_logprobs, theirs.exit_logprobs)
        np.testing.assert_array_equal(ours.full_logprobs, theirs.full_logprobs)
    frame = made.to_frame()
    assert len(frame) == sum(len(a.tokens) for a in made)
    assert frame.groupby(["prompt", "sample"]).depth.mean().tolist() == pytest.approx([a.depths.mean() for a in made])
    assert "".join(frame[(frame["prompt"] == 1) & (frame["sample"] == 0)].token) == "".join(made[2].pieces)


def test_a_stream_is_the_answer_token_by_token(model: EarlyExitModel) -> None:
    whole = model.generate("abc", "threshold:0.5", max_new_tokens=12)[0]
    events = list(model.stream("abc", "threshold:0.5", sampling=SamplingParams(0.0, 12)))
    assert "".join(e.text for e in events) == whole.text
    assert [(e.token, e.depth) for e in events] == list(zip(whole.tokens, whole.depths, strict=True))


def test_messages_go_through_the_chat_template(house: House, tmp_path: Path) -> None:
    def chatty(folder: Path) -> EarlyExitModel:
        copy = shutil.copytree(folder, tmp_path / folder.name)
        (copy / "chat_template.jinja").write_text(CHAT)
        return EarlyExitModel.load(copy, **FLOAT32)

    plain, gated, run = chatty(house.base), chatty(house.embed), EarlyExitModel.load(house.run)
    messages = [{"role": "user", "content": "hi"}]
    tokens = plain.encode(messages)
    assert plain.tokenizer.decode(tokens) == "<user>hi<a>" and tokens == plain.encode("hi", chat=True)
    one, two = plain.generate(messages, max_new_tokens=3)[0], plain.generate("hi", chat=True, max_new_tokens=3)[0]
    assert one.prompt_tokens.tolist() == two.prompt_tokens.tolist() == tokens
    with pytest.raises(ValueError, match="chat template"):
        EarlyExitModel.load(house.base).encode(messages)
    (tmp_path / house.base.name / "chat_template.jinja").write_text(CHAT + "{{ mood }}")
    moody = EarlyExitModel.load(tmp_path / house.base.name, **FLOAT32)
    moody.chat_template_kwargs["mood"] = "!"
    assert moody.tokenizer.decode(moody.encode("hi", chat=True)) == "<user>hi<a>!"
    # On the command line: for chat models as their makers left them.
    assert wants_chat(plain, None) and not wants_chat(plain, False)
    # What these were trained on isn't known, or is known to be plain.
    assert not wants_chat(gated, None) and wants_chat(gated, True) and not wants_chat(run, None)
    assert not wants_chat(EarlyExitModel.load(house.base), None)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_readout_equals_the_reference(house: House, model: EarlyExitModel, replayed: bool) -> None:
    prompt, text = "12 + 30 =", " 42, or so"
    before, after = model.encode(prompt), model.encode(text)
    depths = torch.full((len(before) + len(after),), 6)
    if replayed:
        depths[len(before) - 1 : -1] = torch.tensor([2, 6, 4] * 4)[: len(after)]
    exits = depths[len(before) - 1 : -1] if replayed else None
    found = model.readout(text, prompt, exits=exits, top_k=4, full=True)

    reference = Reference(house.base, SPEC, house.policy)
    with torch.no_grad():
        streams = reference.stream(torch.tensor([[*before, *after]]), depths[None])
        rows = slice(len(before) - 1, None)
        logits = torch.stack([reference.read_out([streams[d]])[0, rows] for d in (2, 4, 6)])
        hazards = torch.sigmoid(reference.ask(streams))[0, rows].T
    logp = logits.log_softmax(-1)
    assert found.depths == (2, 4, 6) and found.logits is not None
    assert found.tokens.tolist() == [before[-1], *after] and found.next_tokens.tolist() == [*after, -1]
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found.logits, logits, **close)
    torch.testing.assert_close(found.logprobs, logp, **close)
    torch.testing.assert_close(found.hazards, hazards, **close)
    torch.testing.assert_close(found.entropies, -(logp.exp() * logp).sum(-1), **close)
    torch.testing.assert_close(found.divergences, (logp[-1].exp() * (logp[-1] - logp)).sum(-1), **close)
    torch.testing.assert_close(found.top_logprobs, logp.topk(4).values, **close)
    said = logp[:, torch.arange(len(after)), torch.tensor(after)]
    torch.testing.assert_close(found.next_logprobs[:, :-1], said, **close)
    assert bool(found.next_logprobs[:, -1].isnan().all())
    probabilities = torch.stack([hazards[0], (1 - hazards[0]) * hazards[1], (1 - hazards[0]) * (1 - hazards[1])])
    torch.testing.assert_close(found.exit_probabilities, probabilities, **close)


def test_a_readout_in_chunks_is_the_same_and_keeps_less(model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.readout("a longer text", top_k=3)
    monkeypatch.setattr("ee_megatron.rollout.engine.scoring.LOGITS_BYTES", 4 * 130 * 2)
    parts = model.readout("a longer text", top_k=3)
    torch.testing.assert_close(parts.top_logprobs, whole.top_logprobs)
    torch.testing.assert_close(parts.divergences, whole.divergences)
    assert whole.logits is None and tuple(whole.top_ids.shape) == (3, 13, 3)
    with pytest.raises(ValueError, match="full=True"):
        _ = whole.logprobs


def test_an_answer_read_again_at_its_exits_has_its_log_probabilities(model: EarlyExitModel) -> None:
    answer = model.generate("1 + 1 =", "threshold:0.5", max_new_tokens=12)[0]
    found = model.readout(answer.tokens, answer.prompt_tokens, exits=answer.depths)
    at = [found.depths.index(depth) for depth in answer.depths]
    again = found.next_logprobs[at, range(len(at))].numpy()
    np.testing.assert_allclose(again, answer.full_logprobs, atol=1e-4)


def test_the_frame_of_a_readout_is_tidy(house: House, model: EarlyExitModel) -> None:
    found = model.readout("abcd", at=[1, 4])
    frame = found.to_frame()
    assert len(frame) == 4 * 3 and frame.depth.tolist() == [1, 4, 6] * 4
    row = frame[(frame.position == 2) & (frame.depth == 4)].iloc[0]
    assert (row.token, row.next_token) == ("c", "d") and row.top_id == found.top_ids[1, 2, 0]
    assert row.divergence == pytest.approx(float(found.divergences[1, 2]))
    # Depth 1 is no exit, the last layer has no gate.
    assert frame.hazard.isna().tolist() == [True, False, True] * 4
    assert EarlyExitModel.load(house.base, **FLOAT32).readout("abcd").depths == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_are_an_error(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str], temperature: float
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(house.base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for policy in (None, house.checkpoint):
        model = EarlyExitModel.load(broken, policy, base_unchecked=True, **FLOAT32)
        with pytest.raises(ValueError, match="NaN"):
            model.generate(["abc", "12"], temperature=temperature, max_new_tokens=3)
    assert cli.main(["generate", "--model", str(broken), "--prompt", "x", "--temperature", str(temperature)]) == 2
    assert "NaN" in capsys.readouterr().err


def test_what_cannot_be_done_is_said_in_one_line(house: House, model: EarlyExitModel, tmp_path: Path) -> None:
    plain = EarlyExitModel.load(house.base, **FLOAT32)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    (tmp_path / "alone").mkdir()
    save_policy(tmp_path / "alone", SPEC, house.policy)
    for action, message in (
        (lambda: EarlyExitModel.load(tmp_path / "none"), "/none"),
        (lambda: EarlyExitModel.load(tmp_path / "peft"), "PEFT"),
        (lambda: EarlyExitModel.load(tmp_path / "alone"), "alone.*base"),
        (lambda: EarlyExitModel.load(house.base, tmp_path), "policy"),
        (lambda: EarlyExitModel.load(house.base, dtype="int8"), "dtype=int8"),
        (lambda: EarlyExitModel.load(house.base, device="tpu"), "device=tpu"),
        (lambda: plain.generate("a", "threshold:0.5"), "gates"),
        (lambda: model.generate("a", "threshold:2"), r"threshold.*\b2"),
        (lambda: model.generate("a", "fixed:3"), "3"),
        (lambda: model.generate("a", temperature=float("nan")), "temperature.*nan"),
        (lambda: model.generate("a", n=0), "n=0"),
        (lambda: model.generate(""), "empty"),
        (lambda: model.generate([[1, 2], [130]]), r"0\.\.129"),
        (lambda: model.readout("abc", at=[7]), r"\[7\].*\b6\b"),
        (lambda: model.readout("abc", top_k=0), "top_k=0"),
        (lambda: model.readout("abc", "x", exits=[2]), "depth"),
        (lambda: model.readout("x" * 600), "512"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            action()
        assert "\n" not in str(caught.value)


def test_generate_uses_the_gates_of_an_export_and_says_that_it_loads(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (house.embed, house.sidecar):
        arguments = ["--model", str(path), "--prompt", "1 + 1 =", "--max-new-tokens", "9"]
        assert cli.main(["generate", *arguments]) == 0
        told = capsys.readouterr()
        assert re.search(r"\b9 tokens", told.out) and not re.search(r"depth 6\.0\b", told.out), told.out
        assert told.err.startswith(f"loading {path} ... ") and told.err.endswith(" s\n") and told.err.count("\n") == 1
    # A run's own settings hold where no others are given: its answers end with their line.
    assert cli.main(["generate", "--model", str(house.run), "--prompt", "1 + 1 =", "--max-new-tokens", "99"]) == 0
    assert re.search(r"one-reinforced\D*\b3 tokens", capsys.readouterr().out)
