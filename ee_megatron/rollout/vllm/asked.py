"""What a request says of its exits and of its tokens: plain values, which vLLM carries from process to process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ...exit_rules import RULES, ExitRule, Off, Prescribed, known
from ..engine.request import Row
from ..engine.sampling import SamplingParams, uniforms

# The key in vLLM's `SamplingParams.extra_args`.
EXTRA = "early_exit"


@dataclass
class Asked:
    """One request as the model runner knows it.

    - name: comes back with every token
    - prompt: length of the prompt, without what was answered before
    - key: of the answer's random stream
    - rule: decides about exits of tokens of which `prescribed` says nothing
    - prescribed: depth of every token, entry 0 is L; of Prescribed and of answers that go on
    - sampling: temperature, top_k and top_p
    - given: the tokens that the answer is made to begin with
    - depths: of the tokens made so far; read again after a preemption
    """

    name: int
    prompt: int
    key: int
    rule: ExitRule
    prescribed: Sequence[int]
    sampling: SamplingParams
    given: Sequence[int]
    depths: list[int] = field(default_factory=list)

    @staticmethod
    def extra(row: Row) -> dict[str, Any]:
        """What `of` makes the request of."""
        request, rule = row.request, row.request.exits
        prescribed: Sequence[int] = ()
        if isinstance(rule, Prescribed):
            prescribed, rule = rule.depths.get((request.prompt_id, request.sample), ()), Off()
        sampling = request.sampling.distribution
        return {
            "name": row.id,
            "prompt": len(row.prompt_tokens),
            "key": row.key,
            "rule": {"kind": rule.kind, **asdict(rule)},  # type: ignore[call-overload]
            "prescribed": [int(depth) for depth in prescribed],
            "sampling": {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p},
            "given": [int(token) for token in request.prefill],
            "depths": list(row.exit_depths),
        }

    @staticmethod
    def of(extra: dict[str, Any]) -> Asked:
        rule = dict(extra["rule"])
        kind = rule.pop("kind")
        return Asked(**{**extra, "rule": RULES[kind](**rule), "sampling": SamplingParams(**extra["sampling"])})

    def bounds(self, first: int, stop: int, depths: Sequence[int]) -> np.ndarray | None:
        """For tokens `first` <= t < `stop` (of which none is 0): the hazards above which their positions leave, float64
        [stop - first, M]; None where the rule has to see readouts and it is not known what it said."""
        bounds = np.empty((stop - first, len(depths)))
        if not depths:
            return bounds
        drawn = self.uniform(first, stop, len(depths))
        for at, token in enumerate(range(first, stop)):
            said = self.depths if token < len(self.depths) else self.prescribed
            if token < len(said):
                bounds[at] = known([[said[token] == depth for depth in depths]], depths)
                continue
            if self.prescribed:
                raise ValueError(
                    f"prescribed exits of request {self.name}: {len(self.prescribed)} given, token {token} needs one; "
                    "give more"
                )
            ahead = self.rule.ahead(drawn[at : at + 1], depths, [("", 0, token)])
            if ahead is None:
                return None
            bounds[at] = ahead
        return bounds

    def uniform(self, first: int, stop: int, exits: int) -> np.ndarray:
        """float64 [stop - first, M + 1]: the numbers of these tokens, one per exit and one for the token itself."""
        keys = np.full(stop - first, self.key, dtype=np.uint64)
        return uniforms(keys, np.arange(first, stop), exits + 1)
