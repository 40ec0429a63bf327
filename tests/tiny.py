"""Tiny random models with a real tokenizer, written to disk as Hugging Face directories. No network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from ee_megatron.exit_rules import (
    Confidence,
    Entropy,
    ExitRule,
    Fixed,
    Off,
    Patience,
    Prescribed,
    Random,
    Sample,
    Speculate,
    Threshold,
)
from ee_megatron.families import FAMILIES
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy

# What parity tests run for: a family that is registered is among them.
MODELS = [(family, tied) for family in FAMILIES for tied in (True, False)]
"""(family, whether embedding and head are one tensor)."""
ONE_EACH = [(family, number % 2 == 0) for number, family in enumerate(FAMILIES)]
"""As MODELS, each family once."""
# Families whose layers a Megatron checkpoint's arguments can't describe: conversion refuses them.
NOT_IN_MEGATRON = {"olmo2"}
MEGATRON_MODELS, MEGATRON_ONE_EACH = (
    [model for model in models_ if model[0] not in NOT_IN_MEGATRON] for models_ in (MODELS, ONE_EACH)
)
EOS, PAD = "<|end|>", "<|pad|>"


def exit_rules(replayed: Mapping[tuple[str, int], Sequence[int]]) -> dict[str, ExitRule]:
    """Every rule of the registry by name, for exits after 1, 3 and 4 of 6 layers, with bounds that some tokens pass."""
    return {
        "off": Off(),
        "sample": Sample(),
        "threshold": Threshold(0.5),
        "threshold_mixed": Threshold(0.5, other=0.9, mix=0.5),
        "fixed": Fixed(3),
        "random": Random((0.2, 0.2, 0.2, 0.4)),
        "confidence": Confidence(0.04),
        "entropy": Entropy(4.4, other=4.0, mix=0.5),
        "patience": Patience(2),
        "speculate": Speculate(3),
        "prescribed": Prescribed(replayed),
    }


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII byte (0..127), then end-of-sequence (128) and padding (129): 130 tokens."""
    visible = range(ord("!"), ord("~") + 1)
    hidden = [byte for byte in range(128) if byte not in visible]
    # Byte-level BPE writes the bytes that have no visible form as chr(256 + n), n counting those bytes upwards.
    symbol = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    vocab = {symbol[byte]: byte for byte in range(128)}
    vocab.update({EOS: 128, PAD: 129})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def tiny_hf(
    family: str,
    path: Path,
    tied: bool = True,
    layers: int = 6,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 96,
    vocab: int = 130,
    seed: int = 0,
    scale: float = 0.08,
    **overrides,
) -> Path:
    """Write a random float32 model of a family of FAMILIES with its tokenizer into `path`; return `path`.

    Norm gains and biases are perturbed: their initial ones and zeros would hide mistakes. `scale` is the standard
    deviation of the weights; `overrides` go into the config (rope_parameters, head_dim, attention_bias, ...).
    """
    torch.manual_seed(seed)
    if family == "qwen3":
        overrides.setdefault("head_dim", hidden // heads)
    if family == "smollm3":
        # Layers with and without RoPE on both sides of the exits, in models of two layers, too.
        overrides.setdefault("no_rope_layer_interval", 2)
    overrides.setdefault("max_position_embeddings", 512)
    config = CONFIG_MAPPING[family](
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=128,
        pad_token_id=129,
        **overrides,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def firing_policy(path: Path, spec: PolicySpec, seed: int = 1) -> WeightSet:
    """Adapters that change the model in `path`, and gates that fire on some positions."""
    generator = torch.Generator().manual_seed(seed)
    tensors = initial_policy(HFDirectory(path).dims, spec, seed=seed)
    tensors = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    return WeightSet(seed, {name: t + 3.5 if name.endswith("fc2.bias") else t for name, t in tensors.items()})
