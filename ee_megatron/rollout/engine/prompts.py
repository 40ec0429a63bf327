"""From texts to token tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it stands; begin-of-sequence only where the tokenizer asks for it."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on from a prompt: nothing special is put in front of it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pad(sequences: Sequence[Sequence[int] | np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> int64 [B, T] right-padded with 0, lengths int64 [B] (on the CPU)."""
    rows = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return pad_sequence(rows, batch_first=True).to(device), torch.tensor([len(row) for row in rows])


def common_beginning(prompts: Sequence[list[int]]) -> list[int]:
    """What all prompts begin with, short of the whole of any; empty for a single prompt."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(common, min(map(len, prompts)) - 1)]
