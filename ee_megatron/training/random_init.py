"""A model of a given shape with random weights, and a tokenizer that fits the task's text."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ..config.derive import model_dir, read_dims, shape_config
from ..config.schema import RunConfig
from ..families import ModelDims
from ..families.hf_directory import HFDirectory
from ..observe.rundir import atomic_directory
from ..tasks import task_of

END = "<|end|>"
OUTWARD = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Weights that write into the residual stream."""


def draw_model(cfg: RunConfig, path: Path) -> Path:
    """Make `path`, if it is not there, from model.path/config.json: weights by pretrain.seed and, unless model.path has
    one, a tokenizer trained on the training problems. Returns `path`.

    Raises FileNotFoundError or ValueError: a shape that is not supported, a vocabulary too small for all bytes.
    """
    if path.is_dir():
        return path
    shape, dims = model_dir(cfg), read_dims(cfg)
    assert cfg.pretrain is not None
    with atomic_directory(path) as folder:
        (folder / "config.json").write_text(json.dumps(shape_config(cfg), indent=2) + "\n", encoding="utf-8")
        save_file(draw_weights(dims, cfg.pretrain.seed), folder / "model.safetensors", metadata={"format": "pt"})
        if (shape / "tokenizer.json").is_file():
            for file in shape.glob("*token*.json"):
                shutil.copyfile(file, folder / file.name)
        else:
            write_tokenizer(worked_texts(cfg), dims.vocab, folder)
        HFDirectory(folder)
    return path


def draw_weights(dims: ModelDims, seed: int) -> dict[str, Tensor]:
    """Float32 tensors by their Hugging Face names: normal, deviation sqrt(2 / (5 D)) (Nguyen and Salazar 2019, arXiv
    1910.05895), over sqrt(2 L) where they write into the residual stream (Radford et al. 2019); norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    deviation = math.sqrt(2 / (5 * dims.hidden))
    tensors: dict[str, Tensor] = {}
    for name, dimensions in dims.tensor_shapes().items():
        if len(dimensions) == 1:
            tensors[name] = torch.zeros(dimensions) if name.endswith("bias") else torch.ones(dimensions)
            continue
        scale = deviation / math.sqrt(2 * dims.num_layers) if name.endswith(OUTWARD) else deviation
        tensors[name] = torch.randn(dimensions, generator=generator) * scale
    return tensors


def worked_texts(cfg: RunConfig) -> list[str]:
    """Question and worked answer of every training problem, a line's end behind it: what rollouts stop at."""
    task = task_of(cfg, model_dir(cfg))
    return [f"{prompt.text}{answer}\n" for prompt, answer in task.worked("train")]


def write_tokenizer(texts: Iterable[str], vocab: int, folder: Path) -> None:
    """Byte-level BPE, digits one by one, of at most `vocab` tokens: all bytes, so that it can write anything, merges by
    frequency (Sennrich et al. 2016), an end of text. Raises ValueError below 257 tokens."""
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab <= len(alphabet):
        raise ValueError(f"vocab_size={vocab} in config.json: a byte-level tokenizer needs {len(alphabet) + 1} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(alphabet), special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
