"""Full depth's tokens, sooner: shallow exits draft, the layers behind them check the drafts together (LayerSkip,
Elhoushi et al. 2024, arXiv 2404.16710). Needs torch and transformers.

A draft leaves at the first exit whose gate would let it, but nothing of it is frozen: when a later position goes
deeper, those before it go along. So no layer is computed twice. A token is drawn as without drafts, from full depth's
distribution and in the same order, and a draft stands where it is that token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .layers_early_exit import Pass, WideLinear, attention_mask_4d

# Hazard above which a draft leaves; tokens drafted at first, and at most.
CERTAIN, FIRST, FURTHEST = 0.5, 4, 16


def can_speculate(ids: Tensor, generation_config: Any, synced_gpus: bool, given: dict[str, Any]) -> bool:
    """Whether drafts can be made for this call of `generate`: one row of tokens without padding, whose cache can be
    cut, and nothing to return beside tokens."""
    mask, cache = given.get("attention_mask"), given.get("past_key_values", given.get("cache"))
    return (
        ids.shape[0] == 1
        and type(cache) is DynamicCache
        and given.get("inputs_embeds") is None
        and (mask is None or (mask.dim() == 2 and bool(mask.all())))
        and not (synced_gpus or generation_config.return_dict_in_generate)
    )


class Drafting:
    """A row's positions whose tokens may still be thrown away: their streams [1, 1, D], oldest first, and how many of
    the segments between exits each has run, which never increases from one to the next."""

    def __init__(self, model: Any, cache: DynamicCache, deepest: int):
        self.model, self.cache = model, cache
        depths = [*model.config.exit_depths, model.config.num_hidden_layers]
        self.segments = list(zip([0, *depths], depths))  # noqa: B905
        self.drafting = 1 + depths.index(deepest)
        self.start, self.streams, self.ran = 0, list[Tensor](), list[int]()

    def begin(self, tokens: Tensor, start: int) -> None:
        """Forget what was, and go on with these tokens [1, T], the first of them at position `start`."""
        self.start, self.streams, self.ran = start, [], []
        for stream in self.model.model.embed_tokens(tokens).split(1, dim=1):
            self.add(stream)

    def add(self, stream: Tensor) -> None:
        self.streams.append(stream)
        self.ran.append(0)

    def climb(self, segment: int) -> None:
        """Run a segment for the positions that come to it next."""
        here = [i for i, ran in enumerate(self.ran) if ran == segment]
        if not here:
            return
        x, past = torch.cat([self.streams[i] for i in here], dim=1), self.start + here[0]
        at = torch.arange(past, past + len(here), device=x.device)[None]
        cos, sin = (part.unsqueeze(1) for part in self.model.model.rotary_emb(x, at))
        mask = attention_mask_4d(None, None, 1, len(here), past, x.device)
        eager = self.model.config._attn_implementation == "eager"
        shared, active = Pass(mask, (cos, sin), self.cache, past, eager), torch.ones_like(at, dtype=torch.bool)
        begin, end = self.segments[segment]
        for layer in self.model.model.layers[begin:end]:
            x = layer(x, active, shared)
        for i, stream in zip(here, x.split(1, dim=1)):  # noqa: B905
            self.streams[i], self.ran[i] = stream, segment + 1

    def draft(self, seen: Tensor) -> int | None:
        """The token, among `seen` [n] int64, that would follow the newest position if it left; None if no gate lets
        it."""
        for segment in range(self.drafting):
            self.climb(segment)
            gate = str(self.segments[segment][1])
            if bool(torch.sigmoid(self.model.gates[gate](self.streams[-1])) > CERTAIN):
                break
        else:
            return None
        x, head = self.model.model.norm(self.streams[-1]), self.model.lm_head
        if type(head) is not WideLinear:
            return int(head(x).argmax())
        return int(seen[F.linear(x, head.weight[seen].to(x.dtype)).argmax()])

    def check(self, last: int) -> Tensor:
        """Run all that is left; logits float32 [1, last, V] of the newest positions."""
        for segment in range(len(self.segments)):
            self.climb(segment)
        return self.model.lm_head(self.model.model.norm(torch.cat(self.streams[-last:], dim=1)))


def speculate(
    model: Any, ids: Tensor, deepest: int, logits_processor: Any, stopping_criteria: Any, config: Any, streamer: Any,
    cache: DynamicCache,
) -> Tensor:  # fmt: skip
    """Tokens [1, T] -> with the answer, as transformers' `_sample` makes it; drafts leave at the exit `deepest` at the
    latest."""
    drafting, ahead, going = Drafting(model, cache, deepest), FIRST, True
    ends = getattr(config, "eos_token_id", None)
    ends = set(torch.as_tensor([] if ends is None else ends).reshape(-1).tolist())
    begins = int(cache.get_seq_length())
    drafts: list[int] = []
    while going:
        drafting.begin(ids[:, begins:], begins)
        # The prompt is read by all layers together.
        room = 0 if ids.shape[1] - begins > 1 else min(ahead, config.max_length - ids.shape[1] - 1)
        seen, drafts = ids.unique(), []
        while len(drafts) < room and (token := drafting.draft(seen)) is not None:
            drafts.append(token)
            if token in ends:
                break
            drafting.add(model.model.embed_tokens(ids.new_tensor([[token]])))
        logits = drafting.check(1 + len(drafts) - (bool(drafts) and drafts[-1] in ends))
        stood = 0
        for row in logits[0]:
            scores = logits_processor(ids, row[None].float())
            drawn = torch.multinomial(F.softmax(scores, dim=-1), 1) if config.do_sample else scores.argmax(-1, True)
            ids = torch.cat([ids, drawn], dim=1)
            if streamer is not None:
                streamer.put(drawn[0].cpu())
            going = not bool(stopping_criteria(ids, None).all())
            right = stood < len(drafts) and drafts[stood] == int(drawn)
            stood += right
            if not (going and right):
                break
        if room:
            ahead = min(ahead + 2, FURTHEST) if stood == len(drafts) else max(1, ahead - 1)
        begins = ids.shape[1] - 1
        if thrown := int(cache.get_seq_length()) - begins:
            cache.crop(-thrown)
    if streamer is not None:
        streamer.end()
    return ids


__all__ = ["can_speculate", "speculate"]
