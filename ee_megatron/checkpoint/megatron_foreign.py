"""Checkpoints that Megatron-LM and Megatron-Bridge saved (torch_dist), as a source of tensors.

    <directory>/latest_checkpointed_iteration.txt   which of them counts: a number, or "release"
    <directory>/iter_0000010/, <directory>/release/ the checkpoint; it may be named itself

Layers are stored one by one or stacked, [L, ...]; gate and up as one parameter or as two. The optimizer is left alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from ..families import ModelDims, dims_from_config
from ..families.hf_directory import read_json
from .manifest import MANIFEST
from .megatron_directory import MegatronTensors
from .megatron_io import WEIGHTS
from .megatron_settings import compare_settings, config_of, read_settings, refuse_settings
from .torch_dist import FORMAT, StoredChunk, TorchDistReader

TRACKER = "latest_checkpointed_iteration.txt"
_LAYER = re.compile(r"decoder\.layers\.(?:\d+\.)?")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine|dataloader")
# What the models of all families consist of, by the part of the name behind the layer.
_PARTS = {
    *("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"),
    *("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    *(f"self_attention.{part}_layernorm.weight" for part in "qk"),
    *(f"self_attention.linear_{part}.{kind}" for part in ("qkv", "proj") for kind in ("weight", "bias")),
    *(f"mlp.linear_fc{part}.{kind}" for part in (1, 2) for kind in ("weight", "bias")),
}


class ForeignMegatron(MegatronTensors):
    """A checkpoint of Megatron-LM or Megatron-Bridge.

    config: a Hugging Face directory with config.json and tokenizer, or None: dimensions as the checkpoint records them,
    or from a config.json beside it. Raises FileNotFoundError or ValueError, one line: no such checkpoint, another
    format, dimensions that are missing or contradict each other, a parameter that no supported family has.
    """

    def __init__(self, path: str | Path, config: str | Path | None = None):
        top = Path(path)
        weights = find_weights(top)
        if (weights.parent / MANIFEST).is_file() and weights.resolve().name == WEIGHTS:
            raise ValueError(f"{top} was made by `convert import`; give it to export or reshard as it is")
        reader = TorchDistReader(weights, _known_as, "save it again")
        _refuse_strangers(reader, weights)
        settings = read_settings(weights)
        refuse_settings(settings, weights)
        given = Path(config) if config else top
        if config or (top / "config.json").is_file():
            fields = _read_config(given)
            dims = dims_from_config(fields)
            compare_settings(settings, dims, weights, given / "config.json")
        else:
            fields = config_of(settings, {name: reader.shape(name) for name in reader.chunks}, weights)
            dims = dims_from_config(fields)
        _check_tied(dims, reader, given)
        super().__init__(top, fields, dims, reader, {"tensors": {}})
        self.tokenizer = given

    def fingerprint(self) -> list[list]:
        folder = self.reader.folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return [*found, [json.dumps(self.config), 0, 0]]


def find_weights(top: Path) -> Path:
    """The directory with metadata.json that a directory leads to. Raises FileNotFoundError or ValueError."""
    if not top.is_dir():
        raise FileNotFoundError(f"{top}: no such directory")
    if (top / FORMAT).is_file():
        return top
    tracker = top / TRACKER
    saved = sorted(path for path in top.glob("iter_*") if path.is_dir())
    if tracker.is_file():
        text = tracker.read_text().strip()
        if text != "release" and not text.isdecimal():
            raise ValueError(f"{tracker}: holds {text[:20]!r}, expected the number of an iteration, or release")
        found = top / ("release" if text == "release" else f"iter_{int(text):07d}")
    elif len(saved) == 1:
        found = saved[0]
    else:
        reason = f"{len(saved)} iter_* directories, name one of them" if saved else "what was saved is not there"
        raise FileNotFoundError(
            f"{top}: no {FORMAT} and no {TRACKER} there ({reason}); expected what Megatron-LM or Megatron-Bridge saved"
        )
    if not (found / FORMAT).is_file():
        other = "a checkpoint of another format" if list(found.glob("mp_rank_*")) else "no checkpoint"
        raise ValueError(f"{found}: {other} there; expected torch_dist, save it with --ckpt-format torch_dist")
    return found


def refuse_foreign(folder: Path) -> None:
    """Raises ValueError if a directory, not one of ours, is a checkpoint of Megatron-LM or Megatron-Bridge."""
    tracked = (folder / TRACKER).is_file() or any(folder.glob("iter_*/"))
    if not (folder / WEIGHTS).is_dir() and (tracked or (folder / FORMAT).is_file()):
        raise ValueError(
            f"{folder} was saved by Megatron-LM or Megatron-Bridge; convert import --megatron {folder} first, "
            "and go on from its output"
        )


def _known_as(chunk: StoredChunk) -> StoredChunk | None:
    if _OPTIMIZER.match(chunk.parameter):
        return None
    return _unstacked(_joined(chunk))


def _joined(chunk: StoredChunk) -> StoredChunk:
    """Gate and up, stored as two parameters, as halves of one: under the rows that they have in it."""
    name, _, half = chunk.parameter.rpartition("_")
    if ".mlp.linear_fc1." not in chunk.parameter or half not in ("w", "v"):
        return chunk
    # Behind the layer, where layers are stacked.
    dim = int(_stacked(chunk))
    shape, offsets = list(chunk.shape), list(chunk.offsets)
    offsets[dim] += shape[dim] * (half == "v")
    shape[dim] *= 2
    return replace(chunk, parameter=name, shape=tuple(shape), offsets=tuple(offsets))


def _unstacked(chunk: StoredChunk) -> StoredChunk:
    """A layer's part of a stack of layers as a parameter of that layer."""
    if not _stacked(chunk):
        return chunk
    if chunk.sizes[0] != 1:
        raise ValueError(f"{chunk.parameter}: {chunk.sizes[0]} layers in one chunk, expected one; save it again")
    name = chunk.parameter.replace("decoder.layers.", f"decoder.layers.{chunk.offsets[0]}.", 1)
    return replace(chunk, parameter=name, shape=chunk.shape[1:], offsets=chunk.offsets[1:], sizes=chunk.sizes[1:])


def _stacked(chunk: StoredChunk) -> bool:
    match = _LAYER.match(chunk.parameter)
    return match is not None and match.group() == "decoder.layers."


def _refuse_strangers(reader: TorchDistReader, where: Path) -> None:
    strangers = [name for name in reader.chunks if _LAYER.sub("", name, count=1) not in _PARTS]
    if strangers:
        kinds = {"experts": "mixture of experts", "router": "mixture of experts", "_down_proj": "latent attention"}
        kind = next((f" ({kind})" for mark, kind in kinds.items() if any(mark in name for name in strangers)), "")
        raise ValueError(
            f"{where}: unexpected {sorted(strangers)[0]}{kind}, {len(strangers)} such parameters; supported are the "
            "dense models of llama, qwen2 and qwen3"
        )
    if not reader.chunks:
        raise ValueError(f"{where}: no parameters there; expected those of a GPT model of megatron-core")


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json there; expected the model's Hugging Face directory")
    return read_json(path)


def _check_tied(dims: ModelDims, reader: TorchDistReader, given: Path) -> None:
    stored = "output_layer.weight" not in reader.chunks
    if stored != dims.tied:
        has = "no" if stored else "a"
        raise ValueError(
            f"{reader.folder}: has {has} output_layer.weight, but {given / 'config.json'} says tie_word_embeddings "
            f"{str(dims.tied).lower()}; give its own --config"
        )
