"""Every layout there and back: in one process by the converter, and through real ranks of megatron-core."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layout_cases import split
from ranks import Ranks
from safetensors.torch import load_file, save_file

from ee_megatron.checkpoint.manifest import read_manifest, tensor_sha256
from ee_megatron.checkpoint.mapping import load_base
from ee_megatron.checkpoint.megatron_directory import MegatronDirectory
from ee_megatron.checkpoint.megatron_io import WEIGHTS, load_weights, save_weights
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.model.config import megatron_config
from ee_megatron.model.gpt import build_model
from ee_megatron.parallel.groups import Degrees
from tests.tiny import MODELS, ONE_EACH, tiny_hf

# 133 is odd: under two and four tensor ranks the vocabulary is padded.
SIZES = {"vocab": 133, "heads": 8, "kv_heads": 4, "layers": 6, "hidden": 64}
EXITS = ("--exit-depths", "1,2,3,4,5")


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def as_bf16(base: Path) -> Path:
    file = base / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return base


def hashes(folder: Path) -> dict[str, str]:
    source = HFDirectory(folder)
    return {name: tensor_sha256(source.tensor(name)) for name in source.names()}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_round_trip_through_every_layout_is_bit_exact(tmp_path, family, tied, dtype):
    base = tiny_hf(family, tmp_path / "base", tied=tied, **SIZES)
    expected = hashes(as_bf16(base) if dtype == "bf16" else base)
    for tensor, pipeline in itertools.product((1, 2, 4), (1, 2, 3)):
        here = tmp_path / f"{tensor}x{pipeline}"
        layout = ("--tp", tensor, "--pp", pipeline)
        assert run("import", "--hf", base, "--out", here / "megatron", *layout, *EXITS) == 0
        assert run("export", "--checkpoint", here / "megatron", "--out", here / "hf", "--gates", "drop") == 0
        assert hashes(here / "hf") == expected
        manifest = read_manifest(here / "megatron")
        assert {name: manifest["tensors"][name]["sha256"] for name in expected} == expected
        assert manifest["layout"]["tensor"] == MegatronDirectory(here / "megatron").stored_degree() == tensor
        assert len(manifest["layout"]["stage_layers"]) == pipeline


def test_reshard_changes_the_layout_and_nothing_else(tmp_path, capsys):
    base = tiny_hf("qwen2", tmp_path / "base", tied=False, **SIZES)
    first = tmp_path / "first"
    assert run("import", "--hf", base, "--out", first, "--tp", 4, "--pp", 2, "--rank", 2, *EXITS) == 0
    moves = [(first, "second", (1, 3, 2)), (tmp_path / "second", "third", (2, 1, 1)), (first, "fourth", (4, 2, 1))]
    for source, name, (tensor, pipeline, virtual) in moves:
        degrees = ("--tp", tensor, "--pp", pipeline, "--vpp", virtual)
        assert run("reshard", "--checkpoint", source, "--out", tmp_path / name, *degrees) == 0
        before, after = read_manifest(source), read_manifest(tmp_path / name)
        assert before["sha256"] == after["sha256"]
        assert after["layout"]["padded_vocab"] == -(-133 // tensor) * tensor
        assert len(after["layout"]["stage_layers"]) == pipeline * virtual
        assert run("verify", first, tmp_path / name) == 0
    # The same layout again gives the same files, the adapters and gates among them.
    for path in sorted(first.rglob("*")):
        twin = tmp_path / "fourth" / path.relative_to(first)
        if path.suffix in (".distcp", ".safetensors"):
            assert path.read_bytes() == twin.read_bytes()
    capsys.readouterr()
    assert run("reshard", "--checkpoint", first, "--out", tmp_path / "x", "--tp", 3) == 2
    assert "--tp 3: num_attention_heads=8 does not divide" in capsys.readouterr().err
    assert run("reshard", "--checkpoint", first, "--out", tmp_path / "x", "--vpp", 2) == 2
    assert "virtual stages need --pp" in capsys.readouterr().err


def load_and_save(degrees, stages, pairs) -> None:
    """On every rank: what the converter wrote is what the ranks cut out of the model themselves; then they write it."""
    split(Degrees(*degrees))
    for base, megatron, out in pairs:
        source = HFDirectory(base)
        config = megatron_config(source.dims, None, stages, tensor=degrees[0], virtual=degrees[3])
        expected, found = build_model(config), build_model(config)
        with torch.no_grad():
            for parameter in (p for stage in found for p in stage.parameters()):
                parameter.fill_(7.0)
        load_weights(found, megatron / WEIGHTS)
        for wanted, got in zip(expected, found, strict=True):
            load_base(wanted, source)
            other = dict(got.named_parameters())
            for name, parameter in wanted.named_parameters():
                assert torch.equal(parameter, other[name]), (base, degrees, name)
        if dist.get_rank() == 0:
            (out / WEIGHTS).mkdir(parents=True)
        dist.barrier()
        save_weights(found, out / WEIGHTS)


def test_ranks_load_what_was_converted_and_what_they_save_converts_back(tmp_path):
    bases = {}
    for family, tied in ONE_EACH:
        base = tiny_hf(family, tmp_path / family, tied=tied, **SIZES)
        bases[family] = base, hashes(base)
        assert run("import", "--hf", base, "--out", tmp_path / f"{family}-1x1", *EXITS) == 0
        assert run("import", "--hf", base, "--out", tmp_path / f"{family}-4x3", "--tp", 4, "--pp", 3, *EXITS) == 0
    cases = [
        ((2, 2, 1, 1), (2, 4), "1x1"),
        ((4, 1, 1, 1), (6,), "4x3"),
        ((1, 4, 1, 1), (1, 2, 2, 1), "4x3"),
        ((2, 2, 1, 2), (1, 2, 2, 1), "4x3"),
    ]
    with Ranks(4, tmp_path / "ranks") as ranks:
        for degrees, stages, written in cases:
            made = tmp_path / "-".join(map(str, degrees))
            pairs = [(base, tmp_path / f"{family}-{written}", made / family) for family, (base, _) in bases.items()]
            ranks.call("test_convert_layouts:load_and_save", degrees=degrees, stages=stages, pairs=pairs)
            for family, (base, expected) in bases.items():
                shutil.copy(base / "config.json", made / family)
                assert run("export", "--checkpoint", made / family, "--out", made / f"{family}-hf") == 0
                assert hashes(made / f"{family}-hf") == expected
                assert run("inspect", made / family) == 0
