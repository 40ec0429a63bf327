"""Read a Hugging Face model directory: config, tensor index, tensors one at a time."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open
from tokenizers import Tokenizer

from . import ModelDims, dims_from_config
from .base import eos_ids

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
            if not isinstance(table, dict) or not all(_is_name(file) for file in table.values()):
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
        read_eos_ids(self)
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
                if name in expected and entry.dtype not in FLOATS:
                    raise ValueError(f"{shard}: {name} is stored as {entry.dtype}; supported: {', '.join(FLOATS)}")


def read_eos_ids(source: Any) -> frozenset[int]:
    """End-of-sequence ids of a model (its path, config and dims), from generation_config.json, else from config.json;
    empty if neither names one. Raises ValueError."""
    generation = source.path / "generation_config.json"
    stated = read_json(generation) if generation.is_file() else {}
    try:
        return frozenset(eos_ids(stated, source.dims.vocab) or eos_ids(source.config, source.dims.vocab))
    except ValueError as error:
        raise ValueError(f"{generation}: {error}") from None


def check_tokenizer(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError unless the directory has a tokenizer that can be read. No transformers."""
    whole, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not whole.is_file() and not any(folder.glob("*.model")) and not any(folder.glob("vocab.*")):
        raise FileNotFoundError(f"{folder}: no tokenizer.json there; copy the tokenizer's files to the model's")
    kind = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    if not isinstance(kind, str | None):
        raise ValueError(f"{settings}: tokenizer_class={kind!r}, expected the name of a class; copy it again")
    if whole.is_file():
        try:
            Tokenizer.from_file(str(whole))
        except Exception as error:  # Of Rust.
            raise ValueError(f"{whole}: no tokenizer ({error}); the file is damaged, copy it again") from None


def _is_name(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file and len(file) < 256


def read_json(path: Path) -> dict:
    """Read a file with a JSON object. Raises ValueError, naming the file, for anything else."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); copy it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged, copy it again") from None
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


# Bytes of a number in safetensors files.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BYTES = FLOATS | {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {"C64": 8, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1}


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
            _ = {**table.pop("__metadata__", {})}
            places = sorted((*line["data_offsets"], name) for name, line in table.items())
            lines = {name: HeaderLine(line["dtype"], tuple(line["shape"]), 0) for name, line in table.items()}
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{shard}: not a safetensors file; expected safetensors, not a pickle") from None
    end = 0
    for place in places:
        name, line = place[-1], lines[place[-1]]
        # Numbers of a tensor follow on those of the one before.
        numbers = [*line.shape, *place[:-1]]
        good = isinstance(line.dtype, str) and line.dtype in _BYTES and all(type(n) is int and n >= 0 for n in numbers)
        if not good or place[:-1] != (end, end + math.prod(line.shape) * _BYTES[line.dtype]):
            raise ValueError(
                f"{shard}: {name!r} is {line.dtype!r} of shape {list(line.shape)} at bytes {list(place[:-1])}, "
                f"expected as many as its numbers take, from byte {end} on; the file is damaged, copy it again"
            )
        lines[name], end = line._replace(offset=8 + length + end), place[1]
    end += 8 + length
    if end != size:
        raise ValueError(f"{shard}: truncated or damaged: {size} bytes, its header promises {end}; copy it again")
    return lines
