"""Tokenise prompts: texts, continuations, chats; padding, and common beginnings of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ...families.hf_directory import check_tokenizer
from ...tensors import to_device


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory, by its tokenizer files alone: config.json, which may name code of the
    directory's own (an early-exit export's does), is not read."""
    check_tokenizer(Path(path))
    return AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False, config=PretrainedConfig()
    )


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text; begin-of-sequence only if the tokenizer adds it."""
    ids = encode_continuation(tokenizer, text)
    if tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues a prompt: without special tokens in front. Raises ValueError for what is no
    text in Unicode: half a pair of surrogates."""
    if text != text.encode(errors="ignore").decode():
        raise ValueError(f"{ascii(text)[:80]}: half of a surrogate pair, which is no character; expected Unicode text")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Token ids of messages in the model's chat template, up to where its answer begins, or to the end of the last
    message's text with `continue_final_message`. `variables`: further ones for the template, as enable_thinking.
    Raises ValueError without a template, or if it refuses the messages."""
    if not tokenizer.chat_template:
        raise ValueError("this model has no chat template; give the prompt as text")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], chat_template=None, tokenize=False,
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
            **variables or {},
        )  # fmt: skip
    except Exception as error:
        # Templates refuse roles and orders of messages in exceptions of their own.
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    # The template writes the beginning of the sequence itself.
    return encode_continuation(tokenizer, str(text))


def piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Text of a single token; a part of a character is shown as the replacement character."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def pad(sequences: Sequence[Sequence[int] | np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> int64 [B, T] right-padded with 0, lengths int64 [B] (on the CPU)."""
    rows = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return to_device(pad_sequence(rows, batch_first=True), device), torch.tensor([len(row) for row in rows])


def common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest common beginning of several prompts, shorter than each of them; empty if they are all the same."""
    if not prompts:
        return []
    # In the order of tokens the first and the last differ where any two do.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return [] if first == last else first[: min(common, min(map(len, prompts)) - 1)]
