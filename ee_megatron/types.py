"""The plain records that travel between tasks, rollout pool, learner and evaluation.

They hold numpy arrays and Python scalars only, so that they cross process boundaries (Ray, broadcast, disk) unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One problem.

    `text` is what the model reads (few-shot examples included); `answer` is the reference that the task's verifier
    compares with; `group` names the underlying problem (its operands, say; several are joined by ";"), by which splits
    are separated. `prefill` is text that the answer must begin with: its tokens are given, their exits chosen
    like any other's.
    """

    id: str
    text: str
    answer: str
    task: str
    group: str = ""
    prefill: str = ""


class ExitReading(NamedTuple):
    """Scores of a generated answer at the exits its tokens reached: M exits, T tokens.

    - divergences float32 [T, M + 1]: KL(policy's readout || teacher at full depth), nats, temperature 1, at every exit
      that the token reached, taken or not, at full depth if it got there
    - hazards     float32 [T, M]: of every gate that ran

    NaN behind the token's exit and where it might not exit; hazards of a model without gates are NaN.
    """

    divergences: np.ndarray
    hazards: np.ndarray


@dataclass
class Rollout:
    """One generated answer, with everything that the learner needs to replay it.

    P = prompt length, T = number of generated tokens (the end-of-sequence token is included where one was produced).
    Entry t belongs to generated token t and to the position that *predicted* it (position P-1+t of the sequence).

    - prompt_tokens  int64 [P]
    - tokens         int64 [T]
    - exit_depths    int32 [T]; layers that changed the residual stream of the predicting position. Entry 0 is L unless
      `exits.first_token` is set: its predicting position is the prompt's last, and prompt positions never exit else.
    - token_logprobs float32 [T], natural log, under the distribution that was sampled from (temperature applied)
    - exit_logprobs  float32 [T], log q(exit); 0 for entry 0 where it can't exit
    - full_logprobs  float32 [T], as token_logprobs but before penalties, min-p, top-k and top-p
    - finished: an end-of-sequence token or a stop string ended it, not the length limit
    - weight_version: the weights that its last token was generated under
    - exits: with rl.exit_credit.divergence=all, as the pool's `read_exits`
    - weight_versions int32 [T]: those of every token; not all alike only where an answer was continued under new ones
    - drafted: how many tokens a shallow exit had proposed (exit rule `speculate`)
    """

    prompt_id: str
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    exit_depths: np.ndarray
    token_logprobs: np.ndarray
    exit_logprobs: np.ndarray
    text: str
    finished: bool
    weight_version: int
    full_logprobs: np.ndarray | None = None
    weight_versions: np.ndarray | None = None
    exits: ExitReading | None = None
    drafted: int = 0

    def __post_init__(self) -> None:
        if self.weight_versions is None:
            self.weight_versions = np.full(len(self.tokens), self.weight_version, dtype=np.int32)
        if self.full_logprobs is None:
            self.full_logprobs = self.token_logprobs

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass
class Group:
    """K rollouts of one prompt, with task rewards (float32 [K]) and whether each answer was right and well formed (bool
    [K] each)."""

    prompt: Prompt
    rollouts: list[Rollout]
    rewards: np.ndarray
    correct: np.ndarray
    well_formed: np.ndarray


@dataclass
class Trace:
    """A teacher's answer with calibration data; method.md, stage 1. P, T as in `Rollout`, M exits, k top tokens.

    - prompt_tokens int64 [P]; tokens int64 [T]
    - divergences   float32 [T, M]: KL(p_final ‖ p_readout_i) in nats at the position that predicts token t
    - topk_ids      int32 [T, k], topk_logprobs float32 [T, k]: the teacher's most probable tokens, full-depth, T = 1
    - entropy       float32 [T]: of the teacher's full-depth distribution, nats
    """

    prompt_id: str
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    divergences: np.ndarray
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray
    entropy: np.ndarray
    correct: bool
    text: str = ""
