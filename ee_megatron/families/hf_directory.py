"""Read a Hugging Face model directory: config, tensor index, tensors one at a time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import safe_open

from . import ModelDims, dims_from_config

if TYPE_CHECKING:
    import torch


class HFDirectory:
    """A directory with config.json and safetensors, checked when it is opened, read lazily.

    Raises FileNotFoundError or ValueError with one line that names the file: nothing there, an unsupported
    architecture, a shard that is missing or truncated, a tensor that is missing, unexpected or of another shape.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        config = self.path / "config.json"
        if not config.is_file():
            raise FileNotFoundError(
                f"{self.path}: no config.json there; expected a Hugging Face model directory "
                "(config.json + *.safetensors)"
            )
        self.config = read_json(config)
        try:
            self.dims: ModelDims = dims_from_config(self.config)
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from None
        self.files: dict[str, Path] = self._index()
        self._open: dict[Path, object] = {}
        self._check()

    def names(self) -> list[str]:
        return list(self.files)

    def size(self) -> int:
        """Bytes of the files that hold the weights."""
        return sum(shard.stat().st_size for shard in set(self.files.values()))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, on the CPU."""
        return self._handle(self.files[name]).get_tensor(name)

    def close(self) -> None:
        """Close the mapped files; the next read maps them again."""
        self._open.clear()

    def _handle(self, shard: Path):
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        return self._open[shard]

    def _index(self) -> dict[str, Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
                raise ValueError(f"{index}: no weight_map of tensor names and files in it; copy the model again")
            files = {name: self.path / file for name, file in table.items()}
            for shard in sorted(set(files.values())):
                listed = {name for name, file in files.items() if file == shard}
                present = set(read_header(shard))
                if listed - present:
                    raise ValueError(f"{shard}: lacks {sorted(listed - present)[0]}, which the index lists there")
        else:
            shard = self.path / "model.safetensors"
            if not shard.is_file() and (other := _other_weights(self.path)):
                raise FileNotFoundError(f"{self.path}: no model.safetensors there, {other}")
            files = dict.fromkeys(read_header(shard), shard)
        # A tied head may be stored all the same, and an early-exit export carries its gates beside the base.
        skip = ("rotary_emb.inv_freq",)
        return {
            n: f
            for n, f in files.items()
            if not n.endswith(skip) and not n.startswith("gates.") and not (self.dims.tied and n == "lm_head.weight")
        }

    def _check(self) -> None:
        expected = self.dims.tensor_shapes()
        missing, extra = sorted(expected.keys() - self.files), sorted(self.files.keys() - expected)
        if missing or extra:
            difference = f"missing {missing[:3]}" if missing else f"unexpected {extra[:3]}"
            count = len(missing) or len(extra)
            raise ValueError(
                f"{self.path}: {difference} ({count} in all) for model_type {self.dims.family!r}; "
                "config.json and weights disagree"
            )
        for shard in sorted(set(self.files.values())):
            for name, entry in read_header(shard).items():
                if name in expected and entry.shape != expected[name]:
                    raise ValueError(
                        f"{shard}: {name} has shape {list(entry.shape)}, config.json implies {list(expected[name])}"
                    )


def read_json(path: Path) -> dict:
    """Read a file with a JSON object. Raises ValueError, naming the file, for anything else."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged, copy it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); copy it again") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: holds a JSON {type(contents).__name__}, expected an object of names and values")
    return contents


def _other_weights(folder: Path) -> str:
    """Advice if there are other files than the requested one; "" if there are none."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return (
            f"only {pickles[0]} and the like; save it as safetensors: model.save_pretrained(DIR) of transformers does"
        )
    shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
    return f"and {shards[0]} without model.safetensors.index.json; copy the index too" if shards else ""


class HeaderLine(NamedTuple):
    """Header entry of a tensor in a safetensors file: its dtype code, shape, and the file's byte at which it begins."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(shard: Path) -> dict[str, HeaderLine]:
    """Read the tensor table of a safetensors file. Raises FileNotFoundError, or ValueError for another format or a
    length that contradicts the table."""
    if not shard.is_file():
        raise FileNotFoundError(f"{shard}: no such file; what it belongs to is incomplete, copy it again")
    size = shard.stat().st_size
    with shard.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError(f"{shard}: not a safetensors file or truncated ({size} bytes); copy it again")
        try:
            table = json.loads(file.read(length))
            table.pop("__metadata__", None)
            lines = {
                name: HeaderLine(line["dtype"], tuple(line["shape"]), 8 + length + line["data_offsets"][0])
                for name, line in table.items()
            }
            end = 8 + length + max((line["data_offsets"][1] for line in table.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{shard}: not a safetensors file; expected safetensors, not a pickle") from None
    if end != size:
        raise ValueError(f"{shard}: truncated or damaged: {size} bytes, its header promises {end}; copy it again")
    return lines
