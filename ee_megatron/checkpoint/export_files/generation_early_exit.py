"""What a running `generate` call knows about exits: the policy, where the prompt ends, how deep every position went.

Needs torch only.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# Decoding that was never held against the definition of an exit: the argument of `generate` that asks for it.
REFUSED = {
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa decoding",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "custom_generate": "a decoding loop of your own",
    "assistant_early_exit": "transformers' own early exit",
    "token_healing": "token healing",
}


def check_mode(asked: dict[str, Any]) -> None:
    """Raise ValueError, one line, for arguments of `generate` that exits can't be combined with."""
    words = [f"{name} ({words})" for name, words in REFUSED.items() if asked.get(name)]
    if asked.get("guidance_scale") not in (None, 1):
        words.append("guidance_scale (classifier-free guidance)")
    if (asked.get("num_beam_groups") or 1) > 1:
        words.append("num_beam_groups (group beam search)")
    if asked.get("cache_implementation") == "paged":
        words.append("cache_implementation='paged' (continuous batching)")
    if (asked.get("num_beams") or 1) > 1 and asked.get("use_cache") is False:
        words.append("num_beams with use_cache=False (beams change places, and their exits are not remembered)")
    if words:
        raise ValueError(f'{"; ".join(words)}: not supported with early exits; leave it out or pass exit_policy="off"')


class Generation:
    """One running `generate` call.

    policy: what exits follow. prompt: positions of the prompt, padding included; None until the first forward pass has
    read it, where that pass reads the prompt and nothing else. With `first_token` the prompt's last position may exit.
    aligned: whether rows keep their places, so that depths can be told.
    """

    def __init__(self, policy: dict, prompt: int | None, first_token: bool, aligned: bool):
        self.policy, self.prompt, self.first_token, self.aligned = policy, prompt, first_token, aligned
        # int64 [B, positions that were read]: layers that each ran.
        self.depths_BT: Tensor | None = None

    def begin(self, past: int, new: int, cached: bool) -> tuple[Tensor | None, int]:
        """Before positions past .. past + new - 1 are read: the depths that are known already, int64 [B, t], and the
        first of the new positions that may exit.

        Without a cache all positions are read again at every step, each as deep as it went when its token was made.
        """
        if self.prompt is None:
            self.prompt = past + new
        known = None if cached else self.depths_BT
        free = max(self.prompt - int(self.first_token) - past, 0, 0 if known is None else known.shape[1])
        return known, free

    def note(self, past: int, depths_BT: Tensor) -> None:
        """Positions past, past + 1, ... ran so deep. A draft that was thrown away is written over."""
        if not self.aligned:
            return
        if self.depths_BT is None:
            before = depths_BT.new_full((depths_BT.shape[0], past), -1)
        else:
            before = self.depths_BT[:, :past]
        self.depths_BT = torch.cat([before, depths_BT], dim=1)

    def of_tokens(self, tokens_BT: Tensor, ends: int | list[int] | None) -> Tensor | None:
        """Depths of the generated tokens, int64 [B, T], -1 after a row's end; None where rows changed places."""
        if not self.aligned or self.depths_BT is None or self.prompt is None:
            return None
        first = self.prompt - 1
        depths_BT = self.depths_BT[:, first : first + tokens_BT.shape[1]]
        if ends is None:
            return depths_BT
        end = torch.isin(tokens_BT, torch.as_tensor(ends, device=tokens_BT.device).reshape(-1))
        after = (end.int().cumsum(dim=1) - end.int()) > 0
        return depths_BT.masked_fill(after.to(depths_BT.device), -1)


# The `generate` calls under way in this thread, each with its model, the innermost last: drafts are made within one.
RUNNING: ContextVar[tuple[tuple[Any, Generation], ...]] = ContextVar("RUNNING", default=())


def running_call(model: Any) -> Generation | None:
    """The innermost `generate` call of `model` that is under way in this thread."""
    return next((call for owner, call in reversed(RUNNING.get()) if owner is model), None)


__all__ = ["RUNNING", "Generation", "check_mode", "running_call"]
