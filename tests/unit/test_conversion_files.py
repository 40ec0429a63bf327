"""The files that a conversion reads and writes: safetensors, torch_dist, the workspace that survives a kill."""

from __future__ import annotations

import argparse
import enum
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, load

from ee_megatron.checkpoint.megatron_read import TorchDistReader
from ee_megatron.checkpoint.megatron_settings import Inert, read_common
from ee_megatron.checkpoint.megatron_write import ChunkFile, write_metadata
from ee_megatron.checkpoint.sources import check_finite
from ee_megatron.checkpoint.store import SafetensorsWriter, aligned, write_small
from ee_megatron.checkpoint.workspace import JOURNAL, workspace
from ee_megatron.convert import _size
from tests.conversion import Harm


def test_safetensors_written_in_blocks_load_with_the_library(tmp_path: Path) -> None:
    tensors = {"half": torch.randn(7, 3).bfloat16(), "full": torch.randn(5)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    table = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", table) as writer:
        for name in aligned(table):
            for block in tensors[name].split(2) if tensors[name].dim() else [tensors[name]]:
                writer.write(block)
    read = load_file(tmp_path / "x.safetensors")
    assert sorted(read) == sorted(tensors)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with pytest.raises(ValueError, match=r"dtype torch\.int8 is not supported"):
        write_small(tmp_path / "y.safetensors", {"x": torch.zeros(2, dtype=torch.int8)})


def write_checkpoint(folder: Path, gap: bool = False) -> dict[str, torch.Tensor]:
    tensors = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(4, 6).bfloat16(), "c": torch.randn(3)}
    folder.mkdir()
    with ChunkFile(folder, "__0_0.distcp") as first:
        first.add("a.weight", (6, 4), (0, 0), tensors["a.weight"][:2])
        first.add("b.weight", (4, 6), (0, 3), tensors["b.weight"][:, 3:])
    with ChunkFile(folder, "__1_0.distcp") as second:
        second.add("a.weight", (6, 4), (2, 0), tensors["a.weight"][2:])
        second.add("b.weight", (4, 6), (0, 0), tensors["b.weight"][:, :3])
        second.add("c", (3,), (0,), tensors["c"])
    write_metadata(folder, (first.chunks + second.chunks)[gap:])
    return tensors


def test_torch_dist_written_in_chunks_loads_with_torch_and_with_the_reader(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "w")
    theirs = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(theirs, storage_reader=FileSystemReader(tmp_path / "w"), no_dist=True)
    reader = TorchDistReader(tmp_path / "w")
    assert sorted(reader.chunks) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(reader.read(name), tensor) and reader.dtype(name) == tensor.dtype
    for name, first, end in (("a.weight", 1, 4), ("a.weight", 2, 6), ("a.weight", 3, 4), ("b.weight", 1, 3)):
        assert torch.equal(reader.read(name, first, end), tensors[name][first:end])
    # What was saved is the chunk, not the storage of the tensor that it is a view of.
    assert sum(path.stat().st_size for path in (tmp_path / "w").glob("*.distcp")) < 10_000


def test_a_torch_dist_checkpoint_with_a_gap_is_never_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not make up a tensor"):
        write_checkpoint(tmp_path / "w", gap=True)
    with pytest.raises(FileNotFoundError, match=r"no metadata\.json"):
        TorchDistReader(tmp_path / "w")


class Colour(enum.Enum):
    RED = "red"


def test_common_state_is_read_without_executing_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(colour=Colour.RED, harm=Harm(), num_layers=3, dtype=torch.bfloat16)
    args.steps, args.tensor, args.names = [1, 2], torch.ones(2), {"a", "b"}
    torch.save({"args": args, "iteration": 7}, "common.pt")
    found = read_common(tmp_path)
    read = vars(found["args"])
    assert (found["iteration"], read["num_layers"], read["steps"]) == (7, 3, [1, 2])
    assert all(isinstance(read[name], Inert | type) for name in ("colour", "harm", "tensor", "dtype", "names"))
    assert not Path("harm").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_single_number_that_is_not_finite_is_found(value: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        block = torch.full((50, 30), torch.finfo(dtype).max, dtype=dtype)
        check_finite("x", block)
        block[17, 3] = float(value)
        with pytest.raises(ValueError, match="x holds"):
            check_finite("x", block)


def make(out: Path, job: str, files: list[str], resume: bool = False, fail_at: str = "") -> list[str]:
    """Files that this run had to write."""
    wrote = []
    with workspace(out, {"job": job}, resume) as space:
        for file in files:
            if file == fail_at:
                raise OSError("disk full")
            if space.finished(file) is None:
                (space.folder / file).write_text(f"{job} {file}")
                space.finish(file, {"of": job})
                wrote.append(file)
    return wrote


def test_a_workspace_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="disk full"):
        make(out, "one", ["a", "b"], fail_at="b")
    assert list(tmp_path.iterdir()) == []
    assert make(out, "one", ["a", "b"]) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "out"]
    with pytest.raises(ValueError, match=str(out)):
        make(out, "one", ["a"])


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """An output of which two files of three were finished."""
    with pytest.raises(OSError, match="disk full"):
        make(tmp_path / "out", "one", ["a", "b", "c"], resume=True, fail_at="c")
    assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
    return tmp_path / "out"


def test_resume_goes_on_with_the_same_job_only(begun: Path) -> None:
    partial = begun.parent / ".out.partial"
    with pytest.raises(ValueError, match="--resume"):
        make(begun, "two", ["a", "b", "c"], resume=True)
    # Cut off while a line was being written; a file that is shorter than noted; one that nobody noted.
    with (partial / JOURNAL).open("a") as journal:
        journal.write('{"file": "c", "si')
    (partial / "b").write_text("o")
    (partial / "c").write_text("half")
    assert make(begun, "one", ["a", "b", "c"], resume=True) == ["b", "c"]
    assert {path.name: path.read_text() for path in begun.iterdir()} == {name: f"one {name}" for name in "abc"}


def test_after_a_restart_of_the_machine_nothing_is_trusted(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = begun.parent / "boot"
    boot.write_text("another")
    monkeypatch.setattr("ee_megatron.checkpoint.workspace.BOOT_ID", boot)
    assert make(begun, "one", ["a", "b"], resume=True) == ["a", "b"]


def test_without_resume_a_leftover_is_cleared_away(begun: Path) -> None:
    assert make(begun, "two", ["b"]) == ["b"]
    assert [path.name for path in begun.iterdir()] == ["b"]


def test_two_processes_cannot_make_the_same_output(tmp_path: Path) -> None:
    with workspace(tmp_path / "out", {}) as space:
        with pytest.raises(ValueError, match="is being made by another process"), workspace(tmp_path / "out", {}):
            pass
        assert (space.folder / JOURNAL).is_file()
        assert json.loads((space.folder / JOURNAL).read_text())["job"] == {}


def test_sizes() -> None:
    assert [_size(text) for text in ("5GB", "1.5 GiB", "500mb", "1000")] == [5 * 10**9, 3 << 29, 5 * 10**8, 1000]
    for text in ("large", f"{'9' * 400}GB"):
        with pytest.raises(Exception, match="expected a size"):
            _size(text)
