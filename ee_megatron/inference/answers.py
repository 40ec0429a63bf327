"""Answers as Python users want them: text, tokens, depths, log-probabilities, a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..types import Rollout

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer; T tokens, the end-of-sequence token included where the model wrote one.

    - text: without special tokens, up to the first stop string
    - prompt, sample: the prompt's number in the call, and which of its `n` answers this is
    - prompt_tokens int64 [P]; tokens int64 [T], pieces: the text of each token alone
    - depths int32 [T]: layers that ran for each token; num_layers is all of them
    - logprobs float32 [T]: natural log-probability of each token under the distribution that was sampled from
    - full_logprobs float32 [T]: the same without top_k and top_p
    - exit_logprobs float32 [T]: log-probability that the gates stop at this depth when exits are sampled; 0 where no
      gate was asked
    - finished: "stop" (end of sequence or a stop string) or "length"
    """

    text: str
    prompt: int
    sample: int
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    pieces: tuple[str, ...]
    depths: np.ndarray
    logprobs: np.ndarray
    full_logprobs: np.ndarray
    exit_logprobs: np.ndarray
    finished: str
    num_layers: int

    @property
    def mean_depth(self) -> float:
        """Share of the layers that ran, on average over the tokens."""
        return float(self.depths.mean() / self.num_layers)

    def __str__(self) -> str:
        return self.text

    @staticmethod
    def of(rollout: Rollout, pieces: Sequence[str], prompt: int, sample: int, num_layers: int) -> Answer:
        assert rollout.full_logprobs is not None
        return Answer(
            text=rollout.text,
            prompt=prompt,
            sample=sample,
            prompt_tokens=rollout.prompt_tokens,
            tokens=rollout.tokens,
            pieces=tuple(pieces),
            depths=rollout.exit_depths,
            logprobs=rollout.token_logprobs,
            full_logprobs=rollout.full_logprobs,
            exit_logprobs=rollout.exit_logprobs,
            finished="stop" if rollout.finished else "length",
            num_layers=num_layers,
        )


class Answers(list[Answer]):
    """The answers of one call, those of a prompt next to each other."""

    def to_frame(self) -> pd.DataFrame:
        """A row per token: prompt, sample, position (int), token_id (int), token (str), depth (int), logprob,
        full_logprob, exit_logprob (float)."""
        import pandas as pd

        if not self:
            raise ValueError("no answers, so no tokens to tabulate")
        per_answer = [
            pd.DataFrame(
                {
                    "prompt": answer.prompt,
                    "sample": answer.sample,
                    "position": np.arange(len(answer.tokens)),
                    "token_id": answer.tokens,
                    "token": answer.pieces,
                    "depth": answer.depths,
                    "logprob": answer.logprobs,
                    "full_logprob": answer.full_logprobs,
                    "exit_logprob": answer.exit_logprobs,
                }
            )
            for answer in self
        ]
        return pd.concat(per_answer, ignore_index=True)
