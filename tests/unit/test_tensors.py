"""Tensors in files larger than memory: read in parts, and never more than that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ee_megatron.tensors import FileTensors, LayeredTensors, blocks_of, collect, digest, part_of


def tensors() -> dict[str, torch.Tensor]:
    shapes = {"a": (7, 5), "b": (9,), "c": (), "d": (4, 3, 2)}
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    return found | {"e.half": torch.randn(6, 4).bfloat16(), "f.double": torch.randn(3).double()}


def test_a_part_of_a_file_is_that_part_of_the_tensor(tmp_path: Path):
    held = tensors()
    save_file(held, tmp_path / "file", metadata={"format": "pt"})
    found = FileTensors(tmp_path / "file")
    assert found.keys() == held.keys() and {n: found.shape(n) for n in found} == {n: t.shape for n, t in held.items()}
    for name, tensor in held.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for where in [
        (slice(2, 6),),
        (slice(0, 7), slice(1, 4)),
        (slice(3, 4), slice(4, 5)),
        (slice(3, 3),),
        (slice(5, 99),),
    ]:
        assert torch.equal(found.part("a", *where), held["a"][where]), where
    assert torch.equal(found.part("e.half", slice(1, 6), slice(2, 4)), held["e.half"][1:6, 2:4])
    assert torch.equal(found.part("d", slice(1, 3)), held["d"][1:3])
    assert digest(found) == digest(held)
    assert "missing" not in found
    with pytest.raises(KeyError):
        found["missing"]


def test_blocks_are_all_of_every_tensor_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held = tensors()
    whole = digest(held)
    save_file(held, tmp_path / "file")
    monkeypatch.setattr("ee_megatron.tensors.BLOCK_BYTES", 50)
    for source in (held, FileTensors(tmp_path / "file")):
        blocks = list(blocks_of(source))
        assert [block.name for block in blocks] == sorted(block.name for block in blocks) and len(blocks) > len(held)
        assert all(torch.equal(tensor, held[name]) for name, tensor in collect(blocks).items())
        assert digest(source) == whole


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "no header", "gone"])
def test_a_file_that_is_not_whole_is_refused_with_one_line(tmp_path: Path, damage: str):
    file = tmp_path / "file"
    save_file(tensors(), file)
    data = file.read_bytes()
    file.write_bytes(
        {"cut": data[:-1], "longer": data + b"x", "empty": b"", "no header": data[:8] + b"?" * 400}.get(damage, b"")
    )
    if damage == "gone":
        file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(file))):
        FileTensors(file)


def test_layers_lie_over_one_another(tmp_path: Path):
    under, over = tensors(), {"b": torch.zeros(9), "new": torch.ones(2, 2)}
    save_file(under, tmp_path / "file")
    found = LayeredTensors(over, FileTensors(tmp_path / "file"))
    assert found.keys() == under.keys() | over.keys() and len(found) == len(list(found)) == 7
    assert torch.equal(found["b"], over["b"]) and torch.equal(found["a"], under["a"])
    assert torch.equal(part_of(found, "new", slice(1, 2), slice(0, 1)), torch.ones(1, 1)) and found.shape("new") == (
        2,
        2,
    )
